"""Small shared buffers of known rows, and processes to kill."""

import multiprocessing
import os
import secrets
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
import torch

from clt.data.writer import Rows
from clt.server.buffer import SharedBuffer

ROWS, L, D = 64, 2, 3


def known_rows(n: int, first: int = 0, dtype: str = "float16", shape: tuple[int, int] = (L, D)) -> Rows:
    """n rows of which document tells the content: every value is document % 1024."""
    document = np.arange(first, first + n)
    values = torch.from_numpy(document % 1024).to(getattr(torch, dtype))
    tensor = values.view(n, 1, 1, 1).expand(n, 2, *shape).contiguous()
    return Rows(tensor, (document * 3).astype(np.int32), (document % 7).astype(np.int32), document)


def eventually(holds: Callable[[], object], seconds: float = 60.0) -> None:
    """Wait until `holds()` is true."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not come true in time"
        time.sleep(0.01)


@pytest.fixture
def name() -> Iterator[str]:
    """The name of a segment that does not outlive the test."""
    name = f"test-{secrets.token_hex(4)}"
    yield name
    Path(f"/dev/shm/clt-{name}").unlink(missing_ok=True)


@pytest.fixture
def buffer(name: str) -> Iterator[SharedBuffer]:
    """An empty buffer of 64 rows (2, 2, 3) float16 without min_fill."""
    buffer = SharedBuffer.create(name, ROWS, L, D, "float16", min_fill=0)
    yield buffer
    buffer.unlink()
    buffer.close()


@pytest.fixture
def spawn() -> Iterator[Callable[..., BaseProcess]]:
    """spawn(function, *arguments): a started process of its own, from a server that has imported torch; ended after."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["clt.server.buffer", "tests.server.conftest"])
    children: list[BaseProcess] = []

    def start(function: Callable[..., object], *arguments: object) -> BaseProcess:
        child = context.Process(target=function, args=arguments)
        child.start()
        children.append(child)
        return child

    yield start
    for child in children:
        child.kill()
        child.join()


def kill(child: BaseProcess) -> None:
    """SIGKILL, and wait for the end."""
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    child.join()
