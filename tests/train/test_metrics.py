"""Metrics of a step against sums over single tokens and features; the coefficients; the run's speed on a fake clock."""

from types import SimpleNamespace

import pytest
import torch

from clt.config import LossConfig
from clt.model.loss import Losses
from clt.train import metrics
from clt.train.distributed import Axis, World
from clt.train.metrics import Metrics, Speed, coefficients

CPU = torch.device("cpu")
TOKENS, L, F = 9, 2, 6


def step(seed):
    """What each token of a global batch costs: its error (TOKENS, L), and each feature's penalties and activity."""
    generator = torch.Generator().manual_seed(seed)
    error = torch.rand(TOKENS, L, generator=generator)
    sparsity, pre_activation = torch.rand(2, TOKENS, L, F, generator=generator).unbind()
    on = torch.rand(TOKENS, L, F, generator=generator) < 0.2
    return error, sparsity, pre_activation, on


def losses(of_step, tokens, features):
    """What the objective gives for some of the tokens and a shard of the features: means over these tokens."""
    error, sparsity, pre_activation, on = of_step
    error, on, count = error[tokens], on[tokens][:, :, features], len(error[tokens])
    values = {
        "mse": error.mean(),
        "sparsity": sparsity[tokens][:, :, features].sum() / count,
        "pre_activation": pre_activation[tokens][:, :, features].sum() / count,
        "aux": torch.zeros(()),
    }
    l0, fired = on.sum((0, 2)) / count, on.any(0)
    return Losses(torch.tensor(float("nan")), values, error.mean(0), l0, fired, threshold=torch.zeros(()))


def added_up(numbers):
    return {name: sum(each[name] for each in numbers) for name in numbers[0]}


def test_metrics_of_micro_batches_and_shards_are_the_sums_over_tokens_and_features():
    """A rank's metrics are addends, so those of the shards are added up here, as the ranks' collective does."""
    of_step, terms = step(seed=0), {"sparsity": 0.3, "pre_activation": 2.0}
    shards = [Metrics(World(i, 2, CPU, feature=Axis(i, 2)), L, F // 2) for i in range(2)]
    for tokens in (slice(0, 5), slice(5, 9)):  # micro-batches of different sizes
        for shard, features in zip(shards, (slice(0, 3), slice(3, 6)), strict=True):
            shard.add(losses(of_step, tokens, features), len(range(TOKENS)[tokens]) / TOKENS)
    found = added_up([shard.read(terms) for shard in shards])

    error, sparsity, pre_activation, on = (tensor.tolist() for tensor in of_step)
    naive = dict.fromkeys(["train_mse", "train_sparsity", "train_pre_activation", "train_aux"], 0.0)
    naive |= {f"{name}/layer_{l}": 0.0 for name in ("mse", "L0") for l in range(L)}
    for b in range(TOKENS):
        for l in range(L):
            naive["train_mse"] += error[b][l] / L / TOKENS
            naive[f"mse/layer_{l}"] += error[b][l] / TOKENS
            for f in range(F):
                naive["train_sparsity"] += sparsity[b][l][f] / TOKENS
                naive["train_pre_activation"] += pre_activation[b][l][f] / TOKENS
                naive[f"L0/layer_{l}"] += on[b][l][f] / TOKENS
    naive["L0"] = naive["L0/layer_0"] + naive["L0/layer_1"]
    loss = naive["train_mse"] + 0.3 * naive["train_sparsity"] + 2.0 * naive["train_pre_activation"]
    assert found == pytest.approx(naive | {"train_loss": loss}, rel=1e-5)

    for shard, features in zip(shards, (range(3), range(3, 6)), strict=True):
        fired = [[any(on[b][l][f] for b in range(TOKENS)) for f in features] for l in range(L)]
        assert shard.fired.tolist() == fired
        assert {True, False} == {one for row in fired for one in row}
    values = sum(shard.values for shard in shards)
    assert values.tolist() == pytest.approx(
        [naive["train_mse"], naive["train_sparsity"], naive["train_pre_activation"], 0.0], rel=1e-5
    )


def test_metrics_are_summed_over_all_ranks():
    """Two ranks that have seen the same tokens: every metric is twice as large."""
    everyone = SimpleNamespace(sum=lambda tensor: tensor.mul_(2))
    one, two = Metrics(World(0, 1, CPU), L, F), Metrics(World(0, 2, CPU, everyone=everyone), L, F)
    for each in (one, two):
        each.add(losses(step(seed=0), slice(0, 9), slice(0, 6)), 1.0)
    terms = {"sparsity": 0.3, "pre_activation": 2.0}
    assert two.read(terms) == pytest.approx({name: 2 * value for name, value in one.read(terms).items()})


def test_a_loss_that_is_not_finite_shows():
    whole = Metrics(World(0, 1, CPU), L, F)
    bad = step(seed=0)
    bad[0][3, 1] = float("nan")
    whole.add(losses(bad, slice(0, 5), slice(0, 6)), 5 / 9)
    whole.add(losses(bad, slice(5, 9), slice(0, 6)), 4 / 9)
    assert whole.values.isnan().tolist() == [True, False, False, False]
    found = whole.read({"sparsity": 0.3, "pre_activation": 2.0})
    assert {name for name, value in found.items() if value is None} == {"train_loss", "train_mse", "mse/layer_1"}


def test_the_coefficient_of_sparsity_rises_over_its_ramp_and_the_others_stay():
    config = LossConfig(sparsity=3.0, sparsity_ramp=0.5, pre_activation=0.2)
    assert {coefficients(step, 40, config)["pre_activation"] for step in range(40)} == {0.2}
    values = [coefficients(step, 40, config)["sparsity"] for step in range(40)]
    assert values[0] == 0
    assert values[10] == pytest.approx(1.5)
    assert values[20:] == [3.0] * 20
    assert coefficients(0, 100, LossConfig(sparsity=3.0, sparsity_ramp=0.0))["sparsity"] == 3.0


@pytest.fixture
def clock(monkeypatch):
    """A clock whose seconds go on only when the test says so."""
    clock = SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr(metrics, "time", SimpleNamespace(perf_counter=lambda: clock.seconds))
    return clock


def test_speed_is_that_since_the_last_reading(clock):
    source = SimpleNamespace(stalled=5.0)
    speed = Speed(10, 0.0, 60, source)
    clock.seconds += 4
    source.stalled += 1
    assert speed.read(12) == {"tokens_per_second": 2 * 60 / 4, "data_wait_share": 0.25}
    clock.seconds += 2
    assert speed.read(15) == {"tokens_per_second": 3 * 60 / 2, "data_wait_share": 0.0}


def test_what_is_skipped_counts_neither_as_time_nor_as_steps(clock):
    source = SimpleNamespace(stalled=0.0)
    speed = Speed(0, 100.0, 60, source)
    clock.seconds += 3
    assert speed.busy_until(2) == 103
    clock.seconds += 50  # an evaluation
    source.stalled += 20
    speed.skip(2)
    clock.seconds += 8
    source.stalled += 2
    assert speed.read(6) == {"tokens_per_second": 4 * 60 / 8, "data_wait_share": 0.25}
    assert speed.busy_until(6) == 111
