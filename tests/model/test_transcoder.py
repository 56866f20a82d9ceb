"""The transcoder against a naive double loop in float64."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from clt.errors import UserError
from clt.model.spec import CLTConfig
from clt.model.transcoder import CrossLayerTranscoder
from tests.model.naive import VARIANTS, B, D, F, L, batch, make, naive_features, naive_reconstruction


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@torch.no_grad()
def test_forward_equals_the_naive_double_loop(options):
    clt, x = make(**options), batch()[:, 0]
    _, features = naive_features(clt, x)
    assert 0.2 < (features > 0).double().mean() < 0.8
    torch.testing.assert_close(clt.encode(x), features, atol=1e-12, rtol=0)
    expected = naive_reconstruction(clt, features) * clt.normalization.target_sd + clt.normalization.target_mean
    torch.testing.assert_close(clt(x), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("options", [{}, {"cross_layer": False}], ids=str)
@torch.no_grad()
def test_the_dense_decoder_is_causal_and_decodes_the_same(options):
    clt = make(**options)
    dense, features = clt.dense_decoder(), torch.rand(B, L, F, dtype=torch.float64)
    y = torch.einsum("bsf,stfd->btd", features, dense) + clt.b_dec
    torch.testing.assert_close(clt.normalization.output(y), clt.decode(features))
    for s in range(L):
        assert not dense[s, :s].any(), "a feature writes to an earlier layer"


@pytest.mark.parametrize("kind", ["layer", "dim", "none"])
@torch.no_grad()
def test_fold_is_the_same_function(kind):
    clt = make(normalization=kind).float()
    x = batch()[:, 0].float()
    folded = clt.fold()
    assert folded.normalization.kind == "none"
    torch.testing.assert_close(folded.encode(x), clt.encode(x), rtol=1e-6, atol=1e-5)
    double = make(normalization=kind)
    error = (folded.double()(x.double()) - double(x.double())).norm() / double(x.double()).norm()
    assert error < 1e-6


def test_fold_refuses_what_it_cannot_fold():
    with pytest.raises(ValueError, match="'token' is not affine"):
        make(normalization="token").fold()


def test_initial_values():
    clt = CrossLayerTranscoder(4, 64, CLTConfig(d_features=256))
    assert clt.W_enc.abs().max() <= 256**-0.5 < clt.W_enc.abs().max() * 1.001
    for weight in clt.W_dec:
        assert weight.abs().max() <= (4 * 64) ** -0.5 < weight.abs().max() * 1.01
    assert not clt.b_enc.any()
    assert not clt.b_dec.any()
    assert torch.all(clt.threshold == 0.03)


def test_save_and_load(tmp_path):
    clt = make(cross_layer=False, normalization="dim").float()
    clt.save_pretrained(tmp_path / "out")
    loaded = CrossLayerTranscoder.from_pretrained(tmp_path / "out")
    assert loaded.config == clt.config
    assert all(torch.equal(a, b) for a, b in zip(clt.state_dict().values(), loaded.state_dict().values()))
    with pytest.raises(UserError, match=r"does not hold a transcoder as save_pretrained writes it: .*config\.json"):
        CrossLayerTranscoder.from_pretrained(tmp_path)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    save_file({**tensors, "W_enc": tensors["W_enc"][1:].clone()}, tmp_path / "out" / "model.safetensors")
    with pytest.raises(UserError, match=r"(?s)does not hold a transcoder.*size mismatch for W_enc"):
        CrossLayerTranscoder.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"activation": "gelu"}, "activation is 'gelu'; wanted one of jumprelu, relu"),
        ({"normalization": "batch"}, "normalization is 'batch'; wanted one of layer, dim, token, none"),
        ({"bandwidth": 0.0}, "bandwidth is 0.0; wanted a positive number"),
        ({"d_features": 0}, "d_features is 0; wanted a positive number"),
    ],
)
def test_values_out_of_range_are_named(option, message):
    with pytest.raises(UserError, match=message):
        CrossLayerTranscoder(L, D, CLTConfig(**option))


def test_per_layer_mode_has_no_cross_terms():
    assert [tuple(w.shape) for w in make(cross_layer=False).W_dec] == [(F, 1, D)] * L
    assert [tuple(w.shape) for w in make().W_dec] == [(F, L - s, D) for s in range(L)]
