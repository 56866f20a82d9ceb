"""A transcoder that cannot be imported gives one message, and leaves nothing behind."""

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from clt.errors import UserError
from clt.export.importer import import_transcoder
from tests.export.formats import F, circuit_tracer, sparsify, transcoder_set


def cut(folder):
    file = folder / "W_dec_1.safetensors"
    file.write_bytes(file.read_bytes()[:-9])


def changed(name, change):
    def spoil(folder):
        file = folder / f"{name.rpartition('_')[0].replace('threshold', 'W_enc')}_{name[-1]}.safetensors"
        tensors = load_file(file)
        change(tensors, name)
        save_file(tensors, file)

    return spoil


def of_config(**settings):
    def spoil(folder):
        tree = yaml.safe_load((folder / "config.yaml").read_text())
        (folder / "config.yaml").write_text(yaml.safe_dump(tree | settings))

    return spoil


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (cut, r"W_dec_1.safetensors is damaged \(.*\); copy or download it again"),
        (lambda folder: (folder / "W_enc_1.safetensors").unlink(), r"W_enc_1.safetensors is missing: .* \[0, 2\]"),
        (lambda folder: (folder / "W_dec_2.safetensors").unlink(), r"W_dec_2.safetensors cannot be read \(No such"),
        (changed("threshold_2", lambda t, n: t.pop(n)), "W_enc_2.safetensors has no threshold_2, other layers do"),
        (changed("threshold_0", lambda t, n: t.pop(n)), "W_enc_0.safetensors has no threshold_0, other layers do"),
        (changed("W_enc_1", lambda t, n: t.update({n: t[n][:-2].clone()})), r"W_enc_1 is \[8, 4\], wanted \[10, 4\]"),
        (changed("W_dec_0", lambda t, n: t.update({n: t[n][:, :2].clone()})), r"W_dec_0 is \[10, 2, 4\], wanted \["),
        (changed("W_dec_1", lambda t, n: t[n][0].fill_(torch.nan)), "W_dec_1 has a value that is nan or inf"),
        (changed("threshold_1", lambda t, n: t[n][:2].fill_(-1)), "W_enc_1.safetensors has 2 thresholds below 0"),
        (changed("W_enc_0", lambda t, n: t.update({n: t[n].int()})), "W_enc_0 is torch.int32, wanted floating-point"),
        (of_config(model_kind="sae"), "model_kind 'sae', wanted cross_layer_transcoder or transcoder_set"),
        (of_config(activation="topk", k=3), "has activation 'topk'; wanted relu or jumprelu"),
        (of_config(activation="relu"), "has activation relu, but the files have thresholds"),
        (of_config(feature_input_hook="ln2.hook_normalized"), "feature_input_hook 'ln2.hook_normalized' and"),
        (of_config(feature_output_hook="hook_resid_post"), "feature_output_hook 'hook_resid_post'"),
        (lambda folder: (folder / "config.yaml").write_text("a: [1"), r"config.yaml is damaged \(.*\); copy or"),
        (lambda folder: (folder / "config.yaml").write_text("- 1"), r"found \[1\], wanted keys and values"),
        (lambda folder: (folder / "config.yaml").unlink(), "holds no transcoder of a known format"),
    ],
)  # fmt: skip
def test_what_cannot_be_imported_is_told_in_one_message_and_leaves_nothing(spoil, message, source, tmp_path):
    circuit_tracer(source)
    spoil(source)
    with pytest.raises(UserError, match=message):
        import_transcoder(str(source), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        (None, "lists None in transcoders; wanted hf://user/name/FILE"),
        ([], r"lists \[\] in transcoders"),
        (["hf://a/b/c.safetensors", "layer_1.safetensors"], "lists 'layer_1.safetensors' in transcoders; wanted hf://"),
        (["hf://a/b/layer_0/params.npz"], "Gemma Scope's .npz files cannot be imported"),
        (["hf://a/b/../../c.safetensors"], "in transcoders; wanted hf://user/name/FILE"),
        (["hf://org/absent/c.safetensors"], "no copy of org/absent"),
    ],
    ids=str,
)
def test_lists_of_files_that_cannot_be_had(listed, message, source, tmp_path, hub):
    transcoder_set(source, transcoders=listed)
    with pytest.raises(UserError, match=message):
        import_transcoder(str(source), tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_a_set_that_names_another_rule_or_holds_more_than_is_read(source, tmp_path):
    transcoder_set(source, jump=False, activation="jump_relu")
    with pytest.raises(UserError, match="has activation jumprelu, but the files have no thresholds"):
        import_transcoder(str(source), tmp_path / "out")
    transcoder_set(source, jump=False)
    file = source / "layer_1.safetensors"
    save_file(load_file(file) | {"log_thresholds": torch.zeros(F)}, file)
    with pytest.raises(UserError, match=r"layer_1.safetensors has log_thresholds; wanted no more than .*W_enc"):
        import_transcoder(str(source), tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"transcode": False}, "cfg.json has transcode False; wanted True"),
        ({"transcode": None}, "cfg.json has transcode None; wanted True"),
        ({"embed_skip": True}, "cfg.json has embed_skip True; wanted False"),
        ({"activation": "groupmax"}, "cfg.json has activation 'groupmax'; wanted 'topk'"),
        ({"k": 4}, "k or skip_connection differ by layer"),
        ({"k": None}, "k is None; wanted int"),
    ],
)
def test_sparse_coders_that_are_no_transcoders_of_ours(change, message, source, tmp_path):
    sparsify(source)
    file = source / "h.1.mlp" / "cfg.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=message):
        import_transcoder(str(source), tmp_path / "out")


def test_sparse_coders_of_a_layer_that_was_copied_in_part(source, tmp_path):
    sparsify(source)
    (source / "h.2.mlp" / "sae.safetensors").unlink()
    with pytest.raises(UserError, match=r"h.2.mlp/sae.safetensors cannot be read \(No such file"):
        import_transcoder(str(source), tmp_path / "out")


def test_values_that_differ_by_target_are_refused(source, tmp_path):
    sparsify(source, reach=2, post=0.1)
    with pytest.raises(UserError, match=r"post_encs\.0 is not 0 everywhere, so that a feature has other values"):
        import_transcoder(str(source), tmp_path / "out")
    file = source / "h.0.mlp" / "sae.safetensors"
    save_file(load_file(file) | {"post_encs.0": torch.zeros(0)}, file)
    with pytest.raises(UserError, match=r"post_encs\.0 is empty"):
        import_transcoder(str(source), tmp_path / "out")


def test_a_directory_that_exists_and_a_disk_that_is_too_small(source, tmp_path, small_disk):
    circuit_tracer(source)
    with pytest.raises(UserError, match=r"source exists already; delete it"):
        import_transcoder(str(source), source)
    circuit_tracer(source, width=64, features=512)
    disk = small_disk(1 << 19)
    with pytest.raises(UserError, match=r"disk has .* free, the transcoder takes 1\.\d+ MB; free space"):
        import_transcoder(str(source), disk / "out")
    assert not list(disk.iterdir())
