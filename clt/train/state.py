"""Everything that a step changes, and that a checkpoint holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clt.config import Config
from clt.model.loss import Objective
from clt.model.spec import needs_dead
from clt.model.transcoder import CrossLayerTranscoder
from clt.train import checkpoint
from clt.train import distributed as dist
from clt.train.ddp import GradientMemory
from clt.train.distributed import World
from clt.train.metrics import Speed
from clt.train.optim import Update, check_finite, make_adam
from clt.train.source import StoreSource
from clt.train.steering import Steering
from clt.train.switch import Switch
from clt.train.writer import Checkpoints


class TrainState:
    """Weights, optimizer, loss scale, the step at which each feature last fired, and the counters of a run."""

    def __init__(self, config: Config, objective: Objective, world: World, dtype: torch.dtype) -> None:
        """dtype: of the matrix products."""
        self.world, self.transcoder = world, objective.transcoder
        self.step = self.saved = 0
        self.busy_seconds, self.wandb_id = 0.0, None
        parameters = dict(self.transcoder.named_parameters())
        named = {name: p for name, p in parameters.items() if p.requires_grad}
        self.optimizer, self.row_adam = make_adam(parameters, config.optim, config.train.steps, dtype)
        objective.row_adam = self.row_adam
        own = [] if self.row_adam is None else self.row_adam.parameters()
        self.gradients = objective.gradient_memory = GradientMemory([*named.values(), *own])
        objective.sum_ranks = world.everyone.sum
        # CPUs compute with the cores that gloo adds up with.
        objective.begin_sum = world.feature.begin_sum if world.device.type == "cuda" else None
        rules: dict[str, Any] = {"floor": objective.transcoder.threshold_floor, "fp16": dtype == torch.float16}
        rules |= {"stop": config.train.nonfinite == "stop", "row_adam": self.row_adam}
        self.update = Update(self.optimizer, named, config.optim.clip_norm, world.feature.sum, **rules)
        shape = (self.transcoder.n_layers, self.transcoder.d_features)
        self.window = None  # in steps
        if needs_dead(config.loss) and config.loss.dead_window is not None:
            self.window = -(-config.loss.dead_window // config.train.batch_tokens)
        most = max(0.25 * self.transcoder.n_layers * config.clt.d_features, 4 * (config.loss.target_l0 or 0))
        self.steering = Steering(config.loss, config.train.steps, most, world.device)
        self.switch = Switch(config.train, objective, world)
        self.last_fired = torch.zeros(shape, dtype=torch.int64, device=world.device)

    def fired(self, features: Tensor) -> None:
        """Take in which features (L, F) bool fired on this rank in the step that is done."""
        if self.window is not None:  # every rank must know the same of dead features
            features = self.world.data.max(features.byte()).bool()
        self.last_fired.masked_fill_(features, self.step)

    def dead(self) -> Tensor | None:
        """The features (L, F) bool that fired on none of the last `loss.dead_window` tokens, if a term needs them."""
        return None if self.window is None else self.last_fired <= self.step - self.window

    def up_to_date(self) -> CrossLayerTranscoder:
        """The transcoder, whose decoder rows have taken all steps: for whatever reads it beside a step."""
        if self.row_adam is not None:
            self.row_adam.catch_up()
        return self.transcoder

    def save(self, checkpoints: Checkpoints, source: StoreSource, speed: Speed, identity: dict[str, Any]) -> None:
        """Begin a checkpoint; `identity` goes into its state.json. All ranks must call it.

        Raises UserError as `check_finite`, before anything is saved.
        """
        check_finite(self.update, self.world, source.store.path)
        self.busy_seconds = speed.busy_until(self.step)
        self.saved, data = self.step, self.world.data
        tensors = self._tensors() | {"last_fired": data.max(self.last_fired.clone())}
        # Brought up to date, decoder rows stay as they are until the next update, which waits for the copy. The forward
        # pass before it does not wait, and would change a row that is behind.
        slices = checkpoint.slices(self.up_to_date(), self.optimizer, tensors, (data.rank, data.size))
        counters = {"step": self.step, "busy_seconds": self.busy_seconds, "wandb_id": self.wandb_id}
        more = {"world_size": self.world.size, **identity, **source.position()}
        checkpoints.begin(slices, self.transcoder.config, counters | more)
        speed.skip(self.step)

    def resume(self, directory: Path, identity: dict[str, Any]) -> dict[str, Any]:
        """Go on from the newest checkpoint in the directory, and return its state.json; {} when there is none.

        identity: what state.json must hold. Raises UserError when it holds something else, or is damaged.
        """
        newest = max(checkpoint.steps(directory), default=-1)
        if dist.same_everywhere(self.world, newest, "newest checkpoint") < 0:
            return {}
        path, tensors = directory / f"step_{newest:08d}", self._tensors()
        dist.on_rank_zero(self.world, checkpoint.verify, path, checkpoint.MODEL, checkpoint.TRAINING)
        state = checkpoint.restore(path, self.transcoder, self.optimizer, tensors, identity)
        if self.row_adam is not None:
            self.row_adam.take_in()
        self.step = self.saved = state["step"]
        self.busy_seconds, self.wandb_id = state["busy_seconds"], state["wandb_id"]
        return state

    def _tensors(self) -> dict[str, Tensor]:
        of_parts = self.update.tensors() | self.steering.tensors() | self.switch.tensors()
        return of_parts | {"last_fired": self.last_fired}
