"""A store's index.json: what the rows are, where they came from, and the shards that hold them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypedDict

from clt.errors import UserError
from clt.files import parse_object, read_object, reading

FORMAT_VERSION = 1
INDEX = "index.json"
STATISTICS = "stats.safetensors"
STATISTICS_TENSORS = ("input_mean", "input_sd", "target_mean", "target_sd", "rows")
_SHARD = re.compile(r"[\w-][\w.-]*")
PARTIAL = ".partial"  # suffix of an unfinished file


ITEM_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}


class RowShape(NamedTuple):
    """Of rows: L, D, dtype."""

    n_layers: int
    d_acts: int
    dtype: str

    def __str__(self) -> str:
        return f"(2, {self.n_layers}, {self.d_acts}) {self.dtype}"

    @property
    def row_bytes(self) -> int:
        """Bytes of the activations (2, L, D) of a row."""
        return 2 * self.n_layers * self.d_acts * ITEM_BYTES[self.dtype]


class ShardEntry(TypedDict):
    """One shard file of a store, in reading order."""

    file: str
    rows: int
    checksum: str


@dataclass(frozen=True, kw_only=True)
class StoreIndex:
    """What index.json says of a store."""

    format_version: int = FORMAT_VERSION
    model: str
    revision: str | None
    tokenizer_hash: str
    layers: list[int]
    """Layer numbers in the language model, ascending; activations[:, :, i] belongs to layers[i]."""
    input_sites: list[str]
    output_sites: list[str]
    text: dict[str, Any]
    """`part` (train or heldout) and the fields of the config's text section."""
    seed: int  # of the shuffle
    context: int  # tokens per window
    n_layers: int  # L
    d_acts: int  # D
    dtype: str  # float16, bfloat16 or float32
    rows: int
    shards: list[ShardEntry]
    # Older stores lack these.
    lm_layers: int | None = None
    """Number of layers of the language model, chosen or not; None if unknown."""
    lm_dtype: str = "float32"  # that the language model computed in
    lm_revision: str | None = None
    """The revision that the config asked for; `revision` is the commit that it named."""
    group_rows: int | None = None
    """Rows that were shuffled among each other, in the order of the text; None if unknown."""
    fingerprints: dict[str, str] | None = None
    """What the files of model and text were, as `clt.lm.fingerprint.fingerprints` says it."""

    @classmethod
    def parse(cls, data: bytes) -> StoreIndex:
        """The index in a text of JSON. Raises ValueError as `parse_index`, and for anything but an object."""
        return parse_index(parse_object(data, {}))

    @property
    def some_layers(self) -> list[int] | None:
        """`layers` as `lm.layers` says it: None for all of the language model's."""
        return None if self.layers == list(range(self.lm_layers or self.n_layers)) else self.layers

    @property
    def shape(self) -> RowShape:
        """The shape of its rows."""
        return RowShape(self.n_layers, self.d_acts, self.dtype)


def content_hash(index: StoreIndex) -> str:
    """Twelve hexadecimal digits of all checksums: equal only for stores with the same rows in the same places."""
    return hashlib.sha256("".join(shard["checksum"] for shard in index.shards).encode()).hexdigest()[:12]


def read_index(path: str | Path) -> StoreIndex:
    """The index of the store in directory `path`.

    Raises UserError for a missing directory or index, damaged JSON, missing fields and unknown format versions.
    """
    path, file = Path(path), Path(path) / INDEX
    if not path.is_dir():
        raise UserError(f"store {path} does not exist; run `clt extract CONFIG` to make it, or set data.store")
    if not file.is_file():
        raise UserError(
            f"{path} has no {INDEX}: not a store or an unfinished extraction; run `clt extract CONFIG` to finish it"
        )
    tree = read_object(file, {}, "copy it again or run `clt extract CONFIG` again")
    version = tree.get("format_version")
    if version != FORMAT_VERSION:
        raise UserError(
            f"{file} has format version {version!r}, wanted {FORMAT_VERSION}: "
            "read it with the release of clt that wrote it, or extract it again"
        )
    with reading(file, "copy it again or extract it again"):
        index = parse_index(tree)
        if sum(shard["rows"] for shard in index.shards) != index.rows:
            raise ValueError(f"its shards do not add up to {index.rows} rows")
    return index


