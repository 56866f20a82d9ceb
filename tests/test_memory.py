"""Memory that processes share: nothing but this user's own file, and as much as there is."""

import os
from pathlib import Path

import pytest

from clt.errors import UserError
from clt.memory import allocate, open_own


@pytest.mark.parametrize("kind", ["directory", "link", "fifo", "readable", "another's"])
def test_what_is_not_our_own_file_is_told(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "shared"
    if kind == "directory":
        path.mkdir()
    elif kind == "link":
        path.symlink_to(tmp_path / "elsewhere")
    elif kind == "fifo":
        os.mkfifo(path, 0o600)
    else:
        path.touch(0o600)
        if kind == "readable":
            path.chmod(0o644)
        elif os.geteuid() != 0:
            pytest.skip("only root can give a file away")
        else:
            os.chown(path, 12345, 12345)
    with pytest.raises(UserError, match="wanted a regular file of this user with mode 600"):
        open_own(path, os.O_CREAT)
    assert not (tmp_path / "elsewhere").exists()


def test_a_file_is_made_whole_in_the_place_of_another(tmp_path: Path) -> None:
    (tmp_path / "shared").write_bytes(b"old")
    allocate(tmp_path / "shared", 10_000, b"new")
    assert (tmp_path / "shared").read_bytes() == b"new" + bytes(9997)
    assert [file.name for file in tmp_path.iterdir()] == ["shared"]
    os.close(open_own(tmp_path / "shared"))


def test_too_little_memory_is_told() -> None:
    with pytest.raises(UserError, match=r"the shared buffer needs 79\.\d TB but .*lower server\.rows"):
        allocate(Path("/dev/shm/clt-test-too-large"), 79_200_000_000_000, b"")
    assert not list(Path("/dev/shm").glob("clt-test-too-large*"))
