"""The choice between the dense and the sparse step, in short runs."""

import math
import shutil
from types import SimpleNamespace

import pytest
import torch

from clt.config import TrainConfig, load_config
from clt.errors import UserError
from clt.train import switch
from clt.train.distributed import World
from clt.train.switch import Switch

SPARSE = ["train.kernels=sparse", "log.every=1", "eval.replacement_tokens=0", "checkpoint.keep=99"]


@pytest.fixture(autouse=True)
def often(monkeypatch):
    monkeypatch.setattr(switch, "_EVERY", 3)


def close(found, wanted):
    for name, tensor in wanted.weights.items():
        torch.testing.assert_close(found.weights[name], tensor, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize("rule", [[], ["clt.activation=batchtopk", "clt.k=6", "loss.sparsity=0"]], ids=str)
def test_a_run_takes_the_sparse_step_and_comes_to_the_same_weights(train, rule):
    run, dense = train(*SPARSE, *rule), train(*SPARSE, *rule, "train.kernels=dense")
    close(run, dense)
    assert any(not torch.equal(run.weights[name], tensor) for name, tensor in dense.weights.items()), (
        "it rounds differently"
    )
    lines = [line for line in run.metrics if "near_share" in line]
    assert [line["sparse_step"] for line in lines] == [0, 0] + [1] * 8
    shares = [line["near_share"] for line in lines]
    fired = [line["L0"] / (3 * 24) for line in lines]
    assert all(share >= least - 1e-6 for share, least in zip(shares, fired))
    assert (shares[0] > fired[0] + 1e-3) == (not rule), "jumprelu lists more than what fires"
    assert not any("near_share" in line for line in dense.metrics)


def test_a_resumed_run_is_the_same_to_the_bit(train, tmp_path):
    """From checkpoints between two choices, the first of them before the first choice. It samples by the step."""
    options = [*SPARSE, "train.kernels=sampled"]
    whole = train(*options, f"run.dir={tmp_path / 'whole'}", "checkpoint.every=1")
    assert [line["sparse_step"] for line in whole.metrics if "sparse_step" in line] == [0, 0] + [1] * 8
    for step in (2, 4):
        directory = tmp_path / f"from_{step}"
        shutil.copytree(whole.dir, directory)
        for later in range(step + 1, 11):
            shutil.rmtree(directory / "checkpoints" / f"step_{later:08d}")
        resumed = train(*options, f"run.dir={directory}", "checkpoint.every=1")
        assert all(torch.equal(resumed.weights[name], tensor) for name, tensor in whole.weights.items()), step


def test_steps_without_room_are_left_out_and_the_run_goes_on(train, monkeypatch):
    """By half a pair of room; then enough again."""
    rooms = iter([0.01, 2.0, 2.0])
    choose = Switch.choose

    def choose_little(self, step):
        self.room.mul_(next(rooms) / 2 if self.room > 0 else 1)
        choose(self, step)

    monkeypatch.setattr(Switch, "choose", choose_little)
    run = train(*SPARSE)
    skipped = [line["skipped_steps"] for line in run.metrics if "skipped_steps" in line]
    assert skipped == [0, 0, 0, 1, 2, 3, 3, 3, 3, 3]
    assert all(tensor.isfinite().all() for tensor in run.weights.values())


@pytest.mark.parametrize(("kernels", "most"), [("sparse", 100), ("sampled", 50)])
@pytest.mark.parametrize(("share", "more", "sparse"), [(1, 0, True), (1, 1, False), (0, 0, False)])
def test_the_choice(kernels, most, share, more, sparse):
    pairs = most * 16 * share + more
    objective = SimpleNamespace(capacity=7, transcoder=SimpleNamespace(n_layers=2, d_features=5, shards=1))
    chooser = Switch(TrainConfig(kernels=kernels, batch_tokens=16), objective, World(0, 1, torch.device("cpu")))
    for step, most in enumerate([pairs // 2, pairs, 0], start=1):
        chooser.update(step, SimpleNamespace(most_needed=torch.tensor(most)))
    assert (objective.capacity or 0) == (2 * pairs if sparse else 0)
    assert objective.sampling == (3 if kernels == "sampled" else None)
    assert math.isclose(chooser.seen.item(), 0)


@pytest.mark.parametrize("term", ["loss.pre_activation=0.1", "loss.aux=0.1"])
def test_terms_of_features_that_do_not_fire_are_refused(term):
    with pytest.raises(UserError, match=f"train.kernels is sparse but {term.partition('=')[0]} is 0.1"):
        load_config(None, ["train.kernels=sparse", term, *(["loss.dead_window=100"] if "aux" in term else [])])
