"""Exported directories, read by safetensors alone and put into the formulas of the tools that they are for."""

import json
import re
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file

from clt.cli import main
from clt.config import load_config
from clt.data.store import DiscBuffer
from clt.errors import UserError
from clt.export.compare import ForeignLayer, compare
from clt.export.convert import evenly, to_jumprelu
from clt.export.export import export
from clt.model.spec import CLTConfig
from clt.model.transcoder import CrossLayerTranscoder
from clt.parsing import to_yaml

L, D, F = 3, 16, 24
STEP = "checkpoints/step_00000010"


@pytest.fixture
def make_run(lm_overrides, stores, tmp_path):
    """make_run(config overrides, **fields of CLTConfig) -> a run directory with a transcoder of random weights."""

    def make(*overrides, data=stores, **options):
        run = tmp_path / "run"
        config = load_config(None, [*lm_overrides, f"data.store={data}", f"run.dir={run}", *overrides])
        torch.manual_seed(0)
        clt = CrossLayerTranscoder(L, D, CLTConfig(d_features=F, **options))
        for name, parameter in clt.named_parameters():
            if name != "threshold":
                parameter.data = torch.randn(parameter.shape) * 0.3
        clt.threshold.data = torch.rand(1, L, F)
        clt.threshold.data[:, :, 0] = -0.1  # older runs have such
        if options.get("normalization") != "none":
            statistics = DiscBuffer(stores / "train").statistics
            clt.normalization.set(
                *(getattr(statistics, f"{a}_{b}") for a in ("input", "target") for b in ("mean", "sd"))
            )
        clt.save_pretrained(run / STEP)
        (run / "config.yaml").write_text(to_yaml(config))
        return run

    return make


def heldout(stores):
    rows = DiscBuffer(stores / "heldout")[:].float()
    return rows[:, 0], rows[:, 1]


def formulas(x, layers):
    """Features and outputs as other tools compute them; layers: (W_enc, b_enc, theta, W_dec (F, T, D), b_dec)."""
    features, y = [], torch.zeros_like(x)
    for s, (W_enc, b_enc, threshold, W_dec, b_dec) in enumerate(layers):
        pre = torch.einsum("bd,fd->bf", x[:, s], W_enc) + b_enc
        features.append(torch.relu(pre) if threshold is None else pre * (pre > threshold))
        y[:, s : s + W_dec.shape[1]] += torch.einsum("bf,ftd->btd", features[-1], W_dec)
        y[:, s] += b_dec
    return torch.stack(features, 1), y


