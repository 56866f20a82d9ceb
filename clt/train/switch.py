"""The choice between the dense and the sparse step, with `train.kernels=sparse` or `sampled`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from clt.errors import UserError
from clt.model.loss import Objective
from clt.train.distributed import World
from clt.train.metrics import Metrics
from clt.train.spec import TrainConfig

_EVERY = 50  # steps between choices. Not those of the log, whose frequency must not change the numbers.
_MOST = 100  # pairs a layer and token up to which the sparse step is taken: on paper, it costs the same at 165
_ROOM = 2.0  # times as many pairs as needed room have it. A sample fills what is left.


class Switch:
    """Takes the sparse step while few pairs of a feature and a token are listed, and gives them room.

    A step that needs more room than there is is left out (its loss is nan). The next choice gives more room, or goes
    back to the dense step. All ranks choose the same, as a function of what a checkpoint holds.
    """

    def __init__(self, train: TrainConfig, objective: Objective, world: World) -> None:
        self.wanted, self.sampled = train.kernels != "dense", train.kernels == "sampled"
        self.objective, self.world = objective, world
        self.most = _MOST / _ROOM if self.sampled else _MOST
        objective.count_pairs = self.wanted
        self.tokens = -(-train.batch_tokens // (world.data.size * train.accumulate))  # of a rank's largest micro-batch
        clt = objective.transcoder
        if self.sampled and self.tokens * clt.d_features >= 2**31:
            raise UserError(
                f"a rank's micro-batch has {self.tokens:,} tokens by {clt.d_features:,} features, but "
                "train.kernels=sampled numbers under 2^31 pairs; raise train.accumulate or set train.kernels=sparse"
            )
        self.pairs = train.batch_tokens * clt.n_layers * clt.d_features * clt.shards
        # Pairs a token that need room, in the layer with most: since the last choice; those that have it (0: dense).
        self.seen, self.room = torch.zeros(2, device=world.device).unbind()

    def update(self, step: int, metrics: Metrics) -> Tensor | None:
        """Take in the pairs of step 1, 2, .., on all ranks. Returns whether on any they had no room, () bool."""
        if not self.wanted:
            return None
        capacity = self.objective.capacity
        most = self.world.everyone.max(metrics.most_needed)
        self.seen.copy_(torch.maximum(self.seen, most / self.tokens))
        if step % _EVERY == 0:
            few = self.seen * self.world.feature.size <= self.most
            self.room.copy_(torch.where(few, self.seen * _ROOM, 0))
            self.seen.zero_()
            self.choose(step)
        self._sample_by(step)
        return None if capacity is None else most > capacity

    def _sample_by(self, step: int) -> None:
        self.objective.sampling = step if self.sampled else None

    def choose(self, step: int) -> None:
        """Have the next step, after `step` steps, be what `room` says. Waits for the device."""
        self._sample_by(step)
        room = math.ceil(self.room.item() * self.tokens / 16) * 16  # the kernels are compiled for such numbers
        self.objective.capacity = room or None

    def read(self, metrics: Metrics) -> dict[str, float]:
        """What the log says: whether the next step is sparse, and the share of all pairs that fire or are near
        their threshold. All ranks must call it. Waits for the device."""
        if not self.wanted:
            return {}
        listed = self.world.everyone.sum(metrics.listed).item()
        return {"sparse_step": float(self.objective.capacity is not None), "near_share": listed / self.pairs}

    def tensors(self) -> dict[str, Tensor]:
        """The state that a checkpoint must hold."""
        return {"pairs_seen": self.seen, "pairs_room": self.room} if self.wanted else {}
