"""The controller of lambda, on a simulated L0 that follows lambda with a delay, as a transcoder's does."""

import math
from types import SimpleNamespace

import pytest
import torch

from clt.config import LossConfig
from clt.train.steering import Steering

CPU = torch.device("cpu")


def run(steering, loss, steps, start=0, log_l0=None, exponent=-1.2, lag=60, coefficients=None):
    """L0 after the last step: its logarithm nears log(80 * (lambda / 1e-3) ** exponent) by 1/lag a step."""
    log_l0 = math.log(1500.0) if log_l0 is None else log_l0
    for step in range(start, steps):
        rise = min(1.0, (step + 1) / (loss.sparsity_ramp * steps))
        coefficient = loss.sparsity * rise * float(steering.factor())
        log_l0 += (min(math.log(80) + exponent * math.log(coefficient / 1e-3), math.log(1500)) - log_l0) / lag
        if coefficients is not None:
            coefficients.append(coefficient)
        steering.update(step + 1, SimpleNamespace(l0=lambda l0=log_l0: torch.tensor(math.exp(l0))))
    return math.exp(log_l0)


@pytest.mark.parametrize("exponent", [-0.7, -1.2, -1.6])
@pytest.mark.parametrize("sparsity", [3e-4, 1e-3, 4e-3])
@pytest.mark.parametrize("wanted", [10.0, 40.0, 80.0])
def test_the_wanted_l0_is_reached_from_any_lambda(wanted, sparsity, exponent):
    loss = LossConfig(sparsity=sparsity, sparsity_ramp=0.4, target_l0=wanted)
    assert run(Steering(loss, 1150, 768.0, CPU), loss, 1150, exponent=exponent) == pytest.approx(wanted, rel=0.02)


def test_lambda_does_not_overshoot_when_l0_is_slow():
    loss, coefficients = LossConfig(sparsity=1e-3, sparsity_ramp=0.4, target_l0=80.0), []  # which lambda is right
    run(Steering(loss, 800, 768.0, CPU), loss, 800, lag=120, exponent=-1.1, coefficients=coefficients)
    assert max(coefficients) < 2e-3


def test_without_a_wanted_l0_lambda_stays_and_there_is_no_state():
    steering = Steering(LossConfig(), 100, 768.0, CPU)
    steering.update(1, SimpleNamespace(l0=None))
    assert steering.factor() == 1.0
    assert steering.tensors() == {}


def test_the_state_is_all_that_it_goes_on_from():
    loss = LossConfig(sparsity=1e-3, sparsity_ramp=0.4, target_l0=40.0)
    whole, first, second = (Steering(loss, 300, 768.0, CPU) for _ in range(3))
    run(whole, loss, 200)
    wanted = whole.factor()
    log_l0 = math.log(run(first, loss, 200))
    for name, tensor in second.tensors().items():
        tensor.copy_(first.tensors()[name])
    assert second.factor() == wanted
    assert run(second, loss, 300, 200, log_l0) == run(first, loss, 300, 200, log_l0)
