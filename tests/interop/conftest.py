"""An environment with the tools that exports are for, which cannot live beside this package's own."""

import fcntl
import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def foreign_python() -> Path:
    """The Python of .venv-interop, which is made once from requirements.txt; skips when a package cannot be had."""
    home, file = ROOT / ".venv-interop", Path(__file__).parent / "requirements.txt"
    torch_wanted = f"torch=={torch.__version__.partition('+')[0]}"
    key = hashlib.sha256(f"{sys.version} {torch_wanted} {file.read_text()}".encode()).hexdigest()
    python, installed = home / "bin" / "python", home / "installed"
    home.mkdir(exist_ok=True)
    with (home / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not installed.is_file() or installed.read_text() != key:
            installed.unlink(missing_ok=True)
            subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
            command = [str(python), "-m", "pip", "install", "--quiet", "--retries=2", torch_wanted, "-r", str(file)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"circuit-tracer and SAELens cannot be installed: {done.stderr.strip().splitlines()[-1]}")
            installed.write_text(key)
    return python
