"""Every configuration field changes something that a user can see; a field that is not listed here fails the suite."""

import dataclasses
import functools
import json
import shutil
import struct
from importlib.util import find_spec
from operator import length_hint

import huggingface_hub.constants
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from clt.config import Config, LMConfig
from clt.data.extract import extract
from clt.data.store import DiscBuffer
from clt.errors import UserError
from clt.lm.load import load_language_model
from clt.lm.text import read_documents
from clt.train import checkpoint

needs_wandb = pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed")

WITHOUT_TEXT = "eval.replacement_tokens=0"  # which takes most of a short run's time, and changes no weight
# Fields of which a short training run from the same store ends at other weights.
WEIGHTS = {
    "run.seed": 1,
    "data.block_rows": 8,
    "clt.d_features": 20,
    "clt.activation": "relu",
    "clt.cross_layer": False,
    "clt.window": 2,
    "clt.skip": True,
    "clt.threshold": 0.2,
    "clt.bandwidth": 0.1,
    "clt.straight_through_pre": False,
    "clt.normalization": "dim",
    "loss.sparsity": 0.5,
    "loss.sparsity_ramp": 0.0,
    "loss.sparsity_scale": 3.0,
    "loss.pre_activation": 0.2,
    "loss.pre_activation_kind": "negative",
    "loss.target_scale": "none",
    "loss.target_l0": 3.0,
    "optim.lr": 0.01,
    "optim.betas": [0.5, 0.9],
    "optim.eps": 0.01,
    "optim.warmup": 0.5,
    "optim.decay": 0.5,
    "optim.clip_norm": 0.001,
    "train.steps": 7,
    "train.batch_tokens": 50,
    "train.precision": "bf16",
}
BATCHTOPK = {"clt.activation": "batchtopk", "clt.k": 6, "loss.sparsity": 0.0}
# Fields of which the same is true with `batchtopk` alone.
K = {"clt.k": 5, "clt.k_start": 9, "clt.k_ramp": 0.9, "clt.by_norm": True}
# Fields of which it is true with AuxK alone.
AUX = {"loss.aux": 0.3, "loss.aux_k": 1, "loss.dead_window": 240}
# Fields that change what a store holds.
STORE = {
    "lm.dtype": "bfloat16",
    "lm.layers": [0, 2],
    "lm.context": 20,
    "text.heldout_documents": 30,
    "data.train_tokens": 500,
    "data.dtype": "float32",
    "data.shard_rows": 128,
    "data.open_shards": 2,
    "data.seed": 5,
}
# Fields with a test of their own below, or in the file named.
HERE = [
    "lm.revision",
    "run.dir", "lm.batch_windows", "lm.input_site", "lm.output_site", "lm.model", "text.source", "text.field",
    "text.heldout", "data.store", "data.heldout_tokens", "data.prefetch", "train.accumulate", "eval.every",
    "eval.replacement_tokens", "eval.dead_window", "checkpoint.every", "checkpoint.keep", "checkpoint.resume",
    "log.every", "log.wandb", "log.wandb_project", "log.wandb_entity", "log.wandb_mode", "profile.enabled",
    "profile.start", "profile.steps",
]  # fmt: skip
ELSEWHERE = {
    "train.compile": "tests/distributed/test_torchrun.py",
    "train.nonfinite": "tests/distributed/test_faults.py",
    "train.kernels": "tests/train/test_switch.py",
    "optim.decoder": "tests/train/test_rowadam.py",
    "parallel.feature_shards": "tests/distributed/test_parity.py",
    "parallel.timeout_seconds": "tests/distributed/test_faults.py",
    "checkpoint.keep_every": "tests/train/test_checkpoint.py",
    "checkpoint.grace_seconds": "tests/train/test_watch.py",
    "text.subset": "tests/lm/test_documents.py",
    "text.revision": "tests/lm/test_fingerprint.py",
    "text.split": "tests/lm/test_documents.py",
    **{f"data.{name}": "tests/server/test_remote.py" for name in ("source", "url", "token_file")},
    **{f"server.{name}": "tests/server/test_run.py" for name in "name rows open_share".split()},
    "server.workers": "tests/server/test_faults.py",
    **{f"server.{name}": "tests/data/test_feed.py" for name in ("source", "device", "statistics_tokens")},
    **{
        f"server.{name}": "tests/server/test_app.py"
        for name in "host port token_file max_batch max_streams wait_seconds idle_seconds".split()
    },
}


def test_no_field_is_left_out():
    every = {
        f"{s.name}.{f.name}" for s in dataclasses.fields(Config) for f in dataclasses.fields(getattr(Config(), s.name))
    }
    assert every == {*WEIGHTS, *K, *AUX, *STORE, *HERE, *ELSEWHERE}


@pytest.fixture(scope="module")
def base_weights(train):
    return train("loss.pre_activation=0.1", WITHOUT_TEXT).weights


