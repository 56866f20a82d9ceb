"""launch.sh: the torchrun command it makes from its variables and SLURM's. distributed/test_torchrun.py runs it."""

import os
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CLEAN = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "OMP_")) and k not in ("NPROC", "NNODES")}


@pytest.fixture
def recorded(tmp_path):
    """launch(*arguments, **environment) -> the commands that it would have started, in a copy of the tree.

    The environment's `python` and `torchrun` only print their arguments: several nodes cannot be started here.
    """
    for name in ("launch.sh", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    binaries = tmp_path / ".venv" / "bin"
    binaries.mkdir(parents=True)
    for name in ("python", "torchrun", "scontrol"):
        script = binaries / name
        shown = "omp=$OMP_NUM_THREADS alloc=$PYTORCH_CUDA_ALLOC_CONF"
        answer = "echo node7; echo node8" if name == "scontrol" else f'echo "{name} {shown} $*"'
        script.write_text(f"#!/bin/sh\n{answer}\n")
        script.chmod(script.stat().st_mode | stat.S_IEXEC)

    def launch(*arguments: str, **environment: str) -> list[str]:
        env = CLEAN | {"VENV": ".venv", "CUDA_VISIBLE_DEVICES": ""} | environment
        result = subprocess.run(
            ["bash", str(tmp_path / "launch.sh"), *arguments], env=env, capture_output=True, text=True, check=True
        )
        lines = [line for line in result.stdout.splitlines() if line.startswith(("python", "torchrun"))]
        return [line for line in lines if " -m pip " not in line]

    return launch


def test_one_node(recorded):
    prepare, run = recorded("configs/x.yaml", "train.steps=3", NPROC="3")
    assert prepare.endswith("train_ddp.py --prepare configs/x.yaml train.steps=3")
    assert run.endswith("--standalone --nproc_per_node=3 --max-restarts=0 train_ddp.py configs/x.yaml train.steps=3")
    assert "omp=1 " in run


def test_the_default_is_two_processes_and_the_default_config(recorded):
    _, run, features = recorded()
    assert run.endswith("--standalone --nproc_per_node=2 --max-restarts=0 train_ddp.py")
    assert features.endswith(" -m clt.cli features runs/quickstart")
    assert "omp= " in features, "it takes all cores"


def test_gpu_memory_is_taken_in_segments_that_grow(recorded):
    assert " alloc=expandable_segments:True " in recorded(PYTORCH_CUDA_ALLOC_CONF="")[1]
    assert " alloc=backend:native " in recorded(PYTORCH_CUDA_ALLOC_CONF="backend:native")[1], "what is set, stays"


def test_several_nodes(recorded):
    nodes = {"NPROC": "8", "NNODES": "2", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "777"}
    (run,) = recorded("c.yaml", **nodes, NODE_RANK="1")
    assert "--nnodes=2 --nproc_per_node=8 --max-restarts=3 --rdzv_backend=c10d --rdzv_endpoint=10.0.0.1:777" in run
    assert "is_host=0," in run
    assert run.endswith(" train_ddp.py c.yaml")
    (run,) = recorded("c.yaml", **nodes, NODE_RANK="0", MAX_RESTARTS="7")
    assert "--max-restarts=7" in run
    assert "is_host=1," in run


SLURM = {"SLURM_NNODES": "2", "SLURM_NODEID": "1", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_GPUS_ON_NODE": "4"}


def test_slurm_variables_fill_what_is_not_set(recorded):
    (run,) = recorded("c.yaml", **SLURM)
    assert "--nnodes=2 --nproc_per_node=4 " in run
    assert "--rdzv_endpoint=node7:29500 --rdzv_id=clt --rdzv_conf=is_host=0," in run
    (run,) = recorded("c.yaml", **SLURM, SLURM_JOB_ID="123456")
    assert "--rdzv_endpoint=node7:29956 --rdzv_id=123456 " in run
    (run,) = recorded("c.yaml", **SLURM, NPROC="1", NODE_RANK="0", MASTER_ADDR="head", MASTER_PORT="1")
    assert "--nproc_per_node=1 " in run
    assert "--rdzv_endpoint=head:1 --rdzv_id=clt --rdzv_conf=is_host=1," in run


@pytest.fixture
def batch(tmp_path):
    """batch(srun, **environment): start configs/slurm.sbatch with two arguments, where `srun` is that shell script."""

    def start(srun: str, **environment: str) -> subprocess.Popen:
        for name, body in {"srun": srun, "scontrol": 'echo "scontrol $*"'}.items():
            (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
            (tmp_path / name).chmod(0o755)
        env = CLEAN | {
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "SLURM_JOB_ID": "77",
            "SLURM_SUBMIT_DIR": str(tmp_path),
            **environment,
        }
        command = ["bash", str(ROOT / "configs" / "slurm.sbatch"), "c.yaml", "train.steps=3"]
        return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)

    return start


@pytest.mark.parametrize("pause", ["0", "0.1"])
def test_the_batch_script_starts_launch_sh_on_every_node_and_ends_as_it_does(batch, tmp_path, pause):
    """Also where the step has ended before the script waits for it: bash pauses before each of its commands."""
    (tmp_path / "slow").write_text(f"trap 'sleep {pause}' DEBUG\n")
    job = batch('echo "srun $*"; exit 3', BASH_ENV=str(tmp_path / "slow"))
    assert job.communicate(timeout=60)[0] == "srun bash launch.sh c.yaml train.steps=3\n"
    assert job.returncode == 3


@pytest.mark.parametrize(("status", "then"), [(1, "scontrol requeue 77\n"), (0, "")])
def test_the_batch_script_queues_again_when_its_time_is_up(batch, status, then):
    """SIGUSR1 goes on to the job step, which gets the time it needs; a step that finished is not queued again."""
    job = batch(
        f"trap 'echo told; sleep 0.5; echo saved; exit {status}' USR1; echo ready; while :; do sleep 0.05; done"
    )
    assert job.stdout.readline() == "ready\n"
    job.send_signal(signal.SIGUSR1)
    assert job.communicate(timeout=60)[0] == "told\nsaved\n" + then
    assert job.returncode == 0


def test_the_environment_is_installed_once(recorded, tmp_path):
    recorded("c.yaml")
    marker = (tmp_path / ".venv" / "installed").read_text()
    recorded("c.yaml")
    assert (tmp_path / ".venv" / "installed").read_text() == marker
    assert marker.startswith("run ")
    assert len(marker.splitlines()) == 1


def test_an_environment_that_was_left_half_made_is_completed(tmp_path):
    """As an interrupted `python -m venv` leaves it: without pip. Nothing is installed: the index is switched off."""
    for name in ("launch.sh", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    half = [sys.executable, "-m", "venv", "--without-pip", str(tmp_path / ".venv")]
    subprocess.run(half, check=True)
    env = CLEAN | {"VENV": ".venv", "PIP_NO_INDEX": "1", "PYTHON": sys.executable}
    done = subprocess.run(["bash", str(tmp_path / "launch.sh")], env=env, capture_output=True, text=True)
    assert "No module named pip" not in done.stderr
    assert "No matching distribution found" in done.stderr, "pip ran"
