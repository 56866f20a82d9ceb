"""The Triton kernels without a GPU: by Triton's interpreter, and compiled for an H100.

Each is a process of its own: Triton decides when it is imported whether to interpret.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from clt.model.kernels import AdamStep, Rows, reference

ROOT = Path(__file__).parent.parent.parent
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


def run(*command: str, **environment: str) -> str:
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"} | environment
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_triton
def test_interpreted_kernels_are_their_references():
    run("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/model/interpreted.py", TRITON_INTERPRET="1")


@needs_triton
def test_every_launch_compiles_for_an_h100(tmp_path):
    """No kernel keeps numbers on the stack, and 16 warps of each fit on a multiprocessor."""
    found = json.loads(run("tests/model/compiled.py", TRITON_CACHE_DIR=str(tmp_path)))
    defined = set()
    for file in (ROOT / "clt" / "model" / "kernels").glob("*.py"):
        parts = file.read_text().split("@triton.jit\ndef ")[1:]
        defined |= {part.partition("(")[0] for part in parts}
    assert {launch["kernel"] for launch in found} == {name for name in defined if not name.startswith("_")}
    for launch in found:
        assert launch["spilled_bytes"] == 0, launch
        assert launch["registers"] <= 128, launch


@pytest.mark.parametrize("clip", [None, 0.1])
def test_adam_rows_are_those_of_torch(clip):
    """In float64, with the gradient through the norm, clipping and a skipped step, whose number counts no more."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(5, 2, 3, dtype=torch.float64))
    zeros = torch.zeros_like(weight)
    rows = Rows(weight.detach().clone(), zeros.clone(), zeros.clone(), zeros[:, 0, 0].clone(), zeros.bfloat16())
    adam = torch.optim.Adam([weight], lr=0.02, betas=(0.8, 0.95), eps=1e-6)
    number = torch.zeros((), dtype=torch.float64)
    for step in range(6):
        grad, through, skip = torch.randn_like(weight), torch.randn(5, dtype=torch.float64), torch.tensor(step == 3)
        divisor = torch.tensor(1.0 if clip is None else 1 / clip, dtype=torch.float64)
        if not skip:
            weight.grad = (grad + weight.detach() * through.view(-1, 1, 1)) / divisor
            adam.step()
            number += 1
        reference.adam_rows(rows, grad, through, AdamStep(number, skip, divisor, 0.02), (0.8, 0.95), 1e-6)
        torch.testing.assert_close(rows.weight, weight.detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(rows.norms, weight.detach().flatten(1).norm(dim=1), rtol=1e-12, atol=0)
        assert torch.equal(rows.narrow, rows.weight.bfloat16())
