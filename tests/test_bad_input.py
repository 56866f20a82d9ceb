"""What goes wrong at the command line: status 2, one message that says what to do, and nothing half-written.

An interrupted extraction keeps its whole shards and the record of them, a run its metrics and its whole checkpoints:
the same command goes on from there. Files and directories that are not finished (`.partial`, `.tmp`) must be gone.
"""

import hashlib
import json
import os
import runpy
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from clt import cli
from clt.data.index import read_index
from clt.data.lock import locked
from clt.data.shards import checksum, dataset_offsets, row_bytes
from clt.data.writer import write_store
from clt.errors import UserError, size_text, tell
from clt.train import checkpoint, report

ROOT = Path(__file__).parent.parent


def message(status: int, stderr: str) -> str:
    """The one message of a command that a user's mistake ended, after any progress bars."""
    lines = [line for line in stderr.splitlines() if line.strip()]
    assert status == 2, stderr
    assert "Traceback" not in stderr
    assert [line for line in lines if "error" in line.lower()] == lines[-1:], stderr
    assert lines[-1].startswith("error: ")
    return lines[-1]


@pytest.fixture
def clt(capfd):
    """clt(*arguments) -> the message of the `clt` command, in this process: seconds sooner."""

    def run(*arguments: object) -> str:
        with pytest.raises(SystemExit) as end:
            cli.main([str(argument) for argument in arguments])
        return message(end.value.code, capfd.readouterr().err)  # type: ignore[arg-type]

    return run


@pytest.fixture
def script(capfd, monkeypatch):
    """script(*arguments) -> the message of train_ddp.py, in this process; None when it did its work, without plots."""
    monkeypatch.setattr(report, "write_plots", lambda *_: None)

    def run(*arguments: object) -> str | None:
        monkeypatch.setattr(sys, "argv", ["train_ddp.py", *map(str, arguments)])
        try:
            runpy.run_path(str(ROOT / "train_ddp.py"), run_name="__main__")
        except SystemExit as end:
            if end.code:
                return message(end.code, capfd.readouterr().err)  # type: ignore[arg-type]
        return None

    return run


@pytest.fixture
def copied(stores, tmp_path):
    """A copy of the stores, to be damaged."""
    return shutil.copytree(stores, tmp_path / "copied")


def digests(directory: Path) -> dict[str, str]:
    """Every file below a directory, by its bytes."""
    files = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def half_written(directory: Path) -> list[str]:
    return [p.name for p in directory.rglob("*") if p.suffix in (".partial", ".tmp") or p.name == "lock"]


def write_nan(store: Path, shard: int) -> None:
    """Every value of a shard becomes NaN, while its checksum stays."""
    index = read_index(store)
    entry = index.shards[shard]
    shape = (index.n_layers, index.d_acts, index.dtype)
    offsets = dataset_offsets(store / entry["file"], entry["rows"], *shape)
    with open(store / entry["file"], "r+b") as file:
        file.seek(offsets["tensor"])
        file.write(b"\xff" * (entry["rows"] * row_bytes(*shape)["tensor"]))


