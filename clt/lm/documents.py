"""The documents of a text source: files, folders of them, or a dataset of the hub."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NoReturn

from clt.config import TextConfig
from clt.errors import UserError
from clt.lm.load import ASSETS, first_line

Part = Literal["train", "heldout"]

_DOCUMENT = 1_000_000  # characters in a document at most: tokenizers take 150 bytes and more for each
_LINE = 16 << 20  # characters in a line of a .jsonl file at most
_UNREAD = (".parquet", ".arrow", ".zst", ".bz2", ".xz", ".zip")  # text files that only `datasets` reads


def read_documents(config: TextConfig, part: Part) -> Iterator[str]:
    """The documents of one part of the text, in a fixed order.

    What is longer than a document may be comes as several, and held-out files are left out of the training text.
    Raises UserError for a source that cannot be read, a record without the text field, text that is not Unicode, and
    held-out text that is the training text.
    """
    if config.source == "embedded" and (part == "train" or config.heldout is None):
        return _file_documents(ASSETS / "text" / f"{part}.jsonl.gz", "text")
    if config.heldout is None:
        documents = _documents(config, _locate(config.source, "text.source"), config.split)
        bounds = (0, config.heldout_documents) if part == "heldout" else (config.heldout_documents, None)
        return itertools.islice(documents, *bounds)
    if config.source == "embedded":
        return _documents(config, _locate(config.heldout, "text.heldout"), config.split)
    train, heldout, split = _apart(config, config.heldout)
    return _documents(config, train, config.split) if part == "train" else _documents(config, heldout, split)


def _apart(config: TextConfig, name: str) -> tuple[list[Path] | str, list[Path] | str, str]:
    """Where the training text is and where the held-out text `name` is, with its split: two texts, or a UserError."""
    train = _locate(config.source, "text.source")
    # A split name is not a path, even where a folder of that name happens to exist.
    looks_like_path = _kind(Path(name)) or "/" in name or name.startswith((".", "~"))
    if isinstance(train, str) and not looks_like_path:
        heldout, split = train, name
    else:
        heldout, split = _locate(name, "text.heldout"), config.split
    if isinstance(train, list) and isinstance(heldout, list):
        held = {file.resolve() for file in heldout}
        train = [file for file in train if file.resolve() not in held]
        same = not train
    elif train == heldout:
        same = split == config.split
    else:
        # Of two folders that `datasets` reads, only it knows which files of the outer one belong to a split.
        folders = [Path(place) for place in (train, heldout) if isinstance(place, str)]
        same = len(folders) == 2 and (folders[0] in folders[1].parents or folders[1] in folders[0].parents)
    if same:
        raise UserError(
            f"text.heldout={name!r} is the text that text.source={config.source!r} trains on; wanted other files, a "
            "folder beside the source's, another split, or null, which holds out the first text.heldout_documents"
        )
    return train, heldout, split


def _documents(config: TextConfig, place: list[Path] | str, split: str) -> Iterator[str]:
    if isinstance(place, str):
        return _hub_documents(config, place, split)
    return itertools.chain.from_iterable(_file_documents(path, config.field) for path in place)


def _kind(path: Path) -> str | None:
    """`.txt` or `.jsonl`, with or without .gz; None for another file."""
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    return suffix if suffix in (".txt", ".jsonl") else None


def _locate(source: str, key: str) -> list[Path] | str:
    """The sorted files of a local source; or what `datasets` loads, a hub id or the path of a folder of other files."""
    path = Path(source).expanduser()
    try:
        if path.is_dir():
            return _text_files(path, f"{key}={source!r}") or str(path.resolve())
        if path.is_file():
            if _kind(path) is None:
                raise UserError(f"{key}={source!r} is not a .txt or .jsonl file (nor one of them with .gz)")
            return [path]
    except OSError as error:
        raise UserError(f"{key}={source!r} cannot be read: {error}") from error
    if _kind(path) or source.startswith((".", "/", "~")):
        raise UserError(
            f"{key}={source!r} does not exist; wanted a .txt or .jsonl file (or .gz), a folder, or a hub id"
        )
    return source


def _text_files(folder: Path, name: str) -> list[Path]:
    """The .txt and .jsonl files below a folder, sorted; empty if it has others alone.

    Links are followed. A file or a folder that is reached twice counts once: else a held-out document could be trained
    on under its other name. Raises UserError for an empty folder, and for what would be left out without a word.
    """
    found: dict[Path, Path] = {}
    others, seen, starts = [], set(), [folder]
    for start in starts:  # which grows: folders that are links come after the real ones
        for place, folders, names in os.walk(start, onerror=_raise):
            if (real := os.path.realpath(place)) in seen:
                folders.clear()
                continue
            seen.add(real)
            folders.sort()
            starts += [path for path in (Path(place, name) for name in folders) if path.is_symlink()]
            for path in (Path(place, name) for name in sorted(names)):
                if not path.exists() or (_kind(path) and not path.is_file()):
                    raise UserError(f"{path}, of {name}, is a broken link or not a file; mend it, or take it away")
                if _kind(path):
                    found.setdefault(path.resolve(), path)
                else:
                    others.append(path)
    unread = [path for path in others if path.suffix in _UNREAD]
    if found and unread:
        raise UserError(
            f"{name} holds both .txt or .jsonl files and others, such as {unread[0]}, which are not read together; "
            "wanted one kind in a folder, or the others unpacked"
        )
    if not found and not others:
        raise UserError(f"{name} is an empty folder; wanted .txt or .jsonl files (or .gz) in it, or a dataset's files")
    return sorted(found.values())


def _raise(error: OSError) -> NoReturn:
    raise error


def _file_documents(path: Path, field: str) -> Iterator[str]:
    """The text of a .txt file as one document, or one document for each line of a .jsonl file; long ones are cut."""
    if _kind(path) == ".txt":
        rest = ""
        for number, piece in _read(path, _DOCUMENT):
            *whole, rest = _cut(rest + (piece.removeprefix("\ufeff") if number == 1 else piece))
            yield from whole
        yield rest
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
            yield from _cut(_field_text(record, field, where))


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
        text.isascii() or text.encode()
    except UnicodeEncodeError as error:
        return error.start
    return None


def _cut(text: str) -> Iterator[str]:
    """A text as documents of at most _DOCUMENT characters, cut after a line, else after a word, else anywhere.

    A cut depends on nothing behind it, so that a file may be cut while it is read.
    """
    start = 0
    while (end := start + _DOCUMENT) < len(text):
        end = text.rfind("\n", start, end) + 1 or text.rfind(" ", start, end) + 1 or end
        yield text[start:end]
        start = end
    yield text[start:]


def _field_text(record: Any, field: str, where: str) -> str:
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


def _hub_documents(config: TextConfig, source: str, split: str) -> Iterator[str]:
    """The texts of one split of a dataset, streamed; long ones are cut."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"{source!r} is not a .txt or .jsonl source and needs `datasets`: pip install 'clt-trainer[hub]'"
        ) from error
    number = 0
    try:
        rows = datasets.load_dataset(source, config.subset, split=split, streaming=True)
        for number, row in enumerate(rows):
            yield from _cut(_field_text(row, config.field, f"row {number} of {source} (split {split})"))
    except UserError:
        raise
    except Exception as error:  # of whatever library reads this format: pyarrow, zstandard, an HTTP client ...
        remedy = (
            "Check subset, split and files; wanted .txt or .jsonl files (or .gz), or what `datasets` reads"
            if Path(source).is_dir()
            else "Check the spelling and the network; a gated dataset needs `hf auth login`; without network give a "
            "local file, a folder or `embedded`"
        )
        raise UserError(
            f"dataset {source!r} (subset {config.subset!r}, split {split!r}) could not be read beyond row {number}: "
            f"{first_line(error)} {remedy}"
        ) from error
