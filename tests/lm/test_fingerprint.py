"""Fingerprints: what changes them, what does not, and the commit of a hub dataset."""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import xxhash

from clt.config import Config, LMConfig, TextConfig
from clt.errors import UserError
from clt.lm import fingerprint as module
from clt.lm.documents import read_documents
from clt.lm.fingerprint import fingerprint, fingerprints, pinned

COMMIT = "0123456789" * 4


def test_every_byte_every_size_and_every_name_counts(tmp_path: Path) -> None:
    files = [tmp_path / name for name in "abc"]
    for file, content in zip(files, (b"one", b"", b"three")):
        file.write_bytes(content)
    whole = fingerprint(files)
    header = b"[('a', 3), ('b', 0), ('c', 5)]"
    assert whole == f"3 files, 8 bytes, xxh3_128:{xxhash.xxh3_128_hexdigest(header + b'onethree')}"
    seen = {whole}
    for change in (b"thrEe", b"three ", b""):
        files[2].write_bytes(change)
        seen.add(fingerprint(files))
    files[2].write_bytes(b"three")
    seen |= {fingerprint(files[::2]), fingerprint([files[1], files[0], files[2]])}
    assert len(seen) == 6
    (tmp_path / "copy").mkdir()
    assert fingerprint([Path(shutil.copy(file, tmp_path / "copy")) for file in files]) == whole


def test_of_large_files_evenly_spaced_blocks_are_hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK", 10)
    monkeypatch.setattr(module, "_BLOCKS", 4)
    content = bytearray(range(155))  # 5 blocks and 11

    def found(number: int) -> str:
        for file, part in ((tmp_path / "a", content[:50]), (tmp_path / "b", content[50:])):
            file.write_bytes(part)
            os.utime(file, ns=(0, number))
        return fingerprint([tmp_path / "a", tmp_path / "b"])

    before, seen = found(0), []
    for block in range(16):
        content[block * 10] ^= 1
        seen.append(found(block + 1) != before)
        content[block * 10] ^= 1
    assert [block for block, differs in enumerate(seen) if differs] == [0, 5, 10, 15]


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a cannot be read"):
        fingerprint([tmp_path / "a"])


@pytest.mark.parametrize(
    ("file", "kind"),
    [
        ("model.safetensors", "weights"),
        ("model.safetensors.index.json", "weights"),
        ("config.json", "config"),
        ("tokenizer.json", "tokenizer"),
        ("special_tokens_map.json", "tokenizer"),
        ("vocab.json", "tokenizer"),
        ("generation_config.json", None),
        ("README.md", None),
    ],
)
def test_what_belongs_to_a_model(tmp_path: Path, file: str, kind: str | None) -> None:
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        (tmp_path / name).write_text("as it was")
    config = Config(lm=LMConfig(model=str(tmp_path)))
    before = fingerprints(config, "train")
    (tmp_path / file).write_text("other")
    after = fingerprints(config, "train")
    assert before.keys() == after.keys() == {"weights", "config", "tokenizer", "train text"}
    assert [name for name in before if before[name] != after[name]] == ([kind] if kind else [])


def test_parts_and_files_that_are_not_there(tmp_path: Path) -> None:
    for name in ("s.txt", "h.txt", "m.gguf"):
        (tmp_path / name).write_text(name)
    text = TextConfig(source=str(tmp_path / "s.txt"), heldout=str(tmp_path / "h.txt"))
    config = Config(lm=LMConfig(model=str(tmp_path / "m.gguf")), text=text)
    assert set(fingerprints(config, "train")) == {"weights", "train text"}
    train, heldout = fingerprints(config, "train")["train text"], fingerprints(config, "heldout")["heldout text"]
    assert (train, heldout) == (fingerprint([tmp_path / "s.txt"]), fingerprint([tmp_path / "h.txt"]))
    (tmp_path / "m.gguf").unlink()
    (tmp_path / "s.txt").unlink()
    assert fingerprints(config, "train") == {}
    assert fingerprints(Config(lm=LMConfig(model="org/model"), text=TextConfig(source="org/name")), "train") == {}


def test_a_folder_that_datasets_reads(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"a")
    (tmp_path / ".cache").mkdir()
    config = Config(text=TextConfig(source=str(tmp_path)))
    found = fingerprints(config, "train")
    (tmp_path / ".cache" / "record").write_text("of a download")
    assert fingerprints(config, "train") == found
    (tmp_path / "b.parquet").write_bytes(b"b")
    assert fingerprints(config, "train") != found


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, list[str]], None]:
    """hub(commit, texts): the dataset `org/name` as `datasets` keeps it in its cache, read without a network."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def keep(commit: str, texts: list[str]) -> None:
        datasets.Dataset.from_dict({"text": texts}).to_parquet(tmp_path / "x.parquet")
        file = {"data_files": str(tmp_path / "x.parquet"), "cache_dir": str(tmp_path / commit)}
        builder = datasets.load_dataset_builder("parquet", **file)
        builder.download_and_prepare()
        folder = tmp_path / "cache" / "org___name" / "default" / "0.0.0"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(builder.cache_dir, folder / commit)
        (folder / commit / "parquet-train.arrow").rename(folder / commit / "name-train.arrow")

    return keep


def test_a_hub_dataset_is_pinned_to_the_commit_that_was_read(hub: Callable[[str, list[str]], None]) -> None:
    hub(COMMIT, ["a", "b"])
    config = Config(text=TextConfig(source="org/name", heldout_documents=1))
    found = fingerprints(config, "train", ask_hub=True)
    assert found["train text"] == f"text.revision={COMMIT}"
    again = pinned(config, "train", found)
    assert again == replace(config, text=replace(config.text, revision=COMMIT))
    assert list(read_documents(again.text, "train")) == ["b"]
    hub("9" * 40, ["c", "d"])
    assert list(read_documents(config.text, "train")) == ["d"]
    with pytest.raises(UserError, match=rf"found commit 9+ in the cache, wanted {COMMIT}, which text.revision or the"):
        list(read_documents(again.text, "train"))


def test_local_text_needs_no_revision(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    config = Config(text=TextConfig(source=str(tmp_path / "a.txt")))
    assert pinned(config, "train", fingerprints(config, "train", ask_hub=True)) == config


def test_a_hub_dataset_that_does_not_answer(hub: Callable[[str, list[str]], None]) -> None:
    with pytest.raises(UserError, match=r"dataset 'org/name' \(subset None\) could not be read: .* Check the spelling"):
        fingerprints(Config(text=TextConfig(source="org/name")), "train", ask_hub=True)