def parse_index(tree: Any) -> StoreIndex:
    """The index in an object of JSON, from a disk or a server. Raises ValueError that names the fields at fault."""
    hints, fields = typing.get_type_hints(StoreIndex), dataclasses.fields(StoreIndex)
    wanted = {field.name for field in fields if field.default is dataclasses.MISSING}  # older stores lack the others
    if odd := (wanted - tree.keys()) | (tree.keys() - hints.keys()):
        raise ValueError(f"missing or unknown fields {', '.join(sorted(odd))}")
    if not (odd := {name for name in tree if not _is_of(tree[name], hints[name])}):
        L, lists = tree["n_layers"], ("layers", "input_sites", "output_sites")
        right = {
            "format_version": tree["format_version"] == FORMAT_VERSION,
            "n_layers": 0 < L < 1 << 12 and all(len(tree[name]) == L for name in lists),
            "d_acts": 0 < L * tree["d_acts"] < 1 << 22,  # twice Llama 3.1 405B's: more is a lie that takes all memory
            "dtype": tree["dtype"] in ITEM_BYTES,
            "text": tree["text"].get("part") in ("train", "heldout"),
            # Files of the store's directory, by names that reach nowhere else.
            "shards": all(_SHARD.fullmatch(s["file"]) and s["rows"] > 0 for s in tree["shards"]),
        }
        odd = {name for name, holds in right.items() if not holds}
    if odd:
        raise ValueError(", ".join(f"{name}={tree[name]!r:.100}" for name in sorted(odd)) + " cannot be")
    return StoreIndex(**tree)


def _is_of(value: Any, hint: Any) -> bool:
    """Whether a value of JSON is of a type, down to the items of a list and the values of a TypedDict."""
    if isinstance(hint, types.UnionType):
        return any(_is_of(value, option) for option in typing.get_args(hint))
    if typing.is_typeddict(hint):
        hints = typing.get_type_hints(hint)
        return type(value) is dict and value.keys() == hints.keys() and all(_is_of(value[k], hints[k]) for k in hints)
    kind = typing.get_origin(hint) or hint
    if type(value) is not kind or kind not in (list, dict):
        return hint is Any or type(value) is kind
    return all(_is_of(item, typing.get_args(hint)[-1]) for item in (value.values() if kind is dict else value))


def read_statistics(file: Path, framework: str, shape: tuple[int, int] | None = None) -> dict[str, Any]:
    """The tensors of a store's statistics, of `shape` (L, D) when that is known, for `np` or `pt`.

    Raises UserError when the file is missing, damaged, or holds what cannot be the statistics of rows.
    """
    from safetensors import safe_open

    if not file.is_file():
        raise UserError(f"statistics {file} are missing; copy or extract the store again")
    with reading(file, "copy or extract the store again"), safe_open(str(file), framework=framework) as tensors:
        found = {name: tensors.get_tensor(name) for name in STATISTICS_TENSORS}
        check_statistics(found, shape or tuple(found["input_mean"].shape))
        return found


def check_statistics(found: dict[str, Any], shape: tuple[int, ...]) -> None:
    """Raise ValueError, naming the tensor, for statistics that no rows of `shape` (L, D) can have."""
    if found.keys() != set(STATISTICS_TENSORS):
        raise ValueError(f"found {', '.join(sorted(found))}, wanted {', '.join(STATISTICS_TENSORS)}")
    for name, tensor in found.items():
        wanted, kind = ((), "int64") if name == "rows" else (shape, "float64")
        is_kind = str(tensor.dtype).removeprefix("torch.") == kind
        if not is_kind or tuple(tensor.shape) != wanted or len(shape) != 2:
            raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, wanted {kind} {wanted}")
        if not bool((abs(tensor) < float("inf")).all()):  # which is false for nan, too
            raise ValueError(f"{name} has values that are not finite")
        least = {"rows": 1, "input_sd": 0, "target_sd": 0}.get(name)
        if least is not None and bool((tensor < least).any()):
            raise ValueError(f"{name} has values less than {least}")


def write_index(path: str | Path, index: StoreIndex) -> None:
    """Write the index of the store in directory `path`: the last of its files."""
    write_json(Path(path) / INDEX, dataclasses.asdict(index))


def write_json(file: Path, tree: Any) -> None:
    """Write strict JSON atomically, as `write_atomically`."""
    write_atomically(file, json.dumps(tree, indent=1, allow_nan=False).encode())


def write_atomically(file: Path, data: bytes) -> None:
    """Write a small file atomically: readers see the old file or the new one, even after a power cut."""
    partial = file.with_name(file.name + PARTIAL)
    try:
        with new_file(partial) as opened:
            opened.write(data)
        rename_synced(partial, file)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def new_file(path: Path) -> BinaryIO:
    """A new file, open for writing, in the place of any other: a link is deleted, not followed."""
    path.unlink(missing_ok=True)
    return path.open("xb")


def delete_unfinished(path: Path) -> None:
    """Delete the unfinished files in directory `path`."""
    for partial in path.glob(f"*{PARTIAL}"):
        partial.unlink()


def rename_synced(partial: Path, path: Path) -> None:
    """Sync and rename a finished file: even after a power cut its name never stands for an incomplete one."""
    sync(partial)
    os.replace(partial, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """fsync a file, or a directory for its names."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
