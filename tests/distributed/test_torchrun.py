"""train_ddp.py as users start it: real torchrun processes, real stores, real exits."""

import json
import os
import shutil
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import train_ddp
from benchmarks import ranks
from clt import cli
from clt.config import load_config
from clt.explore.files import Features
from clt.lm.capture import capture
from clt.lm.load import load_language_model
from clt.lm.text import windows
from clt.model.transcoder import CrossLayerTranscoder
from clt.train import checkpoint
from clt.train.logger import read_metrics

ROOT = Path(__file__).parent.parent.parent


def failed(*arguments: str) -> str:
    """What two ranks print, one of which fails."""
    with pytest.raises(RuntimeError, match="the ranks ended with status") as error:
        ranks.train(*arguments, processes=2)
    return str(error.value)


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    last = checkpoint.steps(run_dir / "checkpoints")[-1]
    return load_file(run_dir / "checkpoints" / f"step_{last:08d}" / "model.safetensors")


TELLING_HOW_IT_ENDS = """
import atexit, os

def tell(what, rank=os.environ.get("RANK"), place=os.environ["ENDS"], touch=os.mknod):
    if rank:
        touch(f"{place}/rank{rank} {what}")

class Module:
    __del__ = lambda self, tell=tell: tell("was freed")

module = Module()
atexit.register(tell, "ran what is registered")
"""


def test_two_ranks_give_the_run_of_one(train, train_overrides, launch_env, tmp_path):
    """By launch.sh. The global batch of 61 tokens does not divide by 2, and the ranks' micro-batches differ by a row.

    There is no store, so launch.sh extracts one.
    """
    extra = ["train.batch_tokens=61", "train.accumulate=2", "eval.every=5"]
    alone = train(*extra)
    store, run = tmp_path / "new-store", tmp_path / "run"
    command = ["bash", "launch.sh", *train_overrides, *extra, f"data.store={store}", f"run.dir={run}"]
    (tmp_path / "sitecustomize.py").write_text(TELLING_HOW_IT_ENDS)
    env = os.environ | launch_env | {"NPROC": "2", "NNODES": "1"}
    path = {"PYTHONPATH": str(tmp_path), "ENDS": str(tmp_path)}
    result = subprocess.run(command, cwd=ROOT, env=env | path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert {p.name for p in tmp_path.glob("rank*")} == {"rank0 ran what is registered", "rank1 ran what is registered"}
    assert "Warning" not in result.stderr, result.stderr
    assert sorted(p.name for p in store.iterdir()) == ["heldout", "train"]
    files = sorted(p.name for p in (store / "train").iterdir() if p.suffix != ".h5")
    assert files == ["index.json", "stats.safetensors"]
    for ours, theirs in zip(read_metrics(run), alone.metrics, strict=True):
        assert ours.keys() == theirs.keys()
        for key in ours:
            # A random model's cross-entropies differ by little: the share recovered is a ratio of tiny differences.
            rel = 1e-2 if key == "eval_ce_recovered" else 1e-5
            assert ours[key] == pytest.approx(theirs[key], rel=rel, abs=1e-6), key
    for name, tensor in weights(run).items():
        torch.testing.assert_close(tensor, alone.weights[name], rtol=1e-5, atol=1e-6)
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["world_size"], alone.summary["world_size"]) == (2, 1)
    assert summary["config_hash"] == alone.summary["config_hash"]
    assert summary.keys() == alone.summary.keys() >= {"fve", "kl", "dead_fraction", "tokens_per_second"}
    assert sorted(p.name for p in (run / "report").iterdir()) == ["density.png", "layers.png", "training.png"]
    for line in ("fraction of variance explained", "top-1 agreement with the original model"):
        assert line in result.stdout
    assert result.stdout.strip().splitlines()[-1].startswith(f"The results are in {run}")
    bad = subprocess.run([*command, "clt.d_features=-1"], cwd=ROOT, env=env, capture_output=True, text=True)
    assert bad.returncode == 2
    assert "clt.d_features in the command line is -1; wanted a positive number" in bad.stderr
    assert "Traceback" not in bad.stderr


