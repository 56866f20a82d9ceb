"""What fits into another tool's format: for `clt export`, and for the model card, which offers nothing else."""

from __future__ import annotations

from clt.data.index import StoreIndex
from clt.export.circuit_tracer import INPUT_HOOKS, OUTPUT_HOOKS
from clt.lm.shape import read_settings
from clt.lm.sites import ARCHITECTURES
from clt.lm.spec import LMConfig
from clt.model.spec import CLTConfig
from clt.ranges import OUTPUT

PARALLEL = (
    "transformer-lens has no hook_resid_mid in a GPT-NeoX whose attention and MLP run in parallel (Pythia), so that "
    "circuit-tracer cannot attribute through this transcoder."
)


def parallel(index: StoreIndex | None) -> bool:
    """Whether a store is of a language model to which PARALLEL applies."""
    return index is not None and index.input_sites[0].startswith("gpt_neox.")


def refusal(to: str, spec: CLTConfig, lm: LMConfig, layers: list[int] | None) -> str | None:
    """Why a transcoder at these sites and `layers` (None: all) cannot be exported; None: it can.

    Raises UserError when the sites are paths and the language model's config is not on this machine: only that tells
    whether they are the ones that the tool will use.
    """
    if spec.normalization == "token":
        return (
            "clt.normalization is token, which divides each input by its own norm and cannot be folded into weights; "
            "wanted a run with layer, dim or none"
        )
    if not (_standard(lm) or (to == "circuit-tracer" and _hooks(lm))):
        return (
            f"the sites are lm.input_site={lm.input_site} and lm.output_site={lm.output_site}; wanted the residual "
            "before the MLP's norm and what the MLP adds to it, as clt/lm/sites.py names them for this architecture: "
            "other tools know these as hook_resid_mid and hook_mlp_out, and would read another place without a word"
        )
    if to == "saelens" and spec.cross_layer:
        return (
            "SAELens has transcoders of one layer alone, and these features write to later layers too; wanted a run "
            "with clt.cross_layer=false, or --to circuit-tracer"
        )
    if to == "circuit-tracer" and layers is not None:
        return (
            f"the transcoder is of lm.layers={layers}, not of all layers of the language model. circuit-tracer numbers "
            "the layers of a directory from 0 and wants every one: it would put these into the first MLPs' places, or "
            "end in an index error; wanted a run with lm.layers=null, or --to saelens with clt.cross_layer=false"
        )
    return None


def _hooks(lm: LMConfig) -> bool:
    """Whether circuit-tracer's hooks name the sites, whatever the architecture."""
    return lm.input_site in INPUT_HOOKS.values() and lm.output_site in OUTPUT_HOOKS.values()


def _standard(lm: LMConfig) -> bool:
    """Whether the sites are those of the table for the language model's architecture."""
    if lm.input_site is None and lm.output_site is None:
        return True
    if (lm.input_site or "").endswith(OUTPUT):
        return False
    norm, output = ARCHITECTURES.get(read_settings(lm).model_type, ("", ""))
    return (lm.input_site or norm, lm.output_site or output) == (norm, output)
