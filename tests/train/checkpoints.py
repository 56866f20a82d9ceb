"""A small transcoder after a few real steps, and its checkpoints."""

import torch

from clt.model.loss import Objective
from clt.model.spec import CLTConfig, LossConfig
from clt.model.transcoder import CrossLayerTranscoder
from clt.train import checkpoint
from clt.train.distributed import World
from clt.train.spec import CheckpointConfig
from clt.train.writer import Checkpoints

ONE_RANK = World(0, 1, torch.device("cpu"))
IDENTITY = {"config_hash": "abc", "data_hash": "def"}


def trained(steps=3, seed=0, features=8):
    """A small transcoder and its optimizer after a few real steps, and a function that takes one more."""
    torch.manual_seed(seed)
    objective = Objective(CrossLayerTranscoder(2, 4, CLTConfig(d_features=features, skip=True)), LossConfig())
    optimizer = torch.optim.Adam(objective.parameters(), 1e-2, fused=True)

    def step(i):
        batch = torch.randn(16, 2, 2, 4, generator=torch.Generator().manual_seed(i))
        objective(batch, {"sparsity": 1e-3, "pre_activation": 0.0, "aux": 0.0}).total.backward()
        optimizer.step()
        optimizer.zero_grad()

    for i in range(steps):
        step(i)
    return objective.transcoder, optimizer, step


def counters(fill=None, features=8):
    """Training state beside the optimizer's: what a run has, or an empty place to read it into."""
    fired = torch.arange(2 * features).view(2, features)
    return {"last_fired": fired if fill is None else torch.full_like(fired, fill), "loss_scale": torch.tensor(2.0)}


def save(directory, transcoder, optimizer, step=3, keep=2, keep_every=0):
    """One whole checkpoint; returns its path."""
    with Checkpoints(directory, CheckpointConfig(keep=keep, keep_every=keep_every), ONE_RANK) as checkpoints:
        slices = checkpoint.slices(transcoder, optimizer, counters())
        checkpoints.begin(slices, transcoder.config, {"step": step, "busy_seconds": 1.5, "wandb_id": None, **IDENTITY})
        checkpoints.finish()
    return directory / f"step_{step:08d}"


def restore(path, transcoder, optimizer, expected=IDENTITY):
    tensors = counters(fill=-1, features=transcoder.config["d_features"])
    return checkpoint.restore(path, transcoder, optimizer, tensors, expected), tensors


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def moments(transcoder, optimizer):
    return {
        f"{name}.{key}": value
        for name, parameter in transcoder.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }
