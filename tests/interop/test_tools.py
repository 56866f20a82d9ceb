"""Exports in the tools that they are for: circuit-tracer (CLT and transcoder_set, GPT-2 and Llama) and SAELens.

And `clt graph` with the real circuit-tracer, and the records of features as its page reads them.
"""

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
from clt import cli
from clt.config import Config, load_config
from clt.data.store import DiscBuffer
from clt.explore.features import make_features
from clt.explore.files import Features
from clt.export.export import export
from clt.lm.capture import capture
from clt.lm.load import ASSETS, load_language_model
from clt.model.transcoder import CrossLayerTranscoder
from clt.train import checkpoint, report
from clt.train.evaluation import heldout_windows

ROOT, STEPS, PROMPT = Path(__file__).parents[2], 30, "The old man said to the"
pytestmark = pytest.mark.timeout(1200)  # the environment is made in the first run
LLAMA = ["lm.model={llama}", "train.steps=20", "loss.target_l0=null", "lm.context=32"]
PLT = ["clt.cross_layer=false", "clt.skip=true"]
JOBS = {
    "gpt2": ("circuit-tracer", []),
    "llama": ("circuit-tracer", [*LLAMA, "clt.skip=true"]),
    "set": ("circuit-tracer", [*LLAMA, *PLT]),
    "saelens": ("saelens", [*LLAMA, *PLT]),
}
TRACED = [name for name, (tool, _) in JOBS.items() if tool == "circuit-tracer"]
VALIDATE = """
import json, sys
from circuit_tracer.frontend.feature_models import Model
for record in json.load(sys.stdin):
    Model(**record)
"""


def train(directory: Path, store: Path, *overrides: str) -> Config:
    """The config of a short run of quickstart's kind, which has been trained."""
    config = load_config(
        ROOT / "configs" / "quickstart.yaml",
        [
            f"run.dir={directory}", f"data.store={store}", "data.train_tokens=4000", "data.shard_rows=1000",
            "data.heldout_tokens=1000", "data.block_rows=64", "train.batch_tokens=512", f"train.steps={STEPS}",
            "clt.d_features=48", "loss.target_l0=20", "train.precision=fp32", "eval.replacement_tokens=1024",
            *overrides,
        ],
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "write_plots", lambda *_: None)
        train_ddp.main(config, prepare=False)
    return config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short run of the embedded GPT-2, with features."""
    base = tmp_path_factory.mktemp("interop")
    config = train(base / "run", base / "store")
    make_features(config, base / "run", STEPS, "heldout", 2000, progress=False)
    return base / "run"


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
def results(foreign_python: Path, run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    """By job: a short run, exported, in the tool."""
    base, jobs, made = tmp_path_factory.mktemp("interop"), {}, {}
    llama(base / "other")
    runs = {(): run}
    for number, (name, (tool, overrides)) in enumerate(JOBS.items()):
        directory = base / f"{number}"  # transformer-lens looks for the architecture's name in the path first
        directory.mkdir()
        of_job = runs.setdefault(tuple(overrides), directory / "run")
        if not of_job.exists():
            train(of_job, base / "store", *(text.format(llama=base / "other") for text in overrides))
        config = load_config(of_job / "config.yaml")
        export(of_job, tool, directory / "export", "float32")
        windows = heldout_windows(config, load_language_model(config.lm))
        tokens, keep = (torch.from_numpy(np.stack([getattr(w, n) for w in windows])) for n in ("tokens", "keep"))
        x = DiscBuffer(f"{config.data.store}/heldout")[:200][:, 0].float().contiguous()
        inputs = {"x": x, "tokens": tokens.long(), "keep": keep, "prompt": tokens[0, :12].long().contiguous()}
        save_file(inputs, directory / "inputs.safetensors")
        model = directory / "model"
        shutil.copytree(base / "other" if name != "gpt2" else ASSETS / "model", model)
        job = {"directory": directory, "model": model, "export": directory / "export"}
        jobs[name] = {"tool": tool} | {key: str(path) for key, path in job.items()}
        last = checkpoint.steps(of_job / "checkpoints")[-1]
        clt = CrossLayerTranscoder.from_pretrained(of_job / "checkpoints" / f"step_{last:08d}")
        made[name] = (x, clt, json.loads((of_job / "summary.json").read_text()))
    (base / "jobs.json").write_text(json.dumps(jobs))
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
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


@pytest.fixture(scope="module")
def page(foreign_python) -> Path:
    """The folder of circuit-tracer's page."""
    return next((foreign_python.parents[1] / "lib").glob("python*/site-packages/circuit_tracer/frontend/assets"))


def test_the_graph_of_a_prompt(run, foreign_python, page, capfd):
    """It has the features that our own forward pass finds, and the page finds the record of each."""
    cli.main(["graph", str(run), PROMPT, "--python", str(foreign_python), "--no-serve"])
    printed = capfd.readouterr().out
    assert "replacement score 0." in printed
    assert "completeness score 0." in printed
    config, path = load_config(run / "config.yaml"), run / "checkpoints" / f"step_{STEPS:08d}"
    lm, transcoder = load_language_model(config.lm), CrossLayerTranscoder.from_pretrained(path)
    ids = torch.tensor([[0, *lm.tokenizer(PROMPT, add_special_tokens=False)["input_ids"]]])
    keep = np.arange(ids.shape[1])[None] > 0
    active = transcoder.encode(capture(lm, ids, keep)[:, 0])  # (T - 1, L, F)
    assert f"{int((active > 0).sum()):,} features are active" in printed
    (metadata,) = json.loads((run / "graphs" / "graph-metadata.json").read_text())["graphs"]
    tree = json.loads((run / "graphs" / f"{metadata['slug']}.json").read_text())
    assert metadata["slug"].startswith("the-old-man-said-to-the-")
    assert metadata["prompt_tokens"] == ["<|endoftext|>", *(lm.tokenizer.decode([id]) for id in ids[0, 1:])]
    nodes = [node for node in tree["nodes"] if node["feature_type"] == "cross layer transcoder"]
    assert nodes
    features, folder = Features(run / "features"), run / "graphs" / metadata["scan"].removeprefix("./data/")
    for node in nodes:
        layer, feature, place = map(int, node["node_id"].split("_"))
        assert node["activation"] == pytest.approx(active[place - 1, layer, feature].item(), rel=1e-4, abs=1e-4)
        assert json.loads((folder / f"{node['feature']}.json").read_text()) == features.record(layer, feature)


def test_circuit_tracers_page_reads_the_records_beside_an_export(run, foreign_python, page, tmp_path):
    """Its JavaScript finds each by number in index.json.gz and the layers' files; its schema takes all of them."""
    pytest.importorskip("playwright", reason="its node runs the page's code: pip install playwright")
    from playwright._impl._driver import compute_driver_executable

    export(run, "circuit-tracer", tmp_path / "export", "float32")
    features = Features(run / "features")
    names = [(s, f) for s in range(features.n_layers) for f in range(features.d_features)]
    node, reader = compute_driver_executable()[0], Path(__file__).parent / "reader.js"
    command = [node, str(reader), str(page), str(tmp_path / "export/features")]
    done = subprocess.run(command, input=json.dumps(names), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == len(names)
    for (layer, feature), record in zip(names, found):
        index = record.pop("featureIndex")
        assert (index, record.pop("scan")) == (record["index"], "user/name")
        assert record == features.record(layer, feature)
    command = [str(foreign_python), "-I", "-c", VALIDATE]
    checked = subprocess.run(command, input=done.stdout, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
