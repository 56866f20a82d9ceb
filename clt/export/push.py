"""`clt push`: a finished run's transcoder, or an export, on the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from clt import hub
from clt.config import load_config
from clt.data.index import INDEX, read_index
from clt.errors import UserError
from clt.export.card import PLACE, card
from clt.files import read_object
from clt.train import checkpoint

_EXPORT = ("README.md", "config.yaml", "*.safetensors", "layer_*/cfg.json", "layer_*/*.safetensors", "features/*")


def push(source: Path, name: str, license: str | None = None, *, private: bool = False) -> str:
    """Put a transcoder on the hub as `user/name`, and return its address.

    source: a finished run, of which the last checkpoint's weights, their config, the plots and a card go up; or a
    directory that `clt export` wrote, whose card gets the name. Raises UserError for any other, and as `hub.upload`.
    """
    files = _of_run(source, name, license) if (source / "checkpoints").is_dir() else _of_export(source, name, license)
    return hub.upload(name, files, "Upload a transcoder", private=private)


def _of_run(run: Path, name: str, license: str | None) -> dict[str, Path | bytes]:
    remedy = "finish the run with the command that started it"
    if not (run / "config.yaml").is_file() or not (run / "summary.json").is_file():
        raise UserError(f"{run} has no config.yaml and summary.json, so it has not finished: {remedy}")
    config, summary = load_config(run / "config.yaml"), read_object(run / "summary.json", {"steps": int}, remedy)
    if (last := max(checkpoint.steps(run / "checkpoints"), default=0)) != summary["steps"]:
        raise UserError(f"the last checkpoint of {run} is of step {last}, its summary of {summary['steps']}: {remedy}")
    path = run / "checkpoints" / f"step_{last:08d}"
    checkpoint.verify(path, checkpoint.MODEL)
    heldout = Path(config.data.store) / "heldout"
    index = read_index(heldout) if (heldout / INDEX).is_file() else None
    text = card(config, summary, index, name=name, license=license)
    files: dict[str, Path | bytes] = {name: path / name for name in ("config.json", checkpoint.MODEL)}
    files |= {f"report/{plot.name}": plot for plot in sorted((run / "report").glob("*.png"))}
    return files | {"README.md": text.encode()}


def _of_export(directory: Path, name: str, license: str | None) -> dict[str, Path | bytes]:
    found = {file for pattern in _EXPORT for file in directory.glob(pattern) if file.is_file()}
    names = {str(file.relative_to(directory)): file for file in sorted(found)}
    settings = directory / "config.yaml"
    is_export = (settings.is_file() and b"model_kind:" in settings.read_bytes()) or "layer_0/cfg.json" in names
    if "README.md" not in names or not is_export:
        raise UserError(
            f"{directory} is neither a run (with checkpoints/) nor what `clt export` has written (README.md)"
        )
    if license is not None:
        raise UserError(f"--license goes into the card of a run; write it into {directory}/README.md instead")
    text = (directory / "README.md").read_text()
    # circuit-tracer takes the hub's name in the place of a path; SAELens' load_from_disk does not.
    return names | {"README.md": text.replace(f'"{PLACE}")', f'"{name}")').encode()}