@pytest.fixture
def broken(lm_path, lm_overrides, tmp_path):
    """broken(value) -> overrides for a GPT-2 that embeds tokens with a j as `value`; its text begins without."""
    from transformers import AutoTokenizer, GPT2LMHeadModel

    def make(value: float) -> list[str]:
        path = shutil.copytree(lm_path, tmp_path / "broken")
        model, tokenizer = GPT2LMHeadModel.from_pretrained(lm_path), AutoTokenizer.from_pretrained(lm_path)
        with torch.no_grad():
            model.transformer.wte.weight[[i for token, i in tokenizer.get_vocab().items() if "j" in token]] = value
        model.save_pretrained(path)
        documents = (lm_path / "text.jsonl").read_text().splitlines(keepends=True)
        fine = [document.replace("j", "") for document in documents[:30]]
        (path / "text.jsonl").write_text("".join(fine + documents[30:]))
        keys = [f"lm.model={path}", f"text.source={path / 'text.jsonl'}", f"data.store={tmp_path / 'stores'}"]
        return [*lm_overrides, *keys]

    return make


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (float("nan"), "not finite in the language model itself: set lm.dtype=bfloat16 or lm.dtype=float32"),
        (float("inf"), "not finite in the language model itself: set lm.dtype=bfloat16 or lm.dtype=float32"),
        (-1e5, "overflows float16, which ends at 65504: set data.dtype=bfloat16 or data.dtype=float32"),
    ],
)
def test_activations_that_cannot_be_stored(broken, clt, tmp_path, value, wanted):
    found = clt("extract", *broken(value))
    assert wanted in found
    assert "input activation" in found
    assert "at layer 0 (document " in found
    store = tmp_path / "stores" / "train"
    with safe_open(store / "state.safetensors", "np") as file:
        shards = json.loads(file.metadata()["state"])["shards"]
    assert len(shards) >= 3, "what was whole before is kept"
    assert all(checksum(store / shard["file"]) == shard["checksum"] for shard in shards)
    names = {"state.safetensors", *(shard["file"] for shard in shards)}
    assert set(digests(tmp_path / "stores")) == {f"train/{name}" for name in names}


def test_a_disk_that_is_full_while_extracting(lm_overrides, clt, small_disk):
    disk = small_disk(1000 * (2 * 3 * 16 * 2 + 16) + 16_000)  # the rows fit, their files' headers do not
    found = clt("extract", *lm_overrides, f"data.store={disk}")
    assert f"no more could be written to {disk / 'train'}" in found
    assert "No space left on device" in found
    assert "free space and run `clt extract CONFIG` again" in found
    assert half_written(disk) == []
    assert not (disk / "train" / "index.json").exists()
    small_disk(1 << 20)
    cli.main(["extract", *lm_overrides, f"data.store={disk}"])
    assert half_written(disk) == []


def test_a_disk_that_is_full_at_a_checkpoint(train_overrides, script, small_disk):
    """The first checkpoint fits, the second does not; with more room the same command ends the run."""
    disk = small_disk(128 << 10)
    arguments = [*train_overrides, f"run.dir={disk / 'run'}", "checkpoint.every=5"]
    found = script(*arguments)
    assert f"no checkpoint could be written to {disk / 'run' / 'checkpoints'}" in found
    assert "step 5 is kept. Free disk space and run again to go on." in found
    assert half_written(disk) == []
    assert checkpoint.steps(disk / "run" / "checkpoints") == [5]
    small_disk(4 << 20)
    assert script(*arguments) is None
    assert checkpoint.steps(disk / "run" / "checkpoints") == [5, 10]
    assert (disk / "run" / "summary.json").exists()


def test_a_store_of_another_model(train_overrides, lm_path, copied, script, tmp_path):
    """The directory that the config names holds another model than when the store was extracted."""
    from transformers import GPT2Config, GPT2LMHeadModel

    path = shutil.copytree(lm_path, tmp_path / "lm")
    config = GPT2Config.from_pretrained(lm_path, n_embd=20, n_layer=2)
    GPT2LMHeadModel(config).save_pretrained(path)
    for part in ("train", "heldout"):
        index = copied / part / "index.json"
        index.write_text(json.dumps(json.loads(index.read_text()) | {"model": str(path), "fingerprints": None}))
    before = digests(copied)
    keys = [f"lm.model={path}", f"data.store={copied}", f"run.dir={tmp_path / 'run'}"]
    found = script(*train_overrides, *keys)
    assert "d_acts: found 16, wanted 20" in found
    assert "layers: found [0, 1, 2], wanted [0, 1]" in found
    assert "set data.store to another directory" in found
    assert found == script("--prepare", *train_overrides, *keys)
    assert not (tmp_path / "run").exists()
    assert digests(copied) == before
    found = script(*train_overrides, *keys, "lm.layers=[0, 1]")
    assert "lm.layers: found [0, 1, 2], wanted [0, 1]; set data.store to another directory, or" in found
    assert not (tmp_path / "run").exists()


