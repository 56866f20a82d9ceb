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
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist  # noqa: TID251
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, TCPStore
from torch.distributed.device_mesh import init_device_mesh  # noqa: TID251

from clt.errors import UserError


class Axis(NamedTuple):
    """This process along one axis of the mesh."""

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over the axis, in place."""
        if self.size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.SUM, self.group)
        return tensor

    def begin_sum(self, tensor: Tensor) -> Callable[[], object]:
        """Begin a sum over the axis, in place. Returns what waits for it. All ranks begin sums in the same order."""
        assert tensor.is_contiguous()  # else the sum goes into a copy
        work = dist.all_reduce(tensor, dist.ReduceOp.SUM, self.group, async_op=True)
        assert work is not None  # this process belongs to the group
        return work.wait

    def max(self, tensor: Tensor) -> Tensor:
        """Maximum over the axis, in place."""
        if self.size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MAX, self.group)
        return tensor

    def broadcast(self, tensor: Tensor) -> Tensor:
        """The values of the axis's first rank, in place; the tensor is contiguous."""
        if self.size > 1:
            dist.broadcast(tensor.view(-1).view(torch.uint8), group=self.group, group_src=0)  # gloo knows no bfloat16
        return tensor


ONE_RANK = Axis()
"""An axis of one rank."""


class World(NamedTuple):
    """This process among the others."""

    rank: int
    size: int
    device: torch.device
    data: Axis = ONE_RANK
    feature: Axis = ONE_RANK
    everyone: Axis = ONE_RANK
    control: Axis = ONE_RANK
    """All ranks over gloo: small CPU tensors, in any order with respect to the collectives of `everyone`."""


def setup(feature_shards: int, timeout_seconds: float) -> World:
    """Join the process group that torchrun's environment describes: NCCL with one GPU per rank, or gloo on the CPU.

    A collective that a rank does not join within `timeout_seconds` is an error on the others. Raises UserError when
    the ranks do not meet or cannot be split into feature_shards, and when a node has fewer GPUs than ranks.
    """
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if size % feature_shards:
        raise UserError(
            f"parallel.feature_shards={feature_shards} does not divide {size} processes: start a multiple of it with "
            "--nproc_per_node (or NPROC), or set parallel.feature_shards=1"
        )
    device = own_gpu() if torch.cuda.is_available() else torch.device("cpu")
    accumulate_in_float32()
    if size == 1:
        return World(rank, size, device)
    timeout = timedelta(seconds=timeout_seconds)
    try:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"the {size} ranks did not meet ({error}): start them with torchrun or launch.sh, which set RANK, "
            "WORLD_SIZE, MASTER_ADDR and MASTER_PORT, and see that the nodes reach that address"
        ) from error
    shape = (size // feature_shards, feature_shards)
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("data", "feature"))
    data, feature = (Axis(mesh.get_local_rank(i), shape[i], mesh.get_group(i)) for i in range(2))
    control = Axis(rank, size, _gloo_group(timeout))
    return World(rank, size, device, data, feature, Axis(rank, size), control)


def _gloo_group(timeout: timedelta) -> dist.ProcessGroup:
    group = dist.new_group(backend="gloo", timeout=timeout)
    assert isinstance(group, dist.ProcessGroup)  # every rank is a member
    return group


def own_gpu() -> torch.device:
    """That of this rank of its node, or the first. Raises UserError when the node has fewer GPUs than ranks."""
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
    """Have CUDA accumulate products of bf16 and fp16 matrices in float32 throughout, as the CPU does."""
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


def shared_store(world: World) -> PrefixStore | None:
    """A new connection to the key-value store that all ranks reach; None for a single process."""
    if world.size == 1:
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(address, port, timeout=timedelta(seconds=10), wait_for_workers=False)
    return PrefixStore(f"clt/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def sum_bucket(group, bucket):
    """DDP's hook for a bucket of gradients: sum it over the ranks, without the default's pass that divides."""
    work = dist.all_reduce(bucket.buffer(), group=group, async_op=True)
    assert work is not None  # this process belongs to the group
    return work.get_future().then(lambda done: done.value()[0])


def cleanup() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def first_error_alone(world: World) -> Iterator[None]:
    """When several ranks fail, only the first of them says why: the others exit with status 2 and no message.

    A rank that ends by an error breaks the collectives of the others, and some errors are raised on all ranks.
    """
    try:
        yield
    except (UserError, OSError, RuntimeError) as error:  # a collective that breaks is a RuntimeError
        with suppress(RuntimeError):  # the node of the store is gone: each says what it knows
            store = shared_store(world)
            if store is not None and store.add("failed", 1) > 1:
                raise SystemExit(2) from error
        raise


def on_rank_zero(world: World, work: Callable[..., object], *arguments: object) -> None:
    """Call `work` on rank 0 while the others wait for it.

    The others wait in a gloo group of their own with a timeout of a month: work takes as long as it takes, and torchrun
    notices a rank 0 that dies. An error of `work` is raised on rank 0; the others exit with status 2 and no message.
    """
    if world.size == 1:
        work(*arguments)
        return
    waiting_room = Axis(world.rank, world.size, _gloo_group(timedelta(days=30)))
    error = None
    if world.rank == 0:
        try:
            work(*arguments)
        except Exception as caught:  # noqa: BLE001 - raised again below, when the others know of it
            error = caught
    failed = waiting_room.sum(torch.tensor([error is not None], dtype=torch.int32))
    dist.destroy_process_group(waiting_room.group)
    if error is not None:
        raise error
    if failed.item():
        sys.exit(2)


def same_everywhere(world: World, value: int, what: str) -> int:
    """The value, when every rank has the same. Raises UserError on all of them when they differ."""
    highest, lowest = world.control.max(torch.tensor([value, -value])).tolist()
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
    longest = world.control.max(torch.tensor(len(text)))
    own = torch.tensor(list(text.ljust(int(longest))), dtype=torch.uint8)
    everyone = [torch.empty_like(own) for _ in range(world.size)]
    dist.all_gather(everyone, own, world.control.group)
    return dict(sum((Counter(json.loads(bytes(each.tolist()))) for each in everyone), Counter()))


def count(world: World, *flags: bool) -> list[int]:
    """How many ranks raise each of the flags. Waits for all of them."""
    return Counting(world, *flags).result()


class Counting:
    """How many ranks raise each of the flags, counted while the ranks go on."""

    def __init__(self, world: World, *flags: bool) -> None:
        self.sums, self.pending = torch.tensor(flags, dtype=torch.int64), None
        if world.size > 1:
            self.pending = dist.all_reduce(self.sums, group=world.control.group, async_op=True)

    def result(self) -> list[int]:
        """The counts, equal on every rank."""
        if self.pending is not None:
            self.pending.wait()
        return self.sums.tolist()
