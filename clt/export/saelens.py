"""SAELens' directories (its format 6): one transcoder per layer, `layer_{i}/cfg.json` and `sae_weights.safetensors`.

The weights are W_enc (D, F), b_enc (F,), W_dec (F, D), b_dec (D,), threshold (F,) of JumpReLU, and W_skip (D, D), which
is transposed: a = relu(pre) * 1[pre > threshold], y = a @ W_dec + b_dec + x @ W_skip.T.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from clt.export.compare import ForeignLayer
from clt.model.transcoder import CrossLayerTranscoder

WEIGHTS = "sae_weights.safetensors"


def config(transcoder: CrossLayerTranscoder, model: str, layer: int, context: int) -> str:
    """The text of the cfg.json of `layer`, a number in the language model."""
    jump = "" if transcoder.spec.activation == "relu" else "jumprelu_"
    skip = "" if transcoder.W_skip is None else "skip_"
    D = transcoder.d_acts
    metadata: dict[str, Any] = {
        "sae_lens_version": "6.0.0",  # whose format this is
        "model_name": model,
        "hook_name": f"blocks.{layer}.hook_resid_mid",
        "hook_name_out": f"blocks.{layer}.hook_mlp_out",
        "context_size": context,
        "prepend_bos": True,
    }
    tree = {
        "architecture": f"{jump}{skip}transcoder",
        "d_in": D,
        "d_sae": transcoder.d_features,
        "d_out": D,
        "dtype": "float32",  # to compute in: thresholds are cast to it
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": metadata,
    }
    return json.dumps(tree, indent=2) + "\n"


def files(transcoder: CrossLayerTranscoder) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The tensors of each file, in float32, one layer's at a time; no feature writes beyond its own layer."""
    for s in range(transcoder.n_layers):
        layer = transcoder.fold_layer(s)
        layer["W_dec"] = layer["W_dec"][:, 0]
        layer["threshold"] = layer["threshold"].clamp_min(0)
        if transcoder.spec.activation == "relu":
            del layer["threshold"]
        if "W_skip" in layer:
            layer["W_skip"] = layer["W_skip"].T
        yield f"layer_{s}/{WEIGHTS}", layer


def read_layer(directory: Path, s: int) -> ForeignLayer:
    """One layer as SAELens' formulas take it, in float32."""
    found = {name: tensor.float() for name, tensor in load_file(directory / f"layer_{s}" / WEIGHTS).items()}
    threshold, skip = found.get("threshold"), found["W_skip"].T if "W_skip" in found else None
    return ForeignLayer(found["W_enc"].T, found["b_enc"], threshold, found["W_dec"][:, None], found["b_dec"], skip)
