"""The records of features against a brute-force pass over the same text, and interrupted work against whole."""

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from clt.errors import UserError
from clt.explore import collect, features, records, shares
from clt.explore.features import make_features
from clt.explore.files import cantor
from clt.export.export import export

STEP, T, TOKENS = 10, 16, 500
L, F = 3, 10


@pytest.fixture(scope="module")
def dense(made, text, tmp_path_factory):
    """(windows, T, L, F): the activations that the files of firings hold."""
    directory = tmp_path_factory.mktemp("firings") / "firings"
    found = collect.collect(
        directory, made.config, "heldout", made.lm, made.transcoder, torch.float32, len(text[0]), {}, progress=False
    )
    assert found.token.tolist() == text[0].flatten().tolist()
    assert found.document.tolist() == text[1].flatten().tolist()
    assert found.keep.tolist() == text[2].flatten().tolist()
    activations = np.zeros((len(found.token), L, F), np.float32)
    for s, layer in enumerate(found.layers):
        start = 0
        for place, end in enumerate(layer.end):
            activations[place, s, layer.feature[start:end]] = layer.value[start:end]
            start = end
        assert start == len(layer.feature) == len(layer.value)
    return activations.reshape(-1, T, L, F)


def test_firings_are_what_model_and_transcoder_compute(made, text, dense):
    """Written out: a plain forward pass with hooks, and the encoder's equation in float64."""
    tokens, _, keep = text
    model = transformers.AutoModelForCausalLM.from_pretrained(made.config.lm.model).eval()
    seen = {}
    for s, block in enumerate(model.transformer.h):
        block.ln_2.register_forward_pre_hook(lambda module, args, s=s: seen.__setitem__(s, args[0]))
    with torch.no_grad():
        model(torch.from_numpy(tokens).long())
    weights = {name: tensor.double() for name, tensor in made.transcoder.state_dict().items()}
    for s in range(L):
        x = seen[s].half().double()  # data.dtype
        x = (x - weights["normalization.input_mean"][s]) / weights["normalization.input_sd"][s]
        pre = x @ weights["W_enc"][s] + weights["b_enc"][s]
        wanted = torch.where((pre > weights["threshold"][0, s]) & torch.from_numpy(keep)[..., None], pre, 0.0).numpy()
        np.testing.assert_allclose(dense[:, :, s], wanted, atol=2e-3)  # half precision of x
    assert 0.01 < (dense > 0).mean() < 0.9
    assert not dense[:, 0].any()


def naive_record(dense, text, vocabulary, layer, feature):
    """What a record says of examples and numbers, in plain loops over all tokens."""
    tokens, documents, keep = text
    acts = dense[:, :, layer, feature]
    fired = [(float(acts[w, t]), w, t) for w in range(len(acts)) for t in range(T) if acts[w, t] > 0]
    count = len(fired)
    if not fired:
        return {"count": 0, "act_max": 0, "act_min": 0, "examples": [("Top activations", [])], "coactive": []}
    digits = 4 - int(np.floor(np.log10(max(fired)[0])))

    def example(w, t):
        first, last = max(0, t - 24), min(T, t + 13)
        return {
            "tokens": [vocabulary[tokens[w, u]] for u in range(first, last)],
            "tokens_acts_list": [round(float(acts[w, u]), digits) for u in range(first, last)],
            "train_token_ind": t - first,
            "document": documents[w, t],
            "position": t,
            "window": w,
        }

    ranked = sorted(fired, key=lambda each: (-each[0], each[1], each[2]))
    taken, top = [], []
    for _, w, t in ranked:
        if len(top) < 16 and documents[w, t] not in [documents[v, u] for v, u in top]:
            top.append((w, t))
    taken += top
    groups = [("Top activations", top)]
    for k in range(5):
        start, end, group = count * k // 5, count * (k + 1) // 5, []
        for j in range(4):
            place = start + (2 * j + 1) * (end - start) // 8
            while place < end:
                _, w, t = ranked[place]
                if (w, t) not in taken and documents[w, t] not in [documents[v, u] for v, u in group]:
                    group.append((w, t))
                    taken.append((w, t))
                    break
                place += 1
        groups.append((f"Activations {80 - 20 * k} to {100 - 20 * k}%", group))
    values = sorted(round(value, digits) for value, _, _ in fired)
    low, high = values[0], values[-1]
    histogram = [0] * 40
    for value in values:
        histogram[min(39, int((value - low) * 40 / ((high - low) or 1)))] += 1
    overlap = []
    sampled = [fired[int(i)] for i in np.linspace(0, count - 1, min(count, 128))]
    for m in range(L):
        for g in range(F):
            together = sum(dense[w, t, m, g] > 0 for _, w, t in sampled)
            if together and (m, g) != (layer, feature):
                share, other = together / len(sampled), int((dense[:, :, m, g] > 0).sum())
                both = min(share * count, other)
                overlap.append((-both / (count + other - both), m, g, share))
    return {
        "count": count,
        "act_min": low,
        "act_max": high,
        "activation_frequency": count / keep.sum(),
        "quantile_values": [values[int(np.ceil(p * count / 100)) - 1] for p in range(1, 101)],
        "histogram": histogram,
        "examples": [(name, [example(*each) for each in group]) for name, group in groups if group],
        "coactive": [(m, g, round(share, 3), round(-jaccard, 3)) for jaccard, m, g, share in sorted(overlap)[:8]],
    }


