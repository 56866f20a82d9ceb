"""The loss and its terms against naive sums."""

import pytest
import torch

from tests.model.naive import B, D, F, L, batch, losses, make, naive_features, naive_normalized, naive_reconstruction


@pytest.mark.parametrize(
    "loss",
    [
        {},
        {"target_scale": "none"},
        {"pre_activation": 0.1},
        {"pre_activation": 0.1, "pre_activation_kind": "negative"},
        {"pre_activation": 0.1, "activation": "relu"},
    ],
    ids=str,
)
@torch.no_grad()
def test_loss_equals_the_naive_sums(loss):
    loss = dict(loss)
    activation = loss.pop("activation", "jumprelu")
    clt, data = make(skip=True, activation=activation), batch()
    found = losses(clt, data, sparsity_scale=0.7, **loss)
    pre, features = naive_features(clt, data[:, 0])
    error = naive_reconstruction(clt, features, data[:, 0]) - naive_normalized(clt, data[:, 1], "target")
    if loss.get("target_scale") == "none":
        error = error * clt.normalization.target_sd
    mse = sum(error[b, l, d] ** 2 for b in range(B) for l in range(L) for d in range(D)) / (B * L * D)
    penalty = extra = 0.0
    for l in range(L):
        for f in range(F):
            norm = sum((clt.W_dec[l][f, t] ** 2).sum() for t in range(L - l)).sqrt()
            for b in range(B):
                penalty += torch.tanh(0.7 * norm * features[b, l, f]) / B
                zero = activation == "relu" or loss.get("pre_activation_kind") == "negative"
                floor = 0 if zero else clt.threshold[0, l, f]
                extra += norm * torch.relu(floor - pre[b, l, f]) / B
    torch.testing.assert_close(found.values["mse"], mse)
    torch.testing.assert_close(found.values["sparsity"], penalty)
    torch.testing.assert_close(found.total, mse + 0.3 * penalty + loss.get("pre_activation", 0.0) * extra)
    torch.testing.assert_close(found.l0_per_layer.double(), (features > 0).sum(-1).double().mean(0))
    assert torch.equal(found.fired, (features > 0).any(0))
