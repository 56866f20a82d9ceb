"""Hook sites: the table, paths given by hand, and what the errors say."""

from collections.abc import Callable

import pytest

from clt.errors import UserError
from clt.lm.load import LanguageModel
from clt.lm.sites import ARCHITECTURES, Site, find_sites


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


def test_an_unknown_architecture_says_what_is_known_and_what_to_do(tiny: Callable[..., LanguageModel]) -> None:
    model = tiny("gpt2").model
    model.config.model_type = "mamba"
    with pytest.raises(UserError, match=r"'mamba' \(known: gpt2, .*gemma3_text, gemma3\); set lm\.input_site"):
        find_sites(model, [0])
    assert len(find_sites(model, [0], "transformer.h.{layer}.ln_2", "transformer.h.{layer}.mlp")) == 1
