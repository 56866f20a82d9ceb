"""Hook sites: the table, paths given by hand, and what the errors say."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from clt.config import LMConfig
from clt.errors import UserError
from clt.lm.capture import capture
from clt.lm.load import LanguageModel
from clt.lm.replacement import nnsight_logits, replaced_logits
from clt.lm.sites import ARCHITECTURES, Site, at_sites, find_sites
from tests.lm.test_replacement import CrossLayer, kept


def test_every_architecture_of_the_table_is_tested(lm: LanguageModel) -> None:
    assert lm.model.config.model_type in ARCHITECTURES
    assert [site.layer for site in lm.sites] == [0, 1, 2]


def test_paths_by_hand_give_the_same_sites(tiny: Callable[..., LanguageModel]) -> None:
    model = tiny("gpt2").model
    by_hand = find_sites(model, [0, 2], "transformer.h.{layer}.ln_2", "transformer.h.{layer}.mlp")
    assert by_hand == find_sites(model, [0, 2])
    assert by_hand[1] == Site(2, "transformer.h.2.ln_2", "transformer.h.2.mlp")


def test_a_wrong_path_names_the_nearest_module(tiny: Callable[..., LanguageModel]) -> None:
    with pytest.raises(UserError, match=r"'transformer\.h\.0\.ln2' \(layer 0\).*'transformer\.h\.0\.ln_2'"):
        find_sites(tiny("gpt2").model, [0], "transformer.h.{layer}.ln2", "transformer.h.{layer}.mlp")
    with pytest.raises(UserError, match=r"lm\.output_site.*nearest module is 'model\.layers\.1\.mlp'"):
        find_sites(tiny("llama").model, [1], "model.layers.{layer}.input_layernorm", "model.layers.{layer}.mlpp")


def test_braces_that_are_not_the_layers_are_part_of_the_path(tiny: Callable[..., LanguageModel]) -> None:
    with pytest.raises(UserError, match=r"lm\.input_site: the model has no module 'transformer\.h\.0\.\{x\}'"):
        find_sites(tiny("gpt2").model, [0], "transformer.h.{layer}.{x}", "transformer.h.{layer}.mlp")


def test_a_path_may_be_the_end_of_one(tiny: Callable[..., LanguageModel], input_ids: Tensor) -> None:
    """Gemma's MLP itself: what it wrote, before the norm that follows, is read and replaced there."""
    whole = tiny("gemma2")
    sites = find_sites(whole.model, [0, 1, 2], "layers.{layer}.pre_feedforward_layernorm.output", "{layer}.mlp")
    assert sites[1] == Site(1, "model.layers.1.pre_feedforward_layernorm.output", "model.layers.1.mlp")
    lm = dataclasses.replace(whole, sites=find_sites(whole.model, [0, 1, 2], "{layer}.mlp", "layers.{layer}.mlp"))
    x, y = capture(lm, input_ids).unbind(2)
    for layer, of_layer in enumerate(x.unbind(2)):
        torch.testing.assert_close(whole.model.get_submodule(f"model.layers.{layer}.mlp")(of_layer), y[:, :, layer])
    with pytest.raises(UserError, match=r"'o_proj' ends the paths of .*\.0.*o_proj and .*; wanted one of these"):
        find_sites(whole.model, [0], "o_proj", "o_proj")


def test_an_unknown_architecture_says_what_is_known_and_what_to_do(tiny: Callable[..., LanguageModel]) -> None:
    model = tiny("gpt2").model
    model.config.model_type = "mamba"
    with pytest.raises(UserError, match=r"'mamba' \(known: gpt2, .*gemma3_text, gemma3\); set lm\.input_site"):
        find_sites(model, [0])
    assert len(find_sites(model, [0], "transformer.h.{layer}.ln_2", "transformer.h.{layer}.mlp")) == 1


def test_the_output_of_the_norm_is_what_the_mlp_reads(
    tiny: Callable[..., LanguageModel], lm: LanguageModel, input_ids: Tensor
) -> None:
    """Of any architecture: the table's norm, applied to the residual stream."""
    sites = find_sites(lm.model, lm.layers, "norm.output")
    norms = [lm.model.get_submodule(site.input_module) for site in sites]
    assert [site._replace(input_path=site.input_module) for site in sites] == lm.sites
    residual = capture(lm, input_ids)[:, :, 0].unbind(2)
    captured = capture(dataclasses.replace(lm, sites=sites), input_ids)[:, :, 0].unbind(2)
    for norm, before, after in zip(norms, residual, captured):
        torch.testing.assert_close(norm(before), after)


def test_a_transcoder_of_the_norms_output_replaces_mlps_alike_through_hooks_and_nnsight(
    tiny: Callable[..., LanguageModel], input_ids: Tensor
) -> None:
    pytest.importorskip("nnsight")
    lm = tiny("gpt2", input_site="transformer.h.{layer}.ln_2.output", output_site="transformer.h.{layer}.mlp")
    assert lm.sites == tiny("gpt2", input_site="norm.output").sites
    transcoder, keep = CrossLayer(3, lm.d_model), kept(input_ids)
    hooked = replaced_logits(lm, transcoder, input_ids, keep)
    torch.testing.assert_close(hooked, nnsight_logits(lm, transcoder, input_ids, keep), rtol=1e-4, atol=1e-5)
    assert (hooked - replaced_logits(tiny("gpt2"), transcoder, input_ids, keep)).abs().max() > 0.1


@pytest.mark.parametrize(
    ("config", "transcoder", "found"),
    [
        ((None, None), (None, None), (None, None)),
        ((None, None), ("norm.output", None), ("norm.output", None)),
        (("norm.output", None), (None, None), (None, None)),
        (("h.{layer}.ln", "h.{layer}.mlp"), (None, None), ("h.{layer}.ln", "h.{layer}.mlp")),
        (("h.{layer}.ln.output", "h.{layer}.mlp"), (None, None), ("h.{layer}.ln", "h.{layer}.mlp")),
        (("h.{layer}.ln", "h.{layer}.mlp"), ("norm.output", None), ("h.{layer}.ln.output", "h.{layer}.mlp")),
        (("h.{layer}.ln", "h.{layer}.mlp"), ("a.{layer}", "b.{layer}"), ("a.{layer}", "b.{layer}")),
    ],
)
def test_a_transcoder_is_read_where_it_was_trained(config: tuple, transcoder: tuple, found: tuple) -> None:
    lm = at_sites(LMConfig(input_site=config[0], output_site=config[1]), *transcoder)
    assert (lm.input_site, lm.output_site) == found
