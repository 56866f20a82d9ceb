"""Writing checkpoints beside the training: what is kept, and whatever keeps one from the disk is raised."""

import os
import threading
import weakref
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from clt.errors import UserError
from clt.train import checkpoint, tensorfile, writer
from clt.train.distributed import World
from clt.train.optim import Update
from clt.train.spec import CheckpointConfig
from clt.train.writer import Checkpoints
from tests.train.checkpoints import ONE_RANK, counters, equal, save, trained


def test_the_weights_may_change_while_they_are_written(tmp_path):
    transcoder, optimizer, step = trained()
    before = {key: value.clone() for key, value in transcoder.state_dict().items()}
    with Checkpoints(tmp_path, CheckpointConfig(), ONE_RANK) as checkpoints:
        checkpoints.begin(checkpoint.slices(transcoder, optimizer, counters()), transcoder.config, {"step": 3})
        step(9)
        assert checkpoint.steps(tmp_path) == [], "without a name until it is whole"
        checkpoints.finish()
    assert equal(load_file(tmp_path / "step_00000003" / "model.safetensors"), before)


@pytest.fixture
def fake_cuda(monkeypatch):
    """Streams of GPU 5 that only record what is asked of them; `reached` is set when the copy is to be complete."""
    calls, reached = [], threading.Event()
    event = SimpleNamespace(synchronize=lambda: (reached.wait(60), calls.append("copied")))
    training = SimpleNamespace(wait_event=lambda event: calls.append("training waits for the copy"))
    side = SimpleNamespace(
        wait_stream=lambda stream: calls.append("copy waits for training" if stream is training else stream),
        record_event=lambda: (calls.append("event"), event)[1],
    )

    @contextmanager
    def within(stream):
        assert stream is side
        calls.append("begin stream")
        yield
        calls.append("end stream")

    snapshot, write = tensorfile.snapshot, tensorfile.write
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: side)
    monkeypatch.setattr(torch.cuda, "stream", within)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: training)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.append(str(device)))
    monkeypatch.setattr(tensorfile, "snapshot", lambda file: (calls.append("snapshot"), snapshot(file))[1])
    monkeypatch.setattr(tensorfile, "write", lambda *file: (calls.append("write"), write(*file)))
    return SimpleNamespace(calls=calls, reached=reached)


def test_a_gpu_copies_in_a_stream_of_its_own_that_the_next_update_waits_for(tmp_path, fake_cuda):
    transcoder, optimizer, _ = trained()
    calls, device = fake_cuda.calls, torch.device("cuda", 5)
    with Checkpoints(tmp_path, CheckpointConfig(), World(0, 1, device)) as checkpoints:
        checkpoints.wait_for_copy()
        assert calls == [], "there is no copy yet"
        slices = checkpoint.slices(transcoder, optimizer, counters())
        temporary = weakref.ref(slices[checkpoint.TRAINING]["last_fired"].tensor)
        checkpoints.begin(slices, transcoder.config, {"step": 3})
        del slices
        wanted = ["copy waits for training", "begin stream", "snapshot", "snapshot", "end stream", "event"]
        assert [call for call in calls if call != "cuda:5"] == wanted, "training goes on, and nothing is written"
        assert temporary() is not None, "its memory must not be used again before it is copied"
        assert not checkpoints.written
        checkpoints.wait_for_copy()
        checkpoints.wait_for_copy()
        fake_cuda.reached.set()
        checkpoints.finish()
    assert calls.count("training waits for the copy") == 1
    assert calls[-3:] == ["copied", "write", "write"]
    assert "cuda:5" in calls, "the writing thread chooses its GPU"


def test_the_update_of_the_next_step_waits_for_the_copy(train, monkeypatch):
    """In train_ddp.py: after each step's backward pass and before its weights change."""
    calls, wait, update = [], Checkpoints.wait_for_copy, Update.__call__
    monkeypatch.setattr(Checkpoints, "wait_for_copy", lambda self: (calls.append("wait"), wait(self))[1])
    monkeypatch.setattr(Update, "__call__", lambda *arguments: (calls.append("update"), update(*arguments))[1])
    train("train.steps=3", "eval.replacement_tokens=0")
    assert calls == ["wait", "update"] * 3


def test_which_checkpoints_are_kept(tmp_path):
    transcoder, optimizer, _ = trained()
    (tmp_path / "step_00000005.tmp").mkdir()  # what a crash leaves
    for number in (5, 10, 15, 20, 25):
        save(tmp_path, transcoder, optimizer, number, keep_every=10)
    assert checkpoint.steps(tmp_path) == [10, 20, 25]
    assert len(list(tmp_path.iterdir())) == 3


def test_half_of_a_deleted_checkpoint_is_none(tmp_path, monkeypatch):
    transcoder, optimizer, _ = trained()
    save(tmp_path, transcoder, optimizer, 3)

    def killed(directory, **_):
        (directory / "state.json").unlink(missing_ok=True)
        raise KeyboardInterrupt

    monkeypatch.setattr(writer.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, transcoder, optimizer, 6, keep=1)
    monkeypatch.undo()
    assert checkpoint.steps(tmp_path) == [6]
    save(tmp_path, transcoder, optimizer, 9)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000006", "step_00000009"]


def test_whatever_keeps_a_checkpoint_from_the_disk_is_raised(tmp_path, monkeypatch):
    transcoder, optimizer, _ = trained()
    save(tmp_path, transcoder, optimizer, 3)

    def write(path, slices):
        raise MemoryError("no memory for a buffer")

    monkeypatch.setattr(tensorfile, "write", write)
    with pytest.raises(MemoryError, match="no memory for a buffer"):
        save(tmp_path, transcoder, optimizer, 6, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000003"]


def leave_free(disk, wanted):
    """Fill a small file system up to `wanted` free bytes."""
    (disk / "filler").unlink(missing_ok=True)
    status = os.statvfs(disk)
    (disk / "filler").write_bytes(bytes(status.f_bavail * status.f_bsize - wanted))


def test_a_full_disk_keeps_the_previous_checkpoint(small_disk):
    disk = small_disk(64 << 10)
    transcoder, optimizer, _ = trained()
    save(disk, transcoder, optimizer, 3)
    before = {file.name: file.read_bytes() for file in (disk / "step_00000003").iterdir()}
    leave_free(disk, 4096)
    with pytest.raises(UserError, match=r"found 4\.096 kB free, wanted .* step 3 is kept. Free disk space"):
        save(disk, transcoder, optimizer, 6)
    leave_free(disk, 16384)  # what the tensors have, so that the check passes; whole pages and headers do not fit
    with pytest.raises(UserError, match=r"No space left.*step 3 is kept"):
        save(disk, transcoder, optimizer, 6)
    assert checkpoint.steps(disk) == [3]
    assert sorted(path.name for path in disk.iterdir()) == ["filler", "step_00000003"]
    assert before == {file.name: file.read_bytes() for file in (disk / "step_00000003").iterdir()}
