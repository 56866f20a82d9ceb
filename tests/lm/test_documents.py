"""Documents: kinds of files, held-out parts, datasets, and what the errors say."""

import gzip
import sys
from pathlib import Path

import pytest

from clt.config import TextConfig
from clt.errors import UserError
from clt.lm.documents import read_documents
from tests.lm.conftest import write_jsonl

datasets = pytest.importorskip("datasets")


def both(config: TextConfig) -> tuple[list[str], list[str]]:
    return list(read_documents(config, "train")), list(read_documents(config, "heldout"))


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_jsonl_holds_out_its_first_documents(tmp_path: Path, name: str) -> None:
    source = write_jsonl(tmp_path / name, list("abcde"), field="body")
    config = TextConfig(source=str(source), field="body", heldout_documents=2)
    assert both(config) == (["c", "d", "e"], ["a", "b"])


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_a_text_file_is_one_document(tmp_path: Path, name: str) -> None:
    source = tmp_path / name
    text = "one\n\nzwei Größen\n"
    source.write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    config = TextConfig(source=str(source), heldout=str(source))
    assert both(config) == ([text], [text])


def test_a_folder_is_read_in_order_and_other_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_text("b")
    (tmp_path / "README.md").write_text("no")
    write_jsonl(tmp_path / "a.jsonl.gz", ["a0", "a1"])
    (tmp_path / "sub" / "c.txt").write_text("c")
    assert both(TextConfig(source=str(tmp_path), heldout_documents=1)) == (["a1", "b", "c"], ["a0"])


def test_a_heldout_path_leaves_the_source_whole(tmp_path: Path) -> None:
    source, heldout = write_jsonl(tmp_path / "s.jsonl", ["a", "b"]), write_jsonl(tmp_path / "h.jsonl", ["h"])
    assert both(TextConfig(source=str(source), heldout=str(heldout))) == (["a", "b"], ["h"])


def test_the_embedded_text_has_two_disjoint_parts() -> None:
    train, heldout = both(TextConfig())
    assert len(train) > len(heldout) > 0
    assert not set(train) & set(heldout)


def test_empty_lines_are_passed_over(tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text('{"text": "a"}\n\n{"text": "b"}\n')
    assert list(read_documents(TextConfig(source=str(source), heldout_documents=1), "train")) == ["b"]


def error(config: TextConfig, part: str = "train") -> str:
    with pytest.raises(UserError) as caught:
        list(read_documents(config, part))  # type: ignore[arg-type]
    return str(caught.value)


def test_a_record_without_the_field(tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text('{"text": "a"}\n{"id": 1, "content": "b"}\n')
    message = error(TextConfig(source=str(source), heldout_documents=1))
    assert "line 2 of" in message
    assert "no field 'text', only id, content; set text.field" in message


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": 3}', "field 'text' is a int, not text"),
        ("[1]", "no field 'text', only none"),
        ("{oops", "line 1 of .* is not valid JSON"),
    ],
)
def test_records_that_are_not_text(tmp_path: Path, line: str, message: str) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text(line)
    with pytest.raises(UserError, match=message):
        list(read_documents(TextConfig(source=str(source)), "heldout"))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    assert "is not UTF-8 text" in error(TextConfig(source=str(tmp_path / "latin.txt")), "heldout")
    (tmp_path / "plain.txt.gz").write_text("not gzip")
    assert "is not a whole gzip file" in error(TextConfig(source=str(tmp_path / "plain.txt.gz")), "heldout")
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(b"text" * 1000)[:-10])
    assert "is not a whole gzip file" in error(TextConfig(source=str(tmp_path / "cut.txt.gz")), "heldout")
    (tmp_path / "a.csv").write_text("text")
    assert "is not a .txt or .jsonl file" in error(TextConfig(source=str(tmp_path / "a.csv")))


@pytest.mark.parametrize("source", ["missing.jsonl", "./missing", "folder/missing.txt.gz"])
def test_a_missing_file_is_not_taken_for_a_dataset(source: str) -> None:
    assert f"text.source={source!r} does not exist" in error(TextConfig(source=source))


def test_a_missing_heldout_file_is_named(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["a"])
    message = error(TextConfig(source=str(source), heldout=str(tmp_path / "h.jsonl")), "heldout")
    assert "text.heldout=" in message
    assert "does not exist" in message


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    """A dataset as `datasets` loads it from the hub, in a folder: two splits of parquet."""
    for split, texts in {"train": ["a", "b", "c"], "validation": ["v"]}.items():
        datasets.Dataset.from_dict({"text": texts, "n": range(len(texts))}).to_parquet(tmp_path / f"{split}.parquet")
    return tmp_path


def test_a_dataset_is_streamed_by_split(parquet: Path) -> None:
    assert both(TextConfig(source=str(parquet), heldout_documents=1)) == (["b", "c"], ["a"])
    assert both(TextConfig(source=str(parquet), heldout="validation")) == (["a", "b", "c"], ["v"])
    assert both(TextConfig(source=str(parquet), split="validation", heldout="train")) == (["v"], ["a", "b", "c"])


def test_a_dataset_with_a_heldout_file(parquet: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    heldout = write_jsonl(tmp_path_factory.mktemp("text") / "h.jsonl", ["h"])
    assert both(TextConfig(source=str(parquet), heldout=str(heldout))) == (["a", "b", "c"], ["h"])


def test_datasets_that_cannot_be_loaded(parquet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    message = error(TextConfig(source=str(parquet), split="test"))
    assert "split 'test') could not be read" in message
    assert "train" in message
    assert "subset 'nope'" in error(TextConfig(source=str(parquet), subset="nope"))
    assert "row 0 of" in error(TextConfig(source=str(parquet), field="body"), "heldout")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = error(TextConfig(source="nobody/nothing"))
    assert "dataset 'nobody/nothing'" in message
    assert "network" in message


def test_without_datasets_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install 'clt-trainer[hub]'" in error(TextConfig(source="Skylion007/openwebtext"))
