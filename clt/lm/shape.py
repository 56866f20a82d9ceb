"""What a plan must know of a language model, without its weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from clt.errors import UserError
from clt.lm.load import chosen_layers, load_settings, locate
from clt.lm.spec import LMConfig

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class ModelShape(NamedTuple):
    """The layers that are explained and the residual width; and of a model whose config is at hand, its size."""

    n_layers: int
    d_acts: int
    parameters: int | None = None
    flops_per_token: int | None = None  # of a forward pass up to the last layer that is explained


def read_settings(config: LMConfig, *, ask_hub: bool = False, otherwise: str = "") -> PretrainedConfig:
    """The own config of `lm.model`, as transformers has it.

    Raises UserError when it cannot be read, and without `ask_hub` when it is not on this machine; the message ends with
    what can be done `otherwise`.
    """
    source, gguf = locate(config.model)
    if not ask_hub and not Path(source).exists():
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            found = try_to_load_from_cache(source, "config.json", revision=config.revision)
        except HFValidationError:
            found = None
        if not isinstance(found, str):
            raise UserError(
                f"config.json of lm.model={config.model!r} is not on this machine: `hf download {source} config.json` "
                f"fetches it{otherwise}"
            )
    settings, _ = load_settings(config, source, gguf, local=not ask_hub)
    return settings


def read_shape(config: LMConfig, *, ask_hub: bool = False) -> ModelShape:
    """The shape of `lm.model`, from its config alone.

    FLOPs are 2 a weight of the layers that run, and 4 * width for each token of the context that attention reads.
    Raises UserError as `read_settings`, and for layers that the model lacks.
    """
    from transformers import AutoModelForCausalLM

    settings = read_settings(config, ask_hub=ask_hub, otherwise="; or give the model's shape with --layers and --width")
    text = settings.get_text_config()
    layers = chosen_layers(config, text.num_hidden_layers)
    with torch.device("meta"):  # shapes without memory
        model: Any = AutoModelForCausalLM.from_config(settings, trust_remote_code=False)
    head = model.get_output_embeddings()
    unused = {
        m.weight: m.weight.numel() for m in model.modules() if isinstance(m, nn.Embedding) or m is head
    }  # no products
    total = sum(parameter.numel() for parameter in model.parameters())
    ran = layers[-1] + 1
    body = (total - sum(unused.values())) * ran // text.num_hidden_layers
    return ModelShape(len(layers), text.hidden_size, total, 2 * body + 4 * ran * config.context * text.hidden_size)