VARIANTS = [
    {},
    {"normalization": "dim"},
    {"normalization": "none"},
    {"window": 2},
    {"skip": True},
    {"activation": "relu"},
]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@torch.no_grad()
def test_a_cross_layer_transcoder_for_circuit_tracer(options, make_run, stores, tmp_path):
    run, out, (x, _) = make_run(**options), tmp_path / "out", heldout(stores)
    facts = export(run, "circuit-tracer", out, "float32")
    config = yaml.safe_load((out / "config.yaml").read_text())
    hooks = {"feature_input_hook": "hook_resid_mid", "feature_output_hook": "hook_mlp_out"}
    assert config == {"model_kind": "cross_layer_transcoder", "model_name": facts["model"], **hooks}
    layers, skips = [], torch.zeros_like(x)
    for s in range(L):
        encoder, decoder = (load_file(out / f"{part}_{s}.safetensors") for part in ("W_enc", "W_dec"))
        assert encoder[f"W_enc_{s}"].shape == (F, D)
        assert decoder[f"W_dec_{s}"].shape == (F, L - s, D)
        threshold = encoder.get(f"threshold_{s}")
        assert (threshold is None) == (options.get("activation") == "relu")
        assert threshold is None or (threshold.min() == 0 and threshold.max() > 0.5)
        layers.append((*(encoder[f"{n}_{s}"] for n in ("W_enc", "b_enc")), threshold, decoder[f"W_dec_{s}"],
                       encoder[f"b_dec_{s}"]))  # fmt: skip
        if "skip" in options:
            skips[:, s] = x[:, s] @ encoder[f"W_skip_{s}"]
    features, y = formulas(x, layers)
    clt = CrossLayerTranscoder.from_pretrained(run / STEP)
    assert 0.05 < (features > 0).float().mean() < 0.9
    torch.testing.assert_close(features, clt.encode(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(y + skips, clt(x), rtol=1e-4, atol=1e-4)
    assert facts["comparison"]["fired_otherwise"] == 0
    assert facts["comparison"]["difference"] < 1e-4
    assert any("W_skip" in note for note in facts["notes"]) == ("skip" in options)
    assert any("at most 2 layers" in note for note in facts["notes"]) == ("window" in options)


@pytest.mark.parametrize("name", ["~/models/lm", "/home/ann/models/lm", "org/models/lm"])
def test_without_a_store_layers_are_the_configs_and_no_path_gets_out(name, make_run, tmp_path):
    run = make_run("lm.layers=[5, 6, 7]", f"lm.model={name}", data=tmp_path / "none", cross_layer=False)
    export(run, "saelens", tmp_path / "out", "float32")
    for s in range(L):
        metadata = json.loads((tmp_path / "out" / f"layer_{s}" / "cfg.json").read_text())["metadata"]
        assert (metadata["model_name"], metadata["hook_name"]) == ("lm", f"blocks.{5 + s}.hook_resid_mid")


@pytest.mark.parametrize("options", [{"skip": True}, {"activation": "relu"}], ids=str)
@torch.no_grad()
def test_transcoders_of_one_layer_for_both_tools(options, make_run, stores, tmp_path):
    run, (x, _) = make_run(cross_layer=False, **options), heldout(stores)
    clt = CrossLayerTranscoder.from_pretrained(run / STEP)
    export(run, "circuit-tracer", tmp_path / "set", "float32")
    export(run, "saelens", tmp_path / "sae", "float32")
    assert yaml.safe_load((tmp_path / "set" / "config.yaml").read_text())["model_kind"] == "transcoder_set"
    skip, jump = "skip" in options, options.get("activation") != "relu"
    layers, others = [], []
    for s in range(L):
        found = load_file(tmp_path / "set" / f"layer_{s}.safetensors")
        config = json.loads((tmp_path / "sae" / f"layer_{s}" / "cfg.json").read_text())
        sae = load_file(tmp_path / "sae" / f"layer_{s}" / "sae_weights.safetensors")
        assert config["architecture"] == ("jumprelu_skip_transcoder" if skip else "transcoder")
        assert (config["d_in"], config["d_sae"], config["d_out"]) == (D, F, D)
        assert config["metadata"]["hook_name"] == f"blocks.{s}.hook_resid_mid"
        assert ("activation_function.threshold" in found, "threshold" in sae) == (jump, jump)
        for weights, into, key in ((found, layers, "activation_function.threshold"), (sae, others, "threshold")):
            W_enc = weights["W_enc"] if weights is found else weights["W_enc"].T
            b_dec = weights["b_dec"] + (x[:, s] @ weights["W_skip"].T if skip else 0)
            into.append((W_enc, weights["b_enc"], weights.get(key), weights["W_dec"].unsqueeze(1), b_dec))
    for exported in (layers, others):
        features, y = formulas(x, exported)
        torch.testing.assert_close(features, clt.encode(x), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(y, clt(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("activation", "by_norm"), [("topk", False), ("batchtopk", True)])
@torch.no_grad()
def test_k_becomes_a_threshold_per_feature(activation, by_norm, make_run, stores, tmp_path, layers_at_once):
    run, (x, _) = make_run(activation=activation, k=4, by_norm=by_norm), heldout(stores)
    facts = export(run, "circuit-tracer", tmp_path / "out", "float32")
    assert (facts["trained_activation"], facts["activation"]) == (activation, "jumprelu")
    assert layers_at_once == {"W_enc": 1, "W_dec": 1}
    assert f"Trained with {activation} (k = 4)" in facts["notes"][0]
    trained = CrossLayerTranscoder.from_pretrained(run / STEP)
    wanted = to_jumprelu(trained, evenly(DiscBuffer(stores / "train"), 10_000)[:, 0].float())
    for s in range(L):
        found = load_file(tmp_path / "out" / f"W_enc_{s}.safetensors")
        torch.testing.assert_close(found[f"threshold_{s}"], wanted.threshold[0, s], rtol=0, atol=0)
    otherwise = int(((wanted.encode(x) > 0) ^ (trained.encode(x) > 0)).sum())
    assert abs(facts["comparison"]["fired_otherwise"] - otherwise) <= 3
    assert 0 < otherwise < facts["comparison"]["fired"]


def test_a_hub_model_is_named_as_transformer_lens_names_it(make_run, tmp_path):
    run = make_run("lm.model=openai-community/gpt2", data=tmp_path / "none")
    assert export(run, "circuit-tracer", tmp_path / "out", "float32")["model"] == "openai-community/gpt2"
    assert yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())["model_name"] == "gpt2"


def test_matrices_are_stored_narrow_and_vectors_are_not(make_run, tmp_path):
    facts = export(make_run(), "circuit-tracer", tmp_path / "out", "bfloat16")
    found = load_file(tmp_path / "out" / "W_enc_1.safetensors") | load_file(tmp_path / "out" / "W_dec_1.safetensors")
    kinds = {name: tensor.dtype for name, tensor in found.items()}
    assert kinds.pop("W_enc_1") == kinds.pop("W_dec_1") == torch.bfloat16
    assert set(kinds.values()) == {torch.float32}
    found = facts["comparison"]
    assert found["difference"] > 1e-4, "the loss of precision is told"
    assert 0 < found["fired_otherwise"] < 0.02 * found["fired"]


@torch.no_grad()
def test_a_comparison_finds_what_differs(make_run, stores):
    clt, (x, y) = CrossLayerTranscoder.from_pretrained(make_run() / STEP), heldout(stores)

    def read(s, **changes):
        layer = clt.fold_layer(s)
        layer["threshold"].clamp_min_(0)
        names = ("b_enc", "threshold", "W_dec", "b_dec")
        return ForeignLayer(layer["W_enc"].T, *(layer[name] for name in names), None)._replace(**changes)

    same = compare(clt, read, x, y)
    assert (same["rows"], same["fired_otherwise"]) == (len(x), 0)
    assert same["fve"] == pytest.approx(same["fve_exported"], abs=1e-5)
    assert same["fired"] == int((clt.encode(x) > 0).sum())
    never = compare(clt, lambda s: read(s, threshold=torch.full((F,), 1e9)) if s == 1 else read(s), x, y)
    assert never["fired_otherwise"] == int((clt.encode(x)[:, 1] > 0).sum()) > 0
    negative = compare(clt, lambda s: read(s, threshold=clt.threshold[0, s].detach()), x, y)
    assert negative["fired_otherwise"] > 0, "a negative threshold lets negative pre-activations through"
    shifted = compare(clt, lambda s: read(s, b_dec=read(s).b_dec + 1), x, y)
    rms = clt(x).square().mean((0, 2)).sqrt()
    assert shifted["difference"] == pytest.approx(float(1 / rms.min()), rel=1e-3)


def refused(*arguments) -> str:
    with pytest.raises(UserError) as error:
        export(*arguments)
    return str(error.value)


def test_what_cannot_be_exported(make_run, stores, tmp_path):
    out = tmp_path / "out"
    assert "neither a run (config.yaml) nor a checkpoint" in refused(tmp_path, "circuit-tracer", out, "float32")
    assert "SAELens has transcoders of one layer alone" in refused(make_run(), "saelens", out, "float32")
    token = refused(make_run(normalization="token"), "circuit-tracer", out, "float32")
    assert "clt.normalization is token" in token
    sites = ["lm.input_site=transformer.h.{layer}.mlp", "lm.output_site=transformer.h.{layer}.mlp"]
    found = refused(make_run(*sites, data=tmp_path / "none"), "circuit-tracer", out, "float32")
    assert "wanted the residual before the MLP's norm" in found
    (tmp_path / "gemma").mkdir()
    (tmp_path / "gemma" / "config.json").write_text('{"model_type": "gemma2"}')
    layer = "model.layers.{layer}"
    llama = (f"{layer}.post_attention_layernorm", f"{layer}.mlp")
    gemma = (f"{layer}.pre_feedforward_layernorm", f"{layer}.post_feedforward_layernorm")
    for pair, model in ((llama, "gemma"), (gemma, "lm"), (("a.{layer}", "b.{layer}"), "gemma")):
        sites = [f"lm.model={tmp_path / model}" if model == "gemma" else "lm.dtype=float32"]
        sites += [f"lm.input_site={pair[0]}", f"lm.output_site={pair[1]}"]
        found = refused(make_run(*sites, data=tmp_path / "none"), "circuit-tracer", out, "float32")
        assert f"lm.input_site={pair[0]}" in found
    names = [f"lm.input_site={gemma[0]}", f"lm.output_site={gemma[1]}"]
    absent = refused(make_run(*names, "lm.model=org/lm", data=tmp_path / "none"), "circuit-tracer", out, "float32")
    assert "config.json of lm.model='org/lm' is not on this machine: `hf download org/lm config.json`" in absent
    assert "lm.layers=[0, 1]" in refused(
        make_run("lm.layers=[0, 1]", data=tmp_path / "none"), "circuit-tracer", out, "float32"
    )
    topk = make_run(activation="topk", k=4, data=tmp_path / "none")
    assert "Other tools have no topk: thresholds are set on rows" in refused(topk, "circuit-tracer", out, "float32")
    run = make_run(f"lm.model={tmp_path / 'gemma'}", *names, data=tmp_path / "none")
    export(run, "circuit-tracer", tmp_path / "gemmas", "float32")
    run = make_run()
    clt = CrossLayerTranscoder.from_pretrained(run / STEP)
    clt.b_dec.data[1], clt.W_dec[1].data[0, 0, 0] = 1e5, 1e12
    clt.save_pretrained(run / STEP)
    narrow = refused(run, "circuit-tracer", out, "float16")
    assert "W_dec_1 has values up to" in narrow
    assert "beyond the range of --dtype float16; wanted bfloat16 or float32" in narrow
    assert not list(tmp_path.glob("out*")), "a refused export leaves something"
    out.mkdir()
    assert "out exists already; delete it, or name another directory" in refused(run, "circuit-tracer", out, "float32")
    shutil.rmtree(run / STEP)
    assert "has no checkpoint" in refused(run, "circuit-tracer", out, "float32")


def test_without_a_heldout_store_nothing_is_compared_and_the_card_says_so(make_run, tmp_path):
    facts = export(make_run(data=tmp_path / "none"), "circuit-tracer", tmp_path / "out", "float32")
    assert facts["comparison"] is None
    assert "It was not compared with the training forward" in (tmp_path / "out" / "README.md").read_text()


def test_a_disk_that_is_too_small_ends_in_one_message(make_run, small_disk):
    disk = small_disk(4096)
    found = refused(make_run(), "circuit-tracer", disk / "out", "float32")
    assert "free, the export takes 1" in found
    assert not list(disk.iterdir())


def test_the_command_exports_runs_checkpoints_and_converted_ones(train, capsys, tmp_path):
    run = train("clt.activation=batchtopk", "clt.k=6", "loss.sparsity=0.0", "eval.replacement_tokens=0")
    main(["convert", str(run.dir), "--to", "jumprelu", "--rows", "100"])
    capsys.readouterr()
    for number, source in enumerate((run.dir, run.dir / STEP, run.dir / "jumprelu_step_00000010")):
        out = tmp_path / f"out{number}"
        main(["export", str(source), "--to", "circuit-tracer", str(out)])
        printed = capsys.readouterr().out
        assert "cross-layer transcoder of lm0: 3 layers, width 16, 24 features a layer, jumprelu" in printed
        assert ("Trained with batchtopk" in printed) == (number < 2)
        card, fired = (out / "README.md").read_text(), re.search(r"in one alone +(\d+ of \d+)\n", printed)
        assert fired
        assert f"| features that fire in one alone | {fired[1]} |" in card
        assert ("Trained with batchtopk" in card) == (number < 2)
        assert ("## Figures" in card) == (number < 2)  # of the checkpoint that summary.json is of
        assert str(tmp_path) not in card
    assert "The export is in" in printed
