"""The model card: what it tells, and what it never does."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from clt.config import load_config
from clt.data.index import read_index
from clt.export.card import card
from clt.lm.fingerprint import TEXT_REVISION

COMPARISON = {
    "rows": 1024, "fired": 5000, "fired_otherwise": 3, "feature_difference": 1e-6, "difference": 2e-6,
    "fve": 0.81234, "fve_exported": None,
}  # fmt: skip
FACTS = {
    "format": "circuit-tracer", "activation": "jumprelu", "dtype": "bfloat16", "notes": ["A note."],
    "comparison": COMPARISON,
}  # fmt: skip


@pytest.fixture(scope="module")
def run(train):
    """A run's directory; its text and model lie in directories of this machine."""
    return train(plots=True).dir


def of(run: Path, *overrides: str, **options):
    config = load_config(run / "config.yaml", overrides)
    summary = json.loads((run / "summary.json").read_text())
    return card(config, summary, read_index(Path(config.data.store) / "heldout"), **options)


def header(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


def test_what_was_trained(run):
    text = of(run, name="ann/clt", license="mit")
    assert header(text)["license"] == "mit"
    assert text.count("\n# Cross-layer transcoder of a local language model\n") == 1
    summary = json.loads((run / "summary.json").read_text())
    assert re.search(rf"fraction of variance explained \(held out\) +{summary['fve']:.4g}\n", text)
    assert "| tokens | 600 in training; 1,000 extracted, and 150 held out |" in text
    assert "| layers | all 3 |" in text
    recipe = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert recipe["clt"]["d_features"] == 24
    assert recipe["train"]["steps"] == 10
    assert 'CrossLayerTranscoder.from_pretrained("ann/clt")' in text
    for plot in (run / "report").glob("*.png"):
        assert f"(report/{plot.name})" in text
    assert text.endswith("## Licence\n\nmit.\n")
    assert "has not stated one" in of(run)


def test_names_that_are_public(run):
    """A model's and a text's, with their commits, when the store knows that they came from the hub."""
    config = load_config(run / "config.yaml", ["lm.model=org/model", "text.source=org/text", "text.split=validation"])
    index = read_index(Path(config.data.store) / "heldout")
    index = replace(index, model="org/model", text=index.text | {"source": "org/text"})
    hub = replace(index, revision="abc123", fingerprints={"heldout text": f"{TEXT_REVISION}def"})
    text = card(config, {}, hub)
    assert (header(text)["base_model"], header(text)["datasets"]) == ("org/model", ["org/text"])
    assert "[org/model](https://huggingface.co/org/model), commit abc123" in text
    assert 'ReplacementModel.from_pretrained("org/model", "EXPORT")' in text
    gpt2 = replace(config, lm=replace(config.lm, model="openai-community/gpt2"))
    text = card(gpt2, {}, replace(hub, model="openai-community/gpt2"), FACTS)
    assert 'ReplacementModel.from_pretrained("gpt2", "DIRECTORY")' in text, "transformer-lens knows no longer name"
    assert "[org/text](https://huggingface.co/datasets/org/text), split validation" in text
    for known in (index, None):  # a directory here may be called like that too
        assert "org/" not in card(config, {}, known)
    assert "of the embedded language model\n" in card(
        replace(config, lm=replace(config.lm, model="embedded")), {}, None
    )


def test_nothing_of_this_machine_is_told(run):
    """Every free text of a config is a name of somebody; of the directory that the run lies in no part is told."""
    secrets = {
        "run.dir": "/home/zoe/runs", "lm.model": "/home/zoe/models/zoe-lm", "lm.revision": "zoe-branch",
        "text.source": "zoe/texts.jsonl", "text.subset": "zoe-subset", "text.revision": "zoe-revision",
        "text.split": "zoe-split", "text.field": "zoe-field", "text.heldout": "/home/zoe/heldout.txt",
        "data.url": "http://zoe.example:8000", "data.token_file": "/home/zoe/token", "log.wandb_project": "zoe-project",
        "log.wandb_entity": "zoe", "server.name": "zoe-buffer", "server.host": "zoe-host",
        "server.token_file": "/home/zoe/token",
    }  # fmt: skip
    for facts in (None, FACTS):
        text = of(run, *(f"{key}={value}" for key, value in secrets.items()), facts=facts)
        assert "zoe" not in text.lower()
        assert not [part for part in run.resolve().parts if len(part) > 3 and part in text]
        assert "pytest" not in text
        assert "home" not in text


def test_an_export_tells_how_it_compares(run):
    text = of(run, facts=FACTS)
    assert "In the format of circuit-tracer: jumprelu, matrices in bfloat16.\n\nA note.\n" in text
    assert "on 1,024 held-out rows" in text
    assert "| features that fire in one alone | 3 of 5,000 |" in text
    assert "| fraction of variance explained, exported | none |" in text
    assert "ReplacementModel.from_pretrained" in text
    assert "CrossLayerTranscoder.from_pretrained" not in text
    assert "report/" not in text
    assert "not compared" in of(run, facts=FACTS | {"comparison": None})
    assert "sae_lens" in of(run, "clt.cross_layer=false", facts=FACTS | {"format": "saelens"})


@pytest.mark.parametrize(
    ("overrides", "tools"),
    [
        ([], ["circuit-tracer"]),
        (["clt.cross_layer=false"], ["circuit-tracer", "saelens"]),
        (["clt.cross_layer=false", "lm.layers=[0, 2]"], ["saelens"]),
        (["lm.layers=[0, 2]"], []),
        (["clt.normalization=token"], []),
        (["clt.skip=true"], []),
        (["lm.input_site=norm.output"], ["circuit-tracer"]),
        (["lm.input_site=h.{layer}.a", "lm.output_site=h.{layer}.b"], []),
        (["lm.input_site=h.{layer}.a", "lm.output_site=h.{layer}.b", "lm.model=org/absent"], []),
    ],
    ids=str,
)
def test_only_tools_that_can_load_it_are_named(run, overrides, tools):
    """Those to which `clt export` can take it, and which then compute the same without more ado."""
    text = card(load_config(run / "config.yaml", overrides), {}, None)
    assert set(re.findall(r"clt export RUN --to ([\w-]+) EXPORT", text)) == set(tools)
    assert ("circuit_tracer" in text, "sae_lens" in text) == ("circuit-tracer" in tools, "saelens" in tools)
    assert "from_pretrained" in text
