"""Two nodes, each in a network namespace of its own with its own address, as launch.sh starts them."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from clt.train import checkpoint

ROOT = Path(__file__).parent.parent.parent
NAMES = [f"clt{os.getpid()}n{node}" for node in range(2)]
ADDRESSES = ["10.77.0.1", "10.77.0.2"]


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


@pytest.fixture
def network() -> Iterator[None]:
    """Namespaces NAMES joined by one cable, `cable` in both, with ADDRESSES; what runs in them ends with the test."""
    made = []
    try:
        for name in NAMES:
            ip("netns", "add", name)
            made.append(name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("link", "add", "cable", "netns", NAMES[0], "type", "veth", "peer", "name", "cable", "netns", NAMES[1])
        for name, address in zip(NAMES, ADDRESSES):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "cable")
            ip("-n", name, "link", "set", "cable", "up")
    except (OSError, subprocess.CalledProcessError) as error:
        for name in made:
            ip("netns", "delete", name)
        pytest.skip(f"network namespaces cannot be made here: {getattr(error, 'stderr', error)}")
    yield
    for name in NAMES:
        kill_all(name)
        ip("netns", "delete", name)


def kill_all(name: str) -> None:
    """End every process of a node at once, as a power failure does."""
    for pid in ip("netns", "pids", name).split():
        os.kill(int(pid), signal.SIGKILL)


@pytest.fixture
def start(network, launch_env, tmp_path) -> Callable[..., subprocess.Popen]:
    """start(node, *arguments): launch.sh on that node, which prints into `tmp_path`/node.log.

    Node 0 has two ranks, node 1 has one.
    """

    def launch(node: int, *arguments: str) -> subprocess.Popen:
        env = os.environ | launch_env | {"CUDA_VISIBLE_DEVICES": ""}
        env |= {"NNODES": "2", "NODE_RANK": str(node), "NPROC": str(2 - node), "MASTER_ADDR": ADDRESSES[0]}
        # The namespaces share this machine's host name, so every node says which address is its own.
        env |= {"PET_LOCAL_ADDR": ADDRESSES[node], "GLOO_SOCKET_IFNAME": "cable"}
        command = ["ip", "netns", "exec", NAMES[node], "bash", "launch.sh", *arguments]
        with (tmp_path / f"{node}.log").open("a") as log:
            return subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT)

    return launch


def wait_for(condition: Callable[[], bool], jobs: list[subprocess.Popen]) -> None:
    """Poll until the condition holds; the jobs must not end before."""
    while not condition():
        assert all(job.poll() is None for job in jobs), "a node ended early"
        time.sleep(0.1)


def assert_same_weights(run_dir: Path, wanted: dict[str, torch.Tensor], step: int) -> None:
    found = load_file(run_dir / "checkpoints" / f"step_{step:08d}" / "model.safetensors")
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)


@pytest.mark.timeout(600)
def test_two_nodes_give_the_run_of_one_process_though_one_is_cut_off_and_lost(start, train, train_overrides, tmp_path):
    """Node 1's cable is pulled until all ranks have given up. Then it loses power, and its command is run again."""
    options = [
        "train.steps=300",
        "checkpoint.every=20",
        "checkpoint.keep=99",
        "eval.every=0",
        "eval.replacement_tokens=0",
    ]
    run_dir, logs = tmp_path / "run", [tmp_path / "0.log", tmp_path / "1.log"]
    arguments = [*train_overrides, *options, f"run.dir={run_dir}", "parallel.timeout_seconds=12"]
    jobs = [start(node, *arguments) for node in range(2)]

    def written() -> dict[int, tuple[int, int]]:  # by step; a checkpoint that is written again gets another inode
        directories = {
            step: run_dir / "checkpoints" / f"step_{step:08d}" for step in checkpoint.steps(run_dir / "checkpoints")
        }
        return {step: (d.stat().st_ino, d.stat().st_mtime_ns) for step, d in directories.items()}

    wait_for(lambda: len(written()) >= 2, jobs)
    ip("-n", NAMES[1], "link", "set", "cable", "down")
    wait_for(lambda: all("no progress since step" in log.read_text() for log in logs), jobs)
    before_the_cut = written()
    ip("-n", NAMES[1], "link", "set", "cable", "up")

    wait_for(lambda: len(written()) >= len(before_the_cut) + 2, jobs)
    kill_all(NAMES[1])
    assert jobs[1].wait(60) != 0
    before_the_loss = written()
    jobs[1] = start(1, *arguments)
    for log, job in zip(logs, jobs):
        assert job.wait(300) == 0, log.read_text()

    assert max(before_the_loss) < 300, "the run was over before the accident"
    assert written().items() >= before_the_loss.items() >= before_the_cut.items(), "a step was done again"
    assert_same_weights(run_dir, train(*options).weights, step=300)
