"""Where metrics go: `metrics.jsonl` always, Weights & Biases when enabled, a progress bar on rank 0."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from clt.config import Config
from clt.data.index import write_atomically
from clt.errors import UserError, tell
from clt.files import parse_object, reading


class Logger(AbstractContextManager["Logger"]):
    """Rank 0's log of a run. On the other ranks every method returns at once.

    `metrics.jsonl` holds only what the run computes, so that two equal runs write equal files; `speed.jsonl` beside it
    holds what depends on the machine. On resumption the lines after step `start` are dropped, and `evaluated` says
    whether there is an evaluation of that step.
    """

    def __init__(self, config: Config, rank: int, start: int, wandb_id: str | None) -> None:
        self.active, self.evaluated, self.wandb_id, self.wandb = rank == 0, False, wandb_id, None
        self.status: dict[str, str] = {}
        if not self.active:
            return
        if config.log.wandb:
            self.wandb = _start_wandb(config, wandb_id)
            self.wandb_id = self.wandb.id
        directory = Path(config.run.dir)
        self.files = {name: _open_at_step(directory / f"{name}.jsonl", start) for name in ("metrics", "speed")}
        self.evaluated = any("eval_fve" in line for line in read_metrics(directory) if line["step"] == start)
        self.bar = tqdm(total=config.train.steps, initial=start, unit="step", dynamic_ncols=True, mininterval=1.0)

    def step(self, step: int) -> None:
        """Move the progress bar to `step` finished steps."""
        if self.active:
            self.bar.update(step - self.bar.n)

    def log(self, step: int, metrics: Mapping[str, float | None], name: str = "metrics") -> None:
        """Write one line; `name` is the file, "metrics" or "speed". W&B is not told of a value that is None."""
        if not self.active:
            return
        with _named(self.files[name]) as file:
            file.write(json.dumps({"step": step, **metrics}, allow_nan=False) + "\n")
            file.flush()
        values = {key: value for key, value in metrics.items() if value is not None}
        if self.wandb is not None and step >= self.wandb.step:  # W&B has the steps that a resumed run repeats
            with _wandb_errors():
                self.wandb.log(values, step=step)
        shown = {k: f"{values[k]:.4g}" for k in ("train_loss", "L0", "tokens_per_second") if k in values}
        if shown:
            self.status |= shown
            self.bar.set_postfix(self.status, refresh=False)

    def log_evaluation(self, step: int, numbers: dict[str, Any]) -> None:
        """Write an evaluation as `eval_fve`, .., `eval_fve/layer_0`, .. and `replacement_model_accuracy`."""
        line = {f"eval_{key}": value for key, value in numbers.items() if not isinstance(value, list)}
        for key, values in numbers.items():
            if isinstance(values, list):
                name = f"eval_{key.removesuffix('_per_layer')}"
                line |= {f"{name}/layer_{layer}": value for layer, value in enumerate(values)}
        if "top1_agreement" in numbers:
            line["replacement_model_accuracy"] = numbers["top1_agreement"]
        self.log(step, line)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Close everything; an exception marks the W&B run as failed."""
        if not self.active:
            return
        self.bar.close()
        for file in self.files.values():
            with _named(file):
                file.close()
        if self.wandb is not None:
            try:
                with _wandb_errors():
                    self.wandb.finish(exit_code=int(kind is not None))
            except UserError as error:
                if kind is None:
                    raise
                tell(f"warning: {error}")  # the run's own error is the one to raise


@contextmanager
def _named(file: Any) -> Iterator[Any]:
    """While an open file is written: an OSError gets its name, which the system tells only of one that it opens."""
    try:
        yield file
    except OSError as error:
        error.filename = file.name
        raise


def _open_at_step(path: Path, start: int) -> Any:
    """Open for appending after the lines of steps up to `start`."""
    kept = [text + b"\n" for text, line in _lines(path) if line["step"] <= start]
    if path.exists():
        write_atomically(path, b"".join(kept))
    return path.open("a")


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """All lines of a run's metrics.jsonl. Raises UserError as `_lines`."""
    return [line for _, line in _lines(Path(run_dir) / "metrics.jsonl")]


def _lines(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """The lines of a log, each as it is and as it is read. The last is left out when a crash tore it.

    Raises UserError that names the line when another is damaged.
    """
    texts = path.read_bytes().split(b"\n") if path.exists() else []
    lines = []
    for number, text in enumerate(texts, 1):
        try:
            with reading(path, f"mend or delete line {number}, or move the file away and lose the curves so far"):
                lines.append((text, parse_object(text, {"step": int})))
        except UserError:
            if number < len(texts):  # behind the last newline there is nothing, or a torn line
                raise
    return lines


def check_wandb(config: Config) -> None:
    """Raise UserError when W&B is wanted and would not take the run: not installed, no such project, not logged in."""
    if not config.log.wandb:
        return
    wandb = _wandb()
    with _wandb_errors():
        wandb.Settings(project=config.log.wandb_project, entity=config.log.wandb_entity)
        logged_in = config.log.wandb_mode == "offline" or wandb.login(verify=True)
    if not logged_in:
        raise UserError(f"log.wandb is true but W&B has no login; {_NO_WANDB}")


_NO_WANDB = "log in with `wandb login` or WANDB_API_KEY, or set log.wandb_mode=offline or log.wandb=false"


@contextmanager
def _wandb_errors() -> Iterator[None]:
    """Whatever W&B raises becomes a UserError."""
    try:
        yield
    except Exception as error:  # a border: what W&B raises has its reason outside the run
        raise UserError(f"W&B failed ({error}). Mend what it says, {_NO_WANDB}") from error


def _wandb() -> Any:
    try:
        import wandb  # noqa: TID251
    except ImportError as error:
        raise UserError("log.wandb is true but wandb is not installed: pip install 'clt-trainer[wandb]'") from error
    return wandb


def _start_wandb(config: Config, run_id: str | None) -> Any:
    wandb = _wandb()
    with _wandb_errors():
        return wandb.init(
            project=config.log.wandb_project,
            entity=config.log.wandb_entity,
            mode=config.log.wandb_mode,
            id=run_id,
            resume="allow",
            dir=config.run.dir,
            name=Path(config.run.dir).name,
            config=dataclasses.asdict(config),
        )
