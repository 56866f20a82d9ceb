"""A directory that is there whole or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from clt.data.lock import locked
from clt.errors import UserError


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A directory to write into, which gets the name `path` when all is written; an error or Ctrl-C leaves nothing.

    It lies in `PATH.partial`, which one process at a time holds. Raises UserError when there is something of the name
    `path`, and when another process is writing it. What a killed process has left is deleted.
    """
    check_absent(path)
    holder = path.with_name(f"{path.name}.partial")
    partial = holder / path.name
    holder.mkdir(parents=True, exist_ok=True)
    try:
        with locked(holder, "being written", "the directory to write"):
            for left in [place for place in holder.iterdir() if place.is_dir()]:
                shutil.rmtree(left)
            partial.mkdir()
            try:
                yield partial
                check_absent(path)
                partial.rename(path)
            except BaseException:
                shutil.rmtree(partial)
                raise
    finally:
        with suppress(OSError):  # another process holds it
            holder.rmdir()


def check_absent(path: Path) -> None:
    """Raise UserError when there is something of this name."""
    if path.exists() or path.is_symlink():
        raise UserError(f"{path} exists already; delete it, or name another directory")
