"""The reference step of the benchmark and ours: the same loss and the same gradients."""

import copy

import pytest
import torch

from benchmarks.textbook import Textbook
from clt.model.loss import Objective
from clt.model.spec import CLTConfig, LossConfig
from clt.model.transcoder import CrossLayerTranscoder


def terms(sparsity: float) -> dict[str, float]:
    return {"sparsity": sparsity, "pre_activation": 0.0, "aux": 0.0}


@pytest.mark.parametrize("through_pre", [False, True])
def test_our_step_is_the_textbook_step(through_pre: bool) -> None:
    torch.manual_seed(0)
    L, D, F, B = 4, 6, 10, 32
    spec = CLTConfig(d_features=F, threshold=0.1, bandwidth=0.5, straight_through_pre=through_pre)
    clt = CrossLayerTranscoder(L, D, spec).double()
    x, y = torch.randn(B, L, D).double() * 3 + 1, torch.randn(B, L, D).double() * 0.2
    clt.normalization.set(x.mean(0), x.std(0), y.mean(0), y.std(0))
    with torch.no_grad():
        clt.b_enc.normal_(0, 0.1)
        clt.b_dec.normal_(0, 0.1)
        clt.threshold.uniform_(-0.05, 0.3)
    objective = Objective(clt, LossConfig(sparsity_scale=0.7))
    textbook = Textbook(objective)
    batch, sparsity = torch.stack([x, y], 1), 0.03

    ours, theirs = objective(batch, terms(sparsity)).total, textbook(batch, sparsity)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    ours.backward()
    theirs.backward()
    for name in ("W_enc", "b_enc", "threshold", "b_dec"):
        found, wanted = getattr(clt, name).grad, getattr(textbook, name).grad
        assert wanted.abs().max() > 1e-6, name
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12, msg=name)
    for s, weight in enumerate(clt.W_dec):
        wanted = textbook.W_dec.grad[s, s:].transpose(0, 1)  # (F, L - s, D)
        torch.testing.assert_close(weight.grad, wanted, rtol=1e-10, atol=1e-12)
    assert not textbook.W_dec.grad[~textbook.mask.bool()[:, :, 0, 0]].any()


def test_in_bf16_our_step_is_about_as_near_the_truth_as_the_textbook_step() -> None:
    """Against float64, both under autocast, whose products round to 8 bits."""
    torch.manual_seed(0)
    L, D, F, B = 3, 16, 24, 64
    clt = CrossLayerTranscoder(L, D, CLTConfig(F, threshold=0.1, bandwidth=0.5, normalization="none"))
    batch, sparsity = torch.randn(B, 2, L, D), 0.03
    objective = Objective(clt, LossConfig())
    textbook, exact = Textbook(objective), Objective(copy.deepcopy(clt).double(), LossConfig())
    truth = exact(batch.double(), terms(sparsity)).total
    truth.backward()
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = objective(batch, terms(sparsity)).total, textbook(batch, sparsity)
    ours.backward()
    theirs.backward()
    assert abs(ours - truth) < max(1.5 * abs(theirs - truth), 2**-8 * truth)

    def error(gradient: torch.Tensor | None, truth: torch.Tensor | None) -> float:
        assert gradient is not None
        assert truth is not None
        return ((gradient.double() - truth).norm() / truth.norm()).item()

    for name in ("W_enc", "b_enc", "threshold", "b_dec"):
        found, wanted, truth = (getattr(model, name).grad for model in (clt, textbook, exact.transcoder))
        assert error(found, truth) < max(1.5 * error(wanted, truth), 2**-8), name
    assert textbook.W_dec.grad is not None
    for s, (weight, truth) in enumerate(zip(clt.W_dec, exact.transcoder.W_dec)):
        wanted = textbook.W_dec.grad[s, s:].transpose(0, 1)
        assert error(weight.grad, truth.grad) < max(1.5 * error(wanted, truth.grad), 2**-8), s


def test_a_zero_decoder_row_that_fires_gets_no_gradient_through_its_norm() -> None:
    """Also under a loss scale, with which a division by almost nothing would overflow to inf, and inf * 0 is NaN."""
    clt = CrossLayerTranscoder(3, 4, CLTConfig(d_features=8, activation="relu"))
    with torch.no_grad():
        clt.W_dec[1][5] = 0
        clt.b_enc[1, 5] = 9.0  # it fires
    (Objective(clt, LossConfig())(torch.randn(16, 2, 3, 4), terms(0.03)).total * 2**24).backward()
    assert all(weight.grad is None or weight.grad.isfinite().all() for weight in clt.parameters())
    assert clt.W_dec[1].grad is not None
    assert clt.W_dec[1].grad[5].any()  # of what it writes
