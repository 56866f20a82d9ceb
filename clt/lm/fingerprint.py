"""Fingerprints of the files that activations come from: they tell when a model or a text is no longer what it was."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np

from clt.config import Config
from clt.errors import UserError
from clt.lm.documents import Part, dataset_commit, locate_text
from clt.lm.load import locate

_BLOCK, _BLOCKS = 1 << 16, 1024  # bytes read at once, and how often at most: 64 MB
_KINDS = {
    "weights": ("*.safetensors", "*.safetensors.index.json"),
    "config": ("config.json",),
    "tokenizer": ("*token*.json", "vocab.*", "merges.txt", "*.model", "*.tiktoken"),
}
TEXT_REVISION = "text.revision="


def fingerprints(config: Config, part: Part, ask_hub: bool = False) -> dict[str, str]:
    """What the model's files (`weights`, `config`, `tokenizer`) and one part's text (`train text`) are now.

    What is not on this machine is left out. Of a hub model the commit is known anyway; of a hub dataset it is
    `pinned`'s `text.revision=COMMIT`, if the hub may be asked. Raises UserError when it does not answer.
    """
    files: dict[str, list[Path]] = {}
    with suppress(UserError):  # a model that is not here has no fingerprint; loading it gives the message
        place, gguf = locate(config.lm.model)
        kinds = {"weights": (gguf,)} if gguf else _KINDS
        files |= {
            kind: sorted({file for name in names for file in Path(place).glob(name)}) for kind, names in kinds.items()
        }
    text: list[Path] | str = []
    with suppress(UserError):
        text, _ = locate_text(config.text, part)
        files[f"{part} text"] = _visible_files(Path(text)) if isinstance(text, str) else text
    found = {kind: fingerprint(paths) for kind, paths in files.items() if paths}
    if ask_hub and isinstance(text, str) and not Path(text).is_dir():
        found[f"{part} text"] = f"{TEXT_REVISION}{dataset_commit(config.text, text)}"
    return found


def pinned(config: Config, part: Part, found: Mapping[str, str]) -> Config:
    """The config with `text.revision` as found by `fingerprints`: the branch may have moved on since."""
    text = found.get(f"{part} text", "")
    if not text.startswith(TEXT_REVISION):
        return config
    return replace(config, text=replace(config.text, revision=text.removeprefix(TEXT_REVISION)))


def _visible_files(folder: Path) -> list[Path]:
    """The files below a folder, sorted, without hidden ones, in which downloads keep their records."""
    paths = (
        path for path in folder.rglob("*") if not any(name.startswith(".") for name in path.relative_to(folder).parts)
    )
    return sorted(path for path in paths if path.is_file())


def fingerprint(files: Sequence[Path]) -> str:
    """Count and bytes of the files, and an XXH3 hash of their names, sizes and content.

    Of more than 64 MB only evenly spaced blocks are hashed, the first and the last among them: a change that keeps all
    sizes may then go unseen. Raises UserError for a file that cannot be read.
    """
    try:
        status = [(file, file.stat()) for file in files]
        return _hashed(tuple((file, found.st_size, found.st_mtime_ns) for file, found in status))
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read ({error.strerror}): change its mode or its owner") from error


@functools.cache  # a start asks several times for the same model
def _hashed(files: tuple[tuple[Path, int, int], ...]) -> str:
    """`fingerprint` of (file, size, time of its last change)."""
    import xxhash

    sizes = [size for _, size, _ in files]
    digest = xxhash.xxh3_128(repr([(file.name, size) for file, size, _ in files]).encode())
    ends = list(itertools.accumulate(-(-size // _BLOCK) for size in sizes))
    chosen = np.linspace(0, ends[-1] - 1, min(ends[-1], _BLOCKS)).astype(np.int64)
    first = 0
    for (file, _, _), end in zip(files, ends):
        low, high = np.searchsorted(chosen, [first, end])
        if low < high:
            with file.open("rb", buffering=0) as opened:
                for block in (chosen[low:high] - first).tolist():
                    opened.seek(block * _BLOCK)
                    digest.update(opened.read(_BLOCK))
        first = end
    return f"{len(files)} files, {sum(sizes)} bytes, xxh3_128:{digest.hexdigest()}"
