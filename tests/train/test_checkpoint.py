"""Checkpoints: complete, atomic, free of pickle, and the same file from every layout of the ranks."""

import itertools
import json
import os
import threading
import weakref
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import xxhash
from safetensors.torch import load_file

from clt.errors import UserError
from clt.model.loss import Objective
from clt.model.spec import CLTConfig, LossConfig
from clt.model.transcoder import CrossLayerTranscoder
from clt.train import checkpoint, tensorfile, writer
from clt.train.distributed import World
from clt.train.optim import Update
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
    with Checkpoints(directory, keep, keep_every, ONE_RANK) as checkpoints:
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


def test_everything_comes_back_to_the_bit(tmp_path):
    transcoder, optimizer, step = trained()
    path = save(tmp_path, transcoder, optimizer)
    drawn = torch.rand(3)
    assert {file.suffix for file in path.iterdir()} == {".json", ".safetensors"}

    other, other_optimizer, other_step = trained(steps=1, seed=7)
    state, tensors = restore(path, other, other_optimizer)
    assert torch.equal(torch.rand(3), drawn), "the RNG goes on from where it was"
    assert (state["step"], state["wandb_id"], state["torch_version"]) == (3, None, torch.__version__)
    assert equal(tensors, counters())
    assert equal(other.state_dict(), transcoder.state_dict())
    assert str(path) not in Path("/proc/self/maps").read_text(), "the files may be deleted while the run goes on"
    assert equal(moments(other, other_optimizer), moments(transcoder, optimizer))
    step(9), other_step(9)
    assert equal(other.state_dict(), transcoder.state_dict())


def shards_of(transcoder, optimizer, count):
    """The transcoder and its optimizer state cut into shards, as feature ranks hold them."""
    for i in range(count):
        shard = CrossLayerTranscoder(2, 4, CLTConfig(d_features=8, skip=True), shard=(i, count))
        moved = torch.optim.Adam(shard.parameters(), fused=True)
        for (name, ours), theirs in zip(shard.named_parameters(), transcoder.parameters(), strict=True):
            dim = checkpoint.feature_dim(name)

            def cut(tensor, dim=dim, shard=shard):
                return (
                    tensor
                    if dim is None or not tensor.dim()
                    else tensor.movedim(dim, 0)[shard.features].movedim(0, dim)
                )

            ours.data.copy_(cut(theirs.data))
            moved.state[ours] = {key: cut(value).clone() for key, value in optimizer.state[theirs].items()}
        fired = counters()["last_fired"][:, shard.features].clone()
        yield shard, moved, counters() | {"last_fired": fired}


@pytest.mark.parametrize(("shards", "replicas"), [(1, 2), (1, 3), (2, 1), (2, 2), (4, 1), (1, 4)])
def test_every_layout_writes_and_reads_the_same_files(tmp_path, shards, replicas):
    transcoder, optimizer, _ = trained()
    whole = save(tmp_path / "whole", transcoder, optimizer)
    rng = torch.get_rng_state()
    cut = list(shards_of(transcoder, optimizer, shards))
    torch.set_rng_state(rng)
    ranks = [
        checkpoint.slices(shard, moved, tensors, (i, replicas))
        for (shard, moved, tensors), i in itertools.product(cut, range(replicas))
    ]
    for name in (checkpoint.MODEL, checkpoint.TRAINING):
        tensorfile.create(tmp_path / name, ranks[0][name])
        for rank in reversed(ranks):  # in any order
            tensorfile.write(tmp_path / name, tensorfile.snapshot(rank[name]))
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()
        assert sum(p.tensor.nbytes for rank in ranks for p in rank[name].values() if p.writes) == sum(
            t.nbytes for t in load_file(whole / name).values()
        ), "every byte is written by one rank"

    for i, (shard, moved, tensors) in enumerate(cut):
        fresh = CrossLayerTranscoder(2, 4, CLTConfig(d_features=8, skip=True), shard=(i, shards))
        fresh_optimizer = torch.optim.Adam(fresh.parameters(), fused=True)
        found = {"last_fired": torch.zeros_like(tensors["last_fired"]), "loss_scale": torch.zeros(())}
        checkpoint.restore(whole, fresh, fresh_optimizer, found, IDENTITY)
        assert equal(fresh.state_dict(), shard.state_dict())
        assert equal(moments(fresh, fresh_optimizer), moments(shard, moved))
        assert equal(found, tensors)


def test_a_checkpoint_is_a_pretrained_transcoder(tmp_path):
    transcoder, optimizer, _ = trained()
    path = save(tmp_path, transcoder, optimizer)
    assert equal(CrossLayerTranscoder.from_pretrained(path).state_dict(), transcoder.state_dict())


