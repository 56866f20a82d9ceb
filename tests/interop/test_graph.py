"""`clt graph` with the real circuit-tracer, and the records of features as its page reads them."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

import train_ddp
from clt import cli
from clt.config import load_config
from clt.explore.features import make_features
from clt.explore.files import Features
from clt.export.export import export
from clt.lm.capture import capture
from clt.lm.load import load_language_model
from clt.model.transcoder import CrossLayerTranscoder

ROOT, STEPS, PROMPT = Path(__file__).parents[2], 30, "The old man said to the"
pytestmark = pytest.mark.timeout(1200)  # the environment is made in the first run
VALIDATE = """
import json, sys
from circuit_tracer.frontend.feature_models import Model
for record in json.load(sys.stdin):
    Model(**record)
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A short run of quickstart's kind, with features."""
    base = tmp_path_factory.mktemp("graph")
    config = load_config(
        ROOT / "configs" / "quickstart.yaml",
        [
            f"run.dir={base / 'run'}", f"data.store={base / 'store'}", "data.train_tokens=20000",
            "data.shard_rows=4000", "data.heldout_tokens=1000", "data.block_rows=64", "train.batch_tokens=512",
            f"train.steps={STEPS}",
            "clt.d_features=48", "loss.target_l0=20", "train.precision=fp32", "eval.replacement_tokens=0",
        ],
    )  # fmt: skip
    train_ddp.main(config, prepare=False)
    make_features(config, base / "run", STEPS, "heldout", 5000, progress=False)
    return base / "run"


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
