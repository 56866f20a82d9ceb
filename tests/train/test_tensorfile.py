"""One safetensors file, put together from the parts of several processes: what safetensors' own reader finds in it."""

import itertools
import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.overrides import TorchFunctionMode

from clt.errors import UserError
from clt.train import tensorfile
from clt.train.tensorfile import TensorSlice

TENSORS = {
    "cube": torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(0)),
    "double": torch.arange(6, dtype=torch.float64) / 7,
    "steps": torch.arange(12).view(3, 4) - 2**40,
    "bytes": torch.arange(7, dtype=torch.uint8),  # an odd number of them: the next tensor is not aligned
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(3, 0),
}


def wholes(tensors, writes=True):
    return {name: TensorSlice(tensor, tuple(tensor.shape), writes=writes) for name, tensor in tensors.items()}


def cut(dim, bounds):
    """The parts of as many processes as there are pieces of `cube` along a dimension; the first has all the rest."""
    for start, end in itertools.pairwise(bounds):
        piece = TENSORS["cube"].narrow(dim, start, end - start).contiguous()
        yield wholes(TENSORS, writes=start == 0) | {"cube": TensorSlice(piece, (4, 6, 5), dim, start)}


def empty_like(parts):
    return {name: part._replace(tensor=torch.full_like(part.tensor, 99)) for name, part in parts.items()}


@pytest.mark.parametrize(
    ("dim", "bounds"), [(0, (0, 4)), (0, (0, 1, 4)), (1, (0, 2, 3, 6)), (2, (0, 1, 5)), (2, (0, 1, 2, 3, 4, 5))]
)
def test_every_cut_makes_the_same_file_and_reads_its_part(tmp_path, dim, bounds):
    tensorfile.create(tmp_path / "whole", wholes(TENSORS))
    tensorfile.write(tmp_path / "whole", wholes(TENSORS))
    processes = list(cut(dim, bounds))
    tensorfile.create(tmp_path / "parts", processes[-1])
    for parts in reversed(processes):
        tensorfile.write(tmp_path / "parts", tensorfile.snapshot(parts))
    assert (tmp_path / "parts").read_bytes() == (tmp_path / "whole").read_bytes()

    found = load_file(tmp_path / "parts")
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
    for parts in processes:
        back = empty_like(parts)
        tensorfile.read(tmp_path / "parts", back)
        assert all(torch.equal(back[name].tensor, parts[name].tensor) for name in parts)


def test_a_file_of_another_writer_is_read(tmp_path):
    save_file(TENSORS, tmp_path / "file", {"written": "elsewhere"})
    for parts in cut(1, (0, 4, 6)):
        back = empty_like(parts)
        tensorfile.read(tmp_path / "file", back)
        assert all(torch.equal(back[name].tensor, parts[name].tensor) for name in parts)


def test_a_part_of_another_process_is_left_alone(tmp_path):
    first, second = cut(1, (0, 2, 6))
    path = tmp_path / "file"
    tensorfile.create(path, first)
    tensorfile.write(path, first)
    only_first = load_file(path)["cube"]
    assert torch.equal(only_first[:, :2], TENSORS["cube"][:, :2])
    assert not only_first[:, 2:].any()
    tensorfile.write(path, second | {"scalar": TensorSlice(torch.tensor(-1.0), (), writes=False)})
    assert torch.equal(load_file(path)["cube"], TENSORS["cube"])
    assert load_file(path)["scalar"] == 2.5


def test_the_disk_may_take_a_few_bytes_at_a_time(tmp_path, monkeypatch):
    pwrite, calls = os.pwrite, []

    def reluctant(descriptor, data, at):
        calls.append(at)
        return pwrite(descriptor, data[:7], at)

    monkeypatch.setattr(os, "pwrite", reluctant)
    tensorfile.create(tmp_path / "file", wholes(TENSORS))
    for parts in cut(2, (0, 3, 5)):
        tensorfile.write(tmp_path / "file", parts)
    assert len(calls) > sum(tensor.nbytes for tensor in TENSORS.values()) / 7
    found = load_file(tmp_path / "file")
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())


