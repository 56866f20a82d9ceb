"""The replacement model against module surgery, and the nnsight version against the plain one."""

import copy
import sys
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from clt.config import LMConfig
from clt.errors import UserError
from clt.lm.capture import capture
from clt.lm.load import LanguageModel, load_language_model
from clt.lm.replacement import ReplacementModel, ablated_logits, nnsight_logits, replaced_logits, run_with_mlps
from clt.lm.sites import Site
from tests.lm.conftest import blocks, hooks, mlp_branch


class CrossLayer(nn.Module):
    """A random cross-layer transcoder: ReLU features, which write to their own and all later layers, and a skip."""

    def __init__(self, layers: int, d_model: int, d_features: int = 12) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.encoders = nn.Parameter(0.3 * torch.randn(layers, d_model, d_features, generator=generator))
        self.decoders = nn.Parameter(0.3 * torch.randn(layers, layers, d_features, d_model, generator=generator))
        self.skips = nn.Parameter(0.3 * torch.randn(layers, d_model, d_model, generator=generator))

    def encode_layer(self, x: Tensor, layer: int) -> Tensor:
        return torch.relu(x @ self.encoders[layer])

    def decode_layer(self, features: Sequence[Tensor], x: Tensor, layer: int) -> Tensor:
        assert len(features) == layer + 1
        written = torch.stack([f @ self.decoders[source, layer] for source, f in enumerate(features)]).sum(0)
        return self.finish(written, x, layer)

    def write_layer(self, features: Tensor, y: Tensor, layer: int) -> None:
        for target in range(layer, len(self.decoders)):
            y[:, target] += features @ self.decoders[layer, target]

    def finish(self, y: Tensor, x: Tensor, layer: int) -> Tensor:
        return y + x @ self.skips[layer]


class Swapped(nn.Module):
    """Stands in a block for the whole MLP branch: the replacement where `keep`, the block's own branch elsewhere."""

    def __init__(self, replacement: Callable[[Tensor], Tensor], original: Callable[[Tensor], Tensor], keep: Tensor):
        super().__init__()
        self.replacement, self.original, self.keep = replacement, original, keep

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(self.keep[..., None], self.replacement(x), self.original(x))


def operated(lm: LanguageModel, replace: Callable[[int, Tensor], Tensor], ids: Tensor, keep: Tensor) -> Tensor:
    """Logits of the model after its MLP branches are cut out and others sewn in. The model is spoilt afterwards."""
    gemma = lm.model.config.model_type.startswith("gemma")
    if lm.model.config.model_type == "opt":
        return _operated_opt(lm, replace, ids, keep)
    norm = {"gpt2": "ln_2"}.get(lm.model.config.model_type, "post_attention_layernorm")
    for index, block in enumerate(blocks(lm)):
        parts = {name: getattr(block, name) for name in ("mlp", "pre_feedforward_layernorm" if gemma else norm)}
        if gemma:
            parts["post_feedforward_layernorm"] = block.post_feedforward_layernorm
        original = type("Branch", (), parts)
        for name in parts:
            setattr(block, name, nn.Identity())
        block.mlp = Swapped(
            lambda x, index=index: replace(index, x),
            lambda x, original=original: mlp_branch(lm, original, x),  # type: ignore[arg-type]
            keep,
        )
    with torch.no_grad():
        return lm.model(ids, use_cache=False).logits


def _operated_opt(lm: LanguageModel, replace: Callable[[int, Tensor], Tensor], ids: Tensor, keep: Tensor) -> Tensor:
    """`operated` for OPT, which has no MLP module, and whose layers see the tokens flattened."""
    for index, block in enumerate(blocks(lm)):
        original = type("Branch", (), {name: getattr(block, name) for name in ("final_layer_norm", "fc1", "fc2")})
        block.fc1 = Swapped(
            lambda x, index=index: replace(index, x),
            lambda x, original=original: mlp_branch(lm, original, x),  # type: ignore[arg-type]
            keep.flatten(),
        )
        block.final_layer_norm = block.activation_fn = block.fc2 = nn.Identity()
    with torch.no_grad():
        return lm.model(ids, use_cache=False).logits


