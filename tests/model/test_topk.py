"""TopK and BatchTopK against sorting everything in float64, and against autograd through torch.topk."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from clt.errors import UserError
from clt.model.loss import Objective
from clt.model.spec import CLTConfig, LossConfig, check_rule
from clt.model.step import make_kernels
from clt.model.topk import ScoreInputs, batch_threshold, scores, token_thresholds
from clt.model.transcoder import CrossLayerTranscoder
from tests.model.naive import B, D, F, L, batch, make, naive_normalized, naive_reconstruction

KERNELS = make_kernels(compile=False)


def whole(rows):
    return rows


def layers(dtype, by_norm, features=96, tokens=37):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, dtype=dtype, generator=generator)

    return [
        ScoreInputs(draw(features, tokens), draw(features), draw(features).abs() if by_norm else None) for _ in range(L)
    ]


@pytest.mark.parametrize("by_norm", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("k", [1, 3, 7, 40, 95, 96])
def test_thresholds_are_the_scores_that_just_do_not_fire(dtype, k, by_norm):
    """Groups of features are skipped by their maxima: 96 features have groups of up to 16."""
    of_layers = layers(dtype, by_norm)
    for layer in of_layers:
        ordered = torch.cat([scores(layer), torch.zeros(1, 37, dtype=dtype)]).sort(0, descending=True).values
        wanted = ordered[k].clamp_min(0).unsqueeze(0) * (k < 96)
        assert torch.equal(token_thresholds(layer, k, k, whole, KERNELS), wanted)
    every = torch.cat([scores(layer).flatten() for layer in of_layers]).sort(descending=True).values
    assert batch_threshold(of_layers, k, whole, 1, KERNELS) == every[k * 37].clamp_min(0)


def test_ties_with_the_threshold_do_not_fire_and_few_scores_have_threshold_zero():
    tied = ScoreInputs(torch.tensor([[3.0, 1.0], [2.0, -1.0], [2.0, -2.0], [1.0, -3.0]]), torch.zeros(4), None)
    assert token_thresholds(tied, 2, 2, whole, KERNELS).tolist() == [[2.0, 0.0]]
    assert batch_threshold([tied], 1.0, whole, 1, KERNELS) == 2.0  # the two largest are 3 and one of two 2s
    assert batch_threshold([tied], 3.0, whole, 1, KERNELS) == 0.0  # five are positive


@pytest.mark.parametrize("k", [5, 50])
def test_two_shards_find_the_threshold_of_the_whole(k):
    """Of 50 that may fire, a shard with 48 features gives all of its scores."""
    (layer,) = layers(torch.float64, by_norm=True)[:1]
    halves = [ScoreInputs(*(tensor[part] for tensor in layer)) for part in (slice(0, 48), slice(48, 96))]
    tops: list[torch.Tensor] = []

    def gather(rows):
        tops.append(rows)
        return torch.cat(tops)

    found = [token_thresholds(half, k, k, gather, KERNELS) for half in halves]
    assert torch.equal(found[1], token_thresholds(layer, k, k, whole, KERNELS))


def naive_choice(clt, pre):
    """a (B, L, F) of pre-activations (B, L, F), differentiable, by torch.topk over each set that competes."""
    norms = torch.stack([weight.flatten(1).norm(dim=1) for weight in clt.W_dec])  # (L, F)
    score = (pre * norms if clt.spec.by_norm else pre).relu()
    if clt.spec.activation == "topk":
        chosen = torch.zeros_like(score).scatter(2, score.topk(clt.spec.k, 2).indices, 1.0)
    else:
        chosen = torch.zeros(score.numel(), dtype=score.dtype)
        chosen = chosen.scatter(0, score.flatten().topk(clt.spec.k * len(pre)).indices, 1.0).view_as(score)
    return pre.relu() * chosen


@pytest.mark.parametrize("by_norm", [False, True])
@pytest.mark.parametrize(("activation", "k"), [("topk", 2), ("batchtopk", 6)])
def test_the_step_is_that_of_torch_topk_and_autograd(activation, k, by_norm):
    """Features, loss and gradients to all weights, in float64."""
    clt, data = make(activation=activation, k=k, by_norm=by_norm), batch()
    found = Objective(clt, LossConfig(sparsity=0))(data, {"sparsity": 0.0, "pre_activation": 0.0, "aux": 0.0})
    found.total.backward()
    ours = {name: p.grad.clone() for name, p in clt.named_parameters() if p.grad is not None}
    clt.zero_grad()
    x, y = (naive_normalized(clt, data[:, side], name) for side, name in ((0, "input"), (1, "target")))
    features = naive_choice(clt, torch.einsum("bld,ldf->blf", x, clt.W_enc) + clt.b_enc)
    error = torch.einsum("bsf,stfd->btd", features, _dense(clt)) + clt.b_dec - y
    loss = error.square().mean()
    loss.backward()
    torch.testing.assert_close(found.total, loss)
    torch.testing.assert_close(found.l0_per_layer, (features > 0).sum(2).double().mean(0))
    assert found.l0_per_layer.sum() == (k * L if activation == "topk" else k)
    for name, gradient in ours.items():
        torch.testing.assert_close(
            gradient, clt.get_parameter(name).grad, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert "threshold" not in ours


def _dense(clt):
    """The masked square decoder [source, target], through which gradients flow."""
    rows = [[clt.W_dec[s][:, t - s] if t >= s else torch.zeros(F, D).double() for t in range(L)] for s in range(L)]
    return torch.stack([torch.stack(row) for row in rows])


@pytest.mark.parametrize("by_norm", [False, True])
@torch.no_grad()
def test_encode_fires_the_k_largest_of_each_token_and_layer(by_norm):
    clt, data = make(activation="topk", k=3, by_norm=by_norm), batch()
    x = naive_normalized(clt, data[:, 0], "input")
    wanted = naive_choice(clt, torch.einsum("bld,ldf->blf", x, clt.W_enc) + clt.b_enc)
    torch.testing.assert_close(clt.encode(data[:, 0]), wanted)
    torch.testing.assert_close(clt(data[:, 0]), clt.normalization.output(naive_reconstruction(clt, wanted, data[:, 0])))


@pytest.mark.parametrize("by_norm", [False, True])
@torch.no_grad()
def test_batchtopk_encodes_with_the_running_mean_of_its_thresholds(by_norm):
    """The mean of all at first, then one that forgets: 1/100 of each new threshold, none of one that is not finite."""
    clt = make(activation="batchtopk", k=4, by_norm=by_norm)
    wanted = 0.0
    for step in range(1, 301):
        threshold = 1 + step / 300
        clt.track([torch.tensor(threshold - 0.1), torch.tensor(threshold + 0.1)], step)
        wanted += max(1 / step, 0.01) * (threshold - wanted)
    clt.track([torch.tensor(float("nan"))], 301)
    torch.testing.assert_close(clt.threshold, torch.full_like(clt.threshold, wanted))
    x = naive_normalized(clt, batch()[:, 0], "input")
    pre = torch.einsum("bld,ldf->blf", x, clt.W_enc) + clt.b_enc
    norms = torch.stack([weight.flatten(1).norm(dim=1) for weight in clt.W_dec])
    features = clt.encode(batch()[:, 0])
    torch.testing.assert_close(features, pre * ((pre * norms if by_norm else pre) > wanted))
    assert 0 < (features > 0).sum() < B * L * F


@torch.no_grad()
def test_the_running_mean_starts_anew_when_k_has_fallen():
    """Thresholds of a larger k are lower: in the mean they would let too many features fire."""
    clt = make(activation="batchtopk", k=4)
    for steps in range(-99, 1):
        clt.track([torch.tensor(0.5 + 0.005 * (steps + 99))], steps)
    assert 0.9 < clt.threshold.max() < 1.0, "while k falls, the mean follows"
    clt.track([torch.tensor(3.0)], 1)
    assert torch.all(clt.threshold == 3.0)


class Items(TorchDispatchMode):
    """Counts how often the host waits for a number of the device."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("options", [{}, {"activation": "topk", "k": 2}, {"activation": "batchtopk", "k": 6}], ids=str)
