"""Where a model's residual stream and MLP outputs are found: one pair of modules per layer."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from torch import nn

from clt.errors import UserError
from clt.lm.spec import LMConfig
from clt.ranges import NORM_OUTPUT, OUTPUT


class Site(NamedTuple):
    """The two hooked modules of one layer, by dotted path in the Hugging Face model."""

    layer: int
    input_path: str  # the module whose input is x, the residual stream before the MLP block's norm; OUTPUT may follow
    output_path: str  # the module whose output is y, the MLP's output as it is added to the residual stream

    @property
    def input_module(self) -> str:
        """The module whose input, or with OUTPUT whose output, is x."""
        return self.input_path.removesuffix(OUTPUT)

    @property
    def reads_output(self) -> bool:
        """Whether x is the module's output."""
        return self.input_path.endswith(OUTPUT)


_PRE_NORM = ("model.layers.{layer}.post_attention_layernorm", "model.layers.{layer}.mlp")
# Gemma normalises the MLP's output before adding it, so what reaches the residual stream is the norm's output.
_SANDWICH = ("model.layers.{layer}.pre_feedforward_layernorm", "model.layers.{layer}.post_feedforward_layernorm")
_MULTIMODAL = ("model.", "model.language_model.", 1)

# config.model_type -> (input site, output site). With GPT-NeoX's parallel residual the same module's input is the
# layer's own input, which is what that MLP reads.
ARCHITECTURES: dict[str, tuple[str, str]] = {
    "gpt2": ("transformer.h.{layer}.ln_2", "transformer.h.{layer}.mlp"),
    # Of OPT-350m, which normalises after adding, capture refuses the input site: it runs after the MLP.
    "opt": ("model.decoder.layers.{layer}.final_layer_norm", "model.decoder.layers.{layer}.fc2"),
    "gpt_neox": ("gpt_neox.layers.{layer}.post_attention_layernorm", "gpt_neox.layers.{layer}.mlp"),
    "llama": _PRE_NORM,
    "mistral": _PRE_NORM,
    "qwen2": _PRE_NORM,
    "qwen3": _PRE_NORM,
    "gemma2": _SANDWICH,
    "gemma3_text": _SANDWICH,
    "gemma3": (_SANDWICH[0].replace(*_MULTIMODAL), _SANDWICH[1].replace(*_MULTIMODAL)),
}


def find_sites(
    model: nn.Module, layers: Sequence[int], input_site: str | None = None, output_site: str | None = None
) -> list[Site]:
    """The hooked modules of `layers`, from the table above or from dotted paths as `lm.input_site` and `.output_site`.

    A path may be the end of one, `{layer}.mlp`, if only one module's ends so. Raises UserError for an architecture that
    is not in the table, and for a path that names no module of the model.
    """
    if input_site in (None, NORM_OUTPUT) or output_site is None:
        architecture = getattr(model.config, "model_type", type(model).__name__)
        if architecture not in ARCHITECTURES:
            raise UserError(
                f"no hook sites are known for architecture {architecture!r} (known: {', '.join(ARCHITECTURES)}); set "
                "lm.input_site to the module whose input is the residual stream before the MLP and lm.output_site to "
                "the module whose output is added to it, e.g. model.layers.{layer}.mlp"
            )
        norm, output = ARCHITECTURES[architecture]
        input_site = norm + OUTPUT if input_site == NORM_OUTPUT else input_site or norm
        output_site = output_site or output
    modules = [name for name, _ in model.named_modules(remove_duplicate=False)]

    def path(key: str, site: str, layer: int) -> str:
        found = site.replace("{layer}", str(layer))
        module = found.removesuffix(OUTPUT)
        if module not in modules:
            ends = [name for name in modules if name.endswith(f".{module}")]
            if len(ends) == 1:
                return ends[0] + found[len(module) :]
            if ends:
                raise UserError(f"{key}: {found!r} ends the paths of {' and '.join(ends)}; wanted one of these")
            (near,) = difflib.get_close_matches(found, modules, 1, cutoff=0.0)
            raise UserError(f"{key}: the model has no module {found!r} (layer {layer}); the nearest module is {near!r}")
        return found

    return [
        Site(layer, path("lm.input_site", input_site, layer), path("lm.output_site", output_site, layer))
        for layer in layers
    ]


def at_sites(lm: LMConfig, input_site: str | None, output_site: str | None) -> LMConfig:
    """The config with the sites that a transcoder was trained at.

    The config's own paths stand for what a transcoder does not name: the norm before the MLP, and the MLP's output.
    """
    norm = None if lm.input_site in (None, NORM_OUTPUT) else lm.input_site.removesuffix(OUTPUT)
    if input_site in (None, NORM_OUTPUT):
        input_site = norm + OUTPUT if norm and input_site else norm or input_site
    return replace(lm, input_site=input_site, output_site=output_site or lm.output_site)
