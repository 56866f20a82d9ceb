"""Directories in other tools' formats, written here, each with its formula written out: x -> (features, outputs)."""

import json

import torch
import yaml
from safetensors.torch import save_file

L, D, F = 3, 4, 10
HOOKS = {"feature_input_hook": "hook_resid_mid", "feature_output_hook": "hook_mlp_out"}


def numbers(*shape):
    return torch.randn(shape) * 0.5


def circuit_tracer(folder, *, jump=True, skip=False, dtype=torch.float32, layers=L, width=D, features=F, **settings):
    """A cross-layer transcoder; returns the function that it is, x (B, L, D) -> features (B, L, F), y (B, L, D)."""
    torch.manual_seed(0)
    config = {"model_kind": "cross_layer_transcoder", "model_name": "org/lm", **HOOKS, **settings}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    found = []
    for i in range(layers):
        encoder = {f"W_enc_{i}": numbers(features, width).to(dtype), f"b_enc_{i}": numbers(features).to(dtype),
                   f"b_dec_{i}": numbers(width).to(dtype)}  # fmt: skip
        encoder |= {f"threshold_{i}": torch.rand(features).to(dtype)} if jump else {}
        encoder |= {f"W_skip_{i}": numbers(width, width).to(dtype)} if skip else {}
        decoder = {f"W_dec_{i}": numbers(features, layers - i, width).to(dtype)}
        save_file(encoder, folder / f"W_enc_{i}.safetensors")
        save_file(decoder, folder / f"W_dec_{i}.safetensors")
        found.append({name.removesuffix(f"_{i}"): t.double() for name, t in (encoder | decoder).items()})

    def function(x):
        a, y = torch.zeros(len(x), layers, features).double(), torch.zeros_like(x).double()
        for i, w in enumerate(found):
            pre = x[:, i].double() @ w["W_enc"].T + w["b_enc"]
            a[:, i] = pre * (pre > w["threshold"]) if jump else pre.clamp_min(0)
            y[:, i] += w["b_dec"] + (x[:, i].double() @ w["W_skip"] if skip else 0)
            for t in range(i, layers):
                y[:, t] += a[:, i] @ w["W_dec"][:, t - i]
        return a, y

    return function


def transcoder_set(folder, *, jump=True, skip=False, **settings):
    torch.manual_seed(1)
    config = {"model_kind": "transcoder_set", "model_name": "org/lm", **HOOKS, **settings}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    found = []
    for i in range(L):
        tensors = {"W_enc": numbers(F, D), "W_dec": numbers(F, D), "b_enc": numbers(F), "b_dec": numbers(D)}
        tensors |= {"activation_function.threshold": torch.rand(F)} if jump else {}
        tensors |= {"W_skip": numbers(D, D)} if skip else {}
        save_file(tensors, folder / f"layer_{i}.safetensors")
        found.append(tensors)

    def function(x):
        a, y = torch.zeros(len(x), L, F), torch.zeros_like(x)
        for i, w in enumerate(found):
            pre = x[:, i] @ w["W_enc"].T + w["b_enc"]
            a[:, i] = pre * (pre > w["activation_function.threshold"]) if jump else pre.clamp_min(0)
            y[:, i] = a[:, i] @ w["W_dec"] + w["b_dec"] + (x[:, i] @ w["W_skip"].T if skip else 0)
        return a, y

    return function


