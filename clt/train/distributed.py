"""Ranks: the process group, and the few collectives that a run needs. With one process all of them are no-ops."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist  # noqa: TID251
from torch import Tensor

from clt.errors import UserError


class World(NamedTuple):
    """This process among the others."""

    rank: int
    size: int
    device: torch.device


def setup() -> World:
    """Join the process group that torchrun's environment describes: NCCL with one GPU a rank, or gloo on the CPU."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    if size > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return World(rank, size, device)


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


def same_everywhere(value: int, what: str) -> int:
    """The value, when every rank has the same. Raises UserError on all of them when they differ."""
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    highest, lowest = all_max(torch.tensor([value, -value], device=device)).tolist()
    if highest != -lowest:
        raise UserError(
            f"the {what} is {-lowest} on one rank and {highest} on another: "
            "run.dir must lie on a file system that all nodes share"
        )
    return value


def all_sum(tensor: Tensor) -> Tensor:
    """Sum over ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor, dist.ReduceOp.SUM)
    return tensor


def all_max(tensor: Tensor) -> Tensor:
    """Maximum over ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor
