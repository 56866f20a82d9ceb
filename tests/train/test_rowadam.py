"""The decoder's own Adam: as torch's, and the same bits whether a row takes its steps at once or when it is read."""

import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.utils import get_total_norm

from benchmarks import ranks
from clt.config import OptimConfig, load_config
from clt.errors import UserError
from clt.model.loss import Objective
from clt.model.spec import LossConfig
from clt.train import checkpoint, switch
from clt.train.optim import make_adam
from tests.model.naive import B, F, batch, coefficients, make


def training(decoder, steps, capacity, dtype=torch.float64, **rule):
    """An objective, and a function that takes a step of some batches, accumulated, clipped to a norm of 0.3.

    It returns the norm of the gradient: in place of `Update`, whose optimizer clips in float32 alone.
    """
    loss = LossConfig(sparsity_scale=0.7)
    objective = Objective(make(**rule).to(dtype), loss)
    named = dict(objective.transcoder.named_parameters())
    adam, objective.rows = make_adam(named, OptimConfig(decoder=decoder), steps, dtype)
    others = torch.optim.Adam(adam.param_groups[0]["params"], eps=1e-8)

    def step(lr, *data, skip=False):
        objective.capacity, rows = capacity, objective.rows
        objective.zero_grad()
        for part in data:
            (objective(part.to(dtype), coefficients(loss, 0.3)).total / len(data)).backward()
        square = get_total_norm([p.grad for p in named.values() if p.grad is not None]) ** 2
        norm = (square + (0 if rows is None else rows.square_through_norms())).sqrt()
        clip = (norm / 0.3).clamp_min(1)
        if rows is not None:
            rows.update(lr, torch.tensor(skip), clip)
        for parameter in others.param_groups[0]["params"]:
            parameter.grad /= clip
        others.param_groups[0]["lr"] = lr
        if not skip:
            others.step()
        return norm.detach()

    return objective, step


def assert_close(found, wanted, **tolerances):
    weights = wanted.transcoder.state_dict()
    for name, ours in found.transcoder.state_dict().items():
        torch.testing.assert_close(ours, weights[name], **tolerances, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("capacity", [None, F * B], ids=["dense", "sparse"])
def test_it_is_torchs_adam_in_float64(capacity):
    """With clipping, two micro-batches, a row of zeros, and a step that is left out; and so is the norm that clips."""
    runs = [training(decoder, 6, capacity) for decoder in ("torch", "fused")]
    for objective, _ in runs:
        with torch.no_grad():
            objective.transcoder.W_dec[1][2] = 0
        if objective.rows is not None:
            objective.rows.renew()
    for number in range(1, 7):
        norms = [step(1e-2 / number, batch(number), batch(9 + number), skip=number == 3) for _, step in runs]
        torch.testing.assert_close(*norms, rtol=1e-11, atol=0)
        assert norms[0] > 0.3, "it clips"
        assert_close(runs[1][0], runs[0][0], rtol=1e-9, atol=1e-11)
