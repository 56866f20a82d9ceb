"""The documents of .txt and .jsonl files: checked, and long ones cut, while they are read."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clt.errors import UserError

_DOCUMENT = 1_000_000  # characters in a document at most: tokenizers take 150 bytes and more for each
_LINE = 16 << 20  # characters in a line of a .jsonl file at most


def file_kind(path: Path) -> str | None:
    """`.txt` or `.jsonl`, with or without .gz; None for another file."""
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    return suffix if suffix in (".txt", ".jsonl") else None


def file_documents(path: Path, field: str) -> Iterator[tuple[int, str]]:
    """The text of a .txt file as one document, or one document for each line of a .jsonl file; long ones are cut."""
    if file_kind(path) == ".txt":
        rest, count = "", 0
        for number, piece in _read(path, _DOCUMENT):
            *whole, rest = cut(rest + (piece.removeprefix("\ufeff") if number == 1 else piece))
            yield from enumerate(whole, count)
            count += len(whole)
        yield count, rest
        return
    for number, line in _read(path, _LINE, by_line=True):
        line = line.removeprefix("\ufeff")  # the mark with which Windows programs begin a file
        if line.strip():
            where = f"line {number} of {path}"
            try:
                record = json.loads(line)
            except RecursionError as error:
                raise UserError(f"{where} is nested too deeply for JSON; mend or remove this line") from error
            except ValueError as error:  # of which a JSONDecodeError is one, an integer that is too long another
                raise UserError(f"{where} is not valid JSON: {error}; mend or remove this line") from error
            yield from enumerate(cut(field_text(record, field, where)))


def _read(path: Path, limit: int, by_line: bool = False) -> Iterator[tuple[int, str]]:
    """A file's lines, or pieces of `limit` characters, each with the number of the line in which it starts.

    Raises UserError, naming file and line, for a line beyond the limit and for what cannot be read or is not UTF-8.
    """
    opener: Any = gzip.open if path.suffix == ".gz" else open
    number = 1
    try:
        # Bytes that are not UTF-8 become lone surrogates. The check of each line then finds them.
        with opener(path, "rt", encoding="utf-8", errors="surrogateescape") as file:
            read = file.readline if by_line else file.read
            while piece := read(limit + by_line):
                if len(piece) > limit:
                    raise UserError(
                        f"line {number} of {path} has more than {limit} characters; wanted shorter documents: cut it "
                        "into several lines, or give it as a .txt file"
                    )
                if (odd := _surrogate(piece)) is not None:
                    raise UserError(
                        f"line {number + piece.count(chr(10), 0, odd)} of {path} is not UTF-8 text: found the byte "
                        f"0x{ord(piece[odd]) & 0xFF:02x}; convert the file, e.g. with iconv"
                    )
                yield number, piece
                number += piece.count("\n")
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise UserError(f"{path} is not a whole gzip file: at line {number}: {error}; get it again") from error
    except OSError as error:
        raise UserError(f"line {number} of {path} cannot be read: {error}") from error


def _surrogate(text: str) -> int | None:
    """The place of the first lone surrogate, which no tokenizer takes; None if there is none."""
    try:
        if not text.isascii():
            text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None


def cut(text: str) -> Iterator[str]:
    """A text as pieces of at most _DOCUMENT characters, cut after a line, else after a word, else anywhere.

    A cut depends on nothing behind it, so that a file may be cut while it is read.
    """
    start = 0
    while (end := start + _DOCUMENT) < len(text):
        end = text.rfind("\n", start, end) + 1 or text.rfind(" ", start, end) + 1 or end
        yield text[start:end]
        start = end
    yield text[start:]


def field_text(record: Any, field: str, where: str) -> str:
    fields = list(map(str, record)) if isinstance(record, dict) else []
    if field not in fields:
        raise UserError(f"{where} has no field {field!r}, only {', '.join(fields) or 'none'}; set text.field")
    text = record[field]
    if not isinstance(text, str):
        raise UserError(f"{where}: field {field!r} is a {type(text).__name__}, not text; set text.field")
    if (odd := _surrogate(text)) is not None:
        raise UserError(
            f"{where}: field {field!r} has a lone surrogate, \\u{ord(text[odd]):04x}, at character {odd}, which is no "
            "text; mend or remove this record"
        )
    return text
