"""How good a transcoder is, and what a run leaves of it: train_ddp.py and `clt eval` end in the same way."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from clt.config import Config, config_hash
from clt.data.extract import check_model
from clt.data.index import write_json
from clt.data.store import DiscBuffer
from clt.errors import UserError
from clt.lm.load import load_language_model
from clt.lm.text import windows
from clt.model.transcoder import CrossLayerTranscoder
from clt.train import report
from clt.train.distributed import World
from clt.train.evaluation import Replace, dead_features, evaluate_activations, evaluate_replacement
from clt.train.state import TrainState

if TYPE_CHECKING:
    from clt.lm.load import LanguageModel
    from clt.lm.text import Window


class Evaluation(NamedTuple):
    """Quality as plain numbers for logs and summary.json, and as the tensors of `evaluate_activations` for plots."""

    numbers: dict[str, Any]
    tensors: dict[str, Tensor]


class Evaluator:
    """Evaluates transcoders on the held-out rows and, unless `eval.replacement_tokens` is 0, on held-out text.

    Raises UserError when the language model is not that of the rows, or when there is too little held-out text.
    """

    def __init__(self, config: Config, heldout: DiscBuffer, mean_output: Tensor, world: World, dtype: torch.dtype):
        """mean_output: (L, D), what mean ablation writes; dtype: that of the matrix products."""
        self.config, self.heldout, self.mean_output = config, heldout, mean_output
        self.world, self.dtype = world, dtype
        self.lm: LanguageModel | None = None
        if config.eval.replacement_tokens:
            self.lm = load_language_model(config.lm)  # on the CPU: evaluation takes it to the device and back
            check_model(heldout.index, self.lm)
            self.windows = heldout_windows(config, self.lm)

    def __call__(
        self,
        transcoder: CrossLayerTranscoder,
        last_fired: Tensor,
        step: int,
        progress: Callable[[int], None] = lambda step: None,
        run: Replace | None = None,
    ) -> Evaluation:
        """Evaluate the transcoder as it is after `step` steps; all ranks must call it.

        last_fired: (L, F), as `dead_features` takes it; progress: called with the step after each part of the work;
        run: as `evaluate_replacement` takes it.
        """
        data, feature, config = self.world.data, self.world.feature, self.config
        share: dict[str, Any] = {"data": data, "progress": lambda: progress(step)}
        tensors = evaluate_activations(transcoder, self.heldout, autocast=self.dtype, **share)
        numbers: dict[str, Any] = {key: value.tolist() for key, value in tensors.items() if key != "density"}
        if self.lm is not None:
            mean_output = self.mean_output.to(self.world.device)
            numbers |= evaluate_replacement(self.lm, transcoder, mean_output, self.windows, run=run, **share)
        last_fired = data.max(last_fired.clone())
        dead = dead_features(last_fired, step, config.train.batch_tokens, config.eval.dead_window)
        numbers["dead_fraction"] = feature.sum(dead.double().mean()).item() / feature.size
        return Evaluation(numbers, tensors)


def heldout_windows(config: Config, lm: LanguageModel) -> list[Window]:
    """The first windows of held-out text, `eval.replacement_tokens` in all (rounded up to whole windows)."""
    count = -(-config.eval.replacement_tokens // config.lm.context)
    found = list(islice(windows(config.text, "heldout", lm, config.lm.context), count))
    if not found:
        raise UserError(
            f"the held-out text is shorter than one window of lm.context={config.lm.context} tokens; "
            "lower lm.context, name more held-out text, or set eval.replacement_tokens=0"
        )
    if not any((window.keep[:-1] & window.keep[1:]).any() for window in found):
        raise UserError(
            f"no window of lm.context={config.lm.context} held-out tokens has two neighbours that are not special "
            "tokens, so there is nothing to predict: raise lm.context, or set eval.replacement_tokens=0"
        )
    return found


def summary(config: Config, state: TrainState, dtype: torch.dtype, wall_seconds: float) -> dict[str, Any]:
    """What summary.json says of a finished run beside its quality."""
    world, tokens = state.world, config.train.steps * config.train.batch_tokens
    return {
        "dead_window_tokens": min(config.eval.dead_window, tokens),
        "tokens_per_second": tokens / state.busy_seconds,
        "wall_seconds": wall_seconds,
        "steps": config.train.steps,
        "train_tokens": tokens,
        "world_size": world.size,
        "device": torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "cpu",
        "precision": str(dtype).removeprefix("torch."),
        "torch_version": torch.__version__,
        "config_hash": config_hash(config),
    }


def conclude(run_dir: Path, evaluation: Evaluation, file: str, plots: str, more: dict[str, Any] | None = None) -> None:
    """Write the numbers, and `more`, to `run_dir`/`file`, the plots to `run_dir`/`plots`, and print the table."""
    numbers = evaluation.numbers | (more or {})
    report.write_plots(run_dir, evaluation.tensors, plots)
    write_json(run_dir / file, numbers)
    print(f"\n{report.table(numbers)}\n\nThe results lie in {run_dir} ({file}, {plots}/).")
