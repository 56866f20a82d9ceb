"""Run in .venv-interop: circuit-tracer and SAELens on exported directories. `foreign.py JOBS.json RESULTS.json`.

A job names a directory with `inputs.safetensors`, the language model's directory, the export, and what to do with it.
Its result is a dict of numbers; activations and outputs go into `outputs.safetensors` of its directory.
"""

import json
import sys
from pathlib import Path

import torch
import transformer_lens.loading_from_pretrained as loading
from circuit_tracer import Graph, ReplacementModel, attribute
from circuit_tracer.graph import compute_graph_scores, prune_graph
from circuit_tracer.utils.create_graph_files import create_graph_files
from circuit_tracer.utils.hf_utils import load_transcoder_from_hub
from safetensors.torch import load_file, save_file


def load(model: str, export: str):
    """circuit-tracer's replacement model of two directories."""
    # transformer-lens takes the models of its list alone, and asks a GPT-2 for n_ctx, which newer configs do not have.
    loading.OFFICIAL_MODEL_NAMES.append(model)
    config = json.loads((Path(model) / "config.json").read_text())
    (Path(model) / "config.json").write_text(json.dumps({"n_ctx": config.get("n_positions"), **config}))
    transcoders, _ = load_transcoder_from_hub(export, dtype=torch.float32)
    encoders = [load_file(file) for file in sorted(Path(export).glob("W_enc_*"))]  # a set has none
    if encoders and "W_skip_0" in encoders[0]:
        assert not transcoders.skip_connection, "circuit-tracer has read W_skip_{i}; let docs/export.md say so"
        W_skip = torch.stack([tensors[f"W_skip_{i}"] for i, tensors in enumerate(encoders)])
        transcoders.W_skip, transcoders.skip_connection = torch.nn.Parameter(W_skip), True
    return ReplacementModel.from_pretrained_and_transcoders(model, transcoders, dtype=torch.float32)


def encode_decode(transcoders, x):
    """x (B, L, D) -> features (B, L, F) and outputs (B, L, D)."""
    x = x.transpose(0, 1)
    features = transcoders.encode(x)
    return features.transpose(0, 1), transcoders.decode(features, x).transpose(0, 1)


def closed_loop(model, tokens, keep):
    """Agreement and KL of the model with all MLPs replaced at the kept positions of tokens (N, T), attention live."""
    transcoders, features, inputs = model.transcoders, {}, {}

    def read(x, hook):
        inputs[hook.layer()] = x
        features[hook.layer()] = transcoders.encode_layer(x, hook.layer())

    def write(original, hook):
        t = hook.layer()
        if hasattr(transcoders, "transcoders"):
            y = transcoders[t].decode(features[t], inputs[t])
        else:
            y = sum(features[s] @ transcoders._get_decoder_vectors(s)[:, t - s] for s in range(t + 1))
            y = y + transcoders.b_dec[t]
            y = y + (transcoders.compute_skip(t, inputs[t]) if transcoders.skip_connection else 0)
        return torch.where(keep[..., None], y, original)

    hooks = [(f"blocks.{s}.{model.feature_input_hook}", read) for s in range(model.cfg.n_layers)]
    hooks += [(f"blocks.{s}.{model.original_feature_output_hook}", write) for s in range(model.cfg.n_layers)]
    counted = keep[:, :-1] & keep[:, 1:]
    original, replaced = (
        logits[:, :-1][counted].double().log_softmax(-1)
        for logits in (model(tokens), model.run_with_hooks(tokens, fwd_hooks=hooks))
    )
    agreement = (original.argmax(-1) == replaced.argmax(-1)).double().mean()
    kl = (original.exp() * (original - replaced)).sum(-1).mean()
    return {"top1_agreement": agreement.item(), "kl": kl.item()}


def trace(model, prompt, directory):
    """Attribute, prune, save, and intervene on the three features with the largest edges."""
    graph = attribute(prompt, model, batch_size=64)
    replacement, completeness = compute_graph_scores(graph)
    pruned = prune_graph(graph)
    graph.to_pt(str(directory / "graph.pt"))
    create_graph_files(str(directory / "graph.pt"), "prompt", str(directory / "graphs"))
    count, edges = len(graph.active_features), Graph.from_pt(str(directory / "graph.pt")).adjacency_matrix
    targets, layers = tuple(graph.active_features.T), range(model.cfg.n_layers)

    def run(*interventions):
        logits, pre = model.feature_intervention(
            prompt, interventions, constrained_layers=layers, apply_activation_function=False
        )
        return pre[targets], (logits[0, -1] - logits[0, -1].mean())[graph.logit_token_ids]

    (pre, logits), interventions = run(), []
    for source in edges[:, :count].abs().sum(0).topk(3).indices.tolist():
        layer, position, feature = graph.active_features[source].tolist()
        doubled = 2 * graph.activation_values[source].item()
        moved, moved_logits = run((layer, position, feature, doubled))
        # An edge is the effect of a feature as active as it is; the source itself moves by its own activation.
        difference = (moved - pre - edges[:count, source]).abs()
        of_logits = moved_logits - logits - edges[-len(graph.logit_targets) :, source]
        interventions.append(
            {
                "largest_edge": edges[:, source].abs().max().item(),
                "difference": max(difference.max().item(), of_logits.abs().max().item()),
            }
        )
    return {
        "features": count,
        "nodes": len(edges),
        "nodes_kept": int(pruned.node_mask.sum()),
        "edges_kept": int(pruned.edge_mask.sum()),
        "replacement": replacement,
        "completeness": completeness,
        "interventions": interventions,
    }


def sae_lens(export, x):
    """x (B, L, D) -> features (B, L, F) and outputs (B, L, D) of SAELens' transcoders, one a layer."""
    from sae_lens import SAE

    saes = [SAE.load_from_disk(Path(export) / f"layer_{s}") for s in range(x.shape[1])]
    features = [sae.encode(x[:, s]) for s, sae in enumerate(saes)]
    return torch.stack(features, 1), torch.stack([sae(x[:, s]) for s, sae in enumerate(saes)], 1)


def work(job):
    directory, result = Path(job["directory"]), {}
    inputs = load_file(directory / "inputs.safetensors")
    with torch.no_grad():
        if job["tool"] == "saelens":
            outputs = sae_lens(job["export"], inputs["x"])
        else:
            model = load(job["model"], job["export"])
            outputs = encode_decode(model.transcoders, inputs["x"])
            result |= closed_loop(model, inputs["tokens"], inputs["keep"])
    if job["tool"] != "saelens":
        result |= trace(model, inputs["prompt"], directory)
    save_file({n: t.contiguous() for n, t in zip(("features", "y"), outputs)}, directory / "outputs.safetensors")
    return result


if __name__ == "__main__":
    torch.set_num_threads(1)
    jobs, results = map(Path, sys.argv[1:])
    results.write_text(json.dumps({name: work(job) for name, job in json.loads(jobs.read_text()).items()}))
