"""The decoder's own Adam: as torch's, and the same bits whether a row takes its steps at once or when it is read."""

import runpy
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.utils import get_total_norm

from benchmarks import ranks
from clt.config import OptimConfig, load_config
from clt.errors import UserError
from clt.model.kernels import reference
from clt.model.loss import Objective
from clt.model.spec import LossConfig
from clt.train import checkpoint, switch
from clt.train.logger import read_metrics
from clt.train.optim import make_adam
from clt.train.state import TrainState
from tests.model.naive import B, F, batch, coefficients, make

SHORT = ["eval.replacement_tokens=0", "log.every=1", "checkpoint.keep=99"]
SPARSE = [*SHORT, "train.kernels=sparse", "clt.threshold=1.2", "clt.bandwidth=0.2"]  # few features fire in a batch


def training(decoder, steps, capacity, dtype=torch.float64, **rule):
    """An objective, and a function that takes a step of some batches, accumulated, clipped to a norm of 0.3.

    It returns the norm of the gradient: in place of `Update`, whose optimizer clips in float32 alone.
    """
    loss = LossConfig(sparsity_scale=0.7)
    objective = Objective(make(**rule).to(dtype), loss)
    named = dict(objective.transcoder.named_parameters())
    adam, objective.row_adam = make_adam(named, OptimConfig(decoder=decoder), steps, dtype)
    others = torch.optim.Adam(adam.param_groups[0]["params"], eps=1e-8)

    def step(lr, *data, skip=False):
        objective.capacity, rows = capacity, objective.row_adam
        objective.zero_grad()
        for part in data:
            (objective(part.to(dtype), coefficients(loss, 0.3)).total / len(data)).backward()
        square = get_total_norm([p.grad for p in named.values() if p.grad is not None]) ** 2
        norm = (square + (0 if rows is None else rows.square_through_norms())).sqrt()
        clip = (norm / 0.3).clamp_min(1)
        if rows is not None:
            rows.update(lr, torch.tensor(skip), clip)
        for parameter in others.param_groups[0]["params"]:
            parameter.grad /= clip
        others.param_groups[0]["lr"] = lr
        if not skip:
            others.step()
        return norm.detach()

    return objective, step


