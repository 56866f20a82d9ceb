"""Schedules at their corners."""

from pathlib import Path

import pytest
import torch

from clt.config import OptimConfig
from clt.model.terms import value_names
from clt.train.optim import NEVER, Update, autocast_dtype, learning_rate


def test_learning_rate():
    config = OptimConfig(lr=2.0, warmup=0.1, decay=0.2)
    rates = [learning_rate(step, 100, config) for step in range(100)]
    assert rates[:3] == pytest.approx([0.2, 0.4, 0.6])
    assert rates[9:80] == [2.0] * 71
    assert rates[81] == pytest.approx(1.9)
    assert rates[99] == pytest.approx(0.1)
    assert [learning_rate(step, 100, OptimConfig(lr=2.0)) for step in (0, 50, 99)] == [2.0] * 3
    assert max(learning_rate(step, 10, OptimConfig(lr=2.0, warmup=1.0, decay=1.0)) for step in range(10)) < 2.0


def test_auto_precision_is_what_the_hardware_multiplies():
    cpu = torch.device("cpu")
    assert autocast_dtype("bf16", cpu) == torch.bfloat16
    assert autocast_dtype("fp16", cpu) == torch.float16
    assert autocast_dtype("fp32", cpu) == torch.float32
    flags = Path("/proc/cpuinfo").read_text()
    native = "amx_bf16" in flags or "avx512_bf16" in flags
    assert autocast_dtype("auto", cpu) == (torch.bfloat16 if native else torch.float32)


def problem(scale_of_gradients=1.0):
    """Two parameters with gradients, twice: one pair for our update, one for torch's own functions."""
    generator = torch.Generator().manual_seed(0)
    pairs = []
    for shape in ((5, 3), (4,)):
        value, gradient = (torch.randn(shape, generator=generator) for _ in range(2))
        pairs.append((value, gradient * scale_of_gradients))
    return [[torch.nn.Parameter(value.clone()) for value, _ in pairs] for _ in range(2)], [g for _, g in pairs]


def updater(parameters, **options):
    """The first parameter is one that shards split, the second is whole in each."""
    optimizer = torch.optim.Adam(parameters, 0.1, fused=True)
    defaults = {"clip_norm": 1.0, "sum_shards": lambda t: t, "floor": 0.01, "fp16": False, "stop": True}
    return Update(optimizer, dict(zip(("W_enc", "b_dec"), parameters)), **{**defaults, **options})


@pytest.mark.parametrize("size", [0.01, 100.0])
def test_update_is_torchs_clipping_and_adam(size):
    (ours, theirs), gradients = problem(size)
    update, adam = updater(ours), torch.optim.Adam(theirs, 0.1)
    for step in range(1, 4):
        for a, b, gradient in zip(ours, theirs, gradients):
            a.grad, b.grad = gradient * step, gradient * step
        expected = torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        adam.step()
        torch.testing.assert_close(update(step, 0.1, torch.zeros(len(value_names()))), expected)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("clip_norm", "fp16"), [(None, False), (None, True), (1e4, False), (150.0, False)])
def test_gradients_are_written_back_only_in_steps_that_scale_them(clip_norm, fp16):
    """The kernel writes them back when it is given a scale. Either way the update is Adam's, without failed steps."""
    (ours, theirs), gradients = problem(100.0)
    update, adam = updater(ours, clip_norm=clip_norm, fp16=fp16, stop=False), torch.optim.Adam(theirs, 0.1)
    scaled = []
    for step, factor in enumerate([0.1, float("nan"), 2.0, 0.2], 1):
        for a, b, gradient in zip(ours, theirs, gradients):
            a.grad, b.grad = gradient * factor * update.scale, gradient * factor
        before = [p.grad.clone() for p in ours]
        update(step, 0.1, torch.zeros(len(value_names())))
        if factor == factor:
            torch.nn.utils.clip_grad_norm_(theirs, clip_norm or 1e9)
            adam.step()
            scaled.append(not all(torch.equal(p.grad, gradient) for p, gradient in zip(ours, before)))
    assert scaled == ([True] * 3 if fp16 else [False, clip_norm == 150, False])
    torch.testing.assert_close(ours, theirs)
    assert {float(update.optimizer.state[p]["step"]) for p in ours} == {3}, "each step counts once, a failed one never"


@pytest.mark.parametrize("fp16", [False, True])
def test_learned_thresholds_stay_at_or_above_the_floor(fp16):
    """Adam at this rate moves each by 0.1 a step: two would become negative, and one was (an older checkpoint's)."""
    threshold = torch.nn.Parameter(torch.tensor([0.03, 0.05, 0.5, -3.0]))
    b_dec = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.Adam([threshold, b_dec], 0.1, fused=True)
    parameters = {"threshold": threshold, "b_dec": b_dec}
    update = Update(optimizer, parameters, None, lambda t: t, floor=0.01, fp16=fp16, stop=True)
    b_dec.grad = torch.zeros(1)
    threshold.grad = torch.tensor([1.0, -1.0, 1.0, 1.0]) * update.scale
    update(1, 0.1, torch.zeros(len(value_names())))
    torch.testing.assert_close(threshold.detach(), torch.tensor([0.01, 0.15, 0.4, 0.01]))


