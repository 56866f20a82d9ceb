"""Ranks: the (data, feature) mesh, and the few collectives that a run needs. With one process all are no-ops.

The ranks of a feature axis hold the shards of one transcoder and read the same rows; the ranks of a data axis hold the
same shard and read different rows. Rank r is (r // feature_shards, r % feature_shards): the shards of one transcoder
lie on neighbouring ranks, which share a node's fast links.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist  # noqa: TID251
from torch import Tensor, nn
from torch._C._distributed_c10d import PrefixStore, TCPStore
from torch.distributed.device_mesh import init_device_mesh  # noqa: TID251

from clt.errors import UserError


class Axis(NamedTuple):
    """This process along one axis of the mesh."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    def share(self, rows: int) -> int:
        """How many of the rows of a global batch this rank takes."""
        return rows * (self.rank + 1) // self.size - rows * self.rank // self.size

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over the axis, in place."""
        if self.size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.SUM, self.group)
        return tensor

    def max(self, tensor: Tensor) -> Tensor:
        """Maximum over the axis, in place."""
        if self.size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MAX, self.group)
        return tensor


ALONE = Axis()
"""An axis of one rank."""


class World(NamedTuple):
    """This process among the others."""

    rank: int
    size: int
    device: torch.device
    data: Axis = ALONE
    feature: Axis = ALONE
    control: dist.ProcessGroup | None = None
    """A gloo group of all ranks for small messages between their CPUs, in no order with the training's collectives."""


def setup(feature_shards: int, timeout_seconds: float) -> World:
    """Join the process group that torchrun's environment describes: NCCL with one GPU a rank, or gloo on the CPU.

    A collective that a rank does not join within `timeout_seconds` is an error on the others. Raises UserError when
    the ranks cannot be split into feature_shards, and when a node has fewer GPUs than ranks.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if size % feature_shards:
        raise UserError(
            f"parallel.feature_shards={feature_shards} does not divide {size} processes: start a multiple of it with "
            "--nproc_per_node (or NPROC), or set parallel.feature_shards=1"
        )
    device = _own_gpu() if torch.cuda.is_available() else torch.device("cpu")
    accumulate_in_float32()
    if size == 1:
        return World(rank, size, device)
    timeout = timedelta(seconds=timeout_seconds)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout)
    shape = (size // feature_shards, feature_shards)
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("data", "feature"))
    data, feature = (Axis(mesh.get_local_rank(i), shape[i], mesh.get_group(i)) for i in range(2))
    control = dist.new_group(backend="gloo", timeout=timeout)
    assert isinstance(control, dist.ProcessGroup)  # every rank is a member
    return World(rank, size, device, data, feature, control)


def _own_gpu() -> torch.device:
    local, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if local >= count:
        raise UserError(
            f"local rank {local} has no GPU of its own: found {count} GPU{'s' * (count > 1)}, wanted one a rank. "
            f"Start at most {count} with --nproc_per_node (or NPROC), or set CUDA_VISIBLE_DEVICES= to train on the CPU"
        )
    device = torch.device("cuda", local)
    torch.cuda.set_device(device)
    return device


def accumulate_in_float32() -> None:
    """Have CUDA's products of bf16 and fp16 matrices add up in float32 throughout, as the CPU's do.

    One product adds up as many features as write to a layer.
    """
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


def shared_store(world: World) -> PrefixStore | None:
    """A connection of its own to the key-value store that all ranks reach; None for a single process."""
    if world.size == 1:
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(address, port, timeout=timedelta(seconds=10), wait_for_workers=False)
    return PrefixStore(f"clt/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def data_parallel(objective: nn.Module, data: Axis) -> nn.Module:
    """The objective in DDP, which sums gradients over the data axis; itself where that has one rank."""
    if data.size == 1:
        return objective
    DDP = nn.parallel.DistributedDataParallel
    # The statistics are the same everywhere: do not broadcast them each step (the public switch's name varies).
    DDP._set_params_and_buffers_to_ignore_for_model(objective, [name for name, _ in objective.named_buffers()])
    model = DDP(objective, process_group=data.group, gradient_as_bucket_view=True)
    model.register_comm_hook(data.group, sum_bucket)
    return model


def settle_buckets(model: nn.Module, batch: Tensor, coefficients: dict[str, float]) -> None:
    """Have DDP order its buckets, which it does by the first backward pass, and leave no gradient."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        model(batch, coefficients).total.backward()
        model.zero_grad()


def summed(model: nn.Module, last: bool) -> AbstractContextManager[object]:
    """Within, a backward pass sums the gradients over the ranks if it is the last micro-batch's, and else adds up."""
    return nullcontext() if last or not isinstance(model, nn.parallel.DistributedDataParallel) else model.no_sync()


