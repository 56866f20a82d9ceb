"""The notebooks: what is committed is whole and names no machine, and each runs from top to bottom."""

import json
import os
import re
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
NOTEBOOKS = ("train", "replacement_model", "features")  # the first one leaves a run that the others look at
SMALLER = {
    "data": {"train_tokens": 2000, "heldout_tokens": 300, "shard_rows": 500},
    "train": {"steps": 20, "batch_tokens": 64},
    "eval": {"every": 10, "replacement_tokens": 256},
}
PATH = re.compile(r"(?<![\w./<:-])(/|[A-Z]:\\+)(home|root|work|tmp|usr|opt|mnt|var|private|Users)\b", re.I)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the notebooks, with a smaller run to train than small.yaml's, and none of a quickstart."""
    folder = tmp_path_factory.mktemp("checkout") / "notebooks"
    shutil.copytree(ROOT / "notebooks", folder, ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    config = yaml.safe_load((folder / "small.yaml").read_text())
    for section, fields in SMALLER.items():
        config[section] |= fields
    (folder / "small.yaml").write_text(yaml.safe_dump(config))
    return folder


def outputs(notebook: dict) -> list[dict]:
    return [output for cell in notebook["cells"] if cell["cell_type"] == "code" for output in cell["outputs"]]


def check(notebook: dict) -> None:
    """Every code cell ran, once and in order; there are plots; nothing went to stderr; no output names a path."""
    counts = [cell["execution_count"] for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert counts == list(range(counts[0], counts[0] + len(counts)))
    found = outputs(notebook)
    assert any("image/png" in output.get("data", {}) for output in found)
    assert not [output for output in found if output["output_type"] == "error" or output.get("name") == "stderr"]
    for output in found:
        texts = {kind: text for kind, text in output.get("data", {}).items() if kind != "image/png"}
        assert not PATH.search(json.dumps([texts, output.get("text")])), output


@pytest.mark.timeout(900)
def test_the_notebooks_run(folder, monkeypatch):
    """In one kernel, which imports torch and the others once; its variables are deleted between two notebooks."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("IPYTHONDIR", str(folder.parent / "ipython"))
    names = [name for name in NOTEBOOKS if name != "replacement_model" or find_spec("nnsight") is not None]
    notebooks = [nbformat.read(folder / f"{name}.ipynb", as_version=4) for name in names]
    whole = nbformat.v4.new_notebook()
    for notebook in notebooks:
        whole.cells += [nbformat.v4.new_code_cell("%reset -fs"), *notebook.cells]
    for cell in whole.cells:
        cell.pop("outputs", None)
    resources = {"metadata": {"path": str(folder)}}
    nbclient.NotebookClient(whole, timeout=240, kernel_name="python3", resources=resources).execute()
    for notebook in notebooks:
        check(notebook)
    assert (folder.parent / "runs" / "notebook" / "summary.json").is_file()


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_what_is_committed_has_its_outputs(name):
    text = (ROOT / "notebooks" / f"{name}.ipynb").read_text()
    notebook = json.loads(text)
    check(notebook)
    assert next(cell["execution_count"] for cell in notebook["cells"] if cell["cell_type"] == "code") == 1
    assert str(Path.home()) not in text
    assert not PATH.search("".join("".join(cell["source"]) for cell in notebook["cells"]))
    assert len(text) < 300_000, "large outputs make a repository slow to clone"
    assert {file.stem for file in (ROOT / "notebooks").glob("*.ipynb")} == set(NOTEBOOKS)
