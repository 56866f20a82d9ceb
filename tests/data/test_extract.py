import dataclasses
import hashlib
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from clt.config import Config
from clt.data.check import check_store
from clt.data.describe import describe, verify
from clt.data.extract import extract
from clt.data.index import read_index
from clt.data.state import ExtractionState
from clt.data.store import DiscBuffer
from clt.errors import UserError
from clt.lm.capture import capture
from clt.lm.load import LanguageModel, load_language_model
from clt.lm.text import windows

MakeConfig = Callable[..., Config]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
GROUP = 3 * 64


@pytest.fixture
def lm(config: MakeConfig) -> LanguageModel:
    return load_language_model(config().lm)


def digests(path: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(path.iterdir())}


def recorded_shards(path: Path) -> list[dict[str, int]]:
    """The recorded shards of an unfinished extraction."""
    with safe_open(path / "state.safetensors", "np") as file:
        return json.loads(file.metadata()["state"])["shards"]


def as_bytes(tensor: torch.Tensor, *columns: np.ndarray) -> list[bytes]:
    """Each row with its columns as bytes."""
    data = tensor.reshape(len(tensor), -1).view(torch.uint8).numpy()
    return [row.tobytes() + repr([int(value) for value in rest]).encode() for row, *rest in zip(data, *columns)]


def text_order(config: Config, lm: LanguageModel, part: str, rows: int) -> list[bytes]:
    """The rows that a store should hold, computed directly."""
    found: list[bytes] = []
    stream = windows(config.text, part, lm, config.lm.context)
    while len(found) < rows:
        batch = list(islice(stream, config.lm.batch_windows))
        activations = capture(lm, torch.from_numpy(np.stack([window.tokens for window in batch])).long())
        for window, values in zip(batch, activations):
            kept = values[torch.from_numpy(window.keep)].to(getattr(torch, config.data.dtype))
            places = np.flatnonzero(window.keep)
            found += as_bytes(kept, window.tokens[places], places, window.documents[places])
    return found[:rows]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize(("part", "rows"), [("train", 1000), ("heldout", 150)])
