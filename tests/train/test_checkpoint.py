"""Checkpoints: complete, atomic, free of pickle."""

import json
import os
from pathlib import Path

import pytest
import torch

from clt.errors import UserError
from clt.model.loss import Objective
from clt.model.transcoder import CrossLayerTranscoder
from clt.train import checkpoint


def trained(steps=3, seed=0):
    """A small transcoder and its optimizer after a few real steps, and a function that takes one more."""
    torch.manual_seed(seed)
    objective = Objective(CrossLayerTranscoder(2, 4, 8))
    optimizer = torch.optim.Adam(objective.parameters(), 1e-2, fused=True)

    def step(i):
        batch = torch.randn(16, 2, 2, 4, generator=torch.Generator().manual_seed(i))
        objective(batch, torch.tensor(1e-3)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    for i in range(steps):
        step(i)
    return objective.transcoder, optimizer, step


def state(step=3):
    return {"step": step, "wandb_id": None, "scaler": {"scale": 2.0}, "last_fired": torch.arange(16).view(2, 8)}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_everything_comes_back_to_the_bit(tmp_path):
    transcoder, optimizer, step = trained()
    path = checkpoint.save(tmp_path, transcoder, optimizer, state(), keep=2)
    drawn = torch.rand(3)
    assert path.name == "step_00000003"
    assert {file.suffix for file in path.iterdir()} == {".json", ".safetensors"}

    other, other_optimizer, other_step = trained(steps=1, seed=7)
    restored = checkpoint.restore(path, other, other_optimizer)
    assert torch.equal(torch.rand(3), drawn), "the RNG goes on from where it was"
    assert (restored["step"], restored["wandb_id"], restored["scaler"]) == (3, None, {"scale": 2.0})
    assert torch.equal(restored["last_fired"], state()["last_fired"])
    assert equal(other.state_dict(), transcoder.state_dict())
    assert str(path) not in Path("/proc/self/maps").read_text(), "the files may be deleted while the run goes on"
    tensors = checkpoint.optimizer_tensors
    assert equal(tensors(other, other_optimizer), tensors(transcoder, optimizer))
    step(9), other_step(9)
    assert equal(other.state_dict(), transcoder.state_dict())


def test_a_checkpoint_is_a_pretrained_transcoder(tmp_path):
    transcoder, optimizer, _ = trained()
    path = checkpoint.save(tmp_path, transcoder, optimizer, state(), keep=2)
    assert equal(CrossLayerTranscoder.from_pretrained(path).state_dict(), transcoder.state_dict())


def test_only_the_newest_are_kept(tmp_path):
    transcoder, optimizer, _ = trained()
    (tmp_path / "step_00000005.tmp").mkdir()  # what a crash leaves
    for number in (5, 10, 15, 20):
        checkpoint.save(tmp_path, transcoder, optimizer, state(number), keep=2)
    assert checkpoint.steps(tmp_path) == [15, 20]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000015", "step_00000020"]


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_a_truncated_file_is_named(tmp_path, name):
    transcoder, optimizer, _ = trained()
    path = checkpoint.save(tmp_path, transcoder, optimizer, state(), keep=2)
    os.truncate(path / name, (path / name).stat().st_size // 2)
    with pytest.raises(UserError, match=r"step_00000003.*damaged"):
        checkpoint.restore(path, transcoder, optimizer)


def test_another_format_and_another_size_are_refused(tmp_path):
    transcoder, optimizer, _ = trained()
    path = checkpoint.save(tmp_path, transcoder, optimizer, state(), keep=2)
    wider = CrossLayerTranscoder(2, 4, 9)
    with pytest.raises(UserError, match=r"'d_features': 8.* this run of .*'d_features': 9"):
        checkpoint.restore(path, wider, torch.optim.Adam(wider.parameters()))
    saved = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(saved | {"format_version": 99}))
    with pytest.raises(UserError, match="format version 99, this code reads 1; resume with the code that wrote it"):
        checkpoint.restore(path, transcoder, optimizer)


def leave_free(disk, wanted):
    """Fill a small file system up to `wanted` free bytes."""
    (disk / "filler").unlink(missing_ok=True)
    status = os.statvfs(disk)
    (disk / "filler").write_bytes(bytes(status.f_bavail * status.f_bsize - wanted))


def test_a_full_disk_keeps_the_previous_checkpoint(small_disk):
    disk = small_disk(64 << 10)
    transcoder, optimizer, _ = trained()
    checkpoint.save(disk, transcoder, optimizer, state(3), keep=2)
    before = {file.name: file.read_bytes() for file in (disk / "step_00000003").iterdir()}
    leave_free(disk, 4096)
    with pytest.raises(UserError, match=r"found 0\.000 GB free, wanted .* step 3 is kept. Free disk space"):
        checkpoint.save(disk, transcoder, optimizer, state(6), keep=2)
    leave_free(disk, 16384)  # what the tensors have, so that the check passes; whole pages and headers do not fit
    with pytest.raises(UserError, match=r"No space left.*step 3 is kept"):
        checkpoint.save(disk, transcoder, optimizer, state(6), keep=2)
    assert checkpoint.steps(disk) == [3]
    assert sorted(path.name for path in disk.iterdir()) == ["filler", "step_00000003"]
    assert before == {file.name: file.read_bytes() for file in (disk / "step_00000003").iterdir()}
