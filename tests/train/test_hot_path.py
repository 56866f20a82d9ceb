"""What must not happen in every step: waiting for a device, and taking memory from the system."""

import json
import os
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from statistics import median

import pytest
from torch.overrides import TorchFunctionMode

ROOT = Path(__file__).parent.parent.parent
READS = {"item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__", "__array__", "nonzero"}


class Reads(TorchFunctionMode):
    """Where this thread reads tensors' values: on a GPU, each would wait until it has computed them."""

    def __init__(self) -> None:
        self.places: Counter[str] = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in READS:
            frame = sys._getframe(1)
            while "/torch/" in frame.f_code.co_filename:
                frame = frame.f_back
            self.places[f"{Path(frame.f_code.co_filename).name}:{frame.f_code.co_name}"] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_no_step_reads_a_tensor(train, precision):
    """Ten more steps read only the ranks' flags, which are on the host anyway. test_cuda.py asks CUDA the same."""
    options = [f"train.precision={precision}", "train.accumulate=2", "checkpoint.every=0"]
    options += ["eval.every=0", "eval.replacement_tokens=0"]

    def reads(steps: int, every: int) -> Counter[str]:
        with Reads() as seen:
            train(*options, f"train.steps={steps}", f"log.every={every}")
        return seen.places

    once = reads(10, 100)
    assert reads(20, 100) - once == {"distributed.py:result": 10}
    assert (reads(10, 1) - once)["train_ddp.py:log_values"] >= 9, "logging reads, and is seen to"


PROBE = """
import ctypes, json, os, resource, sys
import torch._dynamo, transformers.modeling_utils
import train_ddp
from clt.config import load_config
from clt.train import report, run
from clt.train.logger import Logger

PR_SET_THP_DISABLE, M_MMAP_THRESHOLD = 41, -3
libc = ctypes.CDLL(None)
libc.prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)  # a fault is to be one page

def train(how):
    # glibc begins so, and adapts to what is freed: how far that goes is the luck of what lies at the heap's end.
    libc.mallopt(M_MMAP_THRESHOLD, 128 * 1024)
    faults, step = [], Logger.step

    def probe(logger, finished):
        step(logger, finished)
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)

    Logger.step = probe
    report.write_plots = lambda *_: None
    if how == "without":
        train_ddp.keep_freed_memory = lambda: None
    train_ddp.main(load_config(sys.argv[1], [*sys.argv[2:], f"run.dir={how}"]), prepare=False)
    with open(f"{how}/faults.json", "w") as file:
        json.dump(faults, file)

for how in ("with", "without"):  # a fork each, as the imports take longest
    if (child := os.fork()) == 0:
        train(how)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts Linux's page faults")
def test_a_step_takes_no_memory_from_the_system(train_overrides, tmp_path):
    """After the first steps, in which the heap finds its size. As malloc begins, it takes and returns much of it."""
    (tmp_path / "probe.py").write_text(PROBE)
    options = ["clt.d_features=8192", "train.steps=24", "log.every=100", "eval.every=0", "eval.replacement_tokens=0"]
    env = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    env |= {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, tmp_path / "probe.py", *train_overrides, *options, "checkpoint.every=0"]
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    taken = {}
    for how in ("with", "without"):
        faults = json.loads((tmp_path / how / "faults.json").read_text())
        taken[how] = median(b - a for a, b in pairwise(faults[12:])) * os.sysconf("SC_PAGE_SIZE")
    pre_activations = 60 * 8192 * 4  # bytes of one layer's
    assert taken["with"] < 0.1 * pre_activations
    assert taken["without"] > pre_activations