def test_a_heldout_store_of_another_width(train_overrides, train, stores, copied, clt, script, tmp_path):
    index = read_index(copied / "heldout")
    fields = {name: getattr(index, name) for name in ("model", "tokenizer_hash", "layers", "text", "context")}
    fields |= {name: getattr(index, name) for name in ("input_sites", "output_sites", "lm_layers")}
    shutil.rmtree(copied / "heldout")
    write_store(copied / "heldout", torch.randn(index.rows, 2, 3, 20).half(), **fields)
    found = script(*train_overrides, f"data.store={copied}", f"run.dir={tmp_path / 'run'}")
    assert "are not of one language model: d_acts: found 20, wanted 16; delete the wrong one" in found
    assert not (tmp_path / "run").exists()
    run = train().dir
    config = run / "config.yaml"
    config.write_text(config.read_text().replace(str(stores), str(copied)))
    before = digests(run)
    assert "holds activations of (L, D) = (3, 20), the checkpoint was trained on (3, 16)" in clt("eval", run)
    assert digests(run) == before


def test_a_run_directory_of_another_config(train_overrides, train, script):
    run = train().dir
    before = digests(run)
    found = script(*train_overrides, f"run.dir={run}", "optim.lr=0.5")
    assert "another config (optim.lr: found 0.001, wanted 0.5); choose another run.dir, or delete this one" in found
    assert digests(run) == before


