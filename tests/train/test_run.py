"""A store, a model and a run directory that do not belong together are refused before anything is trained."""

import dataclasses
import subprocess
from pathlib import Path

import pytest
import torch

import train_ddp
from clt.config import load_config
from clt.data.check import check_model
from clt.data.index import read_index
from clt.errors import UserError
from clt.lm.load import load_language_model
from clt.lm.shape import ModelShape
from clt.plan import make_job, need
from clt.train.distributed import World
from clt.train.evaluation import heldout_windows
from clt.train.run import check_memory, check_run_dir, claim_run_dir, open_source, sole_use


@pytest.fixture
def base(train_overrides, tmp_path):
    return load_config(train_overrides[0], [*train_overrides[1:], f"run.dir={tmp_path / 'run'}"])


def test_a_store_of_another_width_is_refused(base, stores):
    index, lm = read_index(stores / "train"), load_language_model(base.lm)
    check_model(index, lm)
    with pytest.raises(UserError, match=r"d_acts: found 16, wanted 20; set lm\.model"):
        check_model(index, dataclasses.replace(lm, d_model=20))
    with pytest.raises(UserError, match=r"tokenizer_hash: found '.*', wanted 'other'"):
        check_model(index, dataclasses.replace(lm, tokenizer_hash="other"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("lm.layers=[0, 2]", r"lm\.layers: found \[0, 1, 2\], wanted \[0, 2\]"),
        ("lm.context=20", r"lm\.context: found 16, wanted 20"),
        ("lm.dtype=bfloat16", r"lm\.dtype: found 'float32', wanted 'bfloat16'"),
        ("data.train_tokens=900", r"data\.train_tokens: found 1000, wanted 900"),
    ],
)
def test_a_store_of_another_config_is_refused(train_overrides, change, message):
    config = load_config(train_overrides[0], [*train_overrides[1:], change])
    with pytest.raises(UserError, match=message + ".*set data.store to another directory"):
        open_source(config, World(0, 1, torch.device("cpu")))


def test_a_run_directory_is_claimed_and_recognised(base):
    check_run_dir(base)
    with sole_use(base, World(0, 1, torch.device("cpu"))):
        claim_run_dir(base)
    check_run_dir(base)
    other = dataclasses.replace(base, optim=dataclasses.replace(base.optim, lr=0.5))
    with pytest.raises(UserError, match=r"another config \(optim\.lr: found 0\.001, wanted 0\.5\)"):
        check_run_dir(other)
    free = dataclasses.replace(base, log=dataclasses.replace(base.log, every=99))
    check_run_dir(free)


@pytest.mark.parametrize(
    ("name", "found"),
    [("file/run", "Not a directory"), ("loop/run", "Too many levels"), ("a" * 300, "File name too long")],
)
def test_a_run_directory_that_cannot_be_written_is_found_at_once(base, tmp_path, name, found):
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    base.run.dir = str(tmp_path / name)
    with pytest.raises(UserError, match=rf"run\.dir=.* cannot be written \({found}.*\): .*choose another run\.dir"):
        train_ddp.main(base, prepare=True)
    assert {path.name for path in tmp_path.iterdir()} == {"file", "loop"}


def test_a_run_directory_on_a_read_only_file_system_is_found_at_once(base, small_disk):
    base.run.dir = str(small_disk(1 << 20) / "run")
    done = subprocess.run(["mount", "-o", "remount,ro", Path(base.run.dir).parent], capture_output=True)
    if done.returncode:
        pytest.skip("a file system cannot be made read-only here")
    with pytest.raises(UserError, match=r"cannot be written \(Read-only file system\)"):
        check_run_dir(base)


def test_heldout_text_shorter_than_a_window(base, tmp_path):
    (tmp_path / "short.jsonl").write_text('{"text": "a"}\n')
    text = dataclasses.replace(base.text, heldout=str(tmp_path / "short.jsonl"))
    with pytest.raises(UserError, match="window"):
        heldout_windows(dataclasses.replace(base, text=text), load_language_model(base.lm))


def test_windows_without_anything_to_predict(base):
    short = dataclasses.replace(base, lm=dataclasses.replace(base.lm, context=2))
    with pytest.raises(UserError, match=r"lm\.context=2 held-out tokens has two neighbours .* raise lm\.context"):
        heldout_windows(short, load_language_model(base.lm))


@pytest.mark.parametrize("made", [True, False], ids=["with a store", "before the extraction"])
def test_a_run_that_cannot_fit_is_refused_before_it_begins(base, made, tmp_path):
    """By the machine's free memory; the remedies that are named fit."""
    base = base if made else dataclasses.replace(base, data=dataclasses.replace(base.data, store=str(tmp_path / "no")))
    check_memory(base, World(0, 1, torch.device("cpu")))
    wide = dataclasses.replace(base, clt=dataclasses.replace(base.clt, d_features=1 << 34))
    with pytest.raises(UserError, match=r"the run does not fit: a rank of 1 x 1 .* TB.*: clt.d_features=\d+$") as e:
        train_ddp.main(wide, prepare=True)
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "no").exists()
    narrow = dataclasses.replace(base.clt, d_features=int(str(e.value).rpartition("=")[2]))
    check_memory(dataclasses.replace(base, clt=narrow), World(0, 1, torch.device("cpu")))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("clt.window=4", r"clt\.window is 4; wanted at most 3, the layers"),
        ("clt.activation=batchtopk clt.k=73 loss.sparsity=0", r"clt\.k is 73; wanted at most 72"),
        ("loss.target_l0=72", r"loss\.target_l0 is 72; wanted less than 72"),
    ],
)
def test_more_than_the_layers_have_is_refused_before_the_extraction(train_overrides, tmp_path, options, message):
    keys = [*options.split(), f"run.dir={tmp_path / 'run'}", f"data.store={tmp_path / 'no'}"]
    with pytest.raises(UserError, match=message):
        train_ddp.main(load_config(train_overrides[0], [*train_overrides[1:], *keys]), prepare=True)
    assert not list(tmp_path.iterdir())


def test_what_may_or_may_not_fit_is_a_warning(base, monkeypatch, capsys):
    job = make_job(base, ModelShape(3, 16))
    for memory, said in ((need(job, 0), ""), (need(job, 0) - 1, "warning: the run may not fit: a rank of 1 x 1")):
        monkeypatch.setattr("clt.train.run.free_memory", lambda memory=memory: {"the machine's memory": memory})
        for precision in ("fp32", "auto"):  # which is the same on a CPU without units for bf16
            base.train.precision = precision
            monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: False)
            monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: False)
            check_memory(base, World(0, 1, torch.device("cpu")))
            told = capsys.readouterr().err
            assert told.startswith(said)
            assert bool(told) == bool(said)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(UserError, match="the run does not fit"):
        check_memory(base, World(0, 1, torch.device("cpu")))
