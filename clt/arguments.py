"""What the arguments of the commands have in common. Imports no torch."""

from __future__ import annotations

import importlib
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from clt.config import DEFAULT_CONFIG, Config, load_config
from clt.errors import UserError
from clt.files import steps
from clt.ranges import PORT


def add_config(parser: ArgumentParser) -> None:
    """Add CONFIG and overrides, which `read_config` takes; `parse_intermixed_args` finds them behind options, too."""
    what = f"a YAML file [{DEFAULT_CONFIG.name}], then overrides section.key=value"
    parser.add_argument("config", nargs="*", metavar="CONFIG", help=what)


def read_config(words: Sequence[str], preset: str | None = None, environment: Sequence[str] = ()) -> Config:
    """The config that is asked for; preset and environment as for `load_config`."""
    path, overrides = (words[0], words[1:]) if words and "=" not in words[0] else (DEFAULT_CONFIG, words)
    return load_config(path, overrides, preset, environment)


def read_run(directory: Path) -> Config:
    """The config of a run. Raises UserError when the directory holds none."""
    if not (directory / "config.yaml").is_file():
        raise UserError(f"{directory} has no config.yaml; wanted the run.dir of a training run")
    return load_config(directory / "config.yaml")


def find_checkpoint(run: str, step: int | None) -> tuple[Config, Path, int]:
    """The config and the directory of a run, and `step` or that of its newest checkpoint. Raises UserError."""
    directory = Path(run)
    config, found = read_run(directory), steps(directory / "checkpoints")
    step = max(found, default=None) if step is None else step
    if step is None or step not in found:
        raise UserError(f"{directory} has no checkpoint of step {step}; found {found or 'none'}")
    return config, directory, step


def need_serving(command: str) -> None:
    """Raise UserError when a package that serves is missing."""
    for package in ("starlette", "uvicorn"):
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise UserError(f"clt {command} needs {error.name}: pip install 'clt-trainer[serve]'") from error


def check_port(port: int) -> None:
    """Raise UserError unless it is the number of a port."""
    if not PORT.holds(port):
        raise UserError(f"--port is {port}; wanted {PORT.wanted}")