def kept(ids: Tensor) -> Tensor:
    keep = ids != 256
    keep[1, 4] = False
    return keep


def cross_layer_replace(transcoder: CrossLayer) -> Callable[[int, Tensor], Tensor]:
    features: list[Tensor] = []

    def replace(index: int, x: Tensor) -> Tensor:
        features.append(transcoder.encode_layer(x, index))
        return transcoder.decode_layer(features, x, index)

    return replace


def test_replaced_logits_are_those_of_a_model_with_other_mlps(lm: LanguageModel, input_ids: Tensor) -> None:
    transcoder, keep = CrossLayer(3, lm.d_model), kept(input_ids)
    with torch.no_grad():
        plain = lm.model(input_ids).logits
    got = replaced_logits(lm, transcoder, input_ids, keep)
    assert hooks(lm.model) == 0
    assert not got.requires_grad
    expected = operated(lm, cross_layer_replace(transcoder), input_ids, keep)
    assert torch.allclose(got, expected, atol=1e-4, rtol=1e-4)
    assert (got - plain).abs().max() > 0.1


def test_ablated_logits_are_those_of_a_model_with_constant_mlps(lm: LanguageModel, input_ids: Tensor) -> None:
    keep = kept(input_ids)
    mean = capture(lm, input_ids)[:, :, 1].mean((0, 1))  # (L, D)
    got = ablated_logits(lm, mean, input_ids, keep)
    expected = operated(lm, lambda index, x: mean[index].expand_as(x), input_ids, keep)
    assert torch.allclose(got, expected, atol=1e-4, rtol=1e-4)


def test_the_models_own_mlps_change_nothing(lm: LanguageModel, input_ids: Tensor) -> None:
    keep = kept(input_ids)
    with torch.no_grad():
        plain = lm.model(input_ids).logits
    same = copy.deepcopy(blocks(lm))
    own = run_with_mlps(lm, input_ids, keep, lambda index, x: mlp_branch(lm, same[index], x))
    assert torch.allclose(own, plain, atol=1e-5, rtol=1e-5)
    nothing = run_with_mlps(lm, input_ids, torch.zeros_like(keep), lambda index, x: torch.full_like(x, torch.nan))
    assert torch.equal(nothing, plain)


def test_only_the_chosen_layers_are_replaced(tiny: Callable[..., LanguageModel], input_ids: Tensor) -> None:
    lm = tiny("llama", layers=[1])
    keep = kept(input_ids)
    got = replaced_logits(lm, CrossLayer(1, lm.d_model), input_ids, keep)
    transcoder = CrossLayer(1, lm.d_model)

    def replace(index: int, x: Tensor) -> Tensor:
        if index != 1:
            return mlp_branch(untouched, blocks(untouched)[index], x)
        return transcoder.decode_layer([transcoder.encode_layer(x, 0)], x, 0)

    untouched = tiny("llama")
    assert torch.allclose(got, operated(lm, replace, input_ids, keep), atol=1e-4, rtol=1e-4)


def test_a_float32_transcoder_in_a_bfloat16_model(tiny: Callable[..., LanguageModel], input_ids: Tensor) -> None:
    logits = replaced_logits(tiny("gpt2", dtype="bfloat16"), CrossLayer(3, 16), input_ids, kept(input_ids))
    assert logits.dtype == torch.bfloat16


def test_sites_in_the_wrong_order_are_named(tiny: Callable[..., LanguageModel], input_ids: Tensor) -> None:
    lm = tiny("gpt2")
    lm.sites[0] = Site(0, "transformer.h.0.mlp", "transformer.h.0.ln_2")
    with pytest.raises(UserError, match=r"'transformer\.h\.0\.ln_2' runs before 'transformer\.h\.0\.mlp'"):
        ablated_logits(lm, torch.zeros(3, 16), input_ids, kept(input_ids))
    assert hooks(lm.model) == 0


