"""Transcoders of other tools, against the formulas of their formats."""

import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from clt.cli import main
from clt.config import load_config
from clt.errors import UserError
from clt.export import importer
from clt.export.export import export
from clt.export.importer import import_transcoder
from clt.lm.forward import forward_text
from clt.lm.load import load_language_model
from clt.model.spec import CLTConfig
from clt.model.transcoder import CrossLayerTranscoder
from clt.parsing import to_yaml
from tests.export.formats import (
    HOOKS,
    SOURCES,
    D,
    F,
    L,
    circuit_tracer,
    gemma_scope,
    numbers,
    sparsify,
    transcoder_set,
)


@pytest.mark.parametrize("name", SOURCES)
@torch.no_grad()
def test_an_import_computes_what_its_source_does(name, source, tmp_path):
    write, options, activation, input_site = SOURCES[name]
    function, x = write(source, **options), torch.randn(40, L, D)
    told = import_transcoder(str(source), tmp_path / "out")
    clt = CrossLayerTranscoder.from_pretrained(tmp_path / "out")
    features, y = (tensor.float() for tensor in function(x))
    assert 0.05 < (features > 0).float().mean() < 0.9
    torch.testing.assert_close(clt.encode(x), features, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(clt(x), y, rtol=1e-4, atol=1e-5)
    output_site = input_site if activation == "topk" else None
    assert (clt.spec.activation, clt.sites.input_site, clt.sites.output_site) == (activation, input_site, output_site)
    assert f"{L} layers, width {D}, {F} features a layer, {activation}" in told[0]
    assert "no statistics" in told[2]
    assert ("The source has no thresholds: features fire above 0" in told) == (activation == "relu")
    assert not list(tmp_path.glob("*.partial"))


@torch.no_grad()
def test_the_sources_precision_is_kept_in_several_files_read_a_layer_at_a_time(source, tmp_path, monkeypatch):
    function, x = circuit_tracer(source, dtype=torch.bfloat16, skip=True), torch.randn(20, L, D)
    import_transcoder(str(source), tmp_path / "one")
    monkeypatch.setattr(importer, "SHARD_BYTES", 300)
    import_transcoder(str(source), tmp_path / "several")
    files = sorted(path.name for path in (tmp_path / "several").glob("*.safetensors"))
    assert len(files) > 3
    tensors = {name: t for file in files for name, t in load_file(tmp_path / "several" / file).items()}
    whole = load_file(tmp_path / "one" / "model.safetensors")
    assert all(torch.equal(tensors[name], whole[name]) for name in whole.keys() | tensors.keys())
    assert {str(whole[name].dtype) for name in ("W_enc", "W_dec.0", "W_skip")} == {"torch.bfloat16"}
    assert whole["threshold"].dtype == torch.float32
    index = json.loads((tmp_path / "several" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    eager, lazy = (CrossLayerTranscoder.from_pretrained(tmp_path / "several", lazy=lazy) for lazy in (False, True))
    assert not {"W_enc", "W_dec.0"} & lazy.state_dict().keys()
    torch.testing.assert_close(eager(x), function(x)[1].float(), rtol=1e-4, atol=1e-5)
    assert torch.equal(lazy(x), eager(x))
    assert sum(parameter.numel() for parameter in lazy.parameters()) < sum(p.numel() for p in eager.parameters()) / 3
    (tmp_path / "several" / files[2]).unlink()
    with pytest.raises(UserError, match=rf"{files[2]} cannot be read \(No such file"):
        CrossLayerTranscoder.from_pretrained(tmp_path / "several")


@pytest.mark.parametrize("cross_layer", [True, False])
def test_round_trips_are_equal_to_the_bit(cross_layer, tmp_path):
    trained = CrossLayerTranscoder(L, D, CLTConfig(F, cross_layer=cross_layer, skip=True))
    for tensor in trained.state_dict().values():
        tensor.uniform_(0.1, 2)  # scales are positive
    trained.save_pretrained(tmp_path / "run" / "checkpoints" / "step_00000010")
    config = load_config(None, ["lm.model=org/lm", f"data.store={tmp_path / 'absent'}"])
    (tmp_path / "run" / "config.yaml").write_text(to_yaml(config))
    export(tmp_path / "run", "circuit-tracer", tmp_path / "theirs", "float32")
    import_transcoder(str(tmp_path / "theirs"), tmp_path / "ours")
    trained = trained.fold()
    ours = CrossLayerTranscoder.from_pretrained(tmp_path / "ours")
    assert ours.state_dict().keys() == trained.state_dict().keys()
    assert all(torch.equal(tensor, ours.state_dict()[name]) for name, tensor in trained.state_dict().items())
    export(tmp_path / "ours", "circuit-tracer", tmp_path / "again", "float32")
    files = sorted(path.name for path in (tmp_path / "theirs").iterdir() if path.name != "README.md")
    assert len(files) == 1 + 3 * (2 if cross_layer else 1)
    for file in files:
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "theirs" / file).read_bytes(), file


def test_where_an_import_reads_goes_on_to_circuit_tracer(source, tmp_path):
    gemma_scope(source)
    import_transcoder(str(source), tmp_path / "ours")
    export(tmp_path / "ours", "circuit-tracer", tmp_path / "theirs", "float32")
    config = yaml.safe_load((tmp_path / "theirs" / "config.yaml").read_text())
    assert (config["feature_input_hook"], config["model_name"]) == ("mlp.hook_in", "google/gemma-3")
    import_transcoder(str(tmp_path / "theirs"), tmp_path / "back")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "back"))
    assert torch.equal(one["threshold"].clamp_min(0), other["threshold"])
    assert all(torch.equal(one[name], other[name]) for name in one if name != "threshold")
    with pytest.raises(UserError, match=r"lm\.input_site=norm\.output"):
        export(tmp_path / "ours", "saelens", tmp_path / "other", "float32")


