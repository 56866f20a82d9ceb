"""Text in, windows of tokens out: documents are tokenised and packed in a background thread."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from clt.config import TextConfig
from clt.errors import UserError
from clt.lm.documents import Part, read_documents
from clt.lm.load import LanguageModel, bos_token

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")
_DOCUMENTS, _CHARACTERS = 64, 200_000  # about as many are tokenised at once, at most


class Window(NamedTuple):
    """One row of a language model's input, and where each of its T tokens comes from."""

    tokens: np.ndarray
    """(T,) int32. The first is the special token that starts windows, where the tokenizer has one."""
    documents: np.ndarray
    """(T,) int64 index, within its part of the text, of the document that each token belongs to."""
    keep: np.ndarray
    """(T,) bool. False at position 0 and at special tokens, whose activations are neither stored nor replaced."""


def pack(documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, context: int) -> Iterator[Window]:
    """Cut the stream [BOS] document [BOS] document ... into windows of exactly `context` tokens that start with BOS.

    A window that goes on in the middle of a document gets a BOS of its own, so that attention has its usual resting
    place; it counts to that document. BOS is the tokenizer's bos, else its eos, else left out everywhere. Documents of
    no tokens are passed over; an incomplete last window is dropped.
    """
    bos = bos_token(tokenizer)
    special = np.array(sorted(tokenizer.all_special_ids), dtype=np.int32)
    stream = _Stream.empty()
    for batch in _tokenised(documents, tokenizer, bos):
        stream = stream.joined(batch)
        position = 0
        while True:
            goes_on = position < len(stream.tokens) and not stream.starts[position]
            end = position + context - (goes_on and bos is not None)
            if end > len(stream.tokens):
                break
            tokens, owners = stream.tokens[position:end], stream.documents[position:end]
            if goes_on and bos is not None:
                tokens, owners = np.insert(tokens, 0, bos), np.insert(owners, 0, owners[0])
            keep = ~np.isin(tokens, special)
            keep[0] = False
            yield Window(tokens, owners, keep)
            position = end
        stream = stream.after(position)


class _Stream(NamedTuple):
    """A stretch of the token stream: ids (int32), their documents (int64), and whether a document starts there."""

    tokens: np.ndarray
    documents: np.ndarray
    starts: np.ndarray

    @staticmethod
    def empty() -> _Stream:
        return _Stream(np.empty(0, np.int32), np.empty(0, np.int64), np.empty(0, bool))

    def joined(self, other: _Stream) -> _Stream:
        return _Stream(*(np.concatenate(pair) for pair in zip(self, other)))

    def after(self, position: int) -> _Stream:
        return _Stream(*(part[position:].copy() for part in self))


def _tokenised(documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, bos: int | None) -> Iterator[_Stream]:
    """The stream, many documents at a time: one call, in which a fast tokenizer runs without the GIL."""
    prefix = [] if bos is None else [bos]
    for batch in _batches(enumerate(documents)):
        texts = [text for _, text in batch]
        # verbose=False: documents longer than the model's context are expected here.
        encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        pieces = [(index, prefix + ids) for (index, _), ids in zip(batch, encoded) if ids]
        lengths = np.array([len(ids) for _, ids in pieces], dtype=np.int64)
        tokens = np.fromiter(itertools.chain.from_iterable(ids for _, ids in pieces), np.int32, lengths.sum())
        starts = np.zeros(len(tokens), bool)
        starts[np.cumsum(lengths) - lengths] = True
        yield _Stream(tokens, np.repeat(np.array([index for index, _ in pieces], dtype=np.int64), lengths), starts)


def _batches(numbered: Iterable[tuple[int, str]]) -> Iterator[list[tuple[int, str]]]:
    """A few documents at a time, fewer where they are long: whoever waits for the first window waits less."""
    batch, length = [], 0
    for index, text in numbered:
        batch.append((index, text))
        length += len(text)
        if len(batch) == _DOCUMENTS or length > _CHARACTERS:
            yield batch
            batch, length = [], 0
    if batch:
        yield batch


def windows(config: TextConfig, part: Part, lm: LanguageModel, context: int, skip: int = 0) -> Iterator[Window]:
    """Windows of one part of the text, read, tokenised and packed in a background thread that runs a little ahead.

    `skip` leaves out the first windows, so that a resumed extraction goes on where it stopped. Errors of the thread are
    raised here; the thread ends when the iterator is exhausted, closed or dropped.
    Raises UserError for a context that the model or the packing does not allow, and for text shorter than one window.
    """
    limit = getattr(lm.model.config, "max_position_embeddings", None)
    if context < 2 or (limit is not None and context > limit):
        raise UserError(
            f"lm.context={context}: wanted 2 to {limit or 'any number of'} tokens, the limit of {lm.name!r}"
        )
    packed = pack(read_documents(config, part), lm.tokenizer, context)
    return _ahead(itertools.islice(_at_least_one(packed, config, part, context), skip, None))


def _at_least_one(packed: Iterator[Window], config: TextConfig, part: Part, context: int) -> Iterator[Window]:
    count = 0
    for window in packed:
        count += 1
        yield window
    if count == 0:
        raise UserError(
            f"the {part} part of text.source={config.source!r} has fewer tokens than one window of "
            f"lm.context={context}; give more text or a smaller context"
        )


def _ahead(items: Iterator[T], depth: int = 32) -> Iterator[T]:
    """`items`, computed by one background thread at most `depth` ahead of the consumer."""
    end: Any = object()
    with ThreadPoolExecutor(1, "clt-text") as thread:
        pending = deque(thread.submit(next, items, end) for _ in range(depth))
        try:
            # A future carries an item, the end or the exception that reading it raised.
            while (item := pending.popleft().result()) is not end:
                pending.append(thread.submit(next, items, end))
                yield item
        finally:
            for future in pending:
                future.cancel()
