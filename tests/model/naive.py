"""A small transcoder, and its forward pass as a naive double loop in float64."""

import torch

from clt.model.loss import Losses, Objective
from clt.model.spec import CLTConfig, LossConfig
from clt.model.transcoder import CrossLayerTranscoder

L, D, F, B = 3, 5, 7, 11
VARIANTS = [
    {},
    {"activation": "relu"},
    {"cross_layer": False},
    {"normalization": "dim"},
    {"normalization": "token"},
    {"normalization": "none"},
    {"normalization": "token", "skip": True},
    {"normalization": "dim", "skip": True},
    {"window": 2},
]


def make(d_features=F, shard=(0, 1), sum_shards=lambda y: y, **options) -> CrossLayerTranscoder:
    """Random weights, thresholds above zero and random statistics, in float64."""
    torch.manual_seed(0)
    spec = CLTConfig(d_features=d_features, **options)
    clt = CrossLayerTranscoder(L, D, spec, shard=shard, sum_shards=sum_shards).double()
    with torch.no_grad():
        for parameter in clt.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        clt.threshold.abs_()
    clt.normalization.set(*(torch.randn(L, D, dtype=torch.float64).abs() + 0.5 for _ in range(4)))
    return clt


def batch(seed=1) -> torch.Tensor:
    return torch.randn(B, 2, L, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 2 + 0.5


def losses(clt, data, sparsity=0.3, compile=False, dead=None, **loss) -> Losses:
    """What a batch costs; `loss` are fields of LossConfig."""
    config = LossConfig(**loss)
    return Objective(clt, config, compile=compile)(data, coefficients(config, sparsity), dead=dead)


def coefficients(loss, sparsity=0.3) -> dict[str, float]:
    return {"sparsity": sparsity, "pre_activation": loss.pre_activation, "aux": loss.aux}


def naive_normalized(clt, x, side):
    """One vector at a time, from the definition."""
    norm = clt.normalization
    out = torch.empty_like(x)
    for b in range(len(x)):
        for l in range(L):
            if norm.kind == "token" and side == "input":
                out[b, l] = (x[b, l] - x[b, l].mean()) / x[b, l].std(correction=0)
            else:
                out[b, l] = (x[b, l] - getattr(norm, f"{side}_mean")[l]) / getattr(norm, f"{side}_sd")[l]
    return out


def naive_features(clt, x):
    x = naive_normalized(clt, x, "input")
    features = torch.zeros(len(x), L, F, dtype=torch.float64)
    pre = torch.zeros_like(features)
    for b in range(len(x)):
        for l in range(L):
            for f in range(F):
                p = (x[b, l] * clt.W_enc[l, :, f]).sum() + clt.b_enc[l, f]
                pre[b, l, f] = p
                on = p > 0 if clt.spec.activation == "relu" else p > clt.threshold[0, l, f] and p > 0
                if on:
                    features[b, l, f] = p
    return pre, features


def naive_reconstruction(clt, features, x):
    """y~[b, t] as the double sum over source layers and features, and over the dimensions of x~ that the skip reads."""
    x = naive_normalized(clt, x, "input")
    reach = (clt.spec.window or L) if clt.spec.cross_layer else 1
    y = torch.zeros(len(features), L, D, dtype=torch.float64)
    for b in range(len(features)):
        for t in range(L):
            y[b, t] = clt.b_dec[t]
            for s in range(t + 1):
                if t - s < reach:
                    for f in range(F):
                        y[b, t] += features[b, s, f] * clt.W_dec[s][f, t - s]
            for d in range(D if clt.spec.skip else 0):
                y[b, t] += x[b, t, d] * clt.W_skip[t, d]
    return y