def test_the_weights_may_change_while_they_are_written(tmp_path):
    transcoder, optimizer, step = trained()
    before = {key: value.clone() for key, value in transcoder.state_dict().items()}
    with Checkpoints(tmp_path, 2, 0, ONE_RANK) as checkpoints:
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
    with Checkpoints(tmp_path, 2, 0, World(0, 1, device)) as checkpoints:
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


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "config.json"])
def test_a_truncated_file_is_named(tmp_path, name):
    transcoder, optimizer, _ = trained()
    path = save(tmp_path, transcoder, optimizer)
    os.truncate(path / name, (path / name).stat().st_size // 2)
    with pytest.raises(UserError, match=r"step_00000003.*damaged"):
        restore(path, transcoder, optimizer)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
def test_one_flipped_bit_is_found(tmp_path, name):
    """Of a mantissa: the file is still whole for safetensors, and the weights are as plausible as before."""
    transcoder, optimizer, _ = trained()
    path = save(tmp_path, transcoder, optimizer)
    checkpoint.verify(path, checkpoint.MODEL, checkpoint.TRAINING)
    stored = json.loads((path / "state.json").read_text())["checksums"][name]
    data = bytearray((path / name).read_bytes())
    assert stored == f"xxh3_128:{xxhash.xxh3_128_hexdigest(bytes(data))}"
    data[-4] ^= 1
    (path / name).write_bytes(data)
    load_file(path / name)
    with pytest.raises(
        UserError, match=rf"{name} is damaged \(its checksum is .*, wanted {stored}: .*\); delete {path}"
    ):
        checkpoint.verify(path, checkpoint.MODEL, checkpoint.TRAINING)


def test_the_transcoder_alone_is_verified_too(tmp_path):
    transcoder, optimizer, _ = trained()
    path = save(tmp_path, transcoder, optimizer)
    data = bytearray((path / "model.safetensors").read_bytes())
    data[-4] ^= 1
    (path / "model.safetensors").write_bytes(data)
    with pytest.raises(UserError, match=r"model.safetensors is damaged .its checksum"):
        checkpoint.load_transcoder(path)


def test_a_checkpoint_of_before_there_were_checksums(tmp_path):
    transcoder, optimizer, _ = trained()
    path = save(tmp_path, transcoder, optimizer)
    state = json.loads((path / "state.json").read_text())
    assert state.pop("checksums").keys() == {"model.safetensors", "optimizer.safetensors"}
    (path / "state.json").write_text(json.dumps(state))
    checkpoint.verify(path, checkpoint.MODEL, checkpoint.TRAINING)
    assert restore(path, transcoder, optimizer)[0]["step"] == 3
    assert equal(checkpoint.load_transcoder(path).state_dict(), transcoder.state_dict())


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"step": "3"}, r"state.json is damaged \(step is '3'; wanted int\); delete .*step_00000003 to go on"),
        ({"step": -3}, "step is -3; wanted zero or a positive number"),
        ({"busy_seconds": None}, "busy_seconds is None; wanted float"),
        ({"busy_seconds": float("nan")}, "busy_seconds is nan; wanted float"),
        ({"wandb_id": 7}, "wandb_id is 7; wanted str or null"),
        ({"rows_by_segment": {"a": "7"}}, r"rows_by_segment is .*; wanted dict\[str, int\] or null"),
        ({"checksums": ["a"]}, r"checksums is \['a'\]; wanted dict\[str, str\] or null"),
        ({"checksums": {"model.safetensors": "md5:0"}}, "checksum kind 'md5' of model.safetensors is unknown"),
        ({"step": 4}, "state.json is of step_00000004, wanted step_00000003: give the directory the name it had"),
    ],
)
def test_a_state_with_a_wrong_field(tmp_path, change, what):
    transcoder, optimizer, _ = trained()
    path = save(tmp_path, transcoder, optimizer)
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(state | change))
    with pytest.raises(UserError, match=what):
        checkpoint.verify(path, checkpoint.MODEL)


@pytest.mark.parametrize("content", [b"\xff{}", b"[1]", b"", b"[" * 100_000, b'{"step": ' + b"1" * 5000 + b"}"])
@pytest.mark.parametrize("name", ["state.json", "config.json"])
def test_json_that_is_none(tmp_path, name, content):
    transcoder, optimizer, _ = trained()
    path = save(tmp_path, transcoder, optimizer)
    (path / name).write_bytes(content)
    with pytest.raises(
        UserError, match=rf"{name} is damaged \(.*\); delete .*step_00000003 to go on from the checkpoint"
    ):
        restore(path, transcoder, optimizer)


def test_another_format_size_config_or_version_is_refused(tmp_path):
    transcoder, optimizer, _ = trained()
    path = save(tmp_path, transcoder, optimizer)
    wider, wider_optimizer, _ = trained(features=9)
    with pytest.raises(UserError, match="d_features: found 8, wanted 9"):
        restore(path, wider, wider_optimizer)
    with pytest.raises(UserError, match=r"data_hash: found 'def', wanted 'other'.*Go back to the versions"):
        restore(path, transcoder, optimizer, IDENTITY | {"data_hash": "other"})
    with pytest.raises(UserError, match=r"torch_version: found '.*', wanted '9\.9'"):
        restore(path, transcoder, optimizer, IDENTITY | {"torch_version": "9.9"})
    saved = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(saved | {"format_version": 99}))
    with pytest.raises(UserError, match="format version 99, this code reads 2; resume with the code that wrote it"):
        restore(path, transcoder, optimizer)


def test_a_checkpoint_that_the_system_refuses_is_named(tmp_path):
    transcoder, optimizer, _ = trained()
    save(tmp_path, transcoder, optimizer, 3)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"written to .*file/checkpoints: .*Not a directory.*no earlier one. Mend that"):
        save(tmp_path / "file" / "checkpoints", transcoder, optimizer, 6)
    (tmp_path / "step_00000006").mkdir()
    (tmp_path / "step_00000006" / "file").touch()  # in the way of the name: the writing thread meets it
    with pytest.raises(UserError, match=r"written to .*: .*Directory not empty.*; step 6 is kept. Mend that and run"):
        save(tmp_path, transcoder, optimizer, 6)


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