def sum_bucket(group, bucket):
    """What DDP does with a bucket of gradients: add it up over the ranks, without its own pass that divides by them."""
    work = dist.all_reduce(bucket.buffer(), group=group, async_op=True)
    assert work is not None  # this process belongs to the group
    return work.get_future().then(lambda done: done.value()[0])


class GradientMemory:
    """The memory of each parameter's last gradient, for its next one: under DDP, its place in a bucket.

    A gradient that is written there is not copied into the bucket again.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self.kept: dict[Tensor, Tensor] = {}

    def __call__(self, parameter: Tensor) -> Tensor | None:
        """The memory, which is the parameter's `.grad` from now on; None for the first gradient, and for a second one
        in the same step, which autograd adds to the first."""
        memory = self.kept.pop(parameter, None)
        if memory is not None:
            # Autograd does not see this write. DDP sums a bucket after the work of the stream that made the parameter.
            stream = torch.cuda.current_stream(memory.device) if memory.is_cuda else None
            assert stream is None or stream == torch.cuda.default_stream(memory.device), "backward on another stream"
            parameter.grad = memory
        return memory

    def clear(self) -> None:
        """Clear the gradients, as `zero_grad` does, and keep their memory."""
        self.kept = {parameter: parameter.grad for parameter in self.parameters if parameter.grad is not None}
        for parameter in self.parameters:
            parameter.grad = None


def cleanup() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def on_rank_zero(world: World, work: Callable[[], object]) -> None:
    """Run `work` on rank 0 while the others wait for it.

    The others wait in a gloo group of their own with a timeout of a month: work takes as long as it takes, and a rank 0
    that dies is noticed by torchrun, not by a timeout. An error of `work` is raised on rank 0, and the others end with
    status 2 and no word.
    """
    if world.size == 1:
        work()
        return
    waiting_room = dist.new_group(backend="gloo", timeout=timedelta(days=30))
    assert isinstance(waiting_room, dist.ProcessGroup)  # every rank is a member
    error = None
    if world.rank == 0:
        try:
            work()
        except Exception as caught:  # noqa: BLE001 - raised again below, when the others know of it
            error = caught
    failed = torch.tensor([error is not None], dtype=torch.int32)
    dist.all_reduce(failed, group=waiting_room)
    dist.destroy_process_group(waiting_room)
    if error is not None:
        raise error
    if failed.item():
        sys.exit(2)


def same_everywhere(world: World, value: int, what: str) -> int:
    """The value, when every rank has the same. Raises UserError on all of them when they differ."""
    if world.size == 1:
        return value
    bounds = torch.tensor([value, -value])
    dist.all_reduce(bounds, dist.ReduceOp.MAX, world.control)
    highest, lowest = bounds.tolist()
    if highest != -lowest:
        raise UserError(
            f"the {what} is {-lowest} on one rank and {highest} on another: "
            "run.dir must lie on a file system that all nodes share"
        )
    return value


def sum_counts(world: World, counts: dict[str, int]) -> dict[str, int]:
    """Counts by name, summed over all ranks."""
    if world.size == 1:
        return dict(counts)
    text = json.dumps(counts).encode()  # torch's own way to gather objects is pickle
    longest = torch.tensor(len(text))
    dist.all_reduce(longest, dist.ReduceOp.MAX, world.control)
    own = torch.tensor(list(text.ljust(int(longest))), dtype=torch.uint8)
    everyone = [torch.empty_like(own) for _ in range(world.size)]
    dist.all_gather(everyone, own, world.control)
    return dict(sum((Counter(json.loads(bytes(each.tolist()))) for each in everyone), Counter()))


def all_sum(tensor: Tensor) -> Tensor:
    """Sum over all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor, dist.ReduceOp.SUM)
    return tensor


def all_max(tensor: Tensor) -> Tensor:
    """Maximum over all ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor


def barrier(world: World) -> None:
    """Wait for every rank."""
    if world.size > 1:
        dist.barrier(world.control)


def count(world: World, *flags: bool) -> list[int]:
    """How many ranks raise each of the flags."""
    sums = torch.tensor(flags, dtype=torch.int64)
    if world.size > 1:
        dist.all_reduce(sums, group=world.control)
    return sums.tolist()


class Flags:
    """How many ranks raised each of a few flags. It is added up during the next step, so that nobody waits."""

    def __init__(self, world: World, flags: int) -> None:
        self.world, self.sums, self.pending = world, torch.zeros(flags, dtype=torch.int64), None

    def send(self, *flags: bool) -> None:
        """Start to add up this step's flags."""
        self.sums = torch.tensor(flags, dtype=torch.int64)
        if self.world.size > 1:
            self.pending = dist.all_reduce(self.sums, group=self.world.control, async_op=True)

    def counts(self) -> list[int]:
        """The sums of the flags sent last, the same on every rank; zeros before the first."""
        if self.pending is not None:
            self.pending.wait()
        return self.sums.tolist()
