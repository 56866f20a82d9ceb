"""The transcoder against a naive double loop in float64, and its gradients against finite differences."""

import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from clt.model.activations import Gradients, Rule, gate, gate_gradients
from clt.model.loss import Objective
from clt.model.transcoder import CrossLayerTranscoder, feature_dim

L, D, F, B = 3, 5, 7, 11


def make(normalization="layer", d_features=F, **options) -> CrossLayerTranscoder:
    torch.manual_seed(0)
    clt = CrossLayerTranscoder(L, D, d_features, normalization=normalization, **options).double()
    with torch.no_grad():
        for parameter in clt.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        clt.threshold.abs_()
    clt.normalization.set(*(torch.randn(L, D, dtype=torch.float64).abs() + 0.5 for _ in range(4)))
    return clt


def batch(seed=1) -> torch.Tensor:
    return torch.randn(B, 2, L, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 2 + 0.5


def naive_normalized(clt, x, side):
    """One vector at a time, from the definition."""
    norm = clt.normalization
    out = torch.empty_like(x)
    for b in range(len(x)):
        for l in range(L):
            if norm.kind == "token" and side == "input":
                out[b, l] = (x[b, l] - x[b, l].mean()) / x[b, l].std(correction=0)
            else:
                out[b, l] = (x[b, l] - getattr(norm, f"{side}_mean")[l]) / getattr(norm, f"{side}_sd")[l]
    return out


def naive_features(clt, x):
    x = naive_normalized(clt, x, "input")
    features = torch.zeros(len(x), L, F, dtype=torch.float64)
    pre = torch.zeros_like(features)
    for b in range(len(x)):
        for l in range(L):
            for f in range(F):
                p = (x[b, l] * clt.W_enc[l, :, f]).sum() + clt.b_enc[l, f]
                pre[b, l, f] = p
                on = p > 0 if clt.activation == "relu" else p > clt.threshold[0, l, f] and p > 0
                if on:
                    features[b, l, f] = p
    return pre, features


def naive_reconstruction(clt, features):
    """y~[b, t] as the double sum over source layers and features, through the dense masked decoder."""
    y = torch.zeros(len(features), L, D, dtype=torch.float64)
    for b in range(len(features)):
        for t in range(L):
            y[b, t] = clt.b_dec[t]
            for s in range(t + 1):
                if clt.config["cross_layer"] or s == t:
                    for f in range(F):
                        y[b, t] += features[b, s, f] * clt.W_dec[s][f, t - s]
    return y


VARIANTS = [
    {},
    {"activation": "relu"},
    {"cross_layer": False},
    {"normalization": "dim"},
    {"normalization": "token"},
    {"normalization": "none"},
]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@torch.no_grad()
def test_forward_equals_the_naive_double_loop(options):
    clt, x = make(**options), batch()[:, 0]
    _, features = naive_features(clt, x)
    assert 0.2 < (features > 0).double().mean() < 0.8
    torch.testing.assert_close(clt.encode(x), features, atol=1e-12, rtol=0)
    expected = naive_reconstruction(clt, features) * clt.normalization.target_sd + clt.normalization.target_mean
    torch.testing.assert_close(clt(x), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@torch.no_grad()
def test_layer_by_layer_equals_all_layers_at_once(options):
    clt, x = make(**options), batch()[:, 0]
    features = [clt.encode_layer(x[:, l], l) for l in range(L)]
    torch.testing.assert_close(torch.stack(features, 1), clt.encode(x))
    y = torch.stack([clt.decode_layer(features[: t + 1], t) for t in range(L)], 1)
    torch.testing.assert_close(y, clt(x))


@pytest.mark.parametrize("options", [{}, {"cross_layer": False}], ids=str)
@torch.no_grad()
def test_dense_decoder_is_causal_and_decodes_the_same(options):
    clt = make(**options)
    dense, features = clt.dense_decoder(), torch.rand(B, L, F, dtype=torch.float64)
    y = torch.einsum("bsf,stfd->btd", features, dense) + clt.b_dec
    torch.testing.assert_close(y, clt.reconstruct(features.transpose(0, 1)))
    for s in range(L):
        assert not dense[s, :s].any(), "a feature writes to an earlier layer"


@pytest.mark.parametrize(
    "loss",
    [
        {},
        {"target_scale": "none"},
        {"pre_activation": 0.1},
        {"pre_activation": 0.1, "pre_activation_kind": "negative"},
    ],
    ids=str,
)
@torch.no_grad()
def test_loss_equals_the_naive_sums(loss):
    clt, data = make(), batch()
    terms = Objective(clt, sparsity_scale=0.7, **loss)(data, 0.3)
    pre, features = naive_features(clt, data[:, 0])
    error = naive_reconstruction(clt, features) - naive_normalized(clt, data[:, 1], "target")
    if loss.get("target_scale") == "none":
        error = error * clt.normalization.target_sd
    mse = sum(error[b, l, d] ** 2 for b in range(B) for l in range(L) for d in range(D)) / (B * L * D)
    penalty = extra = 0.0
    for l in range(L):
        for f in range(F):
            norm = sum((clt.W_dec[l][f, t] ** 2).sum() for t in range(L - l)).sqrt()
            for b in range(B):
                penalty += torch.tanh(0.7 * norm * features[b, l, f]) / B
                floor = 0 if loss.get("pre_activation_kind") == "negative" else clt.threshold[0, l, f]
                extra += torch.relu(floor - pre[b, l, f]) / B
    torch.testing.assert_close(terms.mse, mse)
    torch.testing.assert_close(terms.sparsity, penalty)
    torch.testing.assert_close(terms.loss, mse + 0.3 * penalty + loss.get("pre_activation", 0.0) * extra)
    torch.testing.assert_close(terms.l0_per_layer.double(), (features > 0).sum(-1).double().mean(0))
    assert torch.equal(terms.fired, (features > 0).any(0))


@pytest.mark.parametrize("options", [{}, {"cross_layer": False}, {"normalization": "token"}], ids=str)
def test_gradients_of_everything_but_the_threshold(options):
    """gradcheck perturbs by 1e-6, far less than any pre-activation's distance from its threshold here."""
    clt, data = make(**options), batch()[:4]
    objective = Objective(clt, sparsity_scale=0.7, pre_activation=0.1, pre_activation_kind="negative")
    names = [name for name, _ in objective.named_parameters() if "threshold" not in name]
    values = [dict(objective.named_parameters())[name].detach().clone().requires_grad_() for name in names]

    def loss(*values):
        return torch.func.functional_call(objective, dict(zip(names, values)), (data, 0.3)).loss

    assert torch.autograd.gradcheck(loss, values, atol=1e-8)


@pytest.mark.parametrize("floor", ["none", "zero", "threshold"])
@pytest.mark.parametrize("through_pre", [False, True])
@pytest.mark.parametrize("activation", ["jumprelu", "relu"])
def test_gradients_of_the_gate_equal_their_formula(activation, through_pre, floor):
    """One element at a time, from the definitions, the straight-through estimate included."""
    rule = Rule(activation, 0.8, through_pre, floor)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    product, bias, theta, scale, written = draw(F, B), draw(F), draw(F).abs(), draw(F).abs(), draw(F, B)
    of_penalty, of_low = torch.tensor(0.3).double(), torch.tensor(0.2).double()
    got = gate_gradients(product, bias, theta, scale, rule, written, of_penalty, of_low)
    matrix, row = torch.zeros_like(product), torch.zeros_like(bias)
    expected = Gradients(matrix, row, row.clone(), row.clone(), matrix.clone())
    for b in range(B):
        for f in range(F):
            p, t, c = (product[f, b] + bias[f]).item(), theta[f].item(), scale[f].item()
            a = p if p > (t if activation == "jumprelu" else 0) else 0
            slope = 0.3 * (1 - math.tanh(c * a) ** 2)
            g = written[f, b].item() + slope * c
            through = t / 0.8 * g * (abs(p - t) < 0.4) * (activation == "jumprelu")
            below = {"none": 0, "zero": p < 0, "threshold": p < t}[floor] * 0.2
            expected.features[f, b] = a
            expected.pre[f, b] = g * (a > 0) + through * through_pre - below
            expected.bias[f] += expected.pre[f, b]
            expected.threshold[f] += below * (floor == "threshold") - through
            expected.scale[f] += slope * a
    for name, ours, theirs in zip(Gradients._fields, got, expected):
        torch.testing.assert_close(ours, theirs, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_compiled_kernels_in_bf16_are_the_eager_ones():
    """In between they compute in float32, so that only the last bit of a bf16 result may differ."""
    rule, generator = Rule("jumprelu", 0.8, True, "threshold"), torch.Generator().manual_seed(0)
    product, written = (torch.randn(48, 64, generator=generator).bfloat16() for _ in range(2))
    bias, theta, scale = (torch.rand(48, generator=generator) for _ in range(3))
    low = torch.tensor(0.1)
    for kernel, arguments in (
        (gate, (product, bias, theta, scale, rule)),
        (gate_gradients, (product, bias, theta, scale, rule, written, low, low)),
    ):
        for eager, compiled in zip(kernel(*arguments), torch.compile(kernel, dynamic=False)(*arguments)):
            assert eager.dtype == compiled.dtype
            tight = {"rtol": 2**-7, "atol": 1e-6} if eager.dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-4}
            torch.testing.assert_close(compiled, eager, **tight)


def test_jumprelu_is_never_negative_even_under_a_negative_threshold():
    pre, theta = torch.tensor([[-0.5, 0.5]]), torch.tensor([-1.0])
    rule = Rule("jumprelu", 1.0, False, "none")
    assert gate(pre, torch.zeros(1), theta, torch.ones(1), rule).features.tolist() == [[0.0, 0.5]]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_the_compiled_step_in_bf16_is_the_eager_one():
    """From a float16 store, twice: the second step writes the decoder's gradients where the first one's were."""
    data, gradients = batch().half(), []
    for compile in (False, True):
        clt = make().float()
        objective = Objective(clt, pre_activation=0.1, compile=compile)
        for _ in range(2):
            clt.clear_gradients()
            with torch.autocast("cpu", torch.bfloat16):
                loss = objective(data, 0.3).loss
            loss.backward()
        gradients.append({name: p.grad for name, p in clt.named_parameters()})
    for name, eager in gradients[0].items():
        error = (gradients[1][name] - eager).norm() / eager.norm()
        assert error < torch.finfo(torch.bfloat16).eps, f"{name}: relative difference {error:.2e}"


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_shards_add_up_in_float32(precision):
    """The loss of the last of two shards, to whose partial reconstruction the first one's is added."""
    data, partials, terms = batch().float(), [], []

    def add(partial):
        partials.append(partial.detach().clone())
        return partial.copy_(torch.stack(partials).double().sum(0))

    whole = make(d_features=2 * F).float()
    for part in range(2):
        shard = make(d_features=2 * F, shard=(part, 2), sum_shards=add).float()
        for name, value in whole.state_dict().items():
            dim, of_shard = feature_dim(name), slice(part * F, (part + 1) * F)
            mine = value if dim is None else value.transpose(0, dim)[of_shard].transpose(0, dim)
            shard.state_dict()[name].copy_(mine)
        with torch.autocast("cpu", precision):
            terms.append(Objective(shard)(data, 0.3))
    assert [partial.dtype for partial in partials] == [torch.float32] * 2
    exact = Objective(whole)(data, 0.3)
    torch.testing.assert_close(terms[1].mse, exact.mse, rtol=8 * torch.finfo(precision).eps, atol=0)
    torch.testing.assert_close(
        terms[0].sparsity + terms[1].sparsity, exact.sparsity, rtol=8 * torch.finfo(precision).eps, atol=0
    )


def test_a_frozen_decoder_stays_as_it_is():
    clt = make()
    objective = Objective(clt)
    objective(batch(), 0.3).loss.backward()
    clt.clear_gradients()
    clt.W_dec.requires_grad_(False)
    objective(batch(), 0.3).loss.backward()
    assert all(weight.grad is None for weight in clt.W_dec)
    assert clt.W_enc.grad.abs().sum() > 0


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_autocast_is_within_the_rounding_of_its_dtype(precision):
    clt, data = make().float(), batch().float()
    exact = Objective(clt)(data, 0.3)
    exact.loss.backward()
    gradients = {name: p.grad.clone() for name, p in clt.named_parameters()}
    clt.zero_grad()
    with torch.autocast("cpu", precision):
        terms = Objective(clt)(data, 0.3)
    assert terms.loss.dtype == torch.float32
    terms.loss.backward()
    rounding = torch.finfo(precision).eps
    torch.testing.assert_close(terms.loss, exact.loss, rtol=8 * rounding, atol=0)
    for name, p in clt.named_parameters():
        assert p.grad.dtype == torch.float32
        error = (p.grad - gradients[name]).norm() / gradients[name].norm()
        assert error < 16 * rounding, f"{name}: relative gradient error {error:.2e}"


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
    clt = CrossLayerTranscoder(4, 64, 256)
    assert clt.W_enc.abs().max() <= 256**-0.5 < clt.W_enc.abs().max() * 1.001
    for weight in clt.W_dec:
        assert weight.abs().max() <= (4 * 64) ** -0.5 < weight.abs().max() * 1.01
    assert not clt.b_enc.any()
    assert not clt.b_dec.any()
    assert torch.all(clt.threshold == 0.03)


def test_statistics_reduce_to_one_sd_per_layer():
    clt = CrossLayerTranscoder(2, 3, 4, normalization="layer")
    mean, sd = torch.randn(2, 3).double(), torch.tensor([[3.0, 4.0, 5.0], [1.0, 1.0, 1.0]]).double()
    clt.normalization.set(mean, sd, mean, sd)
    assert clt.normalization.input_sd[:, 0].tolist() == pytest.approx([(50 / 3) ** 0.5, 1.0])
    with pytest.raises(ValueError, match=r"statistics are of \(2, 4\).*transcoder of \(2, 3\)"):
        clt.normalization.set(*[torch.ones(2, 4)] * 4)


def test_save_and_load(tmp_path):
    clt = make(cross_layer=False, normalization="dim").float()
    clt.save_pretrained(tmp_path / "out")
    loaded = CrossLayerTranscoder.from_pretrained(tmp_path / "out")
    assert loaded.config == clt.config
    assert all(torch.equal(a, b) for a, b in zip(clt.state_dict().values(), loaded.state_dict().values()))
    with pytest.raises(ValueError, match=r"has no config\.json"):
        CrossLayerTranscoder.from_pretrained(tmp_path)
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    save_file({**tensors, "W_enc": tensors["W_enc"][1:].clone()}, tmp_path / "out" / "model.safetensors")
    with pytest.raises(ValueError, match="is damaged, or its files do not belong together"):
        CrossLayerTranscoder.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("option", [{"activation": "gelu"}, {"normalization": "batch"}])
def test_unknown_choices_are_named(option):
    with pytest.raises(ValueError, match=r"(gelu|batch)' is unknown; wanted one of"):
        CrossLayerTranscoder(L, D, F, **option)


def test_per_layer_mode_has_no_cross_terms():
    assert [tuple(w.shape) for w in make(cross_layer=False).W_dec] == [(F, 1, D)] * L
    assert [tuple(w.shape) for w in make().W_dec] == [(F, L - s, D) for s in range(L)]
