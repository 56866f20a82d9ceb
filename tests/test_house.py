"""The rules of the house: style, dependency rules and types, as the tools configured in pyproject.toml see them."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
# Data flows one way: a package may import those above it (and itself), never those below.
FLOW = ["lm", "data", "server", "model", "train", "export", "explore"]


def run(*command: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", *command], cwd=cwd, capture_output=True, text=True)


def test_ruff():
    result = run("ruff", "check", ".")
    assert result.returncode == 0, result.stdout
    result = run("ruff", "format", "--check", ".")
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.timeout(600)
def test_pyright(monkeypatch):
    monkeypatch.setenv("NODE_OPTIONS", "--max-semi-space-size=64")  # MB; it collected garbage for a sixth of its time
    result = run("pyright", "--pythonpath", sys.executable)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(
    ("folder", "forbidden"),
    [
        ("clt/model", "import h5py"),
        ("clt/model", "import numpy"),
        ("clt/model", "import huggingface_hub"),
        ("clt/model", "from clt.data.store import DiscBuffer"),
        ("clt/model", "import triton"),
        ("clt/model/kernels", "import numpy"),
        ("clt/lm", "from clt.data.store import DiscBuffer"),
        ("clt/lm", "from clt.model.transcoder import CrossLayerTranscoder"),
        ("clt/data", "from clt.model.transcoder import CrossLayerTranscoder"),
        ("clt/data", "import torch.distributed"),
        ("clt/server", "import h5py"),
        ("clt/server", "from clt.train.run import build"),
        ("clt/data", "from clt.server.buffer import Buffer"),
        ("clt/lm", "from clt.server.buffer import Buffer"),
        ("clt/train", "import starlette"),
        ("clt/train", "import h5py"),
        ("clt/train", "import nnsight"),
        ("clt/train", "import triton"),
        ("clt", "import wandb"),
        ("clt", "import pickle"),
        ("clt", "from torch import load"),
    ],
)
def test_the_linter_refuses_a_forbidden_import(folder, forbidden):
    code = f"def work():\n    {forbidden}\n"
    name = str(ROOT / folder / "planted.py")
    result = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--select", "TID251", "--stdin-filename", name, "-"],
        input=code,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1, f"{forbidden!r} in {folder} passes"
    assert "TID251" in result.stdout


def test_arrows_point_down():
    for position, package in enumerate(FLOW):
        below = {f"clt.{name}" for name in FLOW[position + 1 :]}
        for file in (ROOT / "clt" / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                for name in names:
                    assert not any(name == b or name.startswith(b + ".") for b in below), f"{file} imports {name}"


def test_training_imports_without_the_optional_packages():
    """Everything that train_ddp.py needs is importable with nnsight, wandb, starlette and uvicorn absent."""
    code = (
        "import sys\n"
        "for name in ('nnsight', 'wandb', 'starlette', 'uvicorn', 'datasets'): sys.modules[name] = None\n"
        "import clt.train.run, clt.train.logger, clt.train.checkpoint, clt.train.report, clt.train.distributed\n"
        "import clt.data.loader, clt.data.extract, clt.lm.load, clt.lm.replacement, clt.lm.text, clt.lm.capture\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("module", ["clt", "clt.config", "clt.cli"])
def test_light_modules_do_not_import_torch(module):
    code = f"import sys, {module}; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_a_quick_answer_does_not_wait_for_torch(tmp_path):
    """`--help`, a config error and `clt inspect` say what they have to say without the seconds that torch takes."""
    from clt.data.writer import write_store

    write_store(tmp_path, torch.randn(6, 2, 2, 4).half(), shard_rows=4)
    commands = [
        ["train_ddp.py", "--help"],
        ["train_ddp.py", "train.stps=3"],
        ["clt", "inspect", str(tmp_path), "--verify"],
    ]
    for script, *rest in commands:
        code = (
            "import runpy, sys\n"
            f"sys.argv = {[script, *rest]}\n"
            "try: runpy.run_path('train_ddp.py', run_name='__main__') if sys.argv[0] != 'clt' else "
            "runpy.run_module('clt.cli', run_name='__main__')\n"
            "except SystemExit as end: print(end.code)\n"
            "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
        )
        result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert len(result.stdout + result.stderr) > 20