def joint_topk(folder, width):
    torch.manual_seed(4)
    (folder / "config.json").write_text(json.dumps({"d_feature": F, "k": 2}))
    norms = 0.5 + torch.rand(L, F)
    save_file({"W_dec_norm": norms}, folder / "W_dec_norm.safetensors")
    encoders = []
    for i in range(L):
        encoders.append(numbers(F, width))
        save_file({f"W_enc_{i}": encoders[i]}, folder / f"W_enc_{i}.safetensors")
        decoder = {f"W_dec_{i}": numbers(F, L - i, width), f"W_dec_norm_{i}": norms[i].clone()}
        save_file(decoder, folder / f"W_dec_{i}.safetensors")
    return encoders, norms


@torch.no_grad()
def test_a_joint_topk_gets_the_threshold_by_which_k_fire_on_average(source, tmp_path, config):
    """Its 2 features a layer are the 6 largest scores of a token; the threshold is that of all scores of all tokens."""
    encoders, norms = joint_topk(source, 16)
    told = import_transcoder(str(source), tmp_path / "out", config())
    batches = forward_text(config("data.dtype=float32"), "train", load_language_model(config().lm))
    x = torch.cat([rows.activations[:, 0] for _, rows in batches])
    clt = CrossLayerTranscoder.from_pretrained(tmp_path / "out")
    a = torch.stack([torch.relu(x[:, i] @ encoders[i].T) for i in range(L)], 1)
    scores = a * norms
    tau = scores.flatten().sort(descending=True).values[6 * len(x)]
    assert clt.spec.activation == "jumprelu"
    torch.testing.assert_close(clt.threshold[0], tau / norms, rtol=1e-4, atol=1e-6)
    fired = clt.encode(x) > 0
    assert fired.sum() / len(x) == pytest.approx(6, abs=0.02)
    assert (fired == (scores > tau)).float().mean() > 0.9999
    assert any(f"by which 6 fire on average on {len(x):,} tokens" in line for line in told)


def test_a_joint_topk_needs_a_text(source, tmp_path, config):
    joint_topk(source, 16)
    with pytest.raises(UserError, match=rf"has no thresholds: its 6 largest .*: clt import {source} .*out CONFIG sets"):
        import_transcoder(str(source), tmp_path / "out")
    (source / "W_enc_2.safetensors").unlink()
    with pytest.raises(UserError, match=r"the transcoder has 2 layers of width 16, .* has 3 of width 16; set lm.model"):
        import_transcoder(str(source), tmp_path / "out", config())
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("said", [None, {"model": "google/gemma-2-2b"}, {"model": "/data/lm"}], ids=str)
@pytest.mark.parametrize("norm", [None, "pre_feedforward_layernorm"])
def test_sparse_coders_are_of_the_modules_that_were_hooked_whatever_their_model(said, norm, source, tmp_path):
    """Of Gemma the MLP's own output is not what the residual stream gets, and the site of an import says so."""
    sparsify(source, block="layers")
    if said:
        hookpoints = {"hookpoints_in": [f"layers.{i}.{norm}" for i in range(L)]} if norm else {}
        (source / "config.json").write_text(json.dumps(said | hookpoints))
    import_transcoder(str(source), tmp_path / "out")
    sites = CrossLayerTranscoder.from_pretrained(tmp_path / "out").sites
    input_site = f"layers.{{layer}}.{norm if norm and said else 'mlp'}"
    assert (sites.input_site, sites.output_site) == (input_site, "layers.{layer}.mlp")


