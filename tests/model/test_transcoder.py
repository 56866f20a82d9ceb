"""The transcoder against a naive double loop in float64."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from clt.errors import UserError
from clt.model.spec import CLTConfig, Sites
from clt.model.transcoder import CrossLayerTranscoder
from tests.model.naive import VARIANTS, B, D, F, L, batch, make, naive_features, naive_reconstruction


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@torch.no_grad()
def test_forward_equals_the_naive_double_loop(options):
    clt, x = make(**options), batch()[:, 0]
    _, features = naive_features(clt, x)
    assert 0.2 < (features > 0).double().mean() < 0.8
    torch.testing.assert_close(clt.encode(x), features, atol=1e-12, rtol=0)
    expected = naive_reconstruction(clt, features, x) * clt.normalization.target_sd + clt.normalization.target_mean
    torch.testing.assert_close(clt(x), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("options", [{}, {"cross_layer": False}, {"window": 2}], ids=str)
@torch.no_grad()
def test_the_dense_decoder_is_causal_and_decodes_the_same(options):
    clt = make(**options)
    dense, features = clt.dense_decoder(), torch.rand(B, L, F, dtype=torch.float64)
    x = batch()[:, 0]
    y = torch.einsum("bsf,stfd->btd", features, dense) + clt.b_dec
    torch.testing.assert_close(clt.normalization.output(y), clt.decode(features, x))
    for s in range(L):
        assert not dense[s, :s].any(), "a feature writes to an earlier layer"


@pytest.mark.parametrize("options", [{}, {"skip": True, "window": 2}], ids=str)
@pytest.mark.parametrize("kind", ["layer", "dim", "none"])
@torch.no_grad()
def test_fold_is_the_same_function(kind, options):
    clt = make(normalization=kind, **options).float()
    x = batch()[:, 0].float()
    folded = clt.fold()
    assert folded.normalization.kind == "none"
    torch.testing.assert_close(folded.encode(x), clt.encode(x), rtol=1e-6, atol=1e-5)
    double = make(normalization=kind, **options)
    error = (folded.double()(x.double()) - double(x.double())).norm() / double(x.double()).norm()
    assert error < 1e-6


def test_fold_refuses_what_it_cannot_fold():
    with pytest.raises(ValueError, match="'token' is not affine"):
        make(normalization="token").fold()
    with pytest.raises(ValueError, match=r"by_norm compares decoder norms, .* convert it to jumprelu first"):
        make(activation="topk", k=2, by_norm=True).fold()


def test_initial_values():
    clt = CrossLayerTranscoder(4, 64, CLTConfig(d_features=256, skip=True))
    assert clt.W_enc.abs().max() <= 256**-0.5 < clt.W_enc.abs().max() * 1.001
    for weight in clt.W_dec:
        assert weight.abs().max() <= (4 * 64) ** -0.5 < weight.abs().max() * 1.01
    assert not clt.b_enc.any()
    assert not clt.b_dec.any()
    assert not clt.W_skip.any()
    assert torch.all(clt.threshold == 0.03)
    assert clt.threshold_floor == 0.01
    assert CrossLayerTranscoder(4, 64, CLTConfig(d_features=256, threshold=0.002)).threshold_floor == 0.002


def test_save_and_load(tmp_path):
    clt = make(cross_layer=False, normalization="dim", skip=True).float()
    clt.save_pretrained(tmp_path / "out")
    loaded = CrossLayerTranscoder.from_pretrained(tmp_path / "out")
    assert loaded.config == clt.config
    assert all(torch.equal(a, b) for a, b in zip(clt.state_dict().values(), loaded.state_dict().values()))
    with pytest.raises(UserError, match=r"config\.json cannot be read \(No such file.*\): copy it again from"):
        CrossLayerTranscoder.from_pretrained(tmp_path)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    save_file({**tensors, "W_enc": tensors["W_enc"][1:].clone()}, tmp_path / "out" / "model.safetensors")
    with pytest.raises(UserError, match=r"model.safetensors is damaged .*W_enc: found \[2, .*wanted \[3, "):
        CrossLayerTranscoder.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"bandwidth": 0}, "bandwidth is 0; wanted a positive number"),
        ({"threshold": float("nan")}, "threshold is nan; wanted float"),
        ({"n_layers": 0}, "n_layers is 0; wanted a positive number"),
        ({"n_layers": "3"}, "n_layers is '3'; wanted int"),
        ({"n_layers": None}, "n_layers is None; wanted int"),
        ({"d_acts": 2.5}, "d_acts is 2.5; wanted int"),
        ({"activation": ["relu"]}, "activation is .*; wanted one of"),
        ({"window": 0}, "window is 0; wanted 2 or more layers"),
        ({"window": 2, "cross_layer": False}, "clt.window is 2 but clt.cross_layer is false"),
        ({"sum_shards": 1}, "unknown 'sum_shards'; wanted d_features"),
    ],
)
def test_a_config_that_cannot_be(tmp_path, change, what):
    clt = make().float()
    clt.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(clt.config | change))
    with pytest.raises(UserError, match=rf"{tmp_path}/config.json is damaged \({what}.*\); copy it again"):
        CrossLayerTranscoder.from_pretrained(tmp_path)


@pytest.mark.parametrize("change", [{"d_features": 10**15}, {"n_layers": 10**9}, {"d_acts": 2**62}, {"d_features": 8}])
def test_sizes_are_compared_before_memory_is_taken(tmp_path, change):
    clt = make().float()
    clt.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(clt.config | change))
    with pytest.raises(UserError, match=r"model.safetensors is damaged .*W_enc: found \[.*\], wanted \["):
        CrossLayerTranscoder.from_pretrained(tmp_path)


def _nan(tensors):
    tensors["threshold"][0, 0, 1] = float("nan")


def _inf(tensors):
    tensors["W_dec.1"][0, 0, 0] = float("-inf")


def _no_scale(tensors):
    tensors["normalization.target_sd"][0, 0] = 0


def _integers(tensors):
    tensors["b_enc"] = tensors["b_enc"].int()


def _lost(tensors):
    del tensors["b_dec"]


def _more(tensors):
    tensors["W_skip"] = torch.zeros(2)


def _another_layer(tensors):
    tensors["W_dec.0"] = tensors["W_dec.1"].clone()


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (_nan, "threshold has a value that is nan or inf"),
        (_inf, "W_dec.1 has a value that is nan or inf"),
        (_no_scale, "normalization.target_sd has the value 0, wanted positive scales"),
        (_integers, "b_enc is torch.int32, wanted floating-point"),
        (_lost, "not the tensors of config.json: b_dec: found None, wanted "),
        (_more, r"not the tensors of config.json: W_skip: found \[2\], wanted None"),
        (_another_layer, r"not the tensors of config.json: W_dec.0: found "),
    ],
)
def test_weights_that_cannot_be(tmp_path, change, what):
    make().float().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=rf"{tmp_path}/model.safetensors is damaged \({what}.*\); copy it again"):
        CrossLayerTranscoder.from_pretrained(tmp_path)


def test_where_it_reads_is_kept(tmp_path):
    clt = CrossLayerTranscoder(L, D, CLTConfig(d_features=F), sites=Sites("norm.output", model="org/lm"))
    clt.save_pretrained(tmp_path)
    assert CrossLayerTranscoder.from_pretrained(tmp_path).sites == clt.fold().sites == clt.sites
    (tmp_path / "config.json").write_text(json.dumps(clt.config | {"output_site": "h.0.mlp"}))
    with pytest.raises(UserError, match=r"output_site is 'h\.0\.mlp'; wanted a path with \{layer\}"):
        CrossLayerTranscoder.from_pretrained(tmp_path)


def test_negative_thresholds_of_older_checkpoints_load(tmp_path):
    clt = make().float()
    with torch.no_grad():
        clt.threshold.fill_(-1.0)
    clt.save_pretrained(tmp_path)
    assert torch.all(CrossLayerTranscoder.from_pretrained(tmp_path).threshold == -1)


@pytest.mark.parametrize("options", [{}, {"cross_layer": False}], ids=str)
def test_older_transcoders_load(tmp_path, options):
    """Their config.json has none of the later fields, and they compute what they did."""
    clt = make(**options).float()
    clt.save_pretrained(tmp_path)
    older = {key: value for key, value in clt.config.items() if key not in ("skip", "window")}
    (tmp_path / "config.json").write_text(json.dumps(older))
    loaded = CrossLayerTranscoder.from_pretrained(tmp_path)
    assert loaded.config == clt.config
    assert torch.equal(loaded(batch()[:, 0].float()), clt(batch()[:, 0].float()))


def test_loading_draws_no_random_numbers(tmp_path):
    make().float().save_pretrained(tmp_path)
    before = torch.get_rng_state()
    loaded = CrossLayerTranscoder.from_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in make().parameters()]
    assert {p.device.type for p in loaded.parameters()} == {"cpu"}


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"activation": "gelu"}, "activation is 'gelu'; wanted one of jumprelu, relu"),
        ({"normalization": "batch"}, "normalization is 'batch'; wanted one of layer, dim, token, none"),
        ({"bandwidth": 0.0}, "bandwidth is 0.0; wanted a positive number"),
        ({"d_features": 0}, "d_features is 0; wanted a positive number"),
        ({"window": 0}, r"window is 0; wanted 2 or more layers \(one is cross_layer=false\) or null"),
        ({"window": -3}, "window is -3; wanted 2 or more layers"),
        ({"window": 1}, r"window is 1; wanted 2 or more layers \(one is cross_layer=false\) or null"),
        (
            {"window": 2, "cross_layer": False},
            "clt.window is 2 but clt.cross_layer is false, .*; wanted clt.window=null, or",
        ),
    ],
)
def test_values_out_of_range_are_named(option, message):
    with pytest.raises(UserError, match=message):
        CrossLayerTranscoder(L, D, CLTConfig(**option))


def test_per_layer_mode_has_no_cross_terms():
    assert [tuple(w.shape) for w in make(cross_layer=False).W_dec] == [(F, 1, D)] * L
    assert [tuple(w.shape) for w in make().W_dec] == [(F, L - s, D) for s in range(L)]


@pytest.mark.parametrize(("window", "layers"), [(2, [2, 2, 1]), (3, [3, 2, 1])])
def test_a_window_is_as_many_layers_as_there_are(window, layers):
    assert [tuple(w.shape) for w in make(window=window).W_dec] == [(F, T, D) for T in layers]