def test_no_step_waits_for_a_number_of_the_device(options):
    clt, terms = make(**options), {"sparsity": 0.0, "pre_activation": 0.0, "aux": 0.0}
    with Items() as items:
        Objective(clt, LossConfig())(batch(), terms).total.backward()
        clt.threshold.sum().item()
    assert items.count == 1, "the one of this test"


def test_other_rules_keep_their_thresholds():
    clt = make()
    before = clt.threshold.clone()
    clt.track([torch.tensor(0.0)], 1)
    assert torch.equal(clt.threshold, before)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("by_norm", [False, True])
@pytest.mark.parametrize(("activation", "k"), [("topk", 4), ("batchtopk", 12)])
def test_the_compiled_step_chooses_the_same_features(activation, k, by_norm):
    torch.manual_seed(0)
    clt = CrossLayerTranscoder(2, 16, CLTConfig(d_features=64, activation=activation, k=k, by_norm=by_norm))
    data, terms = torch.randn(40, 2, 2, 16), {"sparsity": 0.0, "pre_activation": 0.0, "aux": 0.0}
    found = []
    for compile in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            found.append(Objective(clt, LossConfig(), compile=compile)(data, terms))
    assert torch.equal(found[0].l0_per_layer, found[1].l0_per_layer)
    assert torch.equal(found[0].fired, found[1].fired)
    assert found[0].threshold == found[1].threshold
    assert found[0].l0_per_layer.sum() <= (2 * k if activation == "topk" else k)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 3}, r"clt\.k is 3 but clt\.activation is jumprelu, .*wanted clt\.activation=topk or batchtopk"),
        ({"activation": "relu", "by_norm": True}, r"clt\.by_norm is True but clt\.activation is relu"),
        ({"activation": "topk"}, r"clt\.k is null but clt\.activation is topk; wanted"),
        ({"activation": "topk", "k": 8}, r"clt\.k is 8; wanted at most 7, the features"),
        ({"activation": "topk", "k": 2, "k_start": 8}, r"clt\.k_start is 8; wanted at most 7, the features"),
        ({"activation": "batchtopk", "k": 22}, r"clt\.k is 22; wanted at most 21, the features"),
        ({"activation": "batchtopk", "k": 5, "k_start": 4}, r"clt\.k_start is 4; wanted at least clt\.k=5"),
        ({"window": 4}, r"clt\.window is 4; wanted at most 3, the layers there are, or null for all"),
    ],
)
def test_a_rule_that_does_not_fit_is_an_error(options, message):
    with pytest.raises(UserError, match=message):
        check_rule(CLTConfig(d_features=7, **options), n_layers=3)
    with pytest.raises(UserError, match=message):
        CrossLayerTranscoder(3, 5, CLTConfig(d_features=7, **options))
