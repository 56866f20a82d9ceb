"""Ranks for short jobs: each is a process forked from one that has imported what ranks import.

Under torchrun every rank and the agent import torch on their own, which takes longer than a short job. Ranks that are
forked share the interpreter's hash seed, and nothing restarts them. A test that depends on either must use torchrun.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["clt.train.run", "torch._dynamo", "transformers.modeling_utils"])


def train(*arguments: str, processes: int) -> str:
    """train_ddp.py with these arguments on that many ranks of one node; returns what they printed, rank after rank.

    Raises RuntimeError with it when a rank fails.
    """
    return run(_train, *arguments, processes=processes)


def _train(*arguments: str) -> None:
    sys.argv = ["train_ddp.py", *arguments]
    runpy.run_path("train_ddp.py", run_name="__main__")


def run(function: Callable[..., None], *arguments: Any, processes: int) -> str:
    """The same for a function that can be pickled, called on every rank. Plots are left out."""
    from torch._C._distributed_c10d import TCPStore

    # The ranks meet in a store of this process, as under torchrun in the agent's: no port is chosen before it is open.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    meeting |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes), "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        logs, ranks = [Path(folder, str(rank)) for rank in range(processes)], []
        for rank, log in enumerate(logs):
            environment = os.environ | meeting | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            ranks.append(FORKS.Process(target=_rank, args=(function, arguments, environment, log), daemon=True))
        try:
            for rank in ranks:
                rank.start()
            while running := [rank.sentinel for rank in ranks if rank.exitcode is None]:
                wait(running)
                if any(rank.exitcode for rank in ranks):
                    time.sleep(0.1)  # as long as torchrun takes to see it; it ends the others in the same way
                    break
        finally:
            for rank in ranks:
                rank.terminate()
            for rank in ranks:
                rank.join(30)
                rank.kill()
                rank.join()
        printed = "".join(log.read_text() for log in logs if log.exists())
    codes = [rank.exitcode for rank in ranks]
    if any(codes):
        raise RuntimeError(f"the ranks ended with status {codes}:\n{printed}")
    return printed


def _rank(function: Callable[..., None], arguments: tuple[Any, ...], environment: dict[str, str], log: Path) -> None:
    import torch

    from clt.train import report

    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    os.chdir(ROOT)
    torch.set_num_threads(1)  # the variable was read when torch was imported
    report.write_plots = lambda *_: None  # they take longer than a short job
    function(*arguments)
