"""Text in, windows of tokens out: documents are tokenised and packed in a background thread."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from clt.errors import UserError
from clt.lm.documents import Part, read_documents
from clt.lm.load import LanguageModel, bos_token, check_ids, first_line, special_ids
from clt.lm.spec import TextConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_DOCUMENTS, _CHARACTERS = 64, 200_000  # limits of what is tokenised in one call


class Window(NamedTuple):
    """One row of a language model's input, and where each of its T tokens comes from."""

    tokens: np.ndarray  # (T,) int32; the first is the special token that starts windows, where the tokenizer has one
    documents: np.ndarray  # (T,) int64 number of each token's document, within its part of the text
    keep: np.ndarray  # (T,) bool; False at position 0 and at special tokens, which are neither stored nor replaced


def pack(documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, context: int) -> Iterator[Window]:
    """Cut the stream [BOS] document [BOS] document ... into windows of exactly `context` tokens that start with BOS.

    Where a window continues a document, a BOS is inserted, because models expect one there; it counts as that
    document's. BOS is the tokenizer's bos, else its eos, else there is none. Documents without tokens are skipped; an
    incomplete last window is dropped.
    """
    bos = bos_token(tokenizer)
    prefix = [] if bos is None else [bos]
    special = np.array(special_ids(tokenizer))
    stream = np.empty((3, 0), np.int64)  # token ids, their documents, and whether a document starts there
    for batch in _tokenised(documents, tokenizer, prefix):
        stream = np.concatenate([stream, *batch], 1)
        start = 0
        while True:
            inserted = prefix if start < stream.shape[1] and not stream[2, start] else []
            end = start + context - len(inserted)
            if end > stream.shape[1]:
                break
            tokens = np.insert(stream[0, start:end], 0, inserted)
            owners = np.insert(stream[1, start:end], 0, stream[1, start : start + len(inserted)])
            keep = ~np.isin(tokens, special)
            keep[0] = False
            yield Window(tokens.astype(np.int32), owners, keep)
            start = end
        stream = stream[:, start:]


def _tokenised(
    documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, prefix: list[int]
) -> Iterator[list[np.ndarray]]:
    """The columns (3, n) of the stream for each document. Many are tokenised in a call, which releases the GIL."""
    first = 0
    for texts in _batches(documents):
        # verbose=False: documents longer than the model's context are expected here.
        try:
            encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        except Exception as error:  # whatever the tokenizer's own code raises
            last, problem = first + len(texts) - 1, f"{type(error).__name__}: {first_line(error)}"
            raise UserError(
                f"the tokenizer {tokenizer.name_or_path} failed on documents {first} to {last} of the text: {problem} "
                "Mend these documents or the tokenizer's files"
            ) from error
        tokens = [(number, np.array(prefix + ids)) for number, ids in enumerate(encoded["input_ids"], first) if ids]
        yield [np.stack([ids, np.full_like(ids, number), np.arange(len(ids)) == 0]) for number, ids in tokens]
        first += len(texts)


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    """Some documents at a time, fewer if they are long, so that the first window comes soon."""
    batch, length = [], 0
    for text in documents:
        batch.append(text)
        length += len(text)
        if len(batch) == _DOCUMENTS or length > _CHARACTERS:
            yield batch
            batch, length = [], 0
    if batch:
        yield batch


def windows(config: TextConfig, part: Part, lm: LanguageModel, context: int, skip: int = 0) -> Iterator[Window]:
    """Windows of one part of the text, without the first `skip`; a background thread reads and packs a little ahead.

    Errors in the thread are raised by the iterator; the thread ends when the iterator is exhausted, closed or dropped.
    Raises UserError for a context that the model or the packing does not allow, for text shorter than one window, and
    for an id beyond the model's embedding.
    """
    limit = getattr(lm.model.config, "max_position_embeddings", None)
    if context < 2 or (limit is not None and context > limit):
        raise UserError(
            f"lm.context={context}: wanted 2 to {limit or 'any number of'} tokens, the limit of {lm.name!r}"
        )
    packed = _with_embedding(pack(read_documents(config, part), lm.tokenizer, context), lm)
    first = next(packed, None)
    if first is None:
        split = part == "train" and config.heldout is None and config.source != "embedded"
        after = (
            f" after its first {config.heldout_documents} documents, which text.heldout_documents holds out (a .txt "
            "file is one document: name another file as text.heldout)"
        )
        raise UserError(
            f"the {part} part of text.source={config.source!r} has fewer tokens than one window of "
            f"lm.context={context}{after if split else ''}; give more text or a smaller context"
        )
    return _ahead(itertools.islice(itertools.chain([first], packed), skip, None))


def _with_embedding(items: Iterator[Window], lm: LanguageModel) -> Iterator[Window]:
    """`items`, their ids checked against the model's embedding."""
    for window in items:
        check_ids(lm, window.tokens)
        yield window


def _ahead(items: Iterator[Window], depth: int = 32) -> Iterator[Window]:
    """`items`, computed by a background thread at most `depth` ahead of the consumer."""
    with ThreadPoolExecutor(1, "clt-text") as thread:
        pending = deque(thread.submit(next, items, None) for _ in range(depth))
        try:
            # A future carries a window, None for the end, or the exception that reading it raised.
            while (window := pending.popleft().result()) is not None:
                pending.append(thread.submit(next, items, None))
                yield window
        finally:
            for future in pending:
                future.cancel()
