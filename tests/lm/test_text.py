"""Packing as a property of the token stream, and the background thread."""

import itertools
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import Mock, patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clt.config import TextConfig
from clt.errors import UserError
from clt.lm import text
from clt.lm.load import LanguageModel
from clt.lm.text import Window, pack, windows
from tests.lm.conftest import BOS, byte_tokenizer, write_jsonl

WITH_BOS, WITHOUT = byte_tokenizer(bos_token=BOS), byte_tokenizer()
DOCUMENTS = st.lists(st.text(max_size=30), max_size=12)


def stream(documents: list[str], bos: int | None) -> tuple[list[int], list[int], list[bool]]:
    """Tokens, documents and document starts of the whole stream, built one document at a time."""
    tokens, owners, starts = [], [], []
    for index, document in enumerate(documents):
        ids = WITHOUT(document)["input_ids"]
        if not ids:
            continue
        ids = ids if bos is None else [bos, *ids]
        tokens += ids
        owners += [index] * len(ids)
        starts += [True] + [False] * (len(ids) - 1)
    return tokens, owners, starts


@settings(deadline=None, max_examples=100)
@given(documents=DOCUMENTS, context=st.integers(2, 20), batch=st.integers(1, 4), has_bos=st.booleans())
def test_windows_without_inserted_bos_are_the_stream(
    documents: list[str], context: int, batch: int, has_bos: bool
) -> None:
    bos = 256 if has_bos else None
    tokens, owners, starts = stream(documents, bos)
    position = 0
    with patch.object(text, "_DOCUMENTS", batch):
        packed = list(pack(documents, WITH_BOS if has_bos else WITHOUT, context))
    for window in packed:
        assert [part.dtype for part in window] == [np.int32, np.int64, bool]
        assert all(part.shape == (context,) for part in window)
        inserted = has_bos and not starts[position]
        if has_bos:
            assert window.tokens[0] == bos
        end = position + context - inserted
        assert window.tokens[inserted:].tolist() == tokens[position:end]
        assert window.documents[inserted:].tolist() == owners[position:end]
        assert window.documents[0] == owners[position]
        assert not window.keep[0]
        assert window.keep[1:].tolist() == [token != bos for token in window.tokens[1:]]
        position = end
    left = len(tokens) - position
    assert left < context - (has_bos and left > 0 and not starts[position])


def test_a_small_example() -> None:
    a, b, c, d = (WITHOUT(char)["input_ids"][0] for char in "abcd")
    got = [(w.tokens.tolist(), w.documents.tolist(), w.keep.tolist()) for w in pack(["abc", "", "d"], WITH_BOS, 3)]
    assert got == [
        ([256, a, b], [0, 0, 0], [False, True, True]),
        ([256, c, 256], [0, 0, 2], [False, True, False]),
    ]
    assert d not in itertools.chain(*(tokens for tokens, _, _ in got))


def test_special_tokens_written_in_a_text_are_not_kept() -> None:
    (window,) = pack([f"a{BOS}b"], WITH_BOS, 4)
    assert window.tokens[2] == 256
    assert window.keep.tolist() == [False, True, False, True]


def same(one: Window, other: Window) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other))


@pytest.fixture
def config(tmp_path: Path) -> TextConfig:
    source = write_jsonl(tmp_path / "a.jsonl", [f"document number {index} " * (index % 7) for index in range(300)])
    return TextConfig(source=str(source), heldout_documents=10)


@pytest.mark.parametrize("skip", [0, 1, 17, 100_000])
def test_resuming_by_skip_equals_a_fresh_iteration(
    config: TextConfig, tiny: Callable[..., LanguageModel], skip: int
) -> None:
    lm = tiny("gpt2")
    fresh = list(windows(config, "train", lm, 32))
    resumed = list(windows(config, "train", lm, 32, skip=skip))
    assert len(fresh) > 100
    assert len(resumed) == max(len(fresh) - skip, 0)
    assert all(map(same, resumed, fresh[skip:]))