@pytest.mark.parametrize("key", WEIGHTS)
def test_field_changes_the_weights(train, base_weights, key):
    weights = train("loss.pre_activation=0.1", WITHOUT_TEXT, f"{key}={json.dumps(WEIGHTS[key])}").weights
    assert any(
        tensor.shape != base_weights[name].shape or not torch.equal(tensor, base_weights[name])
        for name, tensor in weights.items()
    )


@pytest.fixture(scope="module")
def weights_of(train):
    """weights_of({key: value}): those of a run with these fields, trained once for all tests."""
    trained = functools.cache(lambda *keys: train(WITHOUT_TEXT, *keys).weights)
    return lambda values: trained(*(f"{key}={json.dumps(value)}" for key, value in sorted(values.items())))


@pytest.mark.parametrize("key", [*K, *AUX])
def test_field_changes_the_weights_of_some_rules(weights_of, key):
    base = BATCHTOPK | {"clt.k": 2, "loss.aux": 0.1, "loss.dead_window": 60, "loss.aux_k": 3}
    base |= {"clt.k_start": 9} if key == "clt.k_ramp" else {}
    weights, changed = weights_of(base), weights_of(base | {key: (K | AUX)[key]})
    assert any(not torch.equal(tensor, weights[name]) for name, tensor in changed.items())


def test_the_same_config_gives_the_same_weights(train, base_weights):
    weights = train("loss.pre_activation=0.1", WITHOUT_TEXT).weights
    assert all(torch.equal(weights[name], base_weights[name]) for name in base_weights)


@pytest.mark.parametrize("key", STORE)
def test_field_changes_the_store(config, stores, key):
    changed = config(f"{key}={json.dumps(STORE[key])}")
    index = extract(changed, "train", progress=False)
    rows, base = DiscBuffer(f"{changed.data.store}/train")[:], DiscBuffer(stores / "train")
    same = index.shards == base.index.shards and rows.shape == base[:].shape and torch.equal(rows, base[:])
    assert not same


def test_run_dir_and_store(train, config, tmp_path):
    assert (train(f"run.dir={tmp_path / 'here'}").dir) == tmp_path / "here"
    assert (tmp_path / "here" / "summary.json").exists()
    moved = config(f"data.store={tmp_path / 'moved'}", "data.heldout_tokens=60")
    assert extract(moved, "heldout", progress=False).rows == 60
    assert (tmp_path / "moved" / "heldout" / "index.json").exists()


def test_lm_model_and_sites(config, lm_path):
    with pytest.raises(UserError, match="no-such-directory"):
        load_language_model(config("lm.model=./no-such-directory").lm)
    names = ["lm.input_site=transformer.h.{layer}.ln_1", "lm.output_site=transformer.h.{layer}.attn"]
    sites = load_language_model(config(*names).lm).sites
    assert [(s.input_path, s.output_path) for s in sites][1] == ("transformer.h.1.ln_1", "transformer.h.1.attn")