def assert_close(found, wanted, **tolerances):
    weights = wanted.transcoder.state_dict()
    for name, ours in found.transcoder.state_dict().items():
        torch.testing.assert_close(ours, weights[name], **tolerances, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("capacity", [None, F * B], ids=["dense", "sparse"])
def test_it_is_torchs_adam_in_float64(capacity):
    """With clipping, two micro-batches, a row of zeros, and a step that is left out; and so is the norm that clips."""
    runs = [training(decoder, 6, capacity) for decoder in ("torch", "fused")]
    for objective, _ in runs:
        with torch.no_grad():
            objective.transcoder.W_dec[1][2] = 0
        if objective.row_adam is not None:
            objective.row_adam.take_in()
    for number in range(1, 7):
        norms = [step(1e-2 / number, batch(number), batch(9 + number), skip=number == 3) for _, step in runs]
        torch.testing.assert_close(*norms, rtol=1e-11, atol=0)
        assert norms[0] > 0.3, "it clips"
        assert_close(runs[1][0], runs[0][0], rtol=1e-9, atol=1e-11)


def test_decoders_are_all_trained_or_all_frozen():
    """Each layer has its own W_dec. A frozen one is not updated."""
    named = dict(make().named_parameters())
    named["W_dec.1"].requires_grad_(False)
    with pytest.raises(UserError, match=r"optim\.decoder is fused but W_dec\.1 is frozen, .*optim\.decoder=torch"):
        make_adam(named, OptimConfig(decoder="fused"), 3, torch.float64)
    for name, parameter in named.items():
        parameter.requires_grad_(not name.startswith("W_dec."))
    adam, row_adam = make_adam(named, OptimConfig(decoder="fused"), 3, torch.float64)
    assert row_adam is None
    assert len(adam.param_groups[0]["params"]) == sum(p.requires_grad for p in named.values())


def state(run_dir, step=10):
    """All tensors of a checkpoint."""
    path = run_dir / "checkpoints" / f"step_{step:08d}"
    return load_file(path / checkpoint.MODEL) | load_file(path / checkpoint.TRAINING)


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


@pytest.fixture
def often(monkeypatch):
    monkeypatch.setattr(switch, "_EVERY", 3)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_run_comes_to_the_weights_of_torchs_adam(train, precision):
    """The next forward multiplies the narrow copy; fp16 has a loss scale."""
    options = [*SHORT, f"train.precision={precision}", "loss.pre_activation=0.1"]
    found, wanted = train(*options, "optim.decoder=fused"), train(*options)
    for name, tensor in wanted.weights.items():
        torch.testing.assert_close(found.weights[name], tensor, rtol=1e-2, atol=2e-4, msg=name)
    norms = [[line["grad_norm"] for line in run.metrics if "grad_norm" in line] for run in (found, wanted)]
    assert norms[0] == pytest.approx(norms[1], rel=2e-3)
    assert norms[0] != norms[1]


def test_a_lazy_run_has_the_same_bits(train, tmp_path, monkeypatch, often):
    """With evaluations and checkpoints between; also when it resumes, from a dense step and from a sparse one.

    A checkpoint is copied while the next forward pass runs, which so must not change a row.
    """
    options, behind = [*SPARSE, "train.precision=bf16", "train.accumulate=2", "eval.every=4"], []
    fused = train(*options, "optim.decoder=fused", "checkpoint.every=0")
    catch_up = reference.catch_up_rows

    def watched(rows, steps, wanted):
        behind.append(int((steps.newest - rows.last)[wanted].max()) if wanted.any() else 0)
        assert saving or not (every_step_is_saved and behind[-1])
        catch_up(rows, steps, wanted)

    def watched_save(*arguments):
        saving.append(True)
        save(*arguments)
        saving.pop()

    saving, save, every_step_is_saved = [], TrainState.save, False
    monkeypatch.setattr(TrainState, "save", watched_save)
    monkeypatch.setattr(reference, "catch_up_rows", watched)
    options += ["optim.decoder=lazy", "checkpoint.every=1"]
    lazy = train(*options[:-1], "checkpoint.every=0")
    assert max(behind) == 4, "some features do not fire from one evaluation to the next"
    assert_same(state(lazy.dir), state(fused.dir))
    evaluations = [[line for line in run.metrics if "eval_fve" in line] for run in (lazy, fused)]
    assert evaluations[0] == evaluations[1]
    every_step_is_saved = True
    saved = train(*options, f"run.dir={tmp_path / 'whole'}")
    assert_same(state(saved.dir), state(fused.dir))
    for step in (2, 7):
        directory = shutil.copytree(saved.dir, tmp_path / f"from_{step}")
        for later in range(step + 1, 11):
            shutil.rmtree(directory / "checkpoints" / f"step_{later:08d}")
        train(*options, f"run.dir={directory}")
        assert_same(state(directory), state(fused.dir))


def train_with_many_choices(*arguments):
    switch._EVERY = 3
    sys.argv = ["train_ddp.py", *arguments]
    runpy.run_path("train_ddp.py", run_name="__main__")


@pytest.mark.parametrize("shards", [1, 2], ids=["2x1", "1x2"])
def test_two_ranks_give_the_run_of_one_by_torchs_adam(train, train_overrides, tmp_path, often, shards):
    """Data ranks read different rows, and bring them up to date at different steps."""
    options = [*SPARSE, "train.batch_tokens=61", "train.accumulate=2", "optim.clip_norm=0.01"]
    torchs = train(*options)
    wanted, layout, found = torchs.weights, [f"parallel.feature_shards={shards}"], {}
    for decoder in ("fused", "lazy"):
        keys = [f"optim.decoder={decoder}", f"run.dir={tmp_path / decoder}"]
        ranks.run(train_with_many_choices, *train_overrides, *options, *layout, *keys, processes=2)
        found[decoder] = state(tmp_path / decoder)
        # Adam hardly sees a wrong scale of all gradients: the norm that clips must be right by itself.
        norms = [line["grad_norm"] for line in read_metrics(tmp_path / decoder) if "grad_norm" in line]
        assert norms == pytest.approx([line["grad_norm"] for line in torchs.metrics if "grad_norm" in line], rel=1e-4)
    assert_same(found["lazy"], found["fused"])
    for name, tensor in wanted.items():
        torch.testing.assert_close(found["lazy"][name], tensor, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("optim.decoder=fused loss.aux=0.1 loss.dead_window=100", "fused but loss.aux is 0.1"),
        ("optim.decoder=lazy", "lazy but train.kernels is dense"),
        (
            "optim.decoder=lazy train.kernels=sparse clt.activation=topk clt.k=3 loss.sparsity=0 clt.by_norm=true",
            "lazy but clt.by_norm is true",
        ),
    ],
)
def test_what_it_cannot_do_is_refused(keys, message):
    with pytest.raises(UserError, match=message):
        load_config(None, keys.split())
