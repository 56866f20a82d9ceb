"""The gate and its gradients, element by element, against their definitions."""

import math

import pytest
import torch

from clt.model.activations import Gradients, fire, gate, gate_gradients
from clt.model.spec import CLTConfig, LossConfig
from tests.model.naive import B, F


@pytest.mark.parametrize("floor", ["none", "zero", "threshold", "dead"])
@pytest.mark.parametrize("through_pre", [False, True])
@pytest.mark.parametrize("activation", ["jumprelu", "relu"])
def test_gradients_of_the_gate_equal_their_formula(activation, through_pre, floor):
    """One element at a time, from the definitions, the straight-through estimate included."""
    spec = CLTConfig(activation=activation, bandwidth=0.8, straight_through_pre=through_pre)
    kind = {"threshold": "below_threshold", "dead": "dead"}.get(floor, "negative")
    loss = LossConfig(sparsity_scale=0.7, pre_activation=0.0 if floor == "none" else 0.2, pre_activation_kind=kind)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    product, bias, norms, written = draw(F, B), draw(F), draw(F).abs(), draw(F, B)
    theta = draw(F).abs() * (activation == "jumprelu")
    dead = torch.arange(F) % 2 == 0
    of_penalty, of_low = torch.tensor(0.3).double(), torch.tensor(0.2).double()
    got = gate_gradients(product, bias, theta.unsqueeze(1), norms, dead, spec, loss, written, of_penalty, of_low)
    matrix, row = torch.zeros_like(product), torch.zeros_like(bias)
    expected = Gradients(matrix, row, row.clone(), row.clone(), matrix.clone())
    for b in range(B):
        for f in range(F):
            p, t, norm = (product[f, b] + bias[f]).item(), theta[f].item(), norms[f].item()
            a = p if p > t else 0
            slope = 0.3 * (1 - math.tanh(0.7 * norm * a) ** 2) * 0.7
            g = written[f, b].item() + slope * norm
            through = t / 0.8 * g * (abs(p - t) < 0.4) * (activation == "jumprelu")
            below = 0.2 * max(0, {"none": p, "zero": 0, "threshold": t, "dead": t if dead[f] else p}[floor] - p)
            expected.features[f, b] = a
            expected.pre[f, b] = g * (a > 0) + through * through_pre - 0.2 * norm * (below > 0)
            expected.bias[f] += expected.pre[f, b]
            expected.threshold[f] -= through
            expected.norm[f] += slope * a + below
    for name, ours, theirs in zip(Gradients._fields, got, expected):
        torch.testing.assert_close(ours, theirs, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_compiled_kernels_in_bf16_are_the_eager_ones():
    """In between they compute in float32, so that only the last bit of a bf16 result may differ."""
    spec, loss = CLTConfig(bandwidth=0.8, straight_through_pre=True), LossConfig(pre_activation=0.1)
    generator = torch.Generator().manual_seed(0)
    product, written = (torch.randn(48, 64, generator=generator).bfloat16() for _ in range(2))
    bias, theta, norm = (torch.rand(48, generator=generator) for _ in range(3))
    theta = theta.unsqueeze(1)
    low = torch.tensor(0.1)
    for kernel, arguments in (
        (gate, (product, bias, theta, norm, None, spec, loss)),
        (gate_gradients, (product, bias, theta, norm, None, spec, loss, written, low, low, True)),
    ):
        for eager, compiled in zip(kernel(*arguments), torch.compile(kernel, dynamic=False)(*arguments)):
            assert eager.dtype == compiled.dtype
            tight = {"rtol": 2**-7, "atol": 1e-6} if eager.dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-4}
            torch.testing.assert_close(compiled, eager, **tight)


def test_jumprelu_is_never_negative_even_under_a_negative_threshold():
    pre, theta = torch.tensor([[-0.5, 0.5]]), torch.tensor([[-1.0]])
    assert fire(pre, theta).features.tolist() == [[0.0, 0.5]]
    gated = gate(pre, torch.zeros(1), theta, torch.ones(1), None, CLTConfig(), LossConfig())
    assert gated.features.tolist() == [[0.0, 0.5]]


@pytest.mark.parametrize("shape", [(F, 1), (1, B), (1, 1), (F, B)])
def test_fire_takes_any_threshold_that_broadcasts(shape):
    """As TopK and BatchTopK need them: one for each token, or one for all."""
    generator = torch.Generator().manual_seed(0)
    pre, theta = torch.randn(F, B, generator=generator), torch.randn(shape, generator=generator)
    features, slope = fire(pre, theta)
    for (f, b), p in {(f, b): pre[f, b].item() for f in range(F) for b in range(B)}.items():
        fires = p > theta.expand(F, B)[f, b].item() and p > 0
        assert (features[f, b].item(), slope[f, b].item()) == ((p, 1.0) if fires else (0.0, 0.0))
