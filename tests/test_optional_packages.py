"""A machine with torch and transformers but none of the optional packages: everything but their own parts works."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from clt.errors import UserError

ROOT = Path(__file__).parent.parent


def run(environment: dict[str, str], *command: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)


def test_the_packages_are_hidden(bare_environment):
    for package in ("wandb", "nnsight", "starlette"):
        assert f"No module named '{package}'" in run(bare_environment, "-c", f"import {package}").stderr


def test_a_run_and_its_evaluation(bare_environment, train_overrides, tmp_path):
    """Extraction included."""
    run_dir = str(tmp_path / "run")
    options = [*train_overrides, f"data.store={tmp_path / 'store'}", f"run.dir={run_dir}"]
    code = (
        "import sys, train_ddp; from clt import cli; from clt.config import load_config\n"
        "train_ddp.main(load_config(sys.argv[1], sys.argv[2:]), prepare=False)\n"
        f"cli.main(['eval', {run_dir!r}])"
    )
    result = run(bare_environment, "-c", code, *options)
    assert result.returncode == 0, result.stderr
    again = json.loads((tmp_path / "run" / "report_step_00000010" / "evaluation.json").read_text())
    assert again["fve"] == pytest.approx(json.loads((tmp_path / "run" / "summary.json").read_text())["fve"])


def test_what_does_need_one_says_which(bare_environment, train, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"pip install 'clt-trainer\[wandb\]'"):
        train("log.wandb=true")
    result = run(bare_environment, "-m", "clt.cli", "serve")
    assert (result.returncode, "pip install 'clt-trainer[serve]'" in result.stderr) == (2, True), result.stderr


def test_the_tests_are_collected(bare_environment):
    """Those of the missing packages are left out; none fails to be imported."""
    result = run(
        bare_environment, "-m", "pytest", "--collect-only", "-q", "-p", "no:xdist", "-p", "no:xdist.looponfail"
    )
    assert result.returncode == 0, result.stdout
    assert "tests/train/test_fields.py::test_log_every" in result.stdout
    assert "tests/server/" not in result.stdout
