"""Run by circuit-tracer's Python, which need not have this package: attribute a prompt, prune, write the graph file.

`trace.py JOB.json RESULT.json`, started in a directory that holds the language model as `model`, unless the job names
one of the hub. circuit-tracer wants an older transformers than this package's, so it lives in another environment.
"""

import json
import sys
import warnings
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
import transformer_lens.loading_from_pretrained as loading  # type: ignore[import-not-found]
from circuit_tracer import ReplacementModel, attribute  # type: ignore[import-not-found]
from circuit_tracer.graph import compute_graph_scores  # type: ignore[import-not-found]
from circuit_tracer.utils.create_graph_files import create_graph_files  # type: ignore[import-not-found]
from circuit_tracer.utils.hf_utils import load_transcoder_from_hub  # type: ignore[import-not-found]
from safetensors.torch import load_file

# As circuit-tracer's own command has them: rows of a backward pass, and features of a graph, the most influential.
_BATCH, _MOST_FEATURES = 256, 7500


def load(export: str, model: str | None) -> Any:
    """circuit-tracer's replacement model; model: on the hub, or None for `model` in this directory."""
    if model is None:
        loading.OFFICIAL_MODEL_NAMES.append("model")  # transformer-lens takes those of its list alone
    transcoders, _ = load_transcoder_from_hub(export, dtype=torch.float32)
    skips = {}
    for file in Path(export).glob("W_enc_*.safetensors"):  # one transcoder per layer is read whole
        skips |= {name: tensor for name, tensor in load_file(file).items() if name.startswith("W_skip_")}
    if skips:  # versions up to 0.5.0 leave it out as they load, without a word
        transcoders.W_skip = torch.nn.Parameter(torch.stack([skips[f"W_skip_{i}"] for i in range(len(skips))]))
        transcoders.skip_connection = True
    return ReplacementModel.from_pretrained_and_transcoders(model or "model", transcoders, dtype=torch.float32)


def main(job: dict[str, Any]) -> dict[str, Any]:
    model = load(job["export"], job["model"])
    graph = attribute(job["ids"], model, batch_size=_BATCH, max_feature_nodes=_MOST_FEATURES)
    if (found := graph.input_tokens.tolist()) != job["ids"]:
        raise SystemExit(f"circuit-tracer has made the tokens {found} of {job['ids']}")
    graph.input_string = job["prompt"]
    replacement, completeness = compute_graph_scores(graph)
    create_graph_files(graph, job["slug"], job["directory"], scan=job["scan"])
    return {
        "active": len(graph.active_features),
        "replacement": replacement,
        "completeness": completeness,
        "next": list(zip(graph.logit_token_ids.tolist(), graph.logit_probabilities.tolist())),
        "page": str(files("circuit_tracer") / "frontend" / "assets"),
    }


if __name__ == "__main__":
    # torch says so of every graph; circuit-tracer means to run the backward pass through these hooks.
    warnings.filterwarnings("ignore", "Full backward hook is firing")
    given, result = map(Path, sys.argv[1:])
    result.write_text(json.dumps(main(json.loads(given.read_text()))))
