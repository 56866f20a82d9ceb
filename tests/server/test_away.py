"""Runs that read from a server, while it is there and while it is away."""

import contextlib
import itertools
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import train_ddp
from clt import cli
from clt.config import load_config
from clt.server.client import ActivationClient
from clt.train.watch import PREEMPTED
from tests.server.conftest import Server, eventually, pause_generator

STEPS = 40
WAITS = "; trying again for 600 s."
ONE_READS = "parallel.feature_shards=2"  # and sends the other what it read: of two that read, one might get all rows


def rank(number: int, size: int, port: int, overrides: list[str], log: Path) -> None:
    """One rank of a run, as torchrun would start it."""
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    sys.exit(cli.exit_on_user_error(train_ddp.main, load_config(None, overrides), False))


class Job:
    """The ranks of a run, in processes of their own, from a process that has imported what they need."""

    def __init__(self, size: int, overrides: list[str], run: Path) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["tests.server.conftest", "tests.server.test_away", "clt.train.state"])
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        self.run, self.log = run, run.with_suffix(".log")
        self.log.touch()
        keys = [*overrides, f"run.dir={run}", "eval.replacement_tokens=0"]
        self.ranks = [context.Process(target=rank, args=(i, size, port, keys, self.log)) for i in range(size)]
        for process in self.ranks:
            process.start()

    def wait(self) -> None:
        """Until it waits for the server."""
        eventually(lambda: WAITS in self.said() or any(process.exitcode is not None for process in self.ranks), 120)
        assert WAITS in self.said(), self.said()

    def said(self) -> str:
        return self.log.read_text()

    def end(self, *statuses: int) -> list[Path]:
        """Wait for the ranks' ends, with these statuses; the checkpoints that there are."""
        for process in self.ranks:
            process.join(120)
        assert [process.exitcode for process in self.ranks] == [*statuses], self.said()
        return sorted((self.run / "checkpoints").glob("step_*"))


@pytest.fixture
def job(no_gpu_for_several_ranks: None) -> Iterator[Callable[..., Job]]:
    """job(size, overrides, run): a Job, whose processes do not outlive the test."""
    jobs: list[Job] = []
    yield lambda *arguments: jobs.append(Job(*arguments)) or jobs[-1]
    for process in itertools.chain.from_iterable(job.ranks for job in jobs):
        process.kill()
        process.join()


@pytest.fixture(scope="module")
def server(serve) -> Server:
    return serve("server.rows=2048", "server.max_batch=8", "server.wait_seconds=1")


@pytest.fixture
def dry(server) -> Iterator[ActivationClient]:
    """A client of the server, whose generator stands still when it has filled the buffer.

    So a run has rows for fewer than STEPS steps and then waits, however much of a stream the sockets' buffers hold.
    """
    if server.process.poll() is not None:
        server.start()
    client = ActivationClient(server.url)
    eventually(lambda: client.stats()["fill"] == 1)
    generator = pause_generator(client)
    yield client
    with contextlib.suppress(ProcessLookupError):  # killed with the server
        os.kill(generator, signal.SIGCONT)


@pytest.fixture
def keys(server, train_overrides) -> list[str]:
    return [*train_overrides[1:], "data.source=server", f"data.url={server.url}", f"train.steps={STEPS}", "log.every=1"]


def kill(server: Server) -> None:
    server.process.kill()
    server.process.wait()


def test_a_run_that_had_no_row_leaves_nothing_to_resume(dry, keys, job, tmp_path):
    dry.refresh()
    run = job(1, keys, tmp_path / "run")
    run.wait()
    os.kill(run.ranks[0].pid or 0, signal.SIGTERM)
    assert not run.end(PREEMPTED)
    assert f"stopped after step 0 of {STEPS}, before the first step, so nothing was saved" in run.said()


def test_two_ranks_wait_out_a_killed_server_and_their_run_is_evaluated_again(server, dry, keys, job, tmp_path):
    """Each rank has its own stream, no row is read twice, and the rows of both are counted."""
    before = dry.stats()["rows_drawn"]
    run = job(2, [*keys, f"data.store={tmp_path / 'here'}"], tmp_path / "run")
    run.wait()
    kill(server)
    server.start()
    checkpoint = run.end(0, 0)[-1]
    summary = json.loads((run.run / "summary.json").read_text())
    assert summary["server"] == server.url
    (read,) = summary["rows_by_segment"].values()  # the buffer outlives a kill
    assert STEPS * 60 <= read <= dry.stats()["rows_drawn"] - before
    assert STEPS * 60 <= sum(rows_of(checkpoint).values()) <= read
    cli.main(["eval", str(run.run)])
    again = json.loads((run.run / f"report_{checkpoint.name}" / "evaluation.json").read_text())
    assert again["fve"] == pytest.approx(summary["fve"], abs=1e-6)


def rows_of(checkpoint: Path) -> dict[str, int]:
    return json.loads((checkpoint / "state.json").read_text())["rows_by_segment"]


def test_a_signal_while_the_server_is_away_stops_all_ranks_and_the_run_goes_on(server, dry, keys, job, train, tmp_path):
    run = job(2, [*keys, ONE_READS, "parallel.timeout_seconds=6"], tmp_path / "run")
    run.wait()
    kill(server)
    time.sleep(7)  # to wait is no hang
    os.kill(run.ranks[1].pid or 0, signal.SIGUSR1)
    (checkpoint,) = run.end(PREEMPTED, PREEMPTED)
    step = int(checkpoint.name.removeprefix("step_"))
    assert f"stopped after step {step} of {STEPS}, with a checkpoint" in run.said()
    assert 1 <= step < STEPS
    assert "tried for" not in run.said()
    saved = rows_of(checkpoint)
    server.start()
    rows = train(*keys, f"run.dir={run.run}", "eval.replacement_tokens=0").summary["rows_by_segment"]
    assert rows.keys() == saved.keys()
    assert sum(rows.values()) >= 60 * (STEPS - step) + sum(saved.values())


@pytest.mark.parametrize(("ranks", "overrides"), [(2, [ONE_READS]), (1, ["log.every=1000", "optim.lr=1e30"])])
def test_a_server_that_comes_back_as_another_costs_no_step_but_of_numbers_that_are_not_finite(
    server, dry, keys, job, tmp_path, ranks, overrides
):
    """With a token that the run does not have: it will not help to wait."""
    run = job(ranks, [*keys, *overrides], tmp_path / "run")
    run.wait()  # which it may also do before it has a row
    eventually(lambda: ranks == 1 or any("loss" in file.read_text() for file in run.run.glob("metrics.jsonl")), 120)
    (tmp_path / "token").write_text("quite-another-token")
    (tmp_path / "token").chmod(0o600)
    kill(server)
    server.start(f"server.token_file={tmp_path / 'token'}")
    checkpoints = run.end(*[2] * ranks)
    kill(server)
    if ranks == 1:
        assert " was not finite at step " in run.said()
        assert not checkpoints
    else:
        assert " answered 401: this server wants its token" in run.said()
        step = int(checkpoints[0].name.removeprefix("step_"))
        assert f"stopped after step {step} of {STEPS}, with a checkpoint" in run.said()
