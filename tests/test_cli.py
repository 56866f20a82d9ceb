"""The `clt` command as a user types it."""

import json
import shutil
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from clt import cli
from clt.data.store import DiscBuffer
from clt.model.transcoder import CrossLayerTranscoder

ROOT = Path(__file__).parent.parent


def clt(*arguments: object) -> subprocess.CompletedProcess:
    """The command in a process of its own."""
    command = [sys.executable, "-m", "clt.cli", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def refused(result: subprocess.CompletedProcess) -> str:
    """The one message of a command that a user's mistake ended."""
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    return line


@pytest.fixture
def here(capfd):
    """here(*arguments) -> the command in this process, seconds sooner, as `clt` gives it."""

    def run(*arguments: object) -> subprocess.CompletedProcess:
        status = 0
        try:
            cli.main([str(argument) for argument in arguments])
        except SystemExit as end:
            status = end.code
        return subprocess.CompletedProcess(arguments, status, *capfd.readouterr())

    return run


def test_config_prints_every_field_with_its_doc():
    result = clt("config", "configs/gpt2.yaml", "train.steps=7")
    assert result.returncode == 0, result.stderr
    assert "model: openai-community/gpt2" in result.stdout
    assert "# Features per layer (F)." in result.stdout
    assert "steps: 7 " in result.stdout


def test_help_and_config_errors(here):
    assert "extract" in here("--help").stdout
    assert "did you mean 'steps'" in refused(here("extract", "train.stepz=3"))
    assert "unrecognized arguments: --stepz" in here("eval", "runs/x", "--stepz", "3").stderr


@pytest.mark.skipif(find_spec("starlette") is None, reason="starlette is not installed")
def test_serve_refuses_mistakes_before_it_creates_anything(here, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        found = refused(here("serve", "configs/quickstart.yaml", "--config", "test", f"server.port={port}"))
    assert f"server.host=127.0.0.1 server.port={port}: Address already in use; choose others" in found
    assert "server.host=0.0.0.0 lets other machines in" in refused(here("serve", "server.host=0.0.0.0"))
    monkeypatch.setenv("CLT_SERVER_ROWS", "abc")
    assert "server.rows in the environment is 'abc'; wanted int" in refused(here("serve"))
    monkeypatch.setenv("CLT_SERVER_ROW", "5")
    assert "CLT_SERVER_ROW in the environment sets nothing; known:" in refused(here("serve"))
    result = here("serve", "--config", "test", "--prot", "server.rows=9", "x")
    assert (result.returncode, "unrecognized arguments: --prot" in result.stderr) == (2, True), result.stderr


def test_extract_then_inspect_then_verify(config, here, tmp_path):
    base = config()
    overrides = [
        f"lm.model={base.lm.model}", "lm.context=16", f"text.source={base.text.source}", "text.heldout_documents=20",
        f"data.store={tmp_path / 's'}", "data.train_tokens=300", "data.heldout_tokens=50", "data.shard_rows=100",
    ]  # fmt: skip
    result = clt("extract", *overrides)
    assert result.returncode == 0, result.stderr
    assert "train: 300 rows in 3 shards" in result.stdout
    assert "row/s" in result.stderr
    result = here("inspect", tmp_path / "s" / "train", "--verify")
    assert result.returncode == 0, result.stderr
    assert "300" in result.stdout
    assert "checksum is as the index says" in result.stdout
    shard = tmp_path / "s" / "train" / "shard_00001.h5"
    data = bytearray(shard.read_bytes())
    data[-100] ^= 1
    shard.write_bytes(data)
    assert "shard_00001.h5" in refused(here("inspect", tmp_path / "s" / "train", "--verify"))


def test_inspect_refuses_a_directory_that_is_not_a_store(here, tmp_path):
    assert "index.json" in refused(here("inspect", tmp_path))


def test_a_model_that_cannot_be_loaded(here, tmp_path):
    keys = ["lm.model=./nowhere", f"data.store={tmp_path / 's'}"]
    assert "./nowhere" in refused(here("extract", *keys))
    assert not (tmp_path / "s").exists()


NO_NNSIGHT = pytest.mark.skipif(find_spec("nnsight") is None, reason="nnsight is not installed")


@pytest.mark.parametrize(
    ("rule", "flag"),
    [
        ("", ()),
        ("clt.activation=relu clt.cross_layer=false", ()),
        ("clt.activation=topk clt.k=4 clt.skip=true clt.window=2 loss.sparsity=0", ()),
        pytest.param(
            "clt.activation=batchtopk clt.k=9 clt.by_norm=true loss.sparsity=0", ("--nnsight",), marks=NO_NNSIGHT
        ),
    ],
)
def test_eval_repeats_the_summary_from_the_checkpoint(train, stores, here, tmp_path, rule, flag):
    """Of the stores it needs the held-out one, and the training one's statistics."""
    shutil.copytree(stores / "heldout", tmp_path / "heldout")
    (tmp_path / "train").mkdir()
    shutil.copy(stores / "train" / "stats.safetensors", tmp_path / "train")
    run = train(*rule.split())
    resolved = (run.dir / "config.yaml").read_text()
    (run.dir / "config.yaml").write_text(resolved.replace(str(stores), str(tmp_path)))
    result = here("eval", run.dir, *flag)
    assert result.returncode == 0, result.stderr
    report = run.dir / "report_step_00000010"
    assert {file.name for file in report.glob("*.png")} == {"training.png", "layers.png", "density.png"}
    again = json.loads((report / "evaluation.json").read_text())
    for key in ("fve", "nmse", "l0_total", "top1_agreement", "kl", "ce_original", "ce_replaced", "ce_recovered"):
        assert again[key] == pytest.approx(run.summary[key], rel=1e-4, abs=1e-6), key
    assert "fraction of variance explained" in result.stdout
    k = next((k for name, k in (("=topk", 3 * 4), ("=batchtopk", 9)) if name in rule), None)
    wanted = k and pytest.approx(run.summary["l0_total"] / k)
    assert run.summary.get("l0_over_k") == again.get("l0_over_k") == wanted
    loaded = CrossLayerTranscoder.from_pretrained(run.dir / "checkpoints" / "step_00000010")
    rows = DiscBuffer(stores / "heldout")
    features = loaded.encode(rows[0 : len(rows)][:, 0].float())
    assert (features > 0).sum().item() / len(rows) == pytest.approx(run.summary["l0_total"], rel=1e-6)


def test_eval_refuses_a_run_or_checkpoint_that_does_not_exist(train, here, tmp_path):
    assert "has no config.yaml" in refused(here("eval", tmp_path))
    run = train()
    assert "has no checkpoint of step 3; found [10]" in refused(here("eval", run.dir, "--step", "3"))


def test_features_of_a_run(train, here, tmp_path):
    run = train()
    assert "--tokens is 0; wanted 1 or more" in refused(here("features", run.dir, "--tokens", "0"))
    assert "has no checkpoint of step 3; found [10]" in refused(here("features", run.dir, "--step", "3"))
    result = here("features", run.dir, "--tokens", "200", "--neuronpedia", tmp_path / "batches")
    assert result.returncode == 0, result.stderr
    assert len(list((tmp_path / "batches").glob("layer_[0-2]/batch-0.json"))) == 3
    assert result.stdout.startswith(f"{run.dir}/features: 72 features, of which ")
    assert result.stdout.endswith(f"clt browse {run.dir}\n")
    assert "of disk" in result.stderr
    assert "token/s" in result.stderr
    assert "holds features of something else: windows: found 13, wanted 26" in refused(
        here("features", run.dir, "--tokens", "401")
    )


def test_ctrl_c_ends_a_command_without_a_message(capsys):
    def work():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as ended:
        cli.exit_on_user_error(work)
    assert ended.value.code == 130
    assert capsys.readouterr().err == ""
