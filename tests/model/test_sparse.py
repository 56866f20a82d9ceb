"""The sparse step is the dense one: loss and every gradient, in float64, by each rule for the threshold."""

import math
from collections import Counter

import pytest
import torch

from clt.model import loss as loss_module
from clt.model.kernels import sampling
from clt.model.loss import Objective
from clt.model.sparse import draw
from clt.model.spec import LossConfig
from clt.model.transcoder import feature_dim
from clt.train.ddp import GradientMemory
from tests.model.naive import B, F, L, batch, coefficients, make

RULES = {
    "relu": {"activation": "relu"},
    "jumprelu": {"activation": "jumprelu", "bandwidth": 0.7},
    "jumprelu through theta alone": {"activation": "jumprelu", "straight_through_pre": False},
    "jumprelu, all near": {"activation": "jumprelu", "bandwidth": 1e3},
    "topk": {"activation": "topk", "k": 2},
    "topk by norm": {"activation": "topk", "k": 3, "by_norm": True},
    "topk of all": {"activation": "topk", "k": F},
    "batchtopk": {"activation": "batchtopk", "k": 4},
    "batchtopk by norm": {"activation": "batchtopk", "k": 5, "by_norm": True},
    "window and skip": {"window": 2, "skip": True},
    "per layer": {"cross_layer": False, "normalization": "token"},
}


def step(clt, data, capacity, loss, **options):
    """Losses, and gradients by parameter."""
    objective = Objective(clt, loss)
    objective.capacity = capacity
    for name, value in options.items():
        setattr(objective, name, value)
    losses = objective(data, coefficients(loss))
    clt.zero_grad()
    losses.total.backward()
    return losses, {name: p.grad.clone() for name, p in clt.named_parameters() if p.grad is not None}


def assert_same(found, wanted, rtol=1e-10):
    (losses, gradients), (of_dense, dense) = found, wanted
    for name in ("total", "values", "mse_per_layer", "l0_per_layer", "fired", "threshold"):
        torch.testing.assert_close(getattr(losses, name), getattr(of_dense, name), rtol=rtol, atol=rtol)
    assert gradients.keys() == dense.keys()
    for name, gradient in dense.items():
        error = (gradients[name] - gradient).norm() / gradient.norm().clamp_min(1e-30)
        assert error < rtol, f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("rule", RULES)
def test_it_is_the_dense_step(rule):
    clt, loss = make(**RULES[rule]), LossConfig(sparsity_scale=0.7)
    with torch.no_grad():
        clt.b_enc[0, 1] = -100  # a feature that never fires: an empty row
        clt.W_dec[1][2] = 0  # one without a norm
    sparse, dense = (step(clt, batch(), capacity, loss) for capacity in (F * B, None))
    assert_same(sparse, dense)
    assert sparse[0].listed.max() <= F * B
    assert dense[0].total.isfinite()


@pytest.mark.parametrize("distance", [-1e-9, 0.0, 1e-9])
def test_the_edges_of_the_rectangle_are_those_of_the_dense_step(distance):
    """A pre-activation at theta - bw/2, theta and theta + bw/2, to the bit, and a little beside."""
    clt, loss = make(bandwidth=0.5, normalization="none"), LossConfig()
    data = batch()
    with torch.no_grad():
        clt.W_enc.zero_()
        clt.threshold.fill_(0.375)
        for f, at in enumerate((0.125, 0.375, 0.625)):
            clt.b_enc[:, f] = at + distance
    sparse, dense = (step(clt, data, capacity, loss) for capacity in (F * B, None))
    assert_same(sparse, dense)
    on_edge = clt.threshold.grad[0, :, 0].abs().max()
    assert (on_edge > 0) == (distance > 0)


def test_no_feature_fires():
    clt, loss = make(activation="relu"), LossConfig()
    with torch.no_grad():
        clt.b_enc.fill_(-100)
    sparse, dense = (step(clt, batch(), capacity, loss) for capacity in (F * B, None))
    assert_same(sparse, dense)
    assert sparse[0].listed.sum() == 0


