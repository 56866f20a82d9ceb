import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from clt.data.index import read_index, write_index, write_json
from clt.data.shards import create_shard
from clt.errors import UserError


def test_write_and_read(store: Path, tmp_path: Path) -> None:
    index = read_index(store)
    (tmp_path / "other").mkdir()
    other = dataclasses.replace(index, model="gpt2", lm_layers=12)
    write_index(tmp_path / "other", other)
    assert read_index(tmp_path / "other") == other
    assert [file.name for file in (tmp_path / "other").iterdir()] == ["index.json"]


def test_optional_and_required_fields(store: Path) -> None:
    index, tree = read_index(store), json.loads((store / "index.json").read_text())
    (store / "index.json").write_text(json.dumps({key: tree[key] for key in tree if not key.startswith("lm_")}))
    assert read_index(store) == dataclasses.replace(index, lm_layers=None, lm_dtype="float32", lm_revision=None)
    (store / "index.json").write_text(json.dumps({key: tree[key] for key in tree if key != "seed"}))
    with pytest.raises(UserError, match="missing or unknown fields seed"):
        read_index(store)


def test_an_unfinished_file_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    for name, write in {
        "index.json": lambda: write_json(tmp_path / "index.json", [1]),
        "shard.h5": lambda: create_shard(tmp_path / "shard.h5.partial", 2, 1, 1, "float32"),
    }.items():
        (tmp_path / "theirs").write_text("kept")
        (tmp_path / f"{name}.partial").symlink_to(tmp_path / "theirs")
        write()
        assert (tmp_path / "theirs").read_text() == "kept"
    assert json.loads((tmp_path / "index.json").read_text()) == [1]
    assert not (tmp_path / "shard.h5.partial").is_symlink()


def test_missing_directory_and_missing_index(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist; run `clt extract CONFIG`"):
        read_index(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no index.json: not a store or an unfinished extraction; run `clt extract"):
        read_index(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 99}, "has format version 99, wanted 1"),
        ({"rows": 54}, "do not add up to 54 rows"),
        ({"surprise": 1}, "missing or unknown fields surprise"),
    ],
)
def test_a_damaged_index_says_what_is_wrong(store: Path, change: dict[str, int], message: str) -> None:
    file = store / "index.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(UserError, match=message):
        read_index(store)


@pytest.mark.parametrize("name", ["../x.h5", "/etc/passwd", "a/b.h5", "..", ".hidden", "", "a\0b", "a\n"])
def test_a_shard_is_a_file_of_the_store(store: Path, name: str) -> None:
    tree = json.loads((store / "index.json").read_text())
    tree["shards"][1]["file"] = name
    (store / "index.json").write_text(json.dumps(tree))
    with pytest.raises(UserError, match=r"index.json is damaged \(shards=.* cannot be"):
        read_index(store)


@pytest.mark.parametrize("content", [b"", b"{", b'{"a": 1', b"\xff\xfe"])
def test_damaged_json(store: Path, content: bytes) -> None:
    (store / "index.json").write_bytes(content)
    with pytest.raises(UserError, match=r"index.json is damaged .*; copy it again"):
        read_index(store)


def test_reading_an_index_loads_neither_torch_nor_h5py(store: Path) -> None:
    code = (
        "import sys; from clt.data.index import read_index; read_index(sys.argv[1])\n"
        "print('torch' in sys.modules, 'h5py' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code, str(store)], capture_output=True, text=True, check=True)
    assert run.stdout == "False False\n"
