"""The command for a GPU, rehearsed on the CPU: every part runs, and what it checks can fail."""

import json
import os
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, gpu_checks, gpu_runs
from clt.train import distributed

ROOT = Path(__file__).parents[2]


def command(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "benchmarks/gpu.py", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )


# The longest, one that trains in processes of its own, and one that has a GPU alone.
BY_THE_COMMAND = {"tests", "resume", "data"}
IN_ONE_PROCESS = """
import importlib, json, sys
from benchmarks import gpu

parts = {name: importlib.import_module(f"benchmarks.{gpu.PARTS[name].module}") for name in sys.argv[1:]}
print("\\n" + json.dumps({name: getattr(module, name)(True) for name, module in parts.items()}))
"""


@pytest.mark.timeout(600)
def test_every_part_runs_without_the_optional_packages(bare_environment: dict[str, str], tmp_path: Path) -> None:
    """Three by the command, each in its own process, and the others in one, which imports torch once."""
    out = tmp_path / "results" / "gpu.json"
    done = command(bare_environment, "--rehearse", "--only", *BY_THE_COMMAND, "--json", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    assert found["parts"].keys() == BY_THE_COMMAND
    assert {"device", "versions", "commit"} <= found["machine"].keys()
    assert len(found["parts"]["resume"]["digests"]) == 2
    assert found["parts"]["data"]["reader"][0]["stall_share"] >= 0

    others = [name for name in gpu.PARTS if name not in BY_THE_COMMAND]
    run = [sys.executable, "-c", IN_ONE_PROCESS, *others]
    env = bare_environment | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(run, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    parts = json.loads(done.stdout.splitlines()[-1])
    assert list(parts) == others
    assert all(part["ok"] for part in parts.values()), parts
    assert parts["steps"]["rows"][0]["over_textbook"] > 0


@pytest.mark.timeout(600)
def test_the_layouts_of_two_ranks(bare_environment: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "gpus.json"
    done = command(bare_environment, "--ranks", "2", "--rehearse", "--json", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    parts = json.loads(out.read_text())["parts"]
    assert parts["overlap"]["difference"] == 0, "the sum of two numbers has one order"
    assert min(parts["overlap"]["early_ms"], parts["overlap"]["at_end_ms"]) > 0
    ((layout, row),) = parts["layouts"]["layouts"].items()
    assert layout == "1x2"
    assert 0 < row["difference_from_one_rank"] < 1e-5
    assert len(row["digests"]) == 2


def test_without_a_gpu_every_part_says_so_and_the_file_is_written(tmp_path: Path) -> None:
    env = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = command(env, "--only", "hook", "limits", "--json", str(tmp_path / "gpu.json"))
    assert done.returncode == 1
    parts = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert [part["ok"] for part in parts.values()] == [False, False]
    assert all("found 0 GPUs, wanted 1; --rehearse runs toy sizes" in part["error"] for part in parts.values())


def test_a_part_that_takes_too_long_is_ended_with_its_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = tmp_path / "slow"
    slow.write_text(f"#!/bin/sh\nsleep 1000 &\necho $! > {tmp_path / 'child'}\nwait\n")
    slow.chmod(0o755)
    monkeypatch.setattr(gpu.sys, "executable", str(slow))
    result = gpu._in_a_process("hook", 5, Namespace(ranks=0, rehearse=True))
    assert (result["ok"], result["error"]) == (False, "took longer than 5 s")
    child = Path("/proc", (tmp_path / "child").read_text().strip(), "status")
    while child.exists() and "Z (zombie)" not in child.read_text():
        time.sleep(0.01)
    assert not gpu._in_a_process("hook", 0, Namespace(ranks=0, rehearse=True))["ok"], "no time is left to begin"


def test_rounding_of_products_is_seen_in_the_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_checks, "PRECISIONS", {"fp32": torch.bfloat16})
    found = gpu_checks.gradients(True)
    assert not found["ok"]
    assert {"W_enc", "W_dec.0", "threshold"} <= set(found["rows"][-1]["over_bar"])


def test_a_hook_that_changes_one_bit_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    summed = distributed.sum_bucket

    def inexact(group, bucket):
        bucket.buffer().mul_(1 + 2**-22)
        return summed(group, bucket)

    monkeypatch.setattr(distributed, "sum_bucket", inexact)
    found = gpu_checks.hook(True)
    assert not found["ok"]
    assert found["different"]


def test_rows_that_are_left_out_of_the_sums_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the last eighth of the largest batch had been read or written elsewhere."""
    sums = gpu_checks._sums
    monkeypatch.setattr(gpu_checks, "_sums", lambda o, batch: sums(o, batch[:248] if len(batch) == 256 else batch))
    found = gpu_checks.wide_index(True)
    assert not found["ok"]
    assert min(found["relative_differences"].values()) > 0.05


def test_rounded_partial_sums_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = gpu_checks._losses

    def rounded(objective, batch):
        add, clt = objective.transcoder.sum_shards, objective.transcoder
        clt.sum_shards = lambda partial: add(partial.copy_(partial.bfloat16()))
        return losses(objective, batch)

    monkeypatch.setattr(gpu_checks, "_losses", rounded)
    assert not gpu_checks.partial_sums(True)["ok"]


def test_runs_that_end_differently_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without training: the outcome of each run is its name."""
    monkeypatch.setattr(gpu_runs, "_start", lambda base, name, *_: None)
    monkeypatch.setattr(gpu_runs, "_resume", lambda base, name, *_: None)
    monkeypatch.setattr(gpu_runs, "_finish", lambda run: None)
    monkeypatch.setattr(gpu_runs, "_speed", lambda run: {})
    monkeypatch.setattr(gpu_runs, "_digest", lambda run: run.name)
    assert not gpu_runs.resume(True)["ok"]


def test_processes_are_counted_on_each_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once the run has begun to log, by what nvidia-smi says."""
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nprintf 'GPU-a, 11\\\nGPU-b, 12\\\nGPU-a, 12\\\n'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    (tmp_path / "speed.jsonl").touch()
    with subprocess.Popen(["sleep", "1000"], text=True) as run:
        assert gpu_runs._processes_on_gpus(run, tmp_path) == {"GPU-a": 2, "GPU-b": 1}
        run.kill()


# What inductor of torch 2.11 writes for an H100, shortened.
KERNEL = """
{name} = async_compile.triton('{name}', '''
import triton
@triton_heuristics.{heuristic}(
    size_hints={{'x': 16384, 'r0_': 4096}},
    filename=__file__,
    triton_meta={{'signature': {{'in_ptr0': '*bf16'}}, 'configs': [{{(0,): [['tt.divisibility', 16]]}}]}},
    inductor_meta={{'autotune_hints': set(), 'kernel_name': '{name}', {options}, 'tiling_scores': {{'x': 7}}}}
)
@triton.jit
def {name}(in_ptr0, out_ptr0, xnumel, r0_numel, XBLOCK : tl.constexpr, R0_BLOCK : tl.constexpr):
    xnumel = 9216
''', device_str='cuda')
"""
DEFAULT = "'dynamic_scale_rblock': True, 'max_autotune': False, 'deterministic': False"
PINNED = "'dynamic_scale_rblock': False, 'max_autotune': False, 'deterministic': True"


def test_a_reduction_that_is_not_pinned_is_seen() -> None:
    kernels = [("red_0", "reduction", DEFAULT), ("red_1", "reduction", PINNED), ("poi_0", "pointwise", DEFAULT)]
    kernels += [("per_0", "persistent_reduction", PINNED), ("per_1", "persistent_reduction", DEFAULT)]
    code = "".join(KERNEL.format(name=name, heuristic=kind, options=options) for name, kind, options in kernels)
    found = [("red_0", False), ("red_1", True), ("per_0", True), ("per_1", False)]
    assert gpu_checks.reductions(code) == found
