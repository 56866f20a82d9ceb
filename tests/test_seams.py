"""The places where the trainer is meant to grow: each change is made once, and everything follows."""

from dataclasses import asdict, dataclass
from typing import Annotated

import numpy as np
import pytest
import torch

import train_ddp
from clt.config import load_config
from clt.data.store import DiscBuffer
from clt.errors import UserError
from clt.lm.load import load_language_model
from clt.lm.replacement import replaced_logits
from clt.model import loss as objective
from clt.model.activations import Fired, fire
from clt.model.loss import Objective
from clt.model.spec import CLTConfig, LossConfig
from clt.model.transcoder import CrossLayerTranscoder
from clt.ranges import NOT_NEGATIVE
from clt.train.evaluation import evaluate_activations, heldout_windows
from clt.train.logger import read_metrics


def halved(pre, threshold):
    """Another phi: half of what fires."""
    slope = pre.clone().gt_(threshold.clamp_min(0)) / 2
    return Fired(pre * slope, slope)


@torch.no_grad()
def test_fire_is_the_only_activation_function(train_overrides, stores, monkeypatch):
    """Training, encoding of all layers and of one, evaluation and replacement all change with it."""
    config = load_config(train_overrides[0], train_overrides[1:])
    lm, heldout = load_language_model(config.lm), DiscBuffer(stores / "heldout")
    torch.manual_seed(0)
    clt, rows = CrossLayerTranscoder(3, 16, CLTConfig(d_features=24)), heldout[:32].float()
    window = heldout_windows(config, lm)[0]
    tokens, keep = torch.from_numpy(window.tokens).long()[None], torch.from_numpy(np.asarray(window.keep))[None]

    def everything():
        terms = {"sparsity": 0.1, "pre_activation": 0.0, "aux": 0.0}
        return {
            "training": Objective(clt, LossConfig())(rows, terms).values["mse"],
            "encode": clt.encode(rows[:, 0]),
            "encode_layer": clt.encode_layer(rows[:, 0, 1], 1),
            "evaluation": evaluate_activations(clt, heldout)["nmse"],
            "replacement": replaced_logits(lm, clt, tokens, keep),
        }

    before = everything()
    monkeypatch.setattr(fire, "__code__", halved.__code__)
    after = everything()
    for name in before:
        assert not torch.equal(before[name], after[name]), f"{name} has an activation function of its own"
    torch.testing.assert_close(after["encode"], before["encode"] / 2)


@dataclass
class WithBias(LossConfig):
    """A term is a function in TERMS and a field of its name."""

    bias: Annotated[float, NOT_NEGATIVE] = 0.0
    """Coefficient of the squared encoder biases."""


def test_a_new_term_is_a_function_and_a_field(train_overrides, tmp_path, monkeypatch):
    def run(coefficient, directory, term):
        config = load_config(train_overrides[0], [*train_overrides[1:], f"run.dir={directory}", "log.every=1"])
        config.loss = WithBias(**asdict(config.loss), bias=coefficient)
        monkeypatch.setitem(objective.TERMS, "bias", term)
        train_ddp.main(config, prepare=False)
        return [line for line in read_metrics(directory) if "train_loss" in line]

    def squares(batch):
        return (batch.transcoder.b_enc + 1).square().sum()

    without, with_it = run(0.0, tmp_path / "a", squares), run(0.5, tmp_path / "b", squares)
    for line in with_it:
        penalty = line["sparsity_coefficient"] * line["train_sparsity"]
        assert line["train_loss"] == pytest.approx(line["train_mse"] + penalty + 0.5 * line["train_bias"], rel=1e-6)
    assert with_it[-1]["train_bias"] < without[-1]["train_bias"], "its gradient is followed"
    with pytest.raises(UserError, match="train_bias was not finite at step 1"):
        run(0.5, tmp_path / "c", lambda batch: squares(batch) * float("nan"))
