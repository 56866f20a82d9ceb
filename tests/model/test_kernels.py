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

from clt.model.kernels import AdamSteps, DecoderRows, RowGradient, reference

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


def sizes(steps, lr, betas, dtype):
    """As AdamSteps has them."""
    n = torch.arange(steps + 1, dtype=torch.float64)
    return torch.stack([lr / (1 - betas[0] ** n), (1 - betas[1] ** n).rsqrt()], 1).to(dtype)


def rows_of(weight, narrow):
    zeros = torch.zeros_like(weight)
    last = torch.zeros(len(weight), dtype=torch.int32)
    weight, norms = weight.detach().clone(), weight.detach().flatten(1).norm(dim=1)
    return DecoderRows(weight, zeros, zeros.clone(), norms, zeros.to(narrow), last)


@pytest.mark.parametrize("clip", [None, 0.1])
def test_adam_rows_are_those_of_torch(clip):
    """In float64, with the gradient through the norm, clipping and a skipped step, whose number counts no more."""
    torch.manual_seed(0)
    weight, betas = torch.nn.Parameter(torch.randn(5, 2, 3, dtype=torch.float64)), (0.8, 0.95)
    rows = rows_of(weight, torch.bfloat16)
    adam = torch.optim.Adam([weight], lr=0.02, betas=betas, eps=1e-6)
    steps = AdamSteps(torch.zeros((), dtype=torch.int32), sizes(6, 0.02, betas, torch.float64), betas, 1e-6)
    divisor = torch.tensor(1.0 if clip is None else 1 / clip, dtype=torch.float64)
    for step in range(6):
        grad, through, skip = torch.randn_like(weight), torch.randn(5, dtype=torch.float64), torch.tensor(step == 3)
        if not skip:
            weight.grad = (grad + weight.detach() * through.view(-1, 1, 1)) / divisor
            adam.step()
        reference.adam_rows(
            rows, steps._replace(newest=steps.newest + 1), RowGradient(grad, through, divisor, skip), False
        )
        steps.newest.add_(~skip)
        torch.testing.assert_close(rows.weight, weight.detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(rows.norms, weight.detach().flatten(1).norm(dim=1), rtol=1e-12, atol=0)
        assert torch.equal(rows.narrow, rows.weight.bfloat16())


@pytest.mark.parametrize("width", [4, 16])
def test_lazy_rows_are_those_of_torch_after_200_steps(monkeypatch, width):
    """Rows without a gradient take their steps when they are read, or at last: with the bits of taking them at once.

    One row has no gradient after the first step, one is often read without one, one has it through its norm alone.
    """
    torch.manual_seed(0)
    monkeypatch.setattr(reference, "CACHED", 3 * width)  # three rows at once
    weight, betas, F = torch.nn.Parameter(0.05 * torch.randn(8, 1, width)), (0.9, 0.999), 8
    rows, at_once = rows_of(weight, torch.bfloat16), rows_of(weight, torch.bfloat16)
    adam, table = torch.optim.Adam([weight], lr=1e-3, betas=betas), sizes(200, 1e-3, betas, torch.float32)
    share = torch.linspace(0.02, 0.5, F).index_fill_(0, torch.tensor([0, 1]), 0)
    behind = torch.zeros((), dtype=torch.int32)
    for number in range(1, 201):
        fires = (torch.rand(F) < share) | torch.tensor(number == 1)
        grad, through = torch.randn_like(weight) * fires.view(-1, 1, 1), torch.zeros(F)
        through[7], grad[7] = float(fires[7]), 0
        steps = AdamSteps(torch.tensor(number, dtype=torch.int32), table, betas, 1e-8)
        read = fires | (torch.rand(F) < torch.tensor([0, 0.3, 0, 0, 0, 0, 0, 0]))
        reference.catch_up_rows(rows, steps._replace(newest=steps.newest - 1), read)
        assert torch.equal(rows.weight[read], at_once.weight[read])
        assert torch.equal(rows.norms[read], at_once.norms[read])
        weight.grad = grad + weight.detach() * through.view(-1, 1, 1)
        adam.step()
        gradient = RowGradient(grad, through, torch.tensor(1.0), torch.tensor(False))
        for each, lazy in ((rows, True), (at_once, False)):
            reference.adam_rows(each, steps, gradient, lazy)
        behind = torch.maximum(behind, number - rows.last.min())
    assert behind == 199
    reference.catch_up_rows(rows, steps, torch.ones(F, dtype=torch.bool))
    for found, wanted in zip(rows, at_once):
        assert torch.equal(found, wanted)
    assert (rows.weight - weight).abs().max() < 2.4e-7
    state = adam.state[weight]
    torch.testing.assert_close(rows.mean, state["exp_avg"], rtol=0, atol=2.4e-7)
    torch.testing.assert_close(rows.square, state["exp_avg_sq"], rtol=2e-6, atol=1e-9)
