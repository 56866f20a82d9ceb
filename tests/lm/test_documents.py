"""Documents: kinds of files, held-out parts, datasets, and what the errors say."""

import gzip
import sys
import tracemalloc
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clt.config import TextConfig
from clt.errors import UserError
from clt.lm import documents, textfiles
from clt.lm.documents import read_documents
from tests.lm.conftest import write_jsonl

pytestmark = pytest.mark.skipif(find_spec("datasets") is None, reason="datasets is not installed")


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
    heldout = write_jsonl(tmp_path / "h.jsonl", ["h"])
    text = "one\n\nzwei Größen\n"
    source.write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    assert both(TextConfig(source=str(source), heldout=str(heldout))) == ([text], ["h"])
    assert both(TextConfig(source=str(heldout), heldout=str(source))) == (["h"], [text])


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
    assert "latin.txt is not UTF-8 text: found the byte 0xe9" in error(
        TextConfig(source=str(tmp_path / "latin.txt")), "heldout"
    )
    (tmp_path / "plain.txt.gz").write_text("not gzip")
    assert "is not a whole gzip file" in error(TextConfig(source=str(tmp_path / "plain.txt.gz")), "heldout")
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(b"text" * 1000)[:-10])
    assert "is not a whole gzip file" in error(TextConfig(source=str(tmp_path / "cut.txt.gz")), "heldout")
    (tmp_path / "a.csv").write_text("text")
    assert "is not a .txt or .jsonl file" in error(TextConfig(source=str(tmp_path / "a.csv")))


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "\\ud83d"}', r"line 3 of .*: field 'text' has a lone surrogate, \\ud83d, at character 0"),
        (b'{"id": 1' + b"0" * 5000 + b', "text": "a"}', "line 3 of .* is not valid JSON: .*4300 digits"),
        (b"[" * 100_000, "line 3 of .* is nested too deeply for JSON"),
        (b'{"text": "caf\xe9"}', "line 3 of .* is not UTF-8 text: found the byte 0xe9"),
        (b'{"text": "\xed\xa0\x80"}', "line 3 of .* is not UTF-8 text: found the byte 0xed"),
        (b'{"text": "' + b"x" * 200_000 + b'"}', "line 3 of .* has more than 200000 characters"),
    ],
)
def test_a_line_that_is_no_text_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, line: bytes, message: str
) -> None:
    monkeypatch.setattr(textfiles, "_LINE", 200_000)
    content = b'{"text": "a"}\n\n' + line + b'\n{"text": "b"}\n'
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    with pytest.raises(UserError, match=message):
        both(TextConfig(source=str(tmp_path / name)))


def test_the_line_of_a_bad_byte_in_a_text_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("zwei Größen\r\n".encode() * 1000 + b"caf\xe9\n")
    (tmp_path / "h.txt").write_text("h")
    config = TextConfig(source=str(tmp_path / "a.txt"), heldout=str(tmp_path / "h.txt"))
    with patch.object(textfiles, "_DOCUMENT", 100):
        assert "line 1001 of" in error(config)
    assert "line 1001 of" in error(config)


def test_byte_order_marks_are_no_text(tmp_path: Path) -> None:
    mark = b"\xef\xbb\xbf"
    (tmp_path / "a.jsonl").write_bytes(mark + b'{"text": "a"}\n' + mark + b'{"text": "b"}\n')  # two files, put together
    (tmp_path / "h.txt").write_bytes(mark + b"h\n")
    config = TextConfig(source=str(tmp_path / "a.jsonl"), heldout=str(tmp_path / "h.txt"))
    assert both(config) == (["a", "b"], ["h\n"])


