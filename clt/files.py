"""Reading files that may be damaged. Whatever is wrong with a file becomes one message that names it."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from clt.errors import UserError, shown
from clt.ranges import fit

if TYPE_CHECKING:
    from torch import Tensor


@contextmanager
def reading(file: Path, remedy: str) -> Iterator[None]:
    """While a file is read and its content checked: what is wrong with it becomes a UserError that names both.

    A file that the system does not read may be whole: then the message has no remedy, which might be to delete it.
    """
    try:
        yield
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        refusal = error if isinstance(error, OSError) and error.errno else _refusal(file)
        if refusal is None:
            raise UserError(f"{file} is damaged ({error}); {remedy}") from error
        if refusal.errno in (errno.EACCES, errno.EPERM):
            remedy = "change its mode or its owner"
        elif refusal.errno != errno.ENOENT:
            remedy = "the file itself may be whole"
        raise UserError(f"{file} cannot be read ({refusal.strerror}): {remedy}") from error


def _refusal(file: Path) -> OSError | None:
    """What the system says when the file is read: libraries such as safetensors do not pass it on."""
    try:
        with file.open("rb") as opened:
            opened.read(1)
    except OSError as error:
        return error
    return None


def steps(directory: Path) -> list[int]:
    """The steps that have a whole checkpoint in a run's `checkpoints`, ascending."""
    names = (re.fullmatch(r"step_(\d{8})", path.name) for path in directory.glob("step_*"))
    return sorted(int(match[1]) for match in names if match)


def or_null(value: float) -> float | None:
    """A number as strict JSON can hold it: null instead of nan and inf, which mean that there is no value."""
    return value if math.isfinite(value) else None


def parse_object(text: str | bytes, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The object in a text of JSON; `fields` (name: type) have values as `fit` makes them, and are None when missing.

    Raises ValueError for other JSON, a field of another type, and text that is no JSON.
    """
    tree = json.loads(text)
    if not isinstance(tree, dict):
        raise ValueError(f"found {shown(tree)}, wanted an object")
    return tree | {name: fit(name, kind, tree.get(name)) for name, kind in fields.items()}


def read_object(file: Path, fields: Mapping[str, Any], remedy: str) -> dict[str, Any]:
    """`parse_object` of a file. Raises UserError that names the file and the remedy."""
    with reading(file, remedy):
        return parse_object(file.read_bytes(), fields)


class TensorFiles:
    """The tensors of `model.safetensors` in a directory, or of the files that `model.safetensors.index.json` names.

    Shapes are known at once, values are read when asked for. Raises UserError that names the file at fault.
    """

    def __init__(self, directory: Path, remedy: str) -> None:
        self.remedy, self.files, self.shapes = remedy, dict[str, Path](), dict[str, list[int]]()
        self.checked: set[tuple[str, int | None]] = set()
        self.main = directory / "model.safetensors.index.json"
        if self.main.exists():
            parts = read_object(self.main, {"weight_map": dict[str, str]}, remedy)["weight_map"]
            with reading(self.main, remedy):
                if odd := [name for name in parts.values() if not re.fullmatch(r"[\w-]+\.safetensors", name)]:
                    raise ValueError(f"it names {odd[0]!r}, wanted a .safetensors file beside it")
            names = sorted(set(parts.values()))
        else:
            self.main = directory / "model.safetensors"
            names = [self.main.name]
        for file in (directory / name for name in names):
            shapes = tensor_shapes(file, remedy)
            self.files |= dict.fromkeys(shapes, file)
            self.shapes |= shapes

    def read(self, name: str, index: int | None = None, *, check: Callable[[str, Tensor], None]) -> Tensor:
        """A tensor, or its part `index` along the first dimension.

        check: raises ValueError, here a UserError, for values that cannot be; called when a part is read first. Raises
        UserError when the file is damaged, too.
        """
        from safetensors import safe_open

        file = self.files[name]
        with reading(file, self.remedy), safe_open(file, "pt") as opened:
            tensor = opened.get_tensor(name) if index is None else opened.get_slice(name)[index]
            if (name, index) not in self.checked:
                check(name, tensor)
                self.checked.add((name, index))
        return tensor


def tensor_shapes(file: Path, remedy: str) -> dict[str, list[int]]:
    """The shapes of a safetensors file's tensors, from its header. Raises UserError as `reading`."""
    from safetensors import safe_open

    with reading(file, remedy), safe_open(file, "pt") as opened:
        return {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118 - no mapping


def read_token(file: str | None) -> str | None:
    """The bearer token: environment variable CLT_SERVER_TOKEN, else the first line of `file`, else None.

    Raises UserError for a file that is missing, that others can read, or that holds no token.
    """
    token, where = os.environ.get("CLT_SERVER_TOKEN"), "CLT_SERVER_TOKEN"
    if token is None and file is not None:
        where = f"token_file {file}"
        try:
            found = os.stat(file)
            token = Path(file).read_bytes()[:4096].partition(b"\n")[0].strip(b" \t\r").decode("latin-1")
        except OSError as error:
            raise UserError(f"{where}: {error.strerror}; write a token into it, `openssl rand -hex 32`") from error
        if found.st_uid == os.geteuid() and found.st_mode & 0o077:
            raise UserError(f"{where} can be read by others ({stat.filemode(found.st_mode)}): run `chmod 600 {file}`")
    if token is not None and not re.fullmatch("[!-~]{16,}", token):
        raise UserError(f"the token in {where} is not 16 or more printable ASCII characters: `openssl rand -hex 32`")
    return token
