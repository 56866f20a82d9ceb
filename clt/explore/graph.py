"""`clt graph RUN PROMPT`: circuit-tracer's graph of a prompt through a run's transcoder, and its page on this machine.

circuit-tracer attributes and prunes, in its own Python (clt/explore/trace.py). Here it gets what it needs: an export,
the language model's files and token ids; and its page gets the records of the features that are in the graph.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
import yaml

from clt.config import Config
from clt.data.check import check_files, check_model
from clt.data.index import INDEX, read_index, write_json
from clt.errors import UserError, tell
from clt.explore.files import SUMMARY, Features, cantor
from clt.explore.prompt import tokenised
from clt.export.export import export, summary
from clt.export.records import FEATURES
from clt.lm.fingerprint import fingerprint
from clt.lm.load import load_language_model, locate
from clt.lm.spec import LMConfig
from clt.train import checkpoint

INSTALL = "python -m venv tracer && tracer/bin/pip install circuit-tracer==0.5.0"
_TRACE = Path(__file__).with_name("trace.py")
_FOUND = "import importlib.util as i, sys; sys.exit(i.find_spec('circuit_tracer') is None)"
_NEAR = 0.01  # between a probability of a next token by circuit-tracer's language model and by ours


class Graph(NamedTuple):
    """A graph that was made."""

    file: Path
    active: int  # features that are active on the prompt
    nodes: int  # of the pruned graph
    links: int
    replacement: float  # share of the influence that goes through features rather than errors
    completeness: float
    page: Path  # the folder of circuit-tracer's page


def make_graph(config: Config, run: Path, step: int, prompt: str, directory: Path, python: str) -> Graph:
    """Attribute a prompt through a checkpoint of a run, and write the pruned graph into `directory`.

    python: that of an environment with circuit-tracer. The checkpoint is exported once, into the run's directory.
    Raises UserError when circuit-tracer is not there, fails, or runs another language model than the run's; and as
    `export`, `load_language_model` and `tokenised`.
    """
    _check_python(python)
    lm = load_language_model(config.lm)
    if (store := Path(config.data.store) / "heldout" / INDEX).exists():
        check_files(read_index(store.parent), config)
        check_model(read_index(store.parent), lm)
    ids = tokenised(lm, prompt, config.lm.context)[0]
    path = run / "checkpoints" / f"step_{step:08d}"
    exported = _exported(run, path)
    directory.mkdir(parents=True, exist_ok=True)
    name = f"{run.resolve().name}-{step}"
    slug = _slug(prompt, name)
    job = {
        "prompt": prompt,
        "ids": ids[0].tolist(),
        "export": str(exported.resolve()),
        "directory": str(directory.resolve()),
        "slug": slug,
        "scan": f"./data/{FEATURES}/{name}",  # where the page asks for records
    }
    with torch.inference_mode():
        probabilities = lm.model(input_ids=ids, use_cache=False).logits[0, -1].double().softmax(-1)
    with TemporaryDirectory() as work:
        job["model"] = _prepare_model(config.lm, Path(work), exported)
        found = _trace(python, job, Path(work))
    for id, probability in found["next"]:
        if abs(probabilities[id].item() - probability) > _NEAR:
            raise UserError(
                f"after this prompt the token {lm.tokenizer.decode([id])!r} has probability {probability:.3f} by "
                f"circuit-tracer's language model, and {probabilities[id].item():.3f} by {lm.name!r}: the graph is of "
                "another model. transformer-lens takes the newest revision on the hub, and may not know all of the "
                "architecture; name the files of this revision as lm.model, in a directory"
            )
    file = directory / f"{slug}.json"
    tree = json.loads(file.read_text())
    _write_records(run, step, tree["nodes"], directory / FEATURES / name)
    counts = {"nodes": len(tree["nodes"]), "links": len(tree["links"])}
    scores = {key: found[key] for key in ("active", "replacement", "completeness")}
    return Graph(file, **scores, **counts, page=Path(found["page"]))


def _check_python(python: str) -> None:
    """Raise UserError unless circuit-tracer is installed for this interpreter."""
    try:
        missing = subprocess.run([python, "-I", "-c", _FOUND], capture_output=True).returncode != 0
    except OSError as error:
        raise UserError(f"--python {python}: {error.strerror}; wanted the Python of an environment") from error
    if missing:
        raise UserError(
            f"{python} has no circuit-tracer. It wants an older transformers than this package does, so give it a "
            f"separate environment: {INSTALL}, then add --python tracer/bin/python"
        )


def _exported(run: Path, path: Path) -> Path:
    """The export of a checkpoint to circuit-tracer, made unless it is there already."""
    weights = fingerprint([path / checkpoint.MODEL])[-8:]  # a run that was started again has other ones of this step
    directory = run / f"circuit-tracer_{path.name}_{weights}"
    if not directory.exists():
        tell(summary(export(path, "circuit-tracer", directory, "float32", with_records=False)))
    return directory


def _slug(prompt: str, name: str) -> str:
    """A file name for a graph: the prompt's words, and what tells it from other prompts and other transcoders."""
    words = re.sub("[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40].strip("-")
    return f"{words or 'prompt'}-{hashlib.sha256(f'{name} {prompt}'.encode()).hexdigest()[:8]}"


def _prepare_model(config: LMConfig, work: Path, exported: Path) -> str | None:
    """The language model's name on the hub; or None when it is local: then its files are in `work`/model."""
    source, gguf = locate(config.model)
    if gguf is not None:
        raise UserError(f"lm.model={config.model!r} is a GGUF file, which circuit-tracer does not read")
    if not Path(source).is_dir():
        return yaml.safe_load((exported / "config.yaml").read_text())["model_name"]
    # transformer-lens takes the architecture from words in the path before it asks the config. This path has none.
    (work / "model").mkdir()
    for file in Path(source).iterdir():
        if file.name != "config.json":
            (work / "model" / file.name).symlink_to(file.resolve())
    tree = json.loads((Path(source) / "config.json").read_text())
    if "n_positions" in tree:  # a GPT-2 that a newer transformers saved lacks what transformer-lens asks for
        tree.setdefault("n_ctx", tree["n_positions"])
    (work / "model" / "config.json").write_text(json.dumps(tree))
    return None


def _trace(python: str, job: dict[str, Any], work: Path) -> dict[str, Any]:
    """What trace.py tells of the graph that it has written."""
    given, result = work / "job.json", work / "result.json"
    given.write_text(json.dumps(job))
    # -I: neither PYTHONPATH nor the files beside trace.py may hide modules of the other environment.
    command = [str(Path(python).absolute()), "-I", str(_TRACE), str(given), str(result)]
    status = subprocess.run(command, cwd=work, stdout=subprocess.DEVNULL).returncode
    if status or not result.exists():
        raise UserError(f"circuit-tracer has ended with status {status}; what it said stands above")
    return json.loads(result.read_text())


def _write_records(run: Path, step: int, nodes: list[dict[str, Any]], directory: Path) -> None:
    """Write the record of each feature in the graph to a file of the name that the page asks for."""
    remedy = f"run `clt features {run}` and this again"
    if not (run / FEATURES / SUMMARY).exists():
        return tell(f"warning: the page has no examples of the features: {remedy}")
    features = Features(run / FEATURES)
    if (found := features.summary["step"]) != step:
        return tell(f"warning: {features.directory} is of step {found}, not {step}, so the page has no examples")
    directory.mkdir(parents=True, exist_ok=True)
    for node in nodes:
        if node["feature_type"] == "cross layer transcoder":
            layer, feature, _ = map(int, node["node_id"].split("_"))
            write_json(directory / f"{cantor(layer, feature)}.json", features.record(layer, feature))