def test_the_store_holds_the_rows_of_the_text_shuffled_in_groups(
    config: MakeConfig, lm: LanguageModel, part: str, rows: int, dtype: str
) -> None:
    made = config(f"data.dtype={dtype}")
    index = extract(made, part, lm, progress=False)
    buffer = DiscBuffer(Path(made.data.store) / part)
    assert buffer.index == index
    assert (index.rows, index.dtype, index.n_layers, index.d_acts) == (rows, dtype, 3, 16)
    assert [shard["rows"] for shard in index.shards] == [64] * (rows // 64) + [rows % 64]
    everything = slice(None)
    stored = as_bytes(buffer[:], *(read(everything) for read in (buffer.tokens, buffer.positions, buffer.documents)))
    wanted = text_order(made, lm, part, rows)
    for start in range(0, rows, GROUP):
        assert sorted(stored[start : start + GROUP]) == sorted(wanted[start : start + GROUP])
        assert stored[start : start + GROUP] != wanted[start : start + GROUP]
    assert 0 not in buffer.positions(everything)
    verify(buffer.path)
    wide = buffer[:].double()
    np.testing.assert_allclose(buffer.statistics.input_mean.numpy(), wide[:, 0].mean(0).numpy(), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(buffer.statistics.target_sd.numpy(), wide[:, 1].std(0, correction=0).numpy(), rtol=1e-9)
    names = {file.name for file in buffer.path.iterdir()}
    assert names == {"index.json", "stats.safetensors", *(shard["file"] for shard in index.shards)}


def test_inspect_tells_the_size_of_a_group(config: MakeConfig, lm: LanguageModel) -> None:
    extract(config(), "heldout", lm, progress=False)
    assert f"shuffled in groups of {GROUP} rows with seed 0" in describe(Path(config().data.store) / "heldout")


def test_the_seed_changes_only_the_order(config: MakeConfig, lm: LanguageModel, tmp_path: Path) -> None:
    stores = []
    for seed, name in ((0, "a"), (0, "b"), (1, "c")):
        made = config(f"data.seed={seed}", f"data.store={tmp_path / name}")
        extract(made, "train", lm, progress=False)
        stores.append(tmp_path / name / "train")
    assert digests(stores[0]) == digests(stores[1])
    same, other = DiscBuffer(stores[0])[:], DiscBuffer(stores[2])[:]
    assert not torch.equal(same, other)
    assert sorted(as_bytes(same)) == sorted(as_bytes(other))


def test_a_finished_store_is_returned_as_it_is(config: MakeConfig, lm: LanguageModel) -> None:
    first = extract(config(), "train", lm, progress=False)
    path = Path(config().data.store) / "train"
    before = {file.name: file.stat().st_mtime_ns for file in path.iterdir()}
    assert extract(config(), "train", progress=False) == first == read_index(path)
    assert {file.name: file.stat().st_mtime_ns for file in path.iterdir()} == before


@pytest.mark.parametrize("device", DEVICES)
def test_an_extraction_resumes_after_any_group_to_the_same_bytes(
    config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    """A group of 192 rows ends within a pass of at most 60: the rest of that pass belongs to the next group."""
    lm, whole = load_language_model(config().lm, device), config(f"data.store={tmp_path / 'whole'}")
    save = ExtractionState.save
    states: list[tuple[int, int, int]] = []

    def stopping(state: ExtractionState, path: Path, identity: dict[str, object]) -> None:
        save(state, path, identity)
        states.append((state.rows, state.windows, state.skip_rows))
        raise KeyboardInterrupt

    extract(whole, "train", lm, progress=False)
    with monkeypatch.context() as patched:
        patched.setattr(ExtractionState, "save", stopping)
        for _ in range(6):
            with pytest.raises(KeyboardInterrupt):
                extract(config(), "train", lm, progress=False)
    assert [rows for rows, _, _ in states] == [192, 384, 576, 768, 960, 1000]
    assert any(skip for _, _, skip in states)
    extract(config(), "train", lm, progress=False)
    assert digests(Path(config().data.store) / "train") == digests(tmp_path / "whole" / "train")


def extract_until(renames: int, config: Config, lm: LanguageModel) -> None:
    """Extract, and be killed just before a file gets its final name, when as many others have theirs."""
    left = renames

    def count(event: str, arguments: object) -> None:
        nonlocal left
        if event == "os.rename":
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    extract(config, "train", lm, progress=False)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_killed_extraction_resumes_to_the_same_bytes(config: MakeConfig, lm: LanguageModel, tmp_path: Path) -> None:
    """By a fork for every point at which it is killed."""
    extract(config(), "train", lm, progress=False)
    wanted = digests(Path(config().data.store) / "train")
    # A group makes four names: three shards and the state. The last two are the statistics and the index.
    for number, points in enumerate(([3], [23], [6, 0, 7])):
        made = config(f"data.store={tmp_path / f'killed{number}'}")
        for point in points:
            child = multiprocessing.get_context("fork").Process(target=extract_until, args=(point, made, lm))
            child.start()
            child.join()
            assert child.exitcode == -signal.SIGKILL
        store = Path(made.data.store) / "train"
        names = {file.name for file in store.iterdir()}
        assert "index.json" not in names
        assert any(name.endswith(".partial") for name in names)
        assert ("state.safetensors" in names) == (sum(points) >= 4)
        extract(made, "train", lm, progress=False)
        assert digests(store) == wanted, points


def test_an_unfinished_extraction_of_another_config_is_refused(config: MakeConfig, lm: LanguageModel) -> None:
    with pytest.raises(UserError):
        extract(config("data.train_tokens=1000000"), "train", lm, progress=False)
    before = digests(Path(config().data.store) / "train")
    with pytest.raises(
        UserError, match=r"something else: dtype: found 'float16', wanted 'bfloat16'; data.shard_rows: found"
    ):
        extract(config("data.dtype=bfloat16", "data.shard_rows=32"), "train", lm, progress=False)
    with pytest.raises(UserError, match=r"rows done, wanted 300"):
        extract(config("data.train_tokens=300"), "train", lm, progress=False)
    assert digests(Path(config().data.store) / "train") == before


def test_text_that_is_too_short_names_the_rows_it_gave(config: MakeConfig, lm: LanguageModel, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"text of '.*text.jsonl' ends after \d+ rows, wanted 1000000: lower") as error:
        extract(config("data.train_tokens=1000000"), "train", lm, progress=False)
    store = Path(config().data.store) / "train"
    found = int(str(error.value).rsplit("data.train_tokens=")[1].split(",")[0])
    assert recorded_shards(store)[-1]["rows"] == 64
    assert not list(store.glob("*.partial"))
    extract(config(f"data.train_tokens={found}"), "train", lm, progress=False)  # the remedy of the message
    extract(config(f"data.train_tokens={found}", f"data.store={tmp_path / 'fresh'}"), "train", lm, progress=False)
    assert digests(store) == digests(tmp_path / "fresh" / "train")


@pytest.mark.parametrize(
    ("site", "value", "dtype", "message"),
    [
        ("mlp.c_proj", 1e5, "float16", r"target activation 1\d+ at layer 1 \(document 0\) overflows float16, .* 65504"),
        ("attn.c_proj", -1e5, "float16", r"input activation -[19]\d+ at layer 1 \(document 0\) overflows float16"),
        ("mlp.c_proj", float("inf"), "float32", "target activation inf at layer 1 .* not finite in the language model"),
        ("mlp.c_proj", float("nan"), "bfloat16", "target activation nan at layer 1 .* set lm.dtype=bfloat16 or"),
    ],
)  # fmt: skip
def test_values_that_cannot_be_stored_are_errors(
    config: MakeConfig, lm: LanguageModel, site: str, value: float, dtype: str, message: str
) -> None:
    lm.model.get_submodule(f"transformer.h.1.{site}").bias[5] = value
    with pytest.raises(UserError, match=message):
        extract(config(f"data.dtype={dtype}"), "train", lm, progress=False)
    assert list((Path(config().data.store) / "train").iterdir()) == []


def test_extraction_tells_values_that_underflow(
    config: MakeConfig, lm: LanguageModel, capsys: pytest.CaptureFixture[str]
) -> None:
    layer = lm.model.get_submodule("transformer.h.1.mlp.c_proj")
    layer.weight.mul_(1e-7 / 0.02)
    layer.bias.zero_()
    extract(config(), "train", lm, progress=False)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert "train: targets of layer 1: " in line
    extract(config("data.dtype=bfloat16", "data.heldout_tokens=150"), "heldout", lm, progress=False)
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize("place", ["file", "file/inside", "/proc/1/none", "x" * 300])
def test_a_store_that_cannot_be_written(config: MakeConfig, lm: LanguageModel, tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    store = tmp_path / place
    with pytest.raises(UserError, match=f"the store {store}/train cannot be written .*set data.store to another one"):
        extract(config(f"data.store={store}"), "train", lm, progress=False)


def test_a_disk_that_fills_up(config: MakeConfig, lm: LanguageModel, small_disk: Callable[[int], Path]) -> None:
    # 16 KB more than the rows themselves: too little for the shards' headers.
    disk = small_disk(1000 * (2 * 3 * 16 * 2 + 16) + 16_000)
    made, path = config(f"data.store={disk}"), disk / "train"
    with pytest.raises(
        UserError, match=r"no more could be written to .*No space left on device.*resumes after the last"
    ):
        extract(made, "train", lm, progress=False)
    assert recorded_shards(path)
    assert not list(path.glob("*.partial"))
    with pytest.raises(UserError, match=r"has \S+ \S+ free, wanted [\d.]+ kB for the rows that are left: free space"):
        extract(config(f"data.store={disk}", "data.train_tokens=2000"), "train", lm, progress=False)
    small_disk(1 << 20)
    extract(made, "train", lm, progress=False)
    extract(config(), "train", lm, progress=False)
    assert digests(path) == digests(Path(config().data.store) / "train")


@pytest.mark.parametrize(
    ("override", "found", "wanted"),
    [
        ("lm.model=gpt2", "'.*'", "'gpt2'"),
        ("lm.revision=step3000", "None", "'step3000'"),
        ("lm.layers=[0, 2]", r"\[0, 1, 2\]", r"\[0, 2\]"),
        ("lm.context=32", "16", "32"),
        ("lm.input_site=h.{layer}.x", r"\['transformer.h.0.ln_2', .*\]", r"\['h.0.x', 'h.1.x', 'h.2.x'\]"),
        ("lm.input_site=norm.output", r"\['transformer.h.0.ln_2', .*\]", "'norm.output'"),
        ("data.dtype=bfloat16", "'float16'", "'bfloat16'"),
        ("data.heldout_tokens=149", "150", "149"),
        ("data.seed=4", "0", "4"),
        ("text.source=embedded", "'.*text.jsonl'", "'embedded'"),
        ("text.heldout_documents=21", "20", "21"),
        ("text.split=test", "'train'", "'test'"),
    ],
)
def test_a_store_that_the_config_does_not_ask_for(
    config: MakeConfig, lm: LanguageModel, override: str, found: str, wanted: str
) -> None:
    index = extract(config(), "heldout", lm, progress=False)
    check_store(index, config("data.train_tokens=7", "data.shard_rows=3", "train.steps=5"))
    other = config(override, *(["lm.output_site=h.{layer}.y"] if "input_site" in override else []))
    with pytest.raises(
        UserError, match=rf"{override.split('=')[0]}: found {found}, wanted {wanted}.*; set data.store to"
    ):
        check_store(index, other)
    with pytest.raises(UserError, match=r"the heldout store in .* is not the one"):
        extract(other, "heldout", lm, progress=False)


def test_a_revision_matches_by_name_and_by_commit(config: MakeConfig) -> None:
    index = dataclasses.replace(extract(config(), "heldout", progress=False), revision="c0ffee", lm_revision="main")
    check_store(index, config("lm.revision=main"))
    check_store(index, config("lm.revision=c0ffee"))
    with pytest.raises(UserError, match=r"lm.revision: found 'main', wanted 'step3000'"):
        check_store(index, config("lm.revision=step3000"))


def test_a_store_of_some_layers_does_not_match_a_config_for_all(config: MakeConfig) -> None:
    index = extract(config("lm.layers=[0, 1]"), "heldout", progress=False)
    assert (index.layers, index.n_layers, index.lm_layers) == ([0, 1], 2, 3)
    check_store(index, config("lm.layers=[0, 1]"))
    check_store(dataclasses.replace(index, lm_layers=None), config())
    with pytest.raises(UserError, match=r"lm.layers: found \[0, 1\], wanted \[0, 1, 2\]"):
        check_store(index, config())
