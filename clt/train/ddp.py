"""DDP: the gradients summed over the data axis, in memory that is used again."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from clt.model.terms import Coefficients
from clt.train import distributed as dist
from clt.train.distributed import Axis


def data_parallel(objective: nn.Module, data: Axis) -> nn.Module:
    """The objective in DDP, which sums gradients over the data axis; itself where that has one rank."""
    if data.size == 1:
        return objective
    DDP = nn.parallel.DistributedDataParallel
    # The statistics are the same everywhere: do not broadcast them each step (the public switch's name varies).
    DDP._set_params_and_buffers_to_ignore_for_model(objective, [name for name, _ in objective.named_buffers()])
    model = DDP(objective, process_group=data.group, gradient_as_bucket_view=True)
    model.register_comm_hook(data.group, dist.sum_bucket)
    return model


def settle_buckets(
    model: nn.Module,
    batch: Tensor,
    coefficients: Coefficients,
    autocast: AbstractContextManager[object],
    dead: Tensor | None = None,
) -> None:
    """Run one backward pass, in which DDP fixes the order of its buckets, and clear the gradients."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        with autocast:
            losses = model(batch, coefficients, dead=dead)
        losses.total.backward()
        model.zero_grad()  # to None: DDP makes its buckets anew now, and gives the gradients memory in them


def summed(model: nn.Module, last: bool) -> AbstractContextManager[object]:
    """The context of a micro-batch: gradients accumulate locally, and DDP sums them over the ranks after the last."""
    return nullcontext() if last or not isinstance(model, nn.parallel.DistributedDataParallel) else model.no_sync()


class GradientMemory:
    """Reuses the memory of each parameter's gradient: under DDP, its slice of a bucket.

    A gradient that is written there is not copied into the bucket.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self.kept: dict[Tensor, Tensor] = {}

    def __call__(self, parameter: Tensor) -> Tensor | None:
        """The memory, already set as `.grad`. None in the first step, and when it was taken in this step before: return
        the gradient to autograd then."""
        memory = self.kept.pop(parameter, None)
        if memory is not None:
            # Autograd does not know of the write, and DDP's sum waits for the parameter's stream alone.
            stream = torch.cuda.current_stream(memory.device) if memory.is_cuda else None
            assert stream is None or stream == torch.cuda.default_stream(memory.device), "backward on another stream"
            parameter.grad = memory
        return memory

    def clear(self) -> None:
        """Clear the gradients, as `zero_grad` does, and keep their memory."""
        self.kept = {parameter: parameter.grad for parameter in self.parameters if parameter.grad is not None}
        for parameter in self.parameters:
            parameter.grad = None