def test_every_record_is_that_of_a_brute_force_pass(made, text, dense):
    found_examples = 0
    for layer in range(L):
        for feature in range(F):
            found = made.features.record(layer, feature)
            wanted = naive_record(dense, text, made.features.vocabulary, layer, feature)
            assert found["index"] == cantor(layer, feature)
            assert (found["layer"], found["feature"]) == (layer, feature)
            groups = [(group["quantile_name"], group["examples"]) for group in found["examples_quantiles"]]
            assert [name for name, _ in groups] == [name for name, _ in wanted["examples"]]
            for (name, examples), (_, wanted_examples) in zip(groups, wanted.pop("examples")):
                assert len(examples) == len(wanted_examples), name
                for example, wanted_example in zip(examples, wanted_examples):
                    assert wanted_example == {key: example[key] for key in wanted_example}, name
                    found_examples += 1
            coactive = [(c["layer"], c["feature"], c["share"], c["jaccard"]) for c in found["coactive"]]
            assert coactive == wanted.pop("coactive")
            assert wanted == {key: found[key] for key in wanted}
    assert found_examples > 200


def test_the_summary_is_that_of_the_records(made, text, dense):
    arrays, summary = made.features.arrays, made.features.summary
    fires = dense > 0
    assert arrays["count"].tolist() == fires.sum((0, 1)).tolist()
    np.testing.assert_array_equal(arrays["max_activation"], dense.max((0, 1)))
    mean = dense.sum((0, 1), np.float64) / np.maximum(arrays["count"], 1)
    np.testing.assert_allclose(arrays["mean_activation"], mean, rtol=1e-6)
    for s, decoder in enumerate(made.transcoder.W_dec):
        for f in range(F):
            found = made.features.record(s, f)
            np.testing.assert_allclose(found["decoder_norms"], decoder[f].norm(dim=1), rtol=1e-3)
            assert arrays["decoder_norm"][s, f] == pytest.approx(decoder[f].norm().item())
            of_examples = [(e["window"], e["position"]) for e in found["examples_quantiles"][0]["examples"]]
            ids = [text[0][at] for at in of_examples]
            assert arrays["example_tokens"][s, f].tolist() == ids + [-1] * (16 - len(ids))
            for side in ("top_logits", "bottom_logits"):
                assert [made.features.vocabulary[id] for id in arrays[side][s, f]] == found[side]
    assert summary["tokens"] == text[2].sum()
    assert summary["windows"] == len(text[0])
    assert summary["documents"] == len(np.unique(text[1]))
    assert (summary["step"], summary["layers"], summary["part"]) == (STEP, [0, 1, 2], "heldout")
    assert summary["final_norm"] == "transformer.ln_f"
    assert summary["transcoder_id"] == f"{made.run.name}-{STEP}"


class Interrupted(Exception):
    pass


@pytest.fixture
def again(made, tmp_path, monkeypatch) -> Path:
    """A copy of the run without features, whose work is saved after every pass."""
    monkeypatch.setattr(collect, "_SAVE_SECONDS", 0)
    run = tmp_path / made.run.name
    shutil.copytree(made.run, run, ignore=shutil.ignore_patterns("features"))
    return run


def test_interrupted_work_goes_on_and_gives_the_same_files(made, again, bytes_of, monkeypatch):
    whole, skips = collect.forward_text, []

    def passes(most):
        def few(config, part, lm, skip):
            skips.append(skip)
            for number, item in enumerate(whole(config, part, lm, skip)):
                if number == most:
                    raise Interrupted
                yield item

        return few

    def run():
        return make_features(made.config, again, STEP, "heldout", TOKENS, progress=False)

    for most in (3, 1):
        monkeypatch.setattr(collect, "forward_text", passes(most))
        with pytest.raises(Interrupted):
            run()
    # Bytes that were written after the last state do not count.
    with (again / "features" / "firings" / "share_0_of_1" / "layer_1.value").open("ab") as file:
        file.write(b"left over")
    monkeypatch.setattr(collect, "forward_text", passes(-1))
    written = records.write_records

    def fail_at_layer_1(directory, made, layer, *rest):
        if layer == 1:
            raise Interrupted
        written(directory, made, layer, *rest)

    monkeypatch.setattr(features, "write_records", fail_at_layer_1)
    monkeypatch.setattr(features.os, "sched_getaffinity", lambda _: {0})
    with pytest.raises(Interrupted):
        run()
    assert skips == [0, 12, 16]
    layer_0 = again / "features" / "layer_0.bin"
    before = layer_0.stat().st_mtime_ns
    monkeypatch.setattr(features, "write_records", written)
    run()
    assert layer_0.stat().st_mtime_ns == before
    assert skips == [0, 12, 16]
    assert bytes_of(again / "features") == bytes_of(made.run / "features")


