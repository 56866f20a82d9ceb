"""Runs that take the sparse step, on two ranks."""

import os

import pytest
import torch
from safetensors.torch import load_file

import train_ddp
from benchmarks import ranks
from clt.config import load_config
from clt.data.store import DiscBuffer
from clt.train import checkpoint
from clt.train.logger import read_metrics

BATCHTOPK = ["clt.activation=batchtopk", "clt.k=6", "loss.sparsity=0", "clt.by_norm=true"]


def train_and_count_reads(*arguments: str) -> None:
    """As `ranks.train`; prints how many batches of the training store this rank read."""
    read, reads = DiscBuffer.read, []

    def counted(self, rows, out=None):
        reads.append(self.path.name)
        return read(self, rows, out)

    DiscBuffer.read = counted
    train_ddp.main(load_config(arguments[0], arguments[1:]), prepare=False)
    print(f"rank {os.environ['RANK']} read {reads.count('train')} batches")


@pytest.mark.parametrize(("rule", "shards"), [([], 1), (BATCHTOPK, 2)], ids=["jumprelu 2x1", "batchtopk 1x2"])
def test_two_ranks_give_the_run_of_one(train, train_overrides, tmp_path, rule, shards):
    """The ranks' micro-batches differ by a row, and so does what they list; they choose the same.

    One rank reads for both shards of the features.
    """
    options = ["train.kernels=sparse", "log.every=5", "train.batch_tokens=61", "train.accumulate=2", *rule]
    options += ["train.steps=55", "eval.replacement_tokens=0"]  # the first choice is at step 50
    alone = train(*options)
    layout = [f"parallel.feature_shards={shards}", f"run.dir={tmp_path}"]
    printed = ranks.run(train_and_count_reads, *train_overrides, *options, *layout, processes=2)
    assert "rank 0 read 55 batches" in printed
    assert f"rank 1 read {55 if shards == 1 else 0} batches" in printed
    last = checkpoint.steps(tmp_path / "checkpoints")[-1]
    found = load_file(tmp_path / "checkpoints" / f"step_{last:08d}" / "model.safetensors")
    for name, tensor in alone.weights.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)
    logged = [line for line in zip(read_metrics(tmp_path), alone.metrics, strict=True) if "near_share" in line[1]]
    assert [theirs["sparse_step"] for _, theirs in logged] == [0] * 9 + [1] * 2
    for ours, theirs in logged:
        assert ours["sparse_step"] == theirs["sparse_step"]
        assert ours["near_share"] == pytest.approx(theirs["near_share"], rel=1e-2)
