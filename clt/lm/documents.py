"""The documents of a text source: files, folders of them, or a dataset of the hub."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NoReturn

from clt.errors import UserError
from clt.lm.load import ASSETS, first_line
from clt.lm.spec import TextConfig
from clt.lm.textfiles import cut, field_text, file_documents, file_kind

Part = Literal["train", "heldout"]

_COMMIT = re.compile("[0-9a-f]{40}")
_UNREAD = (".parquet", ".arrow", ".zst", ".bz2", ".xz", ".zip")  # text files that only `datasets` reads


def read_documents(config: TextConfig, part: Part) -> Iterator[str]:
    """The documents of one part of the text, in a fixed order.

    What is longer than a document may be comes as several, and held-out files are left out of the training text.
    Raises UserError for a source that cannot be read, a record without the text field, text that is not Unicode, and
    held-out text that is the training text.
    """
    place, split = locate_text(config, part)
    pieces = _pieces(config, place, split)
    if config.heldout is not None or config.source == "embedded":
        return (text for _, text in pieces)
    return _side(pieces, part, config.heldout_documents)


def _side(pieces: Iterator[tuple[int, str]], part: Part, heldout: int) -> Iterator[str]:
    """The pieces of the first `heldout` documents or of the others: never of one document on both sides."""
    documents = 0
    for number, text in pieces:
        documents += number == 0
        if part == ("heldout" if documents <= heldout else "train"):
            yield text
        elif part == "heldout":
            return


def locate_text(config: TextConfig, part: Part) -> tuple[list[Path] | str, str]:
    """Where one part of the text is: its files, or what `datasets` loads; and its split. Raises UserError.

    Without `text.heldout` both parts of a text that is not embedded are the same files.
    """
    if config.source == "embedded":
        if part == "train" or config.heldout is None:
            return [ASSETS / "text" / f"{part}.jsonl.gz"], config.split
        return _locate(config.heldout, "text.heldout"), config.split
    if config.heldout is None:
        return _locate(config.source, "text.source"), config.split
    train, heldout, split = _apart(config, config.heldout)
    return (train, config.split) if part == "train" else (heldout, split)


def _apart(config: TextConfig, name: str) -> tuple[list[Path] | str, list[Path] | str, str]:
    """Where the training text is and where the held-out text `name` is, with its split: two texts, or a UserError."""
    train = _locate(config.source, "text.source")
    # A split name is not a path, even where a folder of that name happens to exist.
    looks_like_path = file_kind(Path(name)) or "/" in name or name.startswith((".", "~"))
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


def _pieces(config: TextConfig, place: list[Path] | str, split: str) -> Iterator[tuple[int, str]]:
    """The documents of a place, as the numbered pieces of each."""
    if isinstance(place, str):
        return _hub_documents(config, place, split)
    return itertools.chain.from_iterable(
        file_documents(path, "text" if ASSETS in path.parents else config.field) for path in place
    )


def _locate(source: str, key: str) -> list[Path] | str:
    """The sorted files of a local source; or what `datasets` loads, a hub id or the path of a folder of other files."""
    try:
        path = Path(source).expanduser()
        if path.is_dir():
            return _text_files(path, f"{key}={source!r}") or str(path.resolve())
        if path.is_file():
            if file_kind(path) is None:
                raise UserError(f"{key}={source!r} is not a .txt or .jsonl file (nor one of them with .gz)")
            return [path]
    except (OSError, RuntimeError) as error:  # the latter for a ~user who is not known
        raise UserError(f"{key}={source!r} cannot be read: {error}") from error
    if file_kind(path) or source.startswith((".", "/", "~")):
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
                if not path.exists() or (file_kind(path) and not path.is_file()):
                    raise UserError(f"{path}, of {name}, is a broken link or not a file; mend it, or take it away")
                if file_kind(path):
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


def _hub_documents(config: TextConfig, source: str, split: str) -> Iterator[tuple[int, str]]:
    """The texts of one split of a dataset, streamed, as the numbered pieces of each."""
    where, number = f"{source!r} (subset {config.subset!r}, split {split!r})", 0
    with _reading_dataset(source, lambda: f"{where} could not be read beyond row {number}"):
        for number, row in enumerate(_builder(config, source).as_streaming_dataset(split)):
            yield from enumerate(cut(field_text(row, config.field, f"row {number} of {source} (split {split})")))


def dataset_commit(config: TextConfig, source: str) -> str:
    """The commit of a hub dataset that `text.revision` names today. Raises UserError when the hub does not tell."""
    with _reading_dataset(source, lambda: f"{source!r} (subset {config.subset!r}) could not be read"):
        return _builder(config, source).hash


def _builder(config: TextConfig, source: str) -> Any:
    """What streams a dataset. Raises UserError when only another commit than `text.revision` is to be had."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"{source!r} is not a .txt or .jsonl source and needs `datasets`: pip install 'clt-trainer[hub]'"
        ) from error
    builder = datasets.load_dataset_builder(source, config.subset, revision=config.revision)
    # Without a network `datasets` takes what is in its cache, whatever revision was asked for.
    if _COMMIT.fullmatch(config.revision or "") and not Path(source).is_dir() and builder.hash != config.revision:
        raise UserError(
            f"dataset {source!r}: found commit {builder.hash} in the cache, wanted {config.revision}, which "
            "text.revision or the store names: run this once with the network"
        )
    return builder


@contextmanager
def _reading_dataset(source: str, what: Callable[[], str]) -> Iterator[None]:
    """Raise UserError for whatever the libraries that read a dataset raise."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of whatever library reads this format: pyarrow, zstandard, an HTTP client ...
        remedy = (
            "Check subset, split and files; wanted .txt or .jsonl files (or .gz), or what `datasets` reads"
            if Path(source).is_dir()
            else "Check the spelling and the network; a gated dataset needs `hf auth login`; without network give a "
            "local file, a folder or `embedded`"
        )
        raise UserError(f"dataset {what()}: {first_line(error)} {remedy}") from error