def test_a_sharded_run_is_evaluated_by_one_process(train, train_overrides, tmp_path):
    """Its own evaluation over the shards, replacement model included, against `clt eval` on its checkpoint.

    Trained with compiled kernels, to the weights of one eager process.
    """
    options = ["parallel.feature_shards=2", "train.compile=true", f"run.dir={tmp_path}"]
    model = ["clt.skip=true", "clt.window=2"]
    ranks.train(*train_overrides, *options, *model, processes=2)
    for name, tensor in train(*model).weights.items():
        torch.testing.assert_close(weights(tmp_path)[name], tensor, rtol=1e-4, atol=1e-5)
    cli.main(["eval", str(tmp_path)])
    alone = json.loads((tmp_path / "report_step_00000010" / "evaluation.json").read_text())
    sharded = json.loads((tmp_path / "summary.json").read_text())
    assert len(alone["l0_per_layer"]) == 3
    for key in alone:
        rel = 1e-2 if key == "ce_recovered" else 1e-5  # a random model's cross-entropies differ by little
        assert sharded[key] == pytest.approx(alone[key], rel=rel, abs=1e-6), key
    cli.main(["features", str(tmp_path), "--tokens", "128"])
    config = load_config(tmp_path / "config.yaml")
    lm = load_language_model(config.lm)
    text = islice(windows(config.text, "heldout", lm, config.lm.context), 128 // config.lm.context)
    tokens, _, keep = (np.stack(arrays) for arrays in zip(*text))
    x = capture(lm, torch.from_numpy(tokens).long(), keep)[:, 0].half().float()
    fires = CrossLayerTranscoder.from_pretrained(tmp_path).encode(x) > 0
    assert Features(tmp_path / "features").arrays["count"].tolist() == fires.sum(0).tolist()


def interrupt(whole: Path, half: Path, step: int) -> None:
    """Copy a run as a crash after its checkpoint of `step` would have left it."""
    shutil.copytree(whole, half)
    for later in checkpoint.steps(half / "checkpoints"):
        if later > step:
            shutil.rmtree(half / "checkpoints" / f"step_{later:08d}")
    with (half / "metrics.jsonl").open("a") as file:
        file.write('{"step": 21, "torn')  # in the middle of a line


def assert_equal_to_the_bit(ours: Path, theirs: Path, step: int) -> None:
    for name in ("model.safetensors", "optimizer.safetensors"):
        a, b = (load_file(run / "checkpoints" / f"step_{step:08d}" / name) for run in (ours, theirs))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a), name
    assert (ours / "metrics.jsonl").read_bytes() == (theirs / "metrics.jsonl").read_bytes()


