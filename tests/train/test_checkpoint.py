"""Checkpoints: complete, atomic, free of pickle, and the same file from every layout of the ranks."""

import itertools
import json
import os
from pathlib import Path

import pytest
import torch
import xxhash
from safetensors.torch import load_file

from clt.errors import UserError
from clt.model.spec import CLTConfig
from clt.model.transcoder import CrossLayerTranscoder
from clt.train import checkpoint, tensorfile
from tests.train.checkpoints import IDENTITY, counters, equal, moments, restore, save, trained


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
