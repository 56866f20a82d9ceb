"""Signals and hangs: what `stopping` says, with which status processes exit, and what they print."""

import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from torch.distributed import TCPStore

from clt.train import watch
from clt.train.distributed import World
from clt.train.evaluation import Evaluator
from clt.train.watch import HUNG, TOO_SLOW, Watch

pytestmark = [
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
    pytest.mark.usefixtures("short_ticks"),
]
CPU = torch.device("cpu")
LONG = 60.0


@pytest.fixture
def short_ticks(monkeypatch):
    monkeypatch.setattr(watch, "TICK", 0.3)


def watched(directory, rank, size, step, hang_seconds, grace_seconds, ends):
    """A rank at a step. It takes no further step until `ends(watch)`; with `ends` None it hangs."""
    sys.stderr = (directory / f"{rank}.err").open("w")
    with Watch(World(rank, size, CPU), hang_seconds, grace_seconds) as it:
        it.progress(step)
        (directory / f"{rank}.ready").touch()
        while ends is None or not ends(it):
            time.sleep(0.01)
            if ends is not None:
                it.progress(step)


@pytest.fixture
def start(tmp_path):
    """start(rank, size, step, ...) -> a process that is `watched`, once its signals and hangs are."""
    started: list[BaseProcess] = []

    def start(rank=0, size=1, step=0, hang_seconds=LONG, grace_seconds=LONG, ends=None) -> BaseProcess:
        arguments = (tmp_path, rank, size, step, hang_seconds, grace_seconds, ends)
        process = multiprocessing.get_context("fork").Process(target=watched, args=arguments)
        process.start()
        started.append(process)
        while not (tmp_path / f"{rank}.ready").exists():
            assert process.exitcode is None
            time.sleep(0.01)
        return process

    yield start
    for process in started:
        process.kill()
        process.join()


def exit_of(process: BaseProcess, directory: Path) -> tuple[int | None, str]:
    """Status and what rank 0 printed."""
    process.join(LONG)
    return process.exitcode, (directory / "0.err").read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_sets_stopping_and_is_the_programs_own_before_and_after(number):
    called = []
    signal.signal(number, lambda *_: called.append(number))
    with Watch(World(0, 1, CPU), LONG, LONG) as undisturbed:
        pass
    os.kill(os.getpid(), number)
    assert called == [number]
    assert not undisturbed.stopping
    with Watch(World(0, 1, CPU), LONG, LONG) as told:
        os.kill(os.getpid(), number)
        while not told.stopping:
            time.sleep(0.01)
    assert called == [number]
    assert signal.getsignal(number) == signal.SIG_IGN, "torchrun may send it once more to a process that is ending"


def test_a_process_that_ends_within_the_grace_time_ends_as_usual(start, tmp_path):
    process = start(ends=lambda it: it.stopping)
    os.kill(process.pid, signal.SIGTERM)
    assert exit_of(process, tmp_path) == (0, "")


def test_a_checkpoint_that_takes_longer_than_the_grace_time_is_given_up(start, tmp_path):
    process = start(grace_seconds=0.1, ends=lambda it: False)
    os.kill(process.pid, signal.SIGUSR1)
    status, errors = exit_of(process, tmp_path)
    assert status == TOO_SLOW
    assert "error: no checkpoint could be written within checkpoint.grace_seconds=0.1 of the signal; the run" in errors


def saved(it: Watch) -> bool:
    it.saved = True
    return it.deadline is not None and time.monotonic() > it.deadline + 2


def test_after_the_last_checkpoint_there_is_no_grace_time(start, tmp_path):
    process = start(grace_seconds=0.1, ends=saved)
    os.kill(process.pid, signal.SIGTERM)
    assert exit_of(process, tmp_path) == (0, "")


def test_a_signal_in_a_long_last_evaluation_does_not_end_the_run(train, monkeypatch):
    asked, evaluate = [], Evaluator.__call__

    def long(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(2)
        return evaluate(*arguments)

    monkeypatch.setattr(Evaluator, "__call__", long)
    monkeypatch.setattr(Watch, "_exit", lambda *reason: asked.append(reason))
    run = train("checkpoint.grace_seconds=0.1", "eval.replacement_tokens=0")
    assert asked == []
    assert run.summary["steps"] == 10


def test_a_process_is_ended_when_it_makes_no_progress(start, tmp_path):
    status, errors = exit_of(start(step=7, hang_seconds=0.5), tmp_path)
    assert (status, errors) == (
        HUNG,
        "\n[rank 0] error: no progress since step 7 for parallel.timeout_seconds=0.5\n",
    )


def test_a_process_that_makes_progress_is_not_ended(start, tmp_path):
    end = time.monotonic() + 5
    assert exit_of(start(hang_seconds=4, ends=lambda _: time.monotonic() > end), tmp_path) == (0, "")


@pytest.fixture
def store(monkeypatch):
    """The ranks' store, as torchrun keeps it: it ends when the list is emptied."""
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(server.port))
    return [server]


def stopped(start: Callable[..., BaseProcess]) -> None:
    other = start(1, 2, step=5, ends=lambda _: False)
    os.kill(other.pid, signal.SIGSTOP)


@pytest.mark.parametrize(
    ("others", "found"),
    [
        (stopped, r"rank 1 \(.*, pid \d+\) stopped answering \(stopped, or cut off from the network\)"),
        (lambda start: None, r"rank 1 \(never seen\) stopped answering"),
        (lambda start: start(1, 2, step=3), r"rank 1 \(.*, pid \d+\) did not get beyond step 3, others did"),
        (lambda start: start(1, 2, step=5), r"all ranks answer and are at step 5, so the hang is in a collective"),
    ],
    ids=["stopped", "never seen", "behind", "same step"],
)
def test_the_rank_that_holds_up_the_others_is_named(start, store, tmp_path, monkeypatch, others, found):
    monkeypatch.setattr(watch, "TICK", 0.6)  # a heartbeat may be late by two of them
    others(start)
    status, errors = exit_of(start(0, 2, step=5, hang_seconds=1), tmp_path)
    assert status == HUNG
    assert "[rank 0] error: no progress since step 5 for parallel.timeout_seconds=1: " in errors
    assert re.search(found, errors), errors


def test_a_store_that_is_gone_is_told(start, store, tmp_path):
    process = start(0, 2, step=5, hang_seconds=2)
    store.clear()
    status, errors = exit_of(process, tmp_path)
    assert status == HUNG
    assert "the node of torchrun's store, where the ranks meet, cannot be reached" in errors