def test_the_processes_that_write_records_need_no_torch():
    code = "import sys, clt.explore.records; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_several_processes_write_the_same_files(made, again, bytes_of, monkeypatch):
    monkeypatch.setattr(features.os, "sched_getaffinity", lambda _: {0, 1})
    make_features(made.config, again, STEP, "heldout", TOKENS, progress=False)
    assert bytes_of(again / "features") == bytes_of(made.run / "features")


def test_two_ranks_make_the_same_files_whenever_they_stop(made, again, bytes_of, monkeypatch):
    """Rank 1 is interrupted, then rank 0 as it puts the shares together. Each reads half of the text's passes."""
    whole, skips = collect.forward_text, []

    def run(rank, ranks=2, most=-1):
        def passes(config, part, lm, skip):
            skips.append((rank, skip))
            for number, item in enumerate(whole(config, part, lm, skip)):
                if number == most:
                    raise Interrupted
                yield item

        monkeypatch.setattr(collect, "forward_text", passes)
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(ranks))
        return make_features(made.config, again, STEP, "heldout", TOKENS, progress=False)

    def fail(*_):
        raise Interrupted

    with pytest.raises(Interrupted):
        run(1, most=2)
    assert run(1) is None
    with pytest.raises(UserError, match="that 2 processes have begun, found 1 now"):
        run(0, ranks=1)
    append = shares._append_ends
    monkeypatch.setattr(shares, "_append_ends", fail)
    with pytest.raises(Interrupted):
        run(0)
    monkeypatch.setattr(shares, "_append_ends", append)
    assert run(0) is not None
    assert run(1) is None
    assert skips == [(1, 16), (1, 24), (0, 0)]
    assert bytes_of(again / "features") == bytes_of(made.run / "features")


def test_a_feature_that_overflows_is_an_error(made, tmp_path):
    transcoder = copy.deepcopy(made.transcoder)
    transcoder.b_enc[1, 3] = torch.inf
    with pytest.raises(UserError, match=r"a feature of layer 1 overflows float16: set train.precision=bf16 or fp32"):
        collect.collect(
            tmp_path / "firings", made.config, "heldout", made.lm, transcoder, torch.float16, 4, {}, progress=False
        )


def test_features_of_something_else_are_not_mixed(made, again, bytes_of, monkeypatch):
    def fail(*_):
        raise Interrupted

    monkeypatch.setattr(features, "token_texts", fail)
    with pytest.raises(Interrupted):
        make_features(made.config, again, STEP, "heldout", 100, progress=False)
    with pytest.raises(UserError, match=r"unfinished features of something else: windows: found 7, wanted 32"):
        make_features(made.config, again, STEP, "heldout", TOKENS, progress=False)
    before = bytes_of(made.run / "features")
    with pytest.raises(UserError, match=r"part: found 'heldout', wanted 'train'.*delete it"):
        make_features(made.config, made.run, STEP, "train", TOKENS, progress=False)
    make_features(made.config, made.run, STEP, "heldout", TOKENS, progress=False)  # has nothing left to do
    assert bytes_of(made.run / "features") == before


def test_a_text_that_is_shorter_is_told_and_taken(made, again, capsys):
    found = make_features(made.config, again, STEP, "heldout", 10**6, progress=False)
    assert "the heldout text ends after" in capsys.readouterr().err
    assert found.tokens > TOKENS


def test_too_little_disk_is_refused(made, small_disk):
    with pytest.raises(UserError, match=r"wanted .* for what fires on 160000 tokens and the records: free space, or"):
        collect.collect(
            small_disk(300_000) / "firings", made.config, "heldout", made.lm, made.transcoder, torch.float32, 10_000,
            {}, progress=False,
        )  # fmt: skip


def test_another_language_model_is_refused(made, again):
    made.config.lm.layers = [0, 2]
    try:
        with pytest.raises(UserError, match=r"\(L, D\) = \(2, 16\), the checkpoint was trained on \(3, 16\)"):
            make_features(made.config, again, STEP, "heldout", TOKENS, progress=False)
    finally:
        made.config.lm.layers = None


def test_an_export_has_the_records_of_its_own_checkpoint_alone(made, again, bytes_of, tmp_path, capsys):
    export(made.run, "circuit-tracer", tmp_path / "export", "float32")
    wanted = bytes_of(made.run / "features")
    assert bytes_of(tmp_path / "export/features") == {
        name: wanted[name] for name in ("index.json.gz", "layer_0.bin", "layer_1.bin", "layer_2.bin")
    }
    assert "features/ has the records" in (tmp_path / "export/README.md").read_text()
    assert capsys.readouterr().err == ""
    shutil.copytree(made.run / "features", again / "features")
    summary = json.loads((again / "features/summary.json").read_text())
    summary["identity"]["checksums"] = "crc32:00000000"  # the run was started again
    (again / "features/summary.json").write_text(json.dumps(summary))
    export(again, "circuit-tracer", tmp_path / "other", "float32")
    assert not (tmp_path / "other/features").exists()
    assert "another checkpoint" in capsys.readouterr().err
