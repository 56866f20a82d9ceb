"""A shortened run of benchmarks/serving.py: everything in it that does not depend on the machine's speed must hold."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
TIMINGS = {"stream_share_of_loopback", "clients16_share", "training_share_of_store"}


def test_killed_clients_bad_requests_and_memory(tmp_path):
    command = [sys.executable, "benchmarks/serving.py", "--json", str(tmp_path / "out.json"), "--seconds", "5"]
    result = subprocess.run([*command, "--skip-training"], cwd=ROOT, capture_output=True, text=True)
    found = json.loads((tmp_path / "out.json").read_text())
    assert set(found["missed"]) <= TIMINGS, result.stderr
    assert result.returncode == bool(found["missed"])
    assert found["stream_gb_per_s"] > 0
    assert found["rows_delivered"] > 1000
    assert found["clients_killed"] == 21
    assert found["bad_requests"] >= 400
