"""circuit-tracer's directories: `cross_layer_transcoder`, and `transcoder_set` of one transcoder per layer.

    config.yaml                            kind, language model, hook points
    W_enc_{i}.safetensors                  W_enc_{i} (F, D), b_enc_{i} (F,), b_dec_{i} (D,), W_skip_{i} (D, D), and of
                                           JumpReLU threshold_{i} (F,): a = pre * 1[pre > threshold], without a ReLU
    W_dec_{i}.safetensors                  W_dec_{i} (F, L - i, D)
    layer_{i}.safetensors                  of a set: W_enc (F, D), W_dec (F, D), b_enc, b_dec, W_skip transposed, and
                                           activation_function.threshold

circuit-tracer casts all of them to one dtype as it loads them. It has no input normalisation.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import yaml
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import pad

from clt.export.compare import Layer
from clt.model.transcoder import CrossLayerTranscoder
from clt.ranges import NORM_OUTPUT

_SET = {"b_enc": "b_enc", "b_dec": "b_dec", "threshold": "activation_function.threshold"}

SKIP_IS_NOT_READ = (
    "No circuit-tracer up to 0.5.0 reads W_skip_{i} from a cross_layer_transcoder directory: its model has the skip "
    "connection, its loader leaves it out without a word. docs/export.md says how to set it after loading."
)


def per_layer(transcoder: CrossLayerTranscoder) -> bool:
    """Whether no feature writes beyond its own layer, which makes a `transcoder_set`."""
    return not transcoder.spec.cross_layer or transcoder.spec.window == 1


def config(transcoder: CrossLayerTranscoder, model: str) -> str:
    """The text of config.yaml."""
    kind = "transcoder_set" if per_layer(transcoder) else "cross_layer_transcoder"
    reads = "mlp.hook_in" if transcoder.sites.input_site == NORM_OUTPUT else "hook_resid_mid"
    hooks = {"feature_input_hook": reads, "feature_output_hook": "hook_mlp_out"}
    return yaml.safe_dump({"model_kind": kind, "model_name": model, **hooks}, sort_keys=False)


def files(transcoder: CrossLayerTranscoder) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The tensors of each file, in float32, one layer's at a time; the rule is relu or jumprelu."""
    L = transcoder.n_layers
    for s in range(L):
        layer = transcoder.fold_layer(s)
        layer["W_enc"] = layer["W_enc"].T
        layer["threshold"] = layer["threshold"].clamp_min(0)
        if transcoder.spec.activation == "relu":
            del layer["threshold"]
        if per_layer(transcoder):
            layer["W_dec"] = layer["W_dec"][:, 0]
            if "W_skip" in layer:
                layer["W_skip"] = layer["W_skip"].T
            yield f"layer_{s}.safetensors", {_SET.get(name, name): tensor for name, tensor in layer.items()}
            continue
        W_dec = layer.pop("W_dec")
        yield f"W_enc_{s}.safetensors", {f"{name}_{s}": tensor for name, tensor in layer.items()}
        beyond = L - s - W_dec.shape[1]  # the layers that a window leaves out
        yield f"W_dec_{s}.safetensors", {f"W_dec_{s}": pad(W_dec, (0, 0, 0, beyond))}


def read_layer(directory: Path, s: int) -> Layer:
    """One layer as circuit-tracer's formulas take it, in float32."""
    path = directory / f"layer_{s}.safetensors"
    if path.is_file():
        found = {name: tensor.float() for name, tensor in load_file(path).items()}
        skip = found["W_skip"].T if "W_skip" in found else None
        threshold = found.get("activation_function.threshold")
        return Layer(found["W_enc"], found["b_enc"], threshold, found["W_dec"][:, None], found["b_dec"], skip)
    encoder = load_file(directory / f"W_enc_{s}.safetensors")
    encoder |= load_file(directory / f"W_dec_{s}.safetensors")
    found = {name.removesuffix(f"_{s}"): tensor.float() for name, tensor in encoder.items()}
    threshold, skip = found.get("threshold"), found.get("W_skip")
    return Layer(found["W_enc"], found["b_enc"], threshold, found["W_dec"], found["b_dec"], skip)
