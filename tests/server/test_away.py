"""Runs whose server is away for longer than they can wait: they end with a checkpoint of all their steps."""

import os
import signal
import time

from clt.config import load_config
from clt.parsing import to_yaml
from clt.server.client import ActivationClient
from clt.train import checkpoint
from clt.train.watch import PREEMPTED
from tests.distributed.test_faults import ranks, start, wait_for_steps
from tests.server.conftest import eventually, pause_generator


def config(server, lm_overrides, tmp_path) -> str:
    keys = [f"data.store={tmp_path / 'here'}", "data.source=server", f"data.url={server.url}",
            "clt.d_features=24", "train.batch_tokens=500", "train.compile=false", "log.every=5",
            "checkpoint.every=0", "eval.every=0"]  # fmt: skip
    (tmp_path / "config.yaml").write_text(to_yaml(load_config(None, [*lm_overrides, *keys])))
    return str(tmp_path / "config.yaml")


def wait_until_it_stands(metrics) -> None:
    size, since = -1, time.monotonic()
    while time.monotonic() < since + 3:
        if metrics.stat().st_size != size:
            size, since = metrics.stat().st_size, time.monotonic()
        time.sleep(0.05)


def test_a_signal_while_the_server_is_away_stops_all_ranks_with_a_checkpoint(serve, lm_overrides, tmp_path):
    server, run = serve("server.max_batch=8"), tmp_path / "run"
    with start(config(server, lm_overrides, tmp_path), "parallel.timeout_seconds=6", run_dir=run) as job:
        wait_for_steps(job, run)
        server.process.kill()
        server.process.wait()
        wait_until_it_stands(run / "metrics.jsonl")
        time.sleep(6)  # to wait is no hang
        os.kill(ranks(job)[1], signal.SIGUSR1)
        _, stderr = job.communicate(timeout=60)
    assert stderr.count(f"exitcode  : {PREEMPTED}") == 2, stderr
    (step,) = checkpoint.steps(run / "checkpoints")
    assert f"stopped after step {step} of 1000, with a checkpoint" in stderr
    assert step >= 5
    assert "tried for" not in stderr
    server.start()


def come_back_as_another(server, tmp_path) -> None:
    """With a token that the run does not have: it will not help to wait."""
    (tmp_path / "token").write_text("quite-another-token")
    (tmp_path / "token").chmod(0o600)
    server.process.kill()
    server.process.wait()
    server.start(f"server.token_file={tmp_path / 'token'}")


def test_a_server_that_comes_back_as_another_costs_no_step(serve, lm_overrides, tmp_path):
    server, run = serve("server.max_batch=8"), tmp_path / "run"
    with start(config(server, lm_overrides, tmp_path), run_dir=run) as job:
        wait_for_steps(job, run)
        come_back_as_another(server, tmp_path)
        _, stderr = job.communicate(timeout=60)
    assert "exitcode  : 2" in stderr, stderr
    assert f"exitcode  : {PREEMPTED}" not in stderr, "the same command again will not help"
    assert " answered 401: this server wants its token" in stderr
    (step,) = checkpoint.steps(run / "checkpoints")
    assert f"stopped after step {step} of 1000, with a checkpoint" in stderr
    assert step >= 5


def test_a_run_that_had_no_row_leaves_nothing_to_resume(serve, lm_overrides, tmp_path):
    server, run = serve("server.wait_seconds=1"), tmp_path / "run"
    client = ActivationClient(server.url)
    generator = pause_generator(client)
    try:
        client.refresh()
        with start(config(server, lm_overrides, tmp_path), run_dir=run, processes=1) as job:
            eventually(lambda: (run / "config.yaml").exists())
            time.sleep(3)
            os.kill(ranks(job)[0], signal.SIGTERM)
            _, stderr = job.communicate(timeout=60)
    finally:
        os.kill(generator, signal.SIGCONT)
    assert f"exitcode  : {PREEMPTED}" in stderr, stderr
    assert "stopped after step 0 of 1000, before the first step, so nothing was saved" in stderr
    assert not list(run.glob("checkpoints/*"))


def test_numbers_that_are_not_finite_are_not_saved_for_a_server_that_is_away(serve, lm_overrides, tmp_path):
    server, run = serve("server.max_batch=8"), tmp_path / "run"
    client, keys = ActivationClient(server.url), ("optim.lr=1e30", "train.precision=fp32", "log.every=1000")
    with start(config(server, lm_overrides, tmp_path), *keys, run_dir=run, processes=1) as job:
        eventually(lambda: client.stats()["rows_drawn"] > 20_000)
        come_back_as_another(server, tmp_path)
        _, stderr = job.communicate(timeout=60)
    assert " was not finite at step " in stderr, stderr
    assert not list(run.glob("checkpoints/*"))