def test_update_counts_every_shard_once():
    """Two shards with the same gradients: the sharded part doubles in square, the replicated part does not."""
    (ours, _), gradients = problem()
    update = updater(ours, sum_shards=lambda sums: 2 * sums)
    for parameter, gradient in zip(ours, gradients):
        parameter.grad = gradient
    expected = (2 * gradients[0].square().sum() + gradients[1].square().sum()).sqrt()
    torch.testing.assert_close(update(1, 0.1, torch.zeros(len(value_names()))), expected)


def test_the_loss_scale_falls_at_an_overflow_and_rises_after_2000_good_steps():
    (ours, _), gradients = problem()
    update, before = updater(ours, fp16=True), [p.detach().clone() for p in ours]

    def step(number, gradients):
        for parameter, gradient in zip(ours, gradients):
            parameter.grad = gradient * update.scale
        return update(number, 0.1, torch.zeros(len(value_names())))

    step(1, [gradients[0] * float("inf"), gradients[1]])
    assert update.scale == 2.0**15
    assert update.skipped == 1
    assert (update.failed_at == NEVER).all(), "an overflow is no failure"
    torch.testing.assert_close(ours, before, rtol=0, atol=0)
    norm = step(2, gradients)
    torch.testing.assert_close(norm, torch.cat([g.flatten() for g in gradients]).norm())
    update.good_steps.fill_(1999)
    step(3, gradients)
    assert update.scale == 2.0**16
    assert update.good_steps == 0


@pytest.mark.parametrize("where", ["data", "feature"])
def test_a_loss_that_another_rank_lost_freezes_this_one(where):
    """Under fp16. The other rank shares this one's gradient, or holds another shard, whose sums arrive as a whole."""
    (ours, _), gradients = problem()
    lost = torch.tensor([float("nan"), 1.0])  # of the other shard: its norm, and that its loss was lost
    steps = iter([torch.zeros(2), lost if where == "feature" else torch.zeros(2), torch.zeros(2)])
    update = updater(ours, fp16=True, sum_shards=lambda sums: sums + next(steps))
    after = []
    for step, factor in enumerate([1.0, float("nan") if where == "data" else 1.0, 1.0], 1):
        for parameter, gradient in zip(ours, gradients):
            parameter.grad = gradient * factor * update.scale
        update(step, 0.1, torch.zeros(len(value_names())))
        after.append([p.detach().clone() for p in ours])
    assert dict(zip(update.names, update.failed_at.tolist()))["grad_norm"] == 2
    assert update.skipped == 2
    assert all(torch.equal(a, b) for a, b in zip(after[0], after[2]))


@pytest.mark.parametrize("stop", [True, False])
def test_a_failure_is_recorded_with_its_term_and_step(stop):
    (ours, _), gradients = problem()
    update, before = updater(ours, stop=stop), [p.detach().clone() for p in ours]
    nan = [gradient * float("nan") for gradient in gradients]
    for number, (values, terms) in enumerate([(nan, [0, float("inf"), 0, 0]), (gradients, [0] * 4)], 1):
        for parameter, gradient in zip(ours, values):
            parameter.grad = gradient.clone()
        update(number, 0.1, torch.tensor(terms))
    assert dict(zip(update.names, update.failed_at.tolist())) == {
        "train_mse": NEVER, "train_sparsity": 1, "train_pre_activation": NEVER, "train_aux": NEVER, "grad_norm": 1,
    }  # fmt: skip
    assert update.skipped == (2 if stop else 1)
    assert all(torch.equal(a, b) for a, b in zip(ours, before)) == stop


def test_a_run_keeps_thresholds_at_or_above_the_floor(train):
    """At this rate Adam would have some of them below 0 after the first step."""
    weights = train("optim.lr=0.1", "eval.replacement_tokens=0").weights
    assert weights["threshold"].min() == torch.tensor(0.01)


@pytest.mark.parametrize(("place", "is_told"), [("mse", True), ("sparsity", False)])
def test_a_step_without_room_does_not_hide_a_nan_in_the_data(place, is_told):
    (ours, _), gradients = problem()
    update, values = updater(ours), torch.zeros(len(value_names()))
    for parameter, gradient in zip(ours, gradients):
        parameter.grad = torch.full_like(gradient, torch.nan)
    values[value_names().index(place)] = torch.nan
    update(1, 0.1, values, torch.tensor(True))
    assert (update.failed_at != NEVER).tolist() == [is_told] + [False] * (len(update.names) - 1)
