"""How a process finds its place among the others, and its device."""

import subprocess
import sys
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

from clt.errors import UserError
from clt.train import ddp, distributed


@pytest.mark.parametrize(("count", "found"), [(1, "1 GPU,"), (4, "4 GPUs,")])
def test_a_rank_without_a_gpu_of_its_own_is_told(monkeypatch, count, found):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    for name, value in {"RANK": 9, "LOCAL_RANK": count, "WORLD_SIZE": 16}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(UserError, match=rf"local rank {count} .*found {found} .* at most {count} with --npro"):
        distributed.setup(1, 60)


def test_the_first_local_rank_takes_the_first_gpu(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert distributed.setup(1, 60).device == torch.device("cuda", 0)
    assert chosen == [torch.device("cuda", 0)]


def test_ranks_that_do_not_meet_are_told(monkeypatch):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": ""}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UserError, match=r"the 2 ranks did not meet \(.*MASTER_ADDR.*\): start them with torchrun"):
        distributed.setup(1, 60)


@pytest.mark.parametrize("name", ["allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction"])
def test_products_add_up_in_float32(name):
    before = getattr(torch.backends.cuda.matmul, name)
    setattr(torch.backends.cuda.matmul, name, True)
    try:
        distributed.setup(1, 60)
        assert not getattr(torch.backends.cuda.matmul, name)
    finally:
        setattr(torch.backends.cuda.matmul, name, before)


@pytest.mark.parametrize(("count", "hidden"), [(1, True), (4, False)])
def test_tests_of_several_ranks_use_gpus_only_where_there_are_enough(monkeypatch, request, count, hidden):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    request.getfixturevalue("no_gpu_for_several_ranks")
    assert torch.cuda.is_available() != hidden
    child = [sys.executable, "-c", "import os; print(repr(os.environ['CUDA_VISIBLE_DEVICES']))"]
    seen = subprocess.run(child, capture_output=True, text=True, check=True).stdout.strip()
    assert seen == repr("" if hidden else "0,1,2,3")


@pytest.mark.parametrize("stream", ["default", "another"])
def test_a_gradient_is_only_written_in_the_stream_that_ddp_waits_for(monkeypatch, stream):
    """The gradient's memory and its streams are stand-ins for a GPU's."""
    monkeypatch.setattr(torch.cuda, "default_stream", lambda device: "default")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    parameter = Mock(grad=None)  # can be a key
    memory = ddp.GradientMemory([])
    memory.kept = {parameter: SimpleNamespace(is_cuda=True, device="cuda:0")}
    if stream == "default":
        assert memory(parameter) is parameter.grad
        assert parameter.grad is not None
    else:
        with pytest.raises(AssertionError, match="backward on another stream"):
            memory(parameter)
        assert parameter.grad is None
