"""A run's checkpoint, opened again to be evaluated: for `clt eval` and `clt convert`."""

from __future__ import annotations

from pathlib import Path

import torch

from clt.config import Config
from clt.data.check import check_files
from clt.data.index import STATISTICS
from clt.data.statistics import Statistics
from clt.errors import UserError
from clt.model.transcoder import CrossLayerTranscoder
from clt.train import checkpoint
from clt.train.distributed import World, accumulate_in_float32
from clt.train.evaluation import Evaluation, Evaluator, Replace
from clt.train.optim import autocast_dtype
from clt.train.run import open_store


class SavedRun:
    """A checkpoint of a run, and what evaluates it. Raises UserError when something is missing or does not fit."""

    def __init__(self, config: Config, directory: Path, step: int) -> None:
        self.config, self.directory, self.step = config, directory, step
        accumulate_in_float32()  # as in training
        world = World(0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        path = directory / "checkpoints" / f"step_{step:08d}"
        self.transcoder = checkpoint.load_transcoder(path).to(world.device)
        heldout = open_store(config, "heldout")
        found = (heldout.index.n_layers, heldout.index.d_acts)
        if found != (wanted := (self.transcoder.n_layers, self.transcoder.d_acts)):
            raise UserError(
                f"{heldout.path} holds activations of (L, D) = {found}, the checkpoint was trained on {wanted}; "
                "extract the stores from the run's language model again"
            )
        if config.eval.replacement_tokens:
            check_files(heldout.index, config)
        # Of the training set only its mean outputs are wanted; its shards may be gone.
        mean_output = Statistics.load(Path(config.data.store) / "train" / STATISTICS).target_mean
        dtype = autocast_dtype(config.train.precision, world.device)
        self.evaluator = Evaluator(config, heldout, mean_output, world, dtype)
        self.last_fired = checkpoint.read_tensor(path, "last_fired").to(world.device)

    def evaluate(self, transcoder: CrossLayerTranscoder, run: Replace | None = None) -> Evaluation:
        """The figures of a transcoder of this run; run: as for `evaluate_replacement`."""
        return self.evaluator(transcoder, self.last_fired, self.step, run=run)