def gemma_scope(folder):
    """With thresholds below 0, which its ReLU makes harmless, and numbers where nothing is written to."""
    torch.manual_seed(2)
    config = {"model_name": "google/gemma-3", "affine_connection": True}
    hook = {"hf_hook_point_in": "model.layers.0.pre_feedforward_layernorm.output"}
    (folder / "config.json").write_text(json.dumps(config | hook))
    found = []
    for i in range(L):
        tensors = {"w_enc": numbers(D, F), "b_enc": numbers(F), "threshold": torch.randn(F), "b_dec": numbers(D)}
        tensors |= {"w_dec": numbers(F, L, D), "affine_skip_connection": numbers(D, D)}
        save_file(tensors, folder / f"params_layer_{i}.safetensors")
        found.append(tensors)

    def function(x):
        a, y = torch.zeros(len(x), L, F), torch.zeros_like(x)
        for i, w in enumerate(found):
            pre = x[:, i] @ w["w_enc"] + w["b_enc"]
            a[:, i] = torch.relu(pre) * (pre > w["threshold"])
        for t in range(L):
            y[:, t] = found[t]["b_dec"] + x[:, t] @ found[t]["affine_skip_connection"]
            for s in range(t + 1):
                y[:, t] += a[:, s] @ found[s]["w_dec"][:, t]
        return a, y

    return function


def sparsify(folder, *, reach=1, skip=True, block="h", post=0.0):
    """TopK with k = 3, of one layer or with `reach` targets."""
    torch.manual_seed(3)
    found = []
    for i in range(L):
        targets = min(reach, L - i)
        tensors = {"encoder.weight": numbers(F, D), "encoder.bias": numbers(F)}
        if reach == 1:
            tensors |= {"W_dec": numbers(F, D), "b_dec": numbers(D), "W_skip": numbers(D, D)}
        else:
            tensors |= {f"W_decs.{j}": numbers(F, D) for j in range(targets)}
            tensors |= {f"b_decs.{j}": numbers(D) for j in range(targets)}
            tensors |= {f"post_encs.{j}": torch.full((F,), post) for j in range(targets)}
            tensors |= {f"W_skips.{j}": numbers(D, D) * (j == 0) for j in range(targets)}
        tensors = {name: t for name, t in tensors.items() if skip or "W_skip" not in name}
        (folder / f"{block}.{i}.mlp").mkdir()
        save_file(tensors, folder / f"{block}.{i}.mlp" / "sae.safetensors")
        config = {"d_in": D, "k": 3, "activation": "topk", "transcode": True, "skip_connection": skip, "n_targets": 0}
        (folder / f"{block}.{i}.mlp" / "cfg.json").write_text(json.dumps(config))
        found.append(tensors)

    def function(x):
        a, y = torch.zeros(len(x), L, F), torch.zeros_like(x)
        for i, w in enumerate(found):
            pre = torch.relu(x[:, i] @ w["encoder.weight"].T + w["encoder.bias"])
            for row in range(len(x)):
                for feature in pre[row].argsort(descending=True)[:3]:
                    a[row, i, feature] = pre[row, feature]
            for j in range(min(reach, L - i)):
                suffix = "" if reach == 1 else f"s.{j}"
                y[:, i + j] += a[:, i] @ w[f"W_dec{suffix}"] + w[f"b_dec{suffix}"]
                if skip and j == 0:
                    y[:, i] += x[:, i] @ w[f"W_skip{suffix}"].T
        return a, y

    return function


SOURCES = {
    "jumprelu": (circuit_tracer, {}, "jumprelu", None),
    "relu with skip": (circuit_tracer, {"jump": False, "skip": True}, "relu", None),
    "norm's output": (circuit_tracer, {"feature_input_hook": "mlp.hook_in"}, "jumprelu", "norm.output"),
    "set": (transcoder_set, {"skip": True}, "jumprelu", None),
    "set of relu": (transcoder_set, {"jump": False, "activation": "relu"}, "relu", None),
    "gemma scope": (gemma_scope, {}, "jumprelu", "norm.output"),
    "sparsify": (sparsify, {}, "topk", "h.{layer}.mlp"),
    "sparsify, two targets": (sparsify, {"reach": 2}, "topk", "h.{layer}.mlp"),
    "sparsify, all targets": (sparsify, {"reach": 9, "skip": False, "block": "layers"}, "topk", "layers.{layer}.mlp"),
}