def test_a_file_of_one_document_gives_the_windows_of_its_text(
    tmp_path: Path, tiny: Callable[..., LanguageModel]
) -> None:
    """Half a million characters: no longer than a document may be, though read in many pieces."""
    content = "".join(f"Zeile {number} läuft.\n" for number in range(27_000))
    (tmp_path / "a.txt").write_text(content)
    heldout = write_jsonl(tmp_path / "h.jsonl", ["h"])
    lm = tiny("gpt2")
    read = list(windows(TextConfig(source=str(tmp_path / "a.txt"), heldout=str(heldout)), "train", lm, 64))
    assert len(read) > 8000
    assert all(map(same, read, list(pack([content], lm.tokenizer, 64))))


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("clt-text")]


def test_the_thread_ends_with_its_consumer(config: TextConfig, tiny: Callable[..., LanguageModel]) -> None:
    iterator = windows(config, "train", tiny("gpt2"), 32)
    next(iterator)
    assert threads()
    iterator.close()  # type: ignore[attr-defined]
    assert not threads()
    for _ in windows(config, "heldout", tiny("gpt2"), 32):
        break
    assert not threads()


def test_an_error_of_the_thread_reaches_the_consumer(config: TextConfig, tiny: Callable[..., LanguageModel]) -> None:
    with Path(config.source).open("a") as file:
        file.write('{"other": "x"}\n')
    seen = []
    with pytest.raises(UserError, match="line 301 of"):
        seen.extend(windows(config, "train", tiny("gpt2"), 32))
    assert not threads()


def test_reading_runs_a_bounded_number_of_windows_ahead(
    config: TextConfig, tiny: Callable[..., LanguageModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []

    def endless(*_: object) -> Iterator[str]:
        for number in itertools.count():
            read.append(number)
            yield "x" * 31  # a window each, with its BOS

    monkeypatch.setattr(text, "read_documents", endless)
    monkeypatch.setattr(text, "_DOCUMENTS", 1)
    stream = windows(config, "train", tiny("gpt2"), 32)
    assert [next(stream).documents[1] for _ in range(10)] == list(range(10))
    stream.close()  # type: ignore[attr-defined]
    assert 10 <= len(read) <= 10 + 32 + 2


def test_too_little_text_for_a_window(tmp_path: Path, tiny: Callable[..., LanguageModel]) -> None:
    config = TextConfig(source=str(write_jsonl(tmp_path / "a.jsonl", ["a", "b"])), heldout_documents=1)
    message = r"the train part .* fewer tokens than one window of lm\.context=32 after its first 1 documents"
    with pytest.raises(UserError, match=message):
        next(windows(config, "train", tiny("gpt2"), 32))
    with pytest.raises(UserError, match=r"the heldout part .* of lm\.context=32; give more text"):
        next(windows(config, "heldout", tiny("gpt2"), 32))


@pytest.mark.parametrize("context", [1, 65])
def test_a_context_that_the_model_does_not_have(
    config: TextConfig, tiny: Callable[..., LanguageModel], context: int
) -> None:
    with pytest.raises(UserError, match=rf"lm\.context={context}: wanted 2 to 64 tokens"):
        windows(config, "train", tiny("gpt2"), context)


@pytest.mark.parametrize(
    ("most", "lengths", "calls"), [(2, [60, 60, 1, 1, 1], [2, 2, 1]), (3, [160, 60, 1, 1], [1, 3])]
)
def test_long_documents_are_tokenised_a_few_at_a_time(most: int, lengths: list[int], calls: list[int]) -> None:
    found = []

    def tokenise(texts: list[str], **options: object) -> object:
        found.append(len(texts))
        return WITHOUT(texts, **options)

    recording = Mock(
        side_effect=tokenise, bos_token_id=None, eos_token_id=None, all_special_ids=[], added_tokens_decoder={}
    )
    with patch.multiple(text, _DOCUMENTS=most, _CHARACTERS=100):
        list(pack(["a" * length for length in lengths], recording, 10))
    assert found == calls


def test_a_tokenizer_that_fails_names_the_documents() -> None:
    tokenizer = byte_tokenizer(unk_token="<unk>")
    with pytest.raises(UserError, match=r"failed on documents 64 to 65 of the text: \w+: .* Mend these documents"):
        list(pack(["a"] * 65 + ["\ud800"], tokenizer, 8))
