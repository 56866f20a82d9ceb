"""Runs whose server is away for longer than they can wait: they end with a checkpoint of all their steps."""

import os
import signal
import time

from clt.config import load_config
from clt.parsing import to_yaml
from clt.train import checkpoint
from clt.train.watch import PREEMPTED
from tests.distributed.test_faults import ranks, start, wait_for_steps


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


def test_a_server_that_comes_back_as_another_costs_no_step(serve, lm_overrides, tmp_path):
    """Here with a token that the run does not have: it will not help to wait."""
    server, run = serve("server.max_batch=8"), tmp_path / "run"
    (tmp_path / "token").write_text("quite-another-token")
    with start(config(server, lm_overrides, tmp_path), run_dir=run, processes=1) as job:
        wait_for_steps(job, run)
        server.process.kill()
        server.process.wait()
        server.start(f"server.token_file={tmp_path / 'token'}")
        _, stderr = job.communicate(timeout=60)
    assert "exitcode  : 2" in stderr, stderr
    assert "/activations/stream answered 401: this server wants its token" in stderr
    (step,) = checkpoint.steps(run / "checkpoints")
    assert f"stopped after step {step} of 1000, with a checkpoint" in stderr
    assert step >= 5
