import gc
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from clt.data.loader import Loader
from clt.data.sampler import DistributedSampler, batch_rows
from clt.data.store import DiscBuffer
from clt.errors import UserError

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "clt-reader"]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("prefetch", [1, 4])
def test_the_batches_are_the_rows_of_the_sampler(
    buffer: DiscBuffer, tensor: torch.Tensor, device: str, prefetch: int
) -> None:
    sampler = DistributedSampler(len(buffer), 4, 15, seed=1, rank=1, world=2, stop_step=20)
    with Loader(buffer, sampler, device, prefetch) as loader:
        count = 0
        for step, batch in enumerate(loader):
            wanted = tensor[batch_rows(len(buffer), 4, 15, 1, step, rank=1, world=2)]
            assert batch.device.type == device
            assert torch.equal(batch.cpu(), wanted)
            count += 1
    assert count == 20
    assert loader.stalled > 0
    assert not readers()


def test_a_slow_consumer_finds_its_batch_unchanged(buffer: DiscBuffer, tensor: torch.Tensor) -> None:
    with Loader(buffer, DistributedSampler(len(buffer), 4, 15, seed=1), prefetch=2) as loader:
        for step in range(5):
            batch = next(loader)
            time.sleep(0.02)  # the reader has long filled every buffer that it may
            assert torch.equal(batch, tensor[batch_rows(len(buffer), 4, 15, 1, step)])


def test_batches_of_several_sizes(buffer: DiscBuffer, tensor: torch.Tensor) -> None:
    rows = [np.arange(n) for n in (3, 20, 0, 53, 1)]
    with Loader(buffer, rows, prefetch=1) as loader:
        for wanted, batch in zip(rows, loader, strict=True):
            assert torch.equal(batch, tensor[wanted])


def test_an_error_of_the_reader_reaches_the_consumer(buffer: DiscBuffer) -> None:
    def broken() -> Iterator[np.ndarray]:
        yield np.arange(3)
        raise UserError("the sampler broke")

    with Loader(buffer, broken()) as loader:
        next(loader)
        for _ in range(2):
            with pytest.raises(UserError, match="the sampler broke"):
                next(loader)
    with Loader(buffer, [np.array([99])]) as loader, pytest.raises(IndexError):
        next(loader)
    assert not readers()


def test_ready_waits_for_a_batch_and_names_what_it_will_raise(buffer: DiscBuffer, tensor: torch.Tensor) -> None:
    released = threading.Event()

    def read(rows: np.ndarray, out: torch.Tensor) -> torch.Tensor:
        assert released.wait(60)
        return buffer.read(rows, out)

    slow = SimpleNamespace(index=buffer.index, threads=1, read=read)
    with Loader(slow, [np.array([5]), np.array([99])]) as loader:
        assert not loader.ready(0.01)
        released.set()
        assert loader.ready(60)
        assert loader.failure is None
        assert torch.equal(next(loader), tensor[5:6])
        assert loader.ready(60)
        assert isinstance(loader.failure, IndexError)
        with pytest.raises(IndexError):
            next(loader)


def test_every_reader_sets_its_gpu_before_it_pins_memory(buffer: DiscBuffer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen without a GPU: what each thread asks of CUDA, in order."""
    asked: dict[int, list[str]] = {}

    def note(what: str) -> None:
        asked.setdefault(threading.get_ident(), []).append(what)

    def empty(*shape: int, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        if pin_memory:
            note("pin")
        return torch.zeros(*shape, **options)

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: SimpleNamespace(device=device))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: note(f"set {device}"))
    monkeypatch.setattr(torch, "empty", empty)
    with Loader(buffer, DistributedSampler(len(buffer), 4, 15, seed=1), "cuda:5", prefetch=3) as loader:
        assert loader.ready(60)
    assert [calls[0] for calls in asked.values()] == ["set cuda:5"] * 2
    assert any("pin" in calls for calls in asked.values())


def test_closing_ends_the_threads_at_once(buffer: DiscBuffer) -> None:
    loader = Loader(buffer, DistributedSampler(len(buffer), 4, 15, seed=1), prefetch=3)
    next(loader)
    assert len(readers()) == 2
    loader.close()
    assert not readers()
    assert list(loader) == []
    loader.close()


def test_a_forgotten_loader_ends_its_threads(buffer: DiscBuffer) -> None:
    loader = Loader(buffer, DistributedSampler(len(buffer), 4, 15, seed=1))
    next(loader)
    threads = readers()
    del loader
    gc.collect()
    for thread in threads:
        thread.join(5)
    assert not readers()