HOLDER = """
import sys; from pathlib import Path; from clt.data.lock import locked
with locked(Path(sys.argv[1]), "used", "run.dir"):
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_a_run_directory_that_another_run_uses(train_overrides, train, script):
    run = train("checkpoint.every=5").dir
    shutil.rmtree(run / "checkpoints" / "step_00000010")
    before = digests(run)
    command = [sys.executable, "-c", HOLDER, str(run)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        found = script(*train_overrides, f"run.dir={run}", "checkpoint.every=5")
        who = f"process {other.pid} on {socket.gethostname()}"
        assert f"{run} is used by {who}: wait until it is done and run this again, end it, or set run.dir to" in found
        after = digests(run)
        assert after.pop("lock") == hashlib.sha256(who.encode()).hexdigest()
        assert after == before
        other.kill()
    assert script(*train_overrides, f"run.dir={run}", "checkpoint.every=5") is None, "a killed run blocks nobody"
    assert checkpoint.steps(run / "checkpoints") == [5, 10]
    assert half_written(run) == []


def test_a_run_has_its_directory_from_its_first_look_to_its_last_file(train, monkeypatch):
    import train_ddp
    from clt.train.state import TrainState

    seen = []

    def noting(name, work):
        def wrapped(*arguments, **more):
            directory = arguments[1].parent if name == "resume" else arguments[0]
            with pytest.raises(UserError, match=f"is used by process {os.getpid()} on "), locked(directory, "used"):
                pass
            seen.append(name)
            return work(*arguments, **more)

        return wrapped

    monkeypatch.setattr(TrainState, "resume", noting("resume", TrainState.resume))
    monkeypatch.setattr(train_ddp, "conclude", noting("conclude", train_ddp.conclude))
    assert half_written(train().dir) == []
    assert seen == ["resume", "conclude"]


def truncate(store: Path) -> None:
    os.truncate(store / "shard_00002.h5", 2100)


def lose_index(store: Path) -> None:
    (store / "index.json").unlink()


@pytest.mark.parametrize("part", ["train", "heldout"])
@pytest.mark.parametrize(
    ("damage", "wanted"),
    [
        (truncate, "shard_00002.h5 is truncated: found 2100 bytes, wanted {size}; copy this file again, or delete"),
        (lose_index, "holds the shards of a finished store but no index.json: copy its index.json there again, delete"),
    ],
)
def test_a_damaged_store_is_found_before_the_run_begins(
    train_overrides, copied, script, tmp_path, part, damage, wanted
):
    size = (copied / part / "shard_00002.h5").stat().st_size
    damage(copied / part)
    before = digests(copied)
    found = script(*train_overrides, f"data.store={copied}", f"run.dir={tmp_path / 'run'}")
    assert str(copied / part) in found
    assert wanted.format(size=size) in found
    assert not (tmp_path / "run").exists()
    assert digests(copied) == before


def test_an_altered_shard_ends_the_run_that_reads_nan(train_overrides, copied, clt, script, tmp_path):
    write_nan(copied / "train", shard=1)
    found = script(*train_overrides, f"data.store={copied}", f"run.dir={tmp_path / 'run'}", "log.every=1")
    assert "train_mse was not finite at step " in found
    remedy = f"clt inspect --verify {copied / 'train'}"
    assert f"Look for bad rows with `{remedy}`" in found
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert half_written(tmp_path / "run") == []
    assert "altered shards: shard_00001.h5 do not have the checksums" in clt(*remedy.split()[1:])


@pytest.mark.parametrize(("every", "reached"), [(5, 5), (0, 10)])
def test_an_altered_heldout_shard_ends_its_evaluation_and_costs_no_step(
    train_overrides, train, stores, copied, script, tmp_path, every, reached
):
    write_nan(copied / "heldout", shard=2)
    run, often = tmp_path / "run", [f"eval.every={every}", f"checkpoint.every={every}"]
    found = script(*train_overrides, f"data.store={copied}", f"run.dir={run}", *often)
    assert f"is nan or inf; look for bad rows with `clt inspect --verify {copied / 'heldout'}`" in found
    assert not (run / "summary.json").exists()
    assert half_written(run) == []
    assert checkpoint.steps(run / "checkpoints") == [reached]
    shutil.copytree(stores / "heldout", copied / "heldout", dirs_exist_ok=True)
    assert train(f"data.store={copied}", f"run.dir={run}", *often).metrics == train(*often).metrics


def test_more_micro_batches_than_rows(script, train_overrides, tmp_path):
    found = script(*train_overrides, "train.batch_tokens=4", "train.accumulate=5", f"run.dir={tmp_path / 'run'}")
    assert found is not None
    assert "train.accumulate=5 micro-batches of train.batch_tokens=4 leave some of 1 ranks without a row" in found


def test_characters_that_control_a_terminal_are_shown_escaped(lm_overrides, copied, clt, capfd, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"\\u001b[2J\\u009b1A\\ud800": "x", "Größe": 1}\n')
    found = clt("extract", *lm_overrides, f"text.source={tmp_path / 'a.jsonl'}", f"data.store={tmp_path / 'stores'}")
    assert r"only \x1b[2J\x9b1A\ud800, Größe; set text.field" in found
    assert "\x1b" not in found
    index = copied / "train" / "index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"model": "gpt2\x1b]0;title\x07"}))
    cli.main(["inspect", str(copied / "train")])
    assert r"gpt2\x1b]0;title\x07," in capfd.readouterr().out


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("two\nlines\tand Größe, 猫, \U0001f600", "two\nlines\tand Größe, 猫, \U0001f600"),
        ("\x00\r\x7f\x85", r"\x00\r\x7f\x85"),
        ("\u202eabc\u2066", r"\u202eabc\u2066"),
    ],
)
def test_what_a_message_shows(capsys, text, shown):
    tell(text)
    assert capsys.readouterr() == ("", shown + "\n")


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (4096, "4.096 kB"), (412_345, "412.3 kB"), (999_960, "1 MB"), (37e9, "37 GB"),
     (12_345e12, "12345.0 TB")],
)  # fmt: skip
def test_sizes_have_the_unit_that_suits_them(count, text):
    assert size_text(count) == text