def test_sparse_coders_of_some_layers(source, tmp_path):
    sparsify(source)
    for i, to in ((2, 11), (1, 9)):
        (source / f"h.{i}.mlp").rename(source / f"h.{to}.mlp")
    import_transcoder(str(source), tmp_path / "out")
    clt, last = CrossLayerTranscoder.from_pretrained(tmp_path / "out"), source / "h.11.mlp"
    assert clt.sites.layers == [0, 9, 11]
    assert torch.equal(clt.W_dec[2][:, 0], load_file(last / "sae.safetensors")["W_dec"])
    last.rename(source / "layers.11.mlp")
    with pytest.raises(UserError, match=r"has h.0.mlp, h.9.mlp, layers.11.mlp; wanted MLPs of one list of layers"):
        import_transcoder(str(source), tmp_path / "other")


@pytest.mark.parametrize("model", [{}, {"model_name": "gemma-2-2b"}], ids=str)
def test_the_mlps_own_output_goes_to_circuit_tracer_and_back(model, source, tmp_path):
    hooks = {"feature_input_hook": "mlp.hook_in", "feature_output_hook": "mlp.hook_out"}
    circuit_tracer(source, **hooks, **model)
    import_transcoder(str(source), tmp_path / "ours")
    sites = CrossLayerTranscoder.from_pretrained(tmp_path / "ours").sites
    assert (sites.input_site, sites.output_site) == ("norm.output", "{layer}.mlp")
    export(tmp_path / "ours", "circuit-tracer", tmp_path / "theirs", "float32")
    config = yaml.safe_load((tmp_path / "theirs" / "config.yaml").read_text())
    assert {key: config[key] for key in hooks} == hooks


@torch.no_grad()
def test_a_source_on_the_hub(hub, source, tmp_path):
    place = hub("org/transcoder")
    function, x = circuit_tracer(source), torch.randn(5, L, D)
    shutil.copytree(source, place / "clt" / "wide")
    import_transcoder("org/transcoder/clt/wide", tmp_path / "out")
    clt = CrossLayerTranscoder.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(clt(x), function(x)[1].float(), rtol=1e-4, atol=1e-5)
    for wrong in ("org/absent", "org/transcoder@v9", "org/transcoder/clt/narrow", "org/../../etc", "absent"):
        why = f"there is no directory {wrong}|no copy of {wrong.partition('@')[0]}|no files of a transcoder in clt/narr"
        with pytest.raises(UserError, match=why):
            import_transcoder(wrong, tmp_path / "other")
    assert not list(tmp_path.glob("other*"))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["set", "set of Gemma Scope 2", "Gemma Scope 2"])
def test_files_that_a_config_lists_on_the_hub(kind, hub, source, tmp_path):
    """Of two repositories, as circuit-tracer's config.yaml names them; in its own format or as Google has them."""
    places = [hub("org/one"), hub("org/two")]
    function = (gemma_scope if kind == "Gemma Scope 2" else transcoder_set)(source)
    addresses = []
    for i, file in enumerate(sorted(source.glob("*.safetensors"))):
        tensors = load_file(file)
        if kind == "set of Gemma Scope 2":
            names = {"W_enc": "w_enc", "W_dec": "w_dec", "activation_function.threshold": "threshold"}
            tensors = {names.get(name, name): t for name, t in tensors.items()}
            tensors["w_enc"] = tensors["w_enc"].T.contiguous()
        folder = places[i % 2] / "wide" / f"{7 - i}"
        folder.mkdir(parents=True)
        save_file(tensors, folder / "params.safetensors")
        addresses.append(
            f"hf://org/{('one', 'two')[i % 2]}/wide/{7 - i}/params.safetensors{'?revision=main' * (i > 1)}"
        )
        file.unlink()
    settings = {"model_kind": "transcoder_set" if "set" in kind else "cross_layer_transcoder", **HOOKS}
    settings |= {"feature_input_hook": "mlp.hook_in", "model_name": "org/lm", "transcoders": addresses}
    (hub("org/config") / "config.yaml").write_text(yaml.safe_dump(settings))
    import_transcoder("org/config", tmp_path / "out")
    clt, x = CrossLayerTranscoder.from_pretrained(tmp_path / "out"), torch.randn(20, L, D)
    features, y = function(x)
    torch.testing.assert_close(clt.encode(x), features, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(clt(x), y, rtol=1e-4, atol=1e-5)
    assert (clt.sites.input_site, clt.sites.output_site) == ("norm.output", None)


def test_the_command(source, tmp_path, capsys):
    circuit_tracer(source)
    main(["import", str(source), str(tmp_path / "out")])
    assert f"The transcoder is in {tmp_path / 'out'}" in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        main(["import", str(source), str(tmp_path / "out")])
    assert end.value.code == 2
    assert "out exists already" in capsys.readouterr().err