def test_revision_chooses_among_those_of_the_hub(lm_path, tmp_path, monkeypatch):
    """The hub's own cache layout, read offline: two revisions of one model that differ in a weight."""
    repository = tmp_path / "models--org--tiny"
    (repository / "refs").mkdir(parents=True)
    for number, revision in enumerate(("main", "v2")):
        commit = str(number) * 40
        (repository / "refs" / revision).write_text(commit)
        snapshot = shutil.copytree(lm_path, repository / "snapshots" / commit)
        weights = load_file(snapshot / "model.safetensors")
        weights["transformer.ln_f.bias"].fill_(number)
        save_file(weights, snapshot / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for revision, commit in ((None, "0" * 40), ("v2", "1" * 40)):
        lm = load_language_model(LMConfig(model="org/tiny", revision=revision))
        assert lm.revision == commit
        assert lm.model.transformer.ln_f.bias.eq(int(commit[0])).all()


def test_batch_windows_is_the_forward_pass(config, tmp_path):
    for size in (2, 5):
        changed = config(f"lm.batch_windows={size}", "data.train_tokens=150", f"data.store={tmp_path / str(size)}")
        lm = load_language_model(changed.lm)
        seen = []
        lm.model.register_forward_pre_hook(
            lambda m, a, k, seen=seen: seen.append(len(k["input_ids"])), with_kwargs=True
        )
        extract(changed, "train", lm=lm, progress=False)
        assert seen[0] == size


def test_text_source_field_and_heldout(config, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "one"}\n{"body": "two"}\n{"body": "three"}\n')
    (tmp_path / "b.jsonl").write_text('{"body": "four"}\n')
    keys = [f"text.source={tmp_path / 'a.jsonl'}", "text.field=body"]
    text = config(*keys, "text.heldout_documents=1").text
    assert (list(read_documents(text, "heldout")), list(read_documents(text, "train"))) == (["one"], ["two", "three"])
    text = config(*keys, f"text.heldout={tmp_path / 'b.jsonl'}").text
    assert list(read_documents(text, "heldout")) == ["four"]
    assert list(read_documents(text, "train")) == ["one", "two", "three"]


def test_prefetch_is_the_number_of_batches_read_ahead(stores):
    from clt.data.loader import Loader

    for depth in (1, 3):
        sampler = iter([np.arange(10)] * 20)
        with Loader(DiscBuffer(stores / "train"), sampler, prefetch=depth) as loader:
            for taken in (1, 2, 3):
                next(loader)
                assert length_hint(sampler) == 20 - depth - taken


def test_accumulation_splits_the_batch_and_nothing_else(train, base_weights):
    rows: list[int] = []

    def count(module, args, output):
        if type(module).__name__ == "Objective":
            rows.append(len(args[0]))

    handle = torch.nn.modules.module.register_module_forward_hook(count)
    try:
        weights = train("loss.pre_activation=0.1", "train.accumulate=3").weights
    finally:
        handle.remove()
    assert rows == [20, 20, 20] * 10
    torch.testing.assert_close(weights["W_enc"], base_weights["W_enc"], rtol=1e-4, atol=1e-5)


def test_evaluation_fields(train):
    run = train("eval.every=4", "eval.replacement_tokens=64", "eval.dead_window=120")
    assert [line["step"] for line in run.metrics if "eval_fve" in line] == [4, 8, 10]
    assert 0 < run.summary["replacement_tokens"] < 64
    assert run.summary["dead_window_tokens"] == 120
    run = train("eval.every=0", "eval.replacement_tokens=0")
    assert [line["step"] for line in run.metrics if "eval_fve" in line] == [10]
    assert "top1_agreement" not in run.summary


def test_checkpoint_fields(train):
    run = train("checkpoint.every=3", "checkpoint.keep=3")
    assert checkpoint.steps(run.dir / "checkpoints") == [6, 9, 10]
    with pytest.raises(UserError, match=r"already holds this run and checkpoint\.resume is false"):
        train("checkpoint.every=3", "checkpoint.resume=false", f"run.dir={run.dir}")
    before = load_file(run.dir / "checkpoints" / "step_00000010" / "model.safetensors")
    again = train("checkpoint.every=3", "checkpoint.keep=3", f"run.dir={run.dir}")
    assert all(torch.equal(before[name], again.weights[name]) for name in before), "a finished run only reports again"


def test_log_every(train):
    assert [line["step"] for line in train("log.every=4").metrics if "train_loss" in line] == [4, 8, 10]


@needs_wandb
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_wandb_fields(train, monkeypatch):
    """W&B's own files have the run under its name and all metrics; a resumed run goes on under the same id."""
    monkeypatch.setenv("WANDB_SILENT", "true")
    keys = ["log.wandb=true", "log.wandb_mode=offline", "log.wandb_project=p1", "log.wandb_entity=e1"]
    run = train(*keys, "checkpoint.every=5")
    state = checkpoint.read_state(run.dir / "checkpoints" / "step_00000010")
    logged = b"".join(file.read_bytes() for file in (run.dir / "wandb").glob("offline-run-*/*.wandb"))
    for text in ("p1", "e1", run.dir.name, "train_loss", "train_sparsity", "L0", "mse/layer_2", "eval_fve", "betas"):
        assert text.encode() in logged, text
    shutil.rmtree(run.dir / "checkpoints" / "step_00000010")  # as if it had been stopped at step 5
    again = train(*keys, "checkpoint.every=5", f"run.dir={run.dir}")
    # offline-run-DATE_TIME-ID, and -1 behind it where both began in the same second
    assert {p.name.split("-")[3] for p in (again.dir / "wandb").glob("offline-run-*")} == {state["wandb_id"]}
    assert state["wandb_id"]
    files = sorted((run.dir / "wandb").glob("offline-run-*/*.wandb"), key=lambda file: file.stat().st_mtime_ns)
    first, second = (wandb_curve(file) for file in files)
    assert (list(first), list(second)) == ([5, 10], [10])
    losses = {line["step"]: line["train_loss"] for line in again.metrics if "train_loss" in line}
    assert {step: row["train_loss"] for step, row in (first | second).items()} == losses
    assert second[10]["eval_fve"] == again.summary["fve"]


def wandb_curve(file):
    """{W&B's step: {metric: value}} of an offline file: a log in LevelDB's format, of protobuf records."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole, rows = file.read_bytes(), 7, b"", {}
    while at < len(data):
        if 32768 - at % 32768 < 7:  # no room for a chunk's head: the rest of the block is padding
            at += 32768 - at % 32768
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # the last chunk of a record
            history, whole = Record.FromString(whole).history, b""
            if history.item:
                items = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in history.item}
                rows[items["_step"]] = items
    return rows


def test_profile_fields(train):
    traces = {}
    for start, steps in ((2, 1), (4, 3)):
        run = train("profile.enabled=true", f"profile.start={start}", f"profile.steps={steps}")
        (file,) = (run.dir / "profile").glob("*.pt.trace.json")
        events = json.loads(file.read_text())["traceEvents"]
        traces[start] = sorted({e["name"] for e in events if e["name"].startswith("ProfilerStep#")})
    assert traces == {2: ["ProfilerStep#2"], 4: ["ProfilerStep#4", "ProfilerStep#5", "ProfilerStep#6"]}
    assert not (train().dir / "profile").exists()