@pytest.fixture(params=["gpt2", "llama", "gemma2", "neox_parallel", "opt", "embedded"])
def some_lm(request: pytest.FixtureRequest, tiny: Callable[..., LanguageModel]) -> LanguageModel:
    return load_language_model(LMConfig()) if request.param == "embedded" else tiny(request.param)


def test_the_nnsight_model_computes_the_same(some_lm: LanguageModel, input_ids: Tensor) -> None:
    pytest.importorskip("nnsight")
    transcoder, keep = CrossLayer(len(some_lm.layers), some_lm.d_model), kept(input_ids)
    replacement = ReplacementModel(some_lm, transcoder)
    expected = replaced_logits(some_lm, transcoder, input_ids, keep)
    logits, features = replacement.run(input_ids, keep)
    assert torch.allclose(logits, expected, atol=1e-4, rtol=1e-5)
    assert torch.allclose(nnsight_logits(some_lm, transcoder, input_ids, keep), expected, atol=1e-4, rtol=1e-5)
    assert [f.shape for f in features] == [(3, 10, 12)] * len(some_lm.layers)
    # The first layer's features are those of the original stream: nothing before it was replaced.
    first = transcoder.encode_layer(capture(some_lm, input_ids)[:, :, 0, 0], 0)
    assert torch.allclose(features[0], first, atol=1e-4, rtol=1e-4)
    assert hooks(some_lm.model) == 0


def test_interventions_reach_later_layers(tiny: Callable[..., LanguageModel], input_ids: Tensor) -> None:
    pytest.importorskip("nnsight")
    lm, keep = tiny("gpt2"), kept(input_ids)
    transcoder = CrossLayer(3, lm.d_model)
    replacement = ReplacementModel(lm, transcoder)

    def silence(layer: int, features: Tensor) -> Tensor:
        return features * 0 if layer == 1 else features

    logits, features = replacement.run(input_ids, keep, silence)
    assert not features[1].any()
    assert not torch.allclose(logits, replacement.run(input_ids, keep).logits, atol=1e-3)
    with torch.no_grad():
        transcoder.encoders[1] = 0
    assert torch.allclose(logits, replaced_logits(lm, transcoder, input_ids, keep), atol=1e-4)


def test_gradients_flow_from_logits_to_features(tiny: Callable[..., LanguageModel], input_ids: Tensor) -> None:
    pytest.importorskip("nnsight")
    lm = tiny("gpt2")
    logits, features = ReplacementModel(lm, CrossLayer(3, lm.d_model)).run(input_ids, kept(input_ids))
    gradients = torch.autograd.grad(logits[:, -1].max(-1).values.sum(), features)
    assert all(gradient.abs().sum() > 0 for gradient in gradients)


def test_an_error_in_an_intervention_reaches_the_caller(tiny: Callable[..., LanguageModel], input_ids: Tensor) -> None:
    pytest.importorskip("nnsight")
    lm, keep = tiny("gpt2"), kept(input_ids)
    transcoder = CrossLayer(3, lm.d_model)
    replacement = ReplacementModel(lm, transcoder)

    def broken(layer: int, features: Tensor) -> Tensor:
        raise ValueError("a mistake in the intervention")

    with pytest.raises(ValueError, match="a mistake in the intervention"):
        replacement.run(input_ids, keep, broken)
    expected = replaced_logits(lm, transcoder, input_ids, keep)
    assert torch.allclose(replacement.run(input_ids, keep).logits, expected, atol=1e-4, rtol=1e-5)


def test_without_nnsight_installed(tiny: Callable[..., LanguageModel], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nnsight", None)
    with pytest.raises(UserError, match=r"pip install 'clt-trainer\[nnsight\]'"):
        ReplacementModel(tiny("gpt2"), CrossLayer(3, 16))