def test_a_created_file_has_its_header_and_all_of_its_space(tmp_path):
    big = {"big": torch.zeros(300, 1000)}
    tensorfile.create(tmp_path / "file", wholes(big, writes=False))
    with safe_open(tmp_path / "file", "pt") as file:
        assert file.get_slice("big").get_shape() == [300, 1000]
    status = (tmp_path / "file").stat()
    assert status.st_size > 300 * 1000 * 4
    assert status.st_blocks * 512 >= status.st_size, "no hole that a full disk could keep from being filled"


def test_a_disk_without_room_is_an_error_before_anything_is_written(small_disk):
    with pytest.raises(OSError, match="No space left"):
        tensorfile.create(small_disk(64 << 10) / "file", wholes({"big": torch.zeros(100_000)}))


def test_places_are_those_of_the_header(tmp_path):
    header, places, size = tensorfile.offsets(wholes(TENSORS))
    save_file(TENSORS, tmp_path / "theirs")
    assert int.from_bytes(header[:8], "little") == len(header) - 8
    assert len(header) % 8 == 0
    entries = json.loads(header[8:])
    theirs = (tmp_path / "theirs").read_bytes()
    their_entries = json.loads(theirs[8 : 8 + int.from_bytes(theirs[:8], "little")])
    for name, entry in entries.items():
        assert (entry["dtype"], entry["shape"]) == (their_entries[name]["dtype"], their_entries[name]["shape"])
        assert places[name] == len(header) + entry["data_offsets"][0]
    assert size == len(header) + sum(tensor.nbytes for tensor in TENSORS.values())


def test_a_snapshot_does_not_follow_the_tensors():
    weights, others = torch.nn.Parameter(torch.ones(3)), torch.ones(5, 2)
    parts = {"weights": TensorSlice(weights, (3,)), "others": TensorSlice(others, (10, 2), 0, 5, writes=False)}
    copies = tensorfile.snapshot(parts)
    weights.data.fill_(7)
    assert copies["weights"].tensor.tolist() == [1, 1, 1]
    assert not copies["weights"].tensor.requires_grad
    assert copies["others"].tensor is others, "what another process writes is not copied"
    assert tensorfile.offsets(copies) == tensorfile.offsets(parts)


class AsIfOnAGpu(TorchFunctionMode):
    """CPU tensors say that they lie on a GPU; `asked` notes what would be asked of CUDA."""

    def __init__(self):
        self.asked = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func == torch.Tensor.is_cuda.__get__:
            return True
        if func is torch.empty:
            self.asked.append("pinned" if kwargs.pop("pin_memory", False) else "pageable")
        if func in (torch.Tensor.copy_, torch.Tensor.to, torch.Tensor.cpu):
            self.asked.append("at once" if kwargs.get("non_blocking") else "waits")
        return func(*args, **kwargs)


def test_a_snapshot_of_a_gpu_goes_to_pinned_memory_and_waits_for_nothing():
    for parts in cut(0, (0, 1, 4)):
        with AsIfOnAGpu() as seen:
            copies = tensorfile.snapshot(parts)
        assert seen.asked == ["pinned", "at once"] * sum(part.writes for part in parts.values())
        assert all(torch.equal(copies[name].tensor, parts[name].tensor) for name in parts if parts[name].writes)


def test_what_cannot_be_read_is_named(tmp_path):
    path = tmp_path / "file"
    with pytest.raises(
        UserError,
        match=rf"{path} cannot be read \(No such file .*\): delete its checkpoint to go on",
    ):
        tensorfile.read(path, wholes(TENSORS))
    save_file({"b": torch.zeros(2, 3)}, path)
    with pytest.raises(UserError, match=rf"{path} is damaged .it has no a, c: it is of another run or another version"):
        tensorfile.read(path, wholes({name: torch.zeros(2, 3) for name in "cba"}))
    with pytest.raises(UserError, match=r"b is \[2, 3\], wanted \[3, 2\]"):
        tensorfile.read(path, wholes({"b": torch.zeros(3, 2)}))
    with pytest.raises(UserError, match=r"is \[2, 3\], wanted \[2, 4\]"):
        tensorfile.read(path, {"b": TensorSlice(torch.zeros(2, 2), (2, 4), 1, 2)})
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(UserError, match="is damaged"):
        tensorfile.read(path, wholes({"b": torch.zeros(2, 3)}))