RESUME = ["train.steps=20", "checkpoint.every=10", "checkpoint.keep=9", "log.every=2", "eval.every=5"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize(
    "options",
    [
        "",
        "train.precision=fp16",
        "train.accumulate=3 clt.skip=true clt.window=2",
        "train.compile=true",
        "loss.target_l0=3 loss.pre_activation=0.1 loss.pre_activation_kind=dead loss.dead_window=120 clt.threshold=1.5",
        "clt.activation=batchtopk clt.k=6 clt.k_start=9 loss.sparsity=0 loss.aux=0.1 loss.aux_k=3 "
        "loss.dead_window=120 clt.k_ramp=1 train.accumulate=3",
    ],
)
def test_a_resumed_run_is_the_undisturbed_run_to_the_bit(train, tmp_path, options):
    whole = train(*RESUME, *options.split())
    for term in {"pre_activation", "aux"} & {key.partition("=")[0].removeprefix("loss.") for key in options.split()}:
        assert any(line.get(f"train_{term}", 0) > 0 for line in whole.metrics), f"no feature was dead for {term}"
    interrupt(whole.dir, tmp_path / "half", 10)
    torch._dynamo.reset()  # as in a new process
    half = train(*RESUME, *options.split(), f"run.dir={tmp_path / 'half'}")
    assert_equal_to_the_bit(half.dir, whole.dir, 20)


def test_ranks_resume_to_the_bit(train_overrides, tmp_path):
    """Three addends: their sum depends on the order, and DDP's order must be that of the undisturbed run.

    The store is missing, so that rank 0 extracts it first.
    """
    options = [*train_overrides, *RESUME, "eval.replacement_tokens=0", "train.batch_tokens=61", "clt.skip=true"]
    options.append(f"data.store={tmp_path / 'new-store'}")
    options += "clt.activation=batchtopk clt.k=6 clt.k_start=9 clt.k_ramp=1 loss.sparsity=0".split()
    ranks.train(*options, f"run.dir={tmp_path / 'whole'}", processes=3)
    assert sorted(p.name for p in (tmp_path / "new-store").iterdir()) == ["heldout", "train"]
    interrupt(tmp_path / "whole", tmp_path / "half", 10)
    ranks.train(*options, f"run.dir={tmp_path / 'half'}", processes=3)
    assert_equal_to_the_bit(tmp_path / "half", tmp_path / "whole", 20)


GRAPHS = 10
"""The gate, its gradients, two transpositions, the pass over a decoder's gradient for one target layer and for several,
the inputs' normalisation, and three of the squared error: none again after the first step."""


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_compiled_is_compiled_once_and_equals_eager(train):
    counters = torch._dynamo.utils.counters
    eager = train("loss.pre_activation=0.1", "clt.skip=true")
    torch._dynamo.reset()
    counters.clear()
    compiled = train("loss.pre_activation=0.1", "clt.skip=true", "train.compile=true")
    assert counters["stats"]["unique_graphs"] == GRAPHS, counters["stats"]
    assert not counters["graph_break"]
    for name, tensor in compiled.weights.items():
        torch.testing.assert_close(tensor, eager.weights[name], rtol=1e-4, atol=1e-5)


def train_and_count_graphs(*arguments: str) -> None:
    train_ddp.main(load_config(arguments[0], arguments[1:]), prepare=False)
    counters = torch._dynamo.utils.counters
    print(f"{counters['stats']['unique_graphs']} graphs with {len(counters['graph_break'])} breaks")


def test_compiled_under_ddp_equals_eager_and_is_compiled_once_a_rank(train, train_overrides, tmp_path):
    extra = [
        "train.batch_tokens=61",
        "train.steps=6",
        "log.every=1",
        "eval.replacement_tokens=0",
    ]  # 31 rows on one rank, 30 on the other
    eager = train(*extra)
    options = [*train_overrides, *extra, "train.compile=true", f"run.dir={tmp_path}"]
    printed = ranks.run(train_and_count_graphs, *options, processes=2)
    assert printed.count(f"{GRAPHS} graphs with 0 breaks") == 2, "each rank compiles each kernel, whole and once"
    for ours, theirs in zip(read_metrics(tmp_path), eager.metrics, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    for name, tensor in weights(tmp_path).items():
        torch.testing.assert_close(tensor, eager.weights[name], rtol=1e-4, atol=1e-5)


def test_a_user_error_is_one_message_and_status_2(train_overrides, tmp_path):
    for arguments, message in [
        (["train.stepz=3"], "unknown key 'train.stepz'"),
        (["nowhere.yaml"], "config nowhere.yaml does not exist"),
        (
            [*train_overrides, f"run.dir={tmp_path}", "train.batch_tokens=5000"],
            "train.batch_tokens=5000 but the store has",
        ),
    ]:
        command = [sys.executable, "train_ddp.py", *arguments]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 2
        assert message in result.stderr
        assert "Traceback" not in result.stderr
        assert not list(tmp_path.iterdir()), "something half-written is left"


def test_an_error_of_rank_zero_alone_is_the_only_message(train_overrides, tmp_path):
    keys = ["lm.model=./nowhere", f"data.store={tmp_path / 'store'}", f"run.dir={tmp_path / 'run'}"]
    printed = failed(*train_overrides, *keys)
    assert printed.count("error: ") == 1, printed
    assert "[rank 0] error: the config of lm.model='./nowhere' could not be loaded" in printed
    assert 'train_ddp.py", line' not in printed, "a traceback of the other rank"
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_full_on_two_ranks_is_the_only_message(train_overrides, small_disk):
    """Rank 0 cannot write its log, and breaks the sums of the other."""
    run_dir = small_disk(48 << 10) / "run"
    options = ["train.steps=5000", "log.every=1", "eval.replacement_tokens=0", f"run.dir={run_dir}"]
    printed = failed(*train_overrides, *options)
    assert printed.count("error: ") == 1, printed
    assert "[rank 0] error: the disk is full: [Errno 28] No space left on device: " in printed
    assert f"{run_dir}/" in printed
    assert 'train_ddp.py", line' not in printed, "a traceback"


def test_an_error_of_all_ranks_is_one_message(train_overrides, tmp_path):
    options = ["optim.lr=1e30", "optim.clip_norm=null", "log.every=1", f"run.dir={tmp_path}"]
    printed = failed(*train_overrides, *options)
    assert printed.count("error: ") == 1, printed
    assert "error: train_mse was not finite at step 2" in printed


def test_prepare_checks_and_stops(train_overrides, tmp_path):
    run_dir = tmp_path / "run"
    config = load_config(train_overrides[0], [*train_overrides[1:], f"run.dir={run_dir}"])
    assert train_ddp.main(config, prepare=True) == 0
    assert not run_dir.exists()


def test_another_config_in_the_run_directory(train, tmp_path):
    run = train()
    with pytest.raises(
        ValueError, match=r"holds a run of another config \(optim.lr: found 0.001, wanted 0.5\); choose an"
    ):
        train(f"run.dir={run.dir}", "optim.lr=0.5")


def test_a_diverging_run_names_the_step_and_the_term(train):
    with pytest.raises(ValueError, match=r"train_mse was not finite at step 2; no weights changed since. Look for bad"):
        train("optim.lr=1e30", "optim.clip_norm=null", "log.every=1")
