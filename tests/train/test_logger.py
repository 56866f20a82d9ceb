"""What a run's log leaves on the disk, after crashes too, and what it tells Weights & Biases."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest

from clt.config import load_config
from clt.errors import UserError
from clt.train.logger import Logger, read_metrics

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def config(tmp_path):
    return load_config(None, [f"run.dir={tmp_path}", "train.steps=20"])


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_each_call_is_one_line_that_is_there_at_once(config, tmp_path, capfd):
    with Logger(config, 0, 0, None) as logger:
        logger.log(5, {"train_loss": 0.5, "L0": 12.0})
        logger.log(5, {"tokens_per_second": 1234.5}, "speed")
        assert lines(tmp_path / "metrics.jsonl") == [{"step": 5, "train_loss": 0.5, "L0": 12.0}]
        assert lines(tmp_path / "speed.jsonl") == [{"step": 5, "tokens_per_second": 1234.5}]
        logger.log(10, {"train_loss": 0.25})
        logger.step(4)
        logger.step(10)
    assert read_metrics(tmp_path) == lines(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in read_metrics(tmp_path)] == [5, 10]
    shown = capfd.readouterr().err.split("\r")[-1]
    assert " 10/20 " in shown
    assert "train_loss=0.25" in shown
    assert "tokens_per_second=1234" in shown, "what was logged before stays"


def test_lines_are_strict_json(config, tmp_path, capfd):
    """A value that is None is null there, and leaves the bar as it was."""
    with Logger(config, 0, 0, None) as logger:
        logger.log(5, {"train_loss": 0.5})
        logger.log(10, {"train_loss": None, "L0": 3.0})
        logger.step(10)
        with pytest.raises(ValueError, match="JSON"):
            logger.log(15, {"train_loss": float("nan")})
    assert lines(tmp_path / "metrics.jsonl")[1:] == [{"step": 10, "train_loss": None, "L0": 3.0}]
    shown = capfd.readouterr().err.split("\r")[-1]
    assert "train_loss=0.5" in shown
    assert "L0=3" in shown


def test_the_bar_of_a_resumed_run_begins_at_its_step(config, capfd):
    with Logger(config, 0, 10, None):
        pass
    assert " 10/20 " in capfd.readouterr().err


def test_an_evaluation_is_one_line_with_a_name_for_each_layer(config, tmp_path):
    with Logger(config, 0, 0, None) as logger:
        logger.log_evaluation(7, {"fve": 0.5, "fve_per_layer": [0.25, 0.75], "top1_agreement": 0.625})
        logger.log_evaluation(8, {"fve": 0.5})
    assert read_metrics(tmp_path) == [
        {
            "step": 7, "eval_fve": 0.5, "eval_fve/layer_0": 0.25, "eval_fve/layer_1": 0.75,
            "eval_top1_agreement": 0.625, "replacement_model_accuracy": 0.625,
        },
        {"step": 8, "eval_fve": 0.5},
    ]  # fmt: skip


def test_other_ranks_write_and_show_nothing(config, tmp_path, capfd):
    with Logger(config, 1, 0, None) as logger:
        logger.step(3)
        logger.log(3, {"train_loss": 0.5})
        logger.log_evaluation(3, {"fve": 0.5})
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr().err == ""
    assert not logger.evaluated


@pytest.mark.parametrize("torn", ["", '{"step": 15, "train_lo', '{"step": 3', "\0\0\0"])
def test_a_resumed_run_goes_on_behind_its_step(config, tmp_path, torn):
    before = [json.dumps({"step": step, "train_loss": float("nan")}) for step in (5, 10, 11, 15)]
    for name in ("metrics", "speed"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(before) + "\n" + torn)
    with Logger(config, 0, 10, None) as logger:
        assert not logger.evaluated
        logger.log(12, {"train_loss": 1.0})
        logger.log(12, {"tokens_per_second": 1.0}, "speed")
    for name in ("metrics", "speed"):
        assert [line["step"] for line in lines(tmp_path / f"{name}.jsonl")] == [5, 10, 12]
        assert (tmp_path / f"{name}.jsonl").read_text().splitlines()[:2] == before[:2]
    assert {file.name for file in tmp_path.iterdir()} == {"metrics.jsonl", "speed.jsonl"}


def test_a_torn_line_of_the_steps_before_is_dropped(config, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 5}\n{"step": 10, "train')
    with Logger(config, 0, 10, None) as logger:
        logger.log(11, {})
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 5}, {"step": 11}]


@pytest.mark.parametrize(
    ("line", "what"),
    [
        (b'{"step": 10, "train', "Expecting|Unterminated"),
        (b'{"step": 10, "train_loss": \xff}', "0xff"),
        (b'{"train_loss": 1.0}', "step is None; wanted int"),
        (b'{"step": "10"}', "step is '10'; wanted int"),
        (b"[10]", r"found \[10\], wanted an object"),
        (b"[" * 100_000, "recursion"),
    ],
)
def test_a_damaged_line_is_named_and_nothing_is_lost(config, tmp_path, line, what):
    content = b'{"step": 5}\n' + line + b'\n{"step": 15}\n'
    (tmp_path / "metrics.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=rf"metrics.jsonl is damaged \(.*({what}).*\); mend or delete line 2, or move"):
        Logger(config, 0, 20, None)
    assert (tmp_path / "metrics.jsonl").read_bytes() == content


@pytest.mark.parametrize(("start", "evaluated"), [(5, False), (10, True), (11, False)])
def test_whether_the_step_was_evaluated(config, tmp_path, start, evaluated):
    (tmp_path / "metrics.jsonl").write_text('{"step": 5}\n{"step": 10}\n{"step": 10, "eval_fve": 0.5}\n{"step": 11}\n')
    with Logger(config, 0, start, None) as logger:
        assert logger.evaluated == evaluated


@pytest.fixture
def wandb(monkeypatch):
    """A package of that name that records what it is asked for; tests/train/test_fields.py uses the real one."""
    logged, ended = [], []
    run = SimpleNamespace(
        id="new",
        step=0,
        log=lambda values, step: logged.append({"step": step, **values}),
        finish=lambda exit_code: ended.append(exit_code),
    )
    fake = SimpleNamespace(logged=logged, ended=ended, asked=[], run=run)

    def init(**options):
        fake.asked.append(options)
        run.id = options["id"] or "new"
        return run

    fake.init = init
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


@pytest.mark.parametrize(("given", "used"), [(None, "new"), ("old", "old")])
def test_wandb_is_told_the_same_as_the_files(config, tmp_path, wandb, given, used):
    config.log = replace(config.log, wandb=True, wandb_project="p", wandb_entity="e", wandb_mode="offline")
    with Logger(config, 0, 0, given) as logger:
        assert logger.wandb_id == used
        logger.log(5, {"train_loss": 0.5})
        logger.log(5, {"tokens_per_second": 9.0}, "speed")
        logger.log(10, {"train_loss": None, "L0": 2.0})
    assert wandb.asked == [
        {
            "project": "p", "entity": "e", "mode": "offline", "id": given, "resume": "allow", "dir": str(tmp_path),
            "name": tmp_path.name, "config": asdict(config),
        }
    ]  # fmt: skip
    first, last = lines(tmp_path / "metrics.jsonl")
    assert last.pop("train_loss") is None, "W&B has no null"
    assert wandb.logged == [first, *lines(tmp_path / "speed.jsonl"), last]
    assert wandb.ended == [0]
    with Logger(config, 1, 0, "old") as other:
        assert other.wandb_id == "old"
    assert len(wandb.asked) == 1


def test_wandb_is_not_told_again_what_it_has(config, wandb):
    """As of a run that was killed after step 15, and goes on from its checkpoint of step 10."""
    config.log.wandb, wandb.run.step = True, 16
    with Logger(config, 0, 10, "old") as logger:
        for step in (12, 15, 16, 18):
            logger.log(step, {"train_loss": 0.5})
    assert [line["step"] for line in wandb.logged] == [16, 18]


def test_wandb_that_fails_is_named(config, wandb):
    def fail(values, step):
        raise BrokenPipeError("its service is gone")

    config.log.wandb, wandb.run.log = True, fail
    with pytest.raises(UserError, match=r"W&B failed \(its service is gone\)\. .*log\.wandb=false"):  # noqa: SIM117
        with Logger(config, 0, 0, None) as logger:
            logger.log(5, {"train_loss": 0.5})


ASK = """
import sys
from clt.cli import exit_on_user_error
from clt.config import load_config
from clt.train.logger import check_wandb
exit_on_user_error(check_wandb, load_config(None, ["log.wandb=true", *sys.argv[1:]]))
"""


@pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed")
@pytest.mark.parametrize(
    ("option", "found"),
    [
        ("log.wandb_project=a/b", "Invalid project name 'a/b'"),
        ("log.wandb_project=p", "wandb login"),
        ("log.wandb_mode=offline", None),
    ],
)
def test_wandb_is_asked_before_anything_is_done(tmp_path, option, found):
    """The real package, of a user who has never logged in."""
    home = {"HOME": str(tmp_path), "PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", ASK, option]
    result = subprocess.run(command, env=home, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert result.returncode == (2 if found else 0), result.stderr
    if found:
        assert result.stderr.startswith("error: W&B failed (")
        assert found in result.stderr
        assert "or set log.wandb_mode=offline or log.wandb=false" in result.stderr
        assert result.stderr.count("\n") == 1, result.stderr


def test_wandb_hears_of_a_failure(config, wandb):
    config.log.wandb = True
    with pytest.raises(ZeroDivisionError), Logger(config, 0, 0, None):
        raise ZeroDivisionError
    assert wandb.ended == [1]


def test_wandb_that_fails_does_not_hide_the_error_of_the_run(config, wandb, capfd):
    def fail(exit_code):
        raise BrokenPipeError("its service is gone")

    config.log.wandb, wandb.run.finish = True, fail
    with pytest.raises(ZeroDivisionError), Logger(config, 0, 0, None):
        raise ZeroDivisionError
    assert "warning: W&B failed (its service is gone)" in capfd.readouterr().err
    with pytest.raises(UserError, match="its service is gone"), Logger(config, 0, 0, None):
        pass


def test_wandb_that_is_missing_is_named(config, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    config.log.wandb = True
    with pytest.raises(UserError, match=r"wandb is not installed: pip install 'clt-trainer\[wandb\]'"):
        Logger(config, 0, 0, None)