def test_too_many_pairs_make_the_loss_nan():
    """A step whose loss is nan changes no weight: it must not go on without the pairs that were left out."""
    clt, loss = make(activation="relu"), LossConfig()
    most = step(clt, batch(), F * B, loss)[0].listed.max().item()
    assert step(clt, batch(), most, loss)[0].total.isfinite()
    losses, _ = step(clt, batch(), most - 1, loss)
    assert losses.total.isnan()
    assert losses.listed.max() == most, "the count goes on, to say how much room is wanted"
    dense, _ = step(clt, batch(), None, loss)
    assert torch.equal(losses.l0_per_layer, dense.l0_per_layer)
    assert torch.equal(losses.fired, dense.fired)


@pytest.mark.parametrize("through_pre", [True, False])
def test_sampled_pairs_give_the_exact_gradients_on_average(through_pre, monkeypatch):
    """Over all samples that a step may draw, to rounding. The loss is exact in each, and so are decoders' gradients."""
    clt, loss = make(bandwidth=2.5, straight_through_pre=through_pre), LossConfig(sparsity_scale=0.7)
    dense = step(clt, batch(), None, loss, count_pairs=True, sampling=0)
    fired, others = dense[0].needed - 1, dense[0].listed - dense[0].needed + 1
    capacity = int(fired.max()) + 3
    every = [int(sampling(torch.stack(found), capacity, 0, B)[0]) for found in zip(fired, others)]
    assert max(every) > 3
    assert capacity < dense[0].listed.max()
    samples, sums = math.lcm(*every), {name: torch.zeros_like(gradient) for name, gradient in dense[1].items()}
    for sample in range(samples):
        monkeypatch.setattr(loss_module, "draw", lambda number, layer, n=sample: -(-n * 2**24 // samples))
        losses, gradients = step(clt, batch(), capacity, loss, sampling=0)
        torch.testing.assert_close(losses.total, dense[0].total, rtol=1e-12, atol=0)
        torch.testing.assert_close(gradients["W_dec.0"], dense[1]["W_dec.0"], rtol=1e-10, atol=1e-12)
        for name, gradient in gradients.items():
            sums[name] += gradient / samples
        assert (gradients["threshold"] - dense[1]["threshold"]).norm() > 1e-3 * gradients["threshold"].norm()
    assert_same((losses, sums), dense)


@pytest.mark.parametrize("tokens", [1, 11, 4000, 4096, 2 * 3 * 5 * 7 * 11 * 13 * 17 * 19])
def test_samples_have_no_period_in_common_with_tokens(tokens):
    """The smallest one with which the pairs that are listed have room."""
    for near in (1, 13, 40, 41, 997, 12_000):
        every, first = sampling(torch.tensor([5, near]), 25, 2**24 - 1, tokens)
        least = math.ceil(near / 20)
        assert int(every) == next(n for n in range(least, 10 * near) if math.gcd(n, tokens) == 1)
        assert first == every - 1


def test_a_sample_that_has_no_room_makes_the_loss_nan():
    clt, loss = make(bandwidth=2.5), LossConfig()
    most = step(clt, batch(), F * B, loss, sampling=0)[0].needed.max().item()
    assert step(clt, batch(), most, loss, sampling=0)[0].total.isfinite()
    assert step(clt, batch(), most - 1, loss, sampling=0)[0].total.isnan()


def test_draws_are_spread_evenly_over_steps_and_differ_by_layer():
    for every in (2, 3, 10, 64):
        for layer in (0, 5):
            counts = Counter(draw(number, layer) * every >> 24 for number in range(1000, 1000 + 50 * every))
            assert set(counts) == set(range(every))
            assert max(counts.values()) - min(counts.values()) <= 10
    assert len({draw(7, layer) for layer in range(48)}) == 48


@pytest.mark.parametrize("place", ["activations", "b_enc"])
@pytest.mark.parametrize("rule", ["relu", "jumprelu", "topk", "batchtopk"])
def test_a_nan_reaches_the_loss(rule, place):
    clt, data = make(**RULES[rule]), batch()
    with torch.no_grad():
        (data[3, 0, 1, 2:3] if place == "activations" else clt.b_enc[1, 2:3]).fill_(torch.nan)
    assert step(clt, data, F * B, LossConfig())[0].total.isnan()


@pytest.mark.parametrize("rule", ["jumprelu", "topk by norm", "batchtopk"])
def test_shards_add_up_to_the_whole(rule):
    """Two shards in one process: the first one's sums are recorded in a first pass, then added to the second's."""
    import threading

    loss, options = LossConfig(sparsity_scale=0.7), RULES[rule]
    whole = make(d_features=2 * F, **options)
    barrier, parts = threading.Barrier(2), [None, None]

    def sum_over_shards(part):
        def add(tensor):
            parts[part] = tensor.detach().clone()
            barrier.wait(timeout=60)
            tensor.copy_(parts[0] + parts[1])
            barrier.wait(timeout=60)
            return tensor

        return add

    shards = []
    for part in range(2):
        shard = make(d_features=2 * F, shard=(part, 2), sum_shards=sum_over_shards(part), **options)
        for name, value in whole.state_dict().items():
            dim, mine = feature_dim(name), slice(part * F, (part + 1) * F)
            part_of = value if dim is None else value.transpose(0, dim)[mine].transpose(0, dim)
            shard.state_dict()[name].copy_(part_of)
        shards.append(shard)
    found = [None, None]

    def run(part):
        found[part] = step(shards[part], batch(), F * B, loss, sum_ranks=sum_over_shards(part))

    threads = [threading.Thread(target=run, args=(part,)) for part in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    losses, gradients = step(whole, batch(), None, loss)
    for part, (of_shard, of_part) in enumerate(found):
        torch.testing.assert_close(of_shard.values["mse"], losses.values["mse"], rtol=1e-10, atol=0)
        for name, gradient in gradients.items():
            dim, mine = feature_dim(name), slice(part * F, (part + 1) * F)
            wanted = gradient if dim is None else gradient.transpose(0, dim)[mine].transpose(0, dim)
            torch.testing.assert_close(of_part[name], wanted, rtol=1e-9, atol=1e-12)


def test_gradients_are_written_where_the_last_ones_were():
    clt, loss = make(), LossConfig()
    wanted = step(clt, batch(2), None, loss)
    memory = GradientMemory(clt.parameters())
    step(clt, batch(1), F * B, loss, gradient_memory=memory)
    clt.zero_grad()
    Objective(clt, loss)(batch(1), coefficients(loss)).total.backward()
    memory.clear()
    places = {p: kept.data_ptr() for p, kept in memory.kept.items()}
    objective = Objective(clt, loss)
    objective.capacity, objective.gradient_memory = F * B, memory
    objective(batch(2), coefficients(loss)).total.backward()
    assert all(weight.grad.data_ptr() == places[weight] for weight in (clt.W_enc, *clt.W_dec))
    for name, parameter in clt.named_parameters():
        if name in wanted[1]:
            torch.testing.assert_close(parameter.grad, wanted[1][name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_autocast_is_within_the_rounding_of_its_dtype(precision):
    clt, data, loss = make().float(), batch().float(), LossConfig()
    _, exact = step(clt, data, F * B, loss)
    with torch.autocast("cpu", precision):
        losses, rounded = step(clt, data, F * B, loss)
    assert losses.mse_per_layer.shape == (L,)
    for name, gradient in exact.items():
        error = (rounded[name] - gradient).norm() / gradient.norm()
        assert error < 16 * torch.finfo(precision).eps, f"{name}: relative gradient error {error:.2e}"