def test_an_unreadable_file_is_named(tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.symlink_to("/proc/self/mem")  # whose first page nobody can read, not even root
    assert f"line 1 of {source} cannot be read: [Errno 5]" in error(TextConfig(source=str(source)))
    assert "text.source='~nobody-here/a.txt' cannot be read: " in error(TextConfig(source="~nobody-here/a.txt"))
    assert "cannot be read: [Errno 36] File name too long" in error(TextConfig(source="x" * 300 + ".txt"))


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
    import datasets

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
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = error(TextConfig(source="nobody/nothing"))
    assert "dataset 'nobody/nothing'" in message
    assert "network" in message


def test_a_damaged_dataset_file_is_one_message(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    packed = bytearray(zstandard.compress(b"".join(b'{"text": "%d"}\n' % (n * n) for n in range(20_000))))
    packed[len(packed) // 2 :] = bytes(len(packed) // 2)
    (tmp_path / "a.jsonl.zst").write_bytes(packed)
    message = error(TextConfig(source=str(tmp_path)))
    assert f"dataset {str(tmp_path)!r}" in message
    assert "zstd" in message
    assert "hf auth login" not in message


def test_an_empty_folder_is_no_dataset_of_the_hub(tmp_path: Path) -> None:
    assert error(TextConfig(source=str(tmp_path))).startswith(f"text.source={str(tmp_path)!r} is an empty folder; want")
    (tmp_path / "README.md").write_text("no text")
    message = error(TextConfig(source=str(tmp_path)))
    assert "hf auth login" not in message
    assert "wanted .txt or .jsonl files" in message


def test_heldout_files_in_the_source_are_not_trained_on(tmp_path: Path) -> None:
    (tmp_path / "s" / "sub").mkdir(parents=True)
    write_jsonl(tmp_path / "s" / "a.jsonl", ["a"])
    held = write_jsonl(tmp_path / "s" / "sub" / "h.jsonl", ["h"])
    (tmp_path / "link.jsonl").symlink_to(held)
    (tmp_path / "s" / "again.jsonl").symlink_to(held)
    for heldout in (held, held.parent, tmp_path / "link.jsonl"):
        assert both(TextConfig(source=str(tmp_path / "s"), heldout=str(heldout))) == (["a"], ["h"])


def refusals(**fields: str) -> tuple[str, str]:
    config = TextConfig(**fields)  # type: ignore[arg-type]
    return error(config, "train"), error(config, "heldout")


def test_one_text_for_both_parts_is_refused(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["a", "b"])
    (tmp_path / "link.jsonl").symlink_to(source)
    for heldout in (source, tmp_path, tmp_path / "link.jsonl"):
        for message in refusals(source=str(source), heldout=str(heldout)):
            assert f"text.heldout={str(heldout)!r} is the text that text.source={str(source)!r} trains on" in message


def test_one_split_for_both_parts_is_refused(parquet: Path) -> None:
    (parquet / "inner").mkdir()
    (parquet / "validation.parquet").rename(parquet / "inner" / "0.parquet")
    for heldout in ("train", str(parquet), str(parquet / "inner")):
        for message in refusals(source=str(parquet), heldout=heldout):
            assert f"text.heldout={heldout!r} is the text that" in message
    for message in refusals(source=str(parquet / "inner"), heldout=str(parquet)):
        assert "is the text that" in message
    for message in refusals(source="org/name", split="test", heldout="test"):
        assert "is the text that" in message


def test_links_are_followed_once(tmp_path: Path) -> None:
    root, away = tmp_path / "root", tmp_path / "away"
    (root / "b").mkdir(parents=True)
    away.mkdir()
    write_jsonl(root / "b" / "b.jsonl", ["b"])
    write_jsonl(away / "c.jsonl", ["c"])
    write_jsonl(tmp_path / "file.jsonl", ["d"])
    (root / "a").symlink_to(root / "b")  # read as b/
    (root / "c").symlink_to(away)
    (away / "back").symlink_to(root)  # a cycle
    (root / "d.jsonl").symlink_to(tmp_path / "file.jsonl")
    (root / "e.jsonl").symlink_to(tmp_path / "file.jsonl")
    (tmp_path / "link").symlink_to(root)
    for source in (root, tmp_path / "link"):
        assert both(TextConfig(source=str(source), heldout_documents=1)) == (["c", "d"], ["b"])


@pytest.mark.parametrize("target", ["missing", "part2", "/dev/null"])
def test_a_link_that_leads_nowhere_is_named(tmp_path: Path, target: str) -> None:
    write_jsonl(tmp_path / "a.jsonl", ["a"])
    name = "part2" if target == "part2" else "b.jsonl"
    (tmp_path / name).symlink_to(target)
    assert f"{tmp_path / name}, of text.source=" in error(TextConfig(source=str(tmp_path)))


def test_files_that_only_datasets_reads_are_not_left_out(parquet: Path) -> None:
    write_jsonl(parquet / "a.jsonl", ["a"])
    assert "holds both .txt or .jsonl files and others, such as" in error(TextConfig(source=str(parquet)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cut")


@settings(deadline=None, max_examples=50)
@given(text=st.text(st.sampled_from("ab \néx"), max_size=60), most=st.integers(1, 12))
def test_long_documents_are_cut_alike_wherever_they_are_read(folder: Path, text: str, most: int) -> None:
    (folder / "a.txt").write_text(text)
    write_jsonl(folder / "a.jsonl", [text])
    with patch.object(textfiles, "_DOCUMENT", most):
        one, other = both(TextConfig(source=str(folder / "a.txt"), heldout=str(folder / "a.jsonl")))
        rows = list(textfiles.cut(text))
    assert one == other == rows
    assert "".join(one) == text
    assert all(0 < len(piece) <= most for piece in one) or one == [""]
    assert len(text) > most or one == [text]


@pytest.mark.parametrize("name", ["a.jsonl", "folder", "parquet"])
def test_all_pieces_of_a_document_are_on_one_side(tmp_path: Path, name: str) -> None:
    texts = ["one two three four", "five", "six seven eight nine", "ten eleven twelve"]
    source = tmp_path / name
    if name == "a.jsonl":
        write_jsonl(source, texts)
    else:
        source.mkdir()
    if name == "folder":
        for number, text in enumerate(texts):
            (source / f"{number}.txt").write_text(text)
    if name == "parquet":
        import datasets

        datasets.Dataset.from_dict({"text": texts}).to_parquet(source / "train.parquet")
    with patch.object(textfiles, "_DOCUMENT", 8):
        for count in range(5):
            train, heldout = both(TextConfig(source=str(source), heldout_documents=count))
            assert ("".join(heldout), "".join(train)) == ("".join(texts[:count]), "".join(texts[count:]))
            assert all(len(piece) <= 8 for piece in train + heldout)


def test_a_long_document_is_cut_after_a_line_or_a_word(folder: Path) -> None:
    (folder / "b.txt").write_text("one two\nthree four five sixsevenight\n")
    write_jsonl(folder / "h.jsonl", ["h"])
    with patch.object(textfiles, "_DOCUMENT", 10):
        train, _ = both(TextConfig(source=str(folder / "b.txt"), heldout=str(folder / "h.jsonl")))
    assert train == ["one two\n", "three ", "four five ", "sixsevenig", "ht\n"]


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.gz"])
def test_memory_is_bounded_whatever_the_file(tmp_path: Path, name: str) -> None:
    """100 MB without a line break, in a file of 100 kB."""
    with gzip.open(tmp_path / name, "wb", compresslevel=1) as file:
        for _ in range(100):
            file.write(b" x" * 500_000)
    write_jsonl(tmp_path / "h.jsonl", ["h"])
    read = documents.read_documents(TextConfig(source=str(tmp_path / name), heldout=str(tmp_path / "h.jsonl")), "train")
    tracemalloc.start()
    try:
        if name == "a.txt.gz":
            assert sum(map(len, read)) == 100_000_000
            most = 8_000_000
        else:
            with pytest.raises(UserError, match=r"line 1 of .* has more than 16777216 characters; wanted shorter"):
                next(read)
            most = 60_000_000
        assert tracemalloc.get_traced_memory()[1] < most
    finally:
        tracemalloc.stop()


def test_without_datasets_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install 'clt-trainer[hub]'" in error(TextConfig(source="Skylion007/openwebtext"))
