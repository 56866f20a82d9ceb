"""A directory is there whole or not at all, also when two processes write to the same place."""

import subprocess
import sys

import pytest

from clt.errors import UserError
from clt.export.directory import new_directory


def write(path, ends=None):
    with new_directory(path) as partial:
        (partial / "half").touch()
        if ends is not None:
            raise ends
        assert not path.exists()


@pytest.mark.parametrize("ends", [KeyboardInterrupt, OSError])
def test_a_directory_gets_its_name_when_it_is_whole(ends, tmp_path):
    path = tmp_path / "parent" / "new"
    with pytest.raises(ends):
        write(path, ends)
    assert not list(path.parent.iterdir())
    write(path)
    assert [file.name for file in path.iterdir()] == ["half"]
    with pytest.raises(UserError, match="new exists already; delete it, or name another directory"):
        write(path)
    assert list(path.parent.iterdir()) == [path]


def test_what_a_killed_process_has_left_is_deleted(tmp_path):
    path = tmp_path / "new"
    code = "import os, pathlib, sys; from clt.export.directory import new_directory\n"
    code += "with new_directory(pathlib.Path(sys.argv[1])) as partial: (partial / 'left').touch(); os._exit(9)"
    assert subprocess.run([sys.executable, "-c", code, str(path)], check=False).returncode == 9
    assert list(tmp_path.rglob("left"))
    write(path)
    assert [file.name for file in tmp_path.rglob("*")] == ["new", "half"]


def test_another_process_that_is_writing_is_left_alone(tmp_path):
    path = tmp_path / "new"
    with new_directory(path) as partial:
        (partial / "file").touch()
        with pytest.raises(UserError, match=r"new.partial is being written by process \d+ on .*: wait until"):
            write(path)
        assert (partial / "file").exists()
    assert [file.name for file in tmp_path.rglob("*")] == ["new", "file"]


def test_a_directory_that_somebody_makes_meanwhile_is_kept(tmp_path):
    path = tmp_path / "new"

    def slow():
        with new_directory(path):
            path.mkdir()
            (path / "theirs").touch()

    with pytest.raises(UserError, match="new exists already"):
        slow()
    assert [file.name for file in tmp_path.rglob("*")] == ["new", "theirs"]
