"""Exports in the tools that they are for: circuit-tracer (CLT and transcoder_set, GPT-2 and Llama) and SAELens."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import train_ddp
from clt.config import load_config
from clt.data.store import DiscBuffer
from clt.export.export import export
from clt.lm.load import ASSETS, load_language_model
from clt.model.transcoder import CrossLayerTranscoder
from clt.train import checkpoint
from clt.train.evaluation import heldout_windows

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.timeout(1200)  # the environment is made in the first run
GPT2 = ["train.steps=60", "clt.d_features=256", "loss.target_l0=30"]
LLAMA = ["lm.model={llama}", "train.steps=20", "clt.d_features=48", "loss.target_l0=null", "lm.context=32"]
PLT = ["clt.cross_layer=false", "clt.skip=true"]
JOBS = {
    "gpt2": ("circuit-tracer", GPT2),
    "llama": ("circuit-tracer", LLAMA),
    "skip": ("circuit-tracer", [*LLAMA, "clt.skip=true"]),
    "set": ("circuit-tracer", [*LLAMA, *PLT]),
    "saelens": ("saelens", [*LLAMA, *PLT]),
}
TRACED = [name for name, (tool, _) in JOBS.items() if tool == "circuit-tracer"]


def llama(path: Path) -> None:
    """A tiny Llama of random weights with the embedded model's tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "max_position_embeddings": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(
        vocab_size=2048, bos_token_id=0, eos_token_id=0, initializer_range=0.2, tie_word_embeddings=False,
        **sizes, **heads,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    for file in (ASSETS / "model").glob("tokenizer*"):
        shutil.copy(file, path)


class Result(NamedTuple):
    """What one job computed, what it was given, and what this package computes of the same."""

    found: dict[str, Any]
    outputs: dict[str, torch.Tensor]
    x: torch.Tensor
    transcoder: CrossLayerTranscoder
    summary: dict[str, Any]


@pytest.fixture(scope="module")
def results(foreign_python: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    """By job: a short training of quickstart's kind, exported, in the tool."""
    base, jobs, made = tmp_path_factory.mktemp("interop"), {}, {}
    llama(base / "other")
    for number, (name, (tool, overrides)) in enumerate(JOBS.items()):
        directory = base / f"{number}"  # transformer-lens looks for the architecture's name in the path first
        store = base / ("store" if name == "gpt2" else "other_store")
        overrides = [text.format(llama=base / "other") for text in overrides]
        config = load_config(
            ROOT / "configs" / "quickstart.yaml",
            [
                f"run.dir={directory / 'run'}", f"data.store={store}", "data.train_tokens=20000",
                "data.shard_rows=4000", "data.heldout_tokens=1000", "data.block_rows=64", "train.batch_tokens=512",
                "train.precision=fp32",
                "eval.replacement_tokens=2048", *overrides,
            ],
        )  # fmt: skip
        train_ddp.main(config, prepare=False)
        export(directory / "run", tool, directory / "export", "float32")
        windows = heldout_windows(config, load_language_model(config.lm))
        tokens, keep = (torch.from_numpy(np.stack([getattr(w, n) for w in windows])) for n in ("tokens", "keep"))
        x = DiscBuffer(store / "heldout")[:200][:, 0].float().contiguous()
        inputs = {"x": x, "tokens": tokens.long(), "keep": keep, "prompt": tokens[0, :12].long().contiguous()}
        save_file(inputs, directory / "inputs.safetensors")
        model = directory / "model"
        shutil.copytree(base / "other" if name != "gpt2" else ASSETS / "model", model)
        job = {"directory": directory, "model": model, "export": directory / "export"}
        jobs[name] = {"tool": tool} | {key: str(path) for key, path in job.items()}
        last = checkpoint.steps(directory / "run" / "checkpoints")[-1]
        clt = CrossLayerTranscoder.from_pretrained(directory / "run" / "checkpoints" / f"step_{last:08d}")
        made[name] = (x, clt, json.loads((directory / "run" / "summary.json").read_text()))
    (base / "jobs.json").write_text(json.dumps(jobs))
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [str(foreign_python), str(Path(__file__).parent / "foreign.py"), base / "jobs.json", base / "found.json"]
    done = subprocess.run(command, cwd=base, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads((base / "found.json").read_text())
    return {
        name: Result(found[name], load_file(jobs[name]["directory"] + "/outputs.safetensors"), *made[name])
        for name in JOBS
    }


@pytest.mark.parametrize("job", JOBS)
@torch.no_grad()
def test_features_and_reconstructions_are_ours(results, job):
    result = results[job]
    features = result.transcoder.encode(result.x)
    assert (features > 0).float().mean() > 0.01
    torch.testing.assert_close(result.outputs["features"], features, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(result.outputs["y"], result.transcoder(result.x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("job", TRACED)
def test_the_replaced_model_is_as_good_as_our_evaluation_says(results, job):
    for key in ("top1_agreement", "kl"):
        assert results[job].found[key] == pytest.approx(results[job].summary[key], abs=1e-3), key


@pytest.mark.parametrize("job", TRACED)
def test_a_prompt_is_attributed_and_edges_are_the_effects_of_interventions(results, job):
    found = results[job].found
    assert found["features"] > 20
    assert 12 < found["nodes_kept"] < found["nodes"]
    assert found["edges_kept"] > 0
    assert 0 < found["replacement"] <= found["completeness"] <= 1
    assert len(found["interventions"]) == 3
    for intervention in found["interventions"]:
        assert intervention["largest_edge"] > 1e-3
        assert intervention["difference"] < 1e-4 * intervention["largest_edge"]
