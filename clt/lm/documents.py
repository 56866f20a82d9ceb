"""The documents of a text source: files, folders of them, or a dataset of the hub."""

from __future__ import annotations

import gzip
import itertools
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from clt.config import TextConfig
from clt.errors import UserError
from clt.lm.load import ASSETS, first_line

Part = Literal["train", "heldout"]


def read_documents(config: TextConfig, part: Part) -> Iterator[str]:
    """The documents of one part of the text, in a fixed order.

    Raises UserError for a source that cannot be read and for a record without the text field.
    """
    if part == "heldout" and config.heldout is not None:
        # A split name is not a path, even where a folder of that name happens to exist.
        looks_like_path = _kind(Path(config.heldout)) or "/" in config.heldout or config.heldout.startswith((".", "~"))
        if not looks_like_path and config.source != "embedded" and _files(config.source, "text.source") is None:
            return _hub_documents(config, config.source, config.heldout)
        return _documents(config, config.heldout, "text.heldout")
    if config.source == "embedded":
        return _file_documents(ASSETS / "text" / f"{part}.jsonl.gz", "text")
    documents = _documents(config, config.source, "text.source")
    if config.heldout is not None:
        return documents
    bounds = (0, config.heldout_documents) if part == "heldout" else (config.heldout_documents, None)
    return itertools.islice(documents, *bounds)


def _documents(config: TextConfig, source: str, key: str) -> Iterator[str]:
    paths = _files(source, key)
    if paths is None:
        return _hub_documents(config, source, config.split)
    return itertools.chain.from_iterable(_file_documents(path, config.field) for path in paths)


def _kind(path: Path) -> str | None:
    """`.txt` or `.jsonl`, with or without .gz; None for another file."""
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    return suffix if suffix in (".txt", ".jsonl") else None


def _files(source: str, key: str) -> list[Path] | None:
    """The sorted files of a local source; None for a hub id or a folder of other files, which `datasets` loads."""
    path = Path(source).expanduser()
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.is_file() and _kind(file)) or None
    if path.is_file():
        if _kind(path) is None:
            raise UserError(f"{key}={source!r} is not a .txt or .jsonl file (nor one of them with .gz)")
        return [path]
    if _kind(path) or source.startswith((".", "/", "~")):
        raise UserError(
            f"{key}={source!r} does not exist; wanted a .txt or .jsonl file (or .gz), a folder, or a hub id"
        )
    return None


def _file_documents(path: Path, field: str) -> Iterator[str]:
    """The text of a .txt file as one document, or one document for each line of a .jsonl file."""
    opener: Any = gzip.open if path.suffix == ".gz" else open
    number = 0
    try:
        with opener(path, "rt", encoding="utf-8") as lines:
            if _kind(path) == ".txt":
                yield lines.read()
                return
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _field_text(json.loads(line), field, f"line {number} of {path}")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error}") from error
    except json.JSONDecodeError as error:
        raise UserError(f"line {number} of {path} is not valid JSON: {error}") from error
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise UserError(f"{path} is not a whole gzip file: {error}") from error


def _field_text(record: Any, field: str, where: str) -> str:
    fields = list(map(str, record)) if isinstance(record, dict) else []
    if field not in fields:
        raise UserError(f"{where} has no field {field!r}, only {', '.join(fields) or 'none'}; set text.field")
    if not isinstance(record[field], str):
        raise UserError(f"{where}: field {field!r} is a {type(record[field]).__name__}, not text; set text.field")
    return record[field]


def _hub_documents(config: TextConfig, source: str, split: str) -> Iterator[str]:
    """The texts of one split of a dataset, streamed."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"{source!r} is not a .txt or .jsonl source and needs `datasets`: pip install 'clt-trainer[hub]'"
        ) from error
    try:
        rows = datasets.load_dataset(source, config.subset, split=split, streaming=True)
        for number, row in enumerate(rows):
            yield _field_text(row, config.field, f"row {number} of {source} (split {split})")
    except UserError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(
            f"dataset {source!r} (subset {config.subset!r}, split {split!r}) could not be read: "
            f"{first_line(error)} Check the spelling and the network; a gated dataset needs `hf auth login`; without "
            "network give a local file, a folder or `embedded`"
        ) from error
