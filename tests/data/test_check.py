"""A store is refused when the model or the text is no longer what it was extracted from."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from clt import cli
from clt.config import Config
from clt.data import check
from clt.data import extract as extraction
from clt.data.extract import extract, extract_all
from clt.data.index import write_index
from clt.data.state import ExtractionState
from clt.errors import UserError
from clt.train.distributed import World
from clt.train.run import open_source

MakeConfig = Callable[..., Config]


@pytest.fixture
def files(lm_path: Path, tmp_path: Path) -> list[str]:
    """The keys of a model and two texts in `tmp_path`, to be changed."""
    model = shutil.copytree(lm_path, tmp_path / "model")
    shutil.move(model / "text.jsonl", tmp_path / "text.jsonl")
    heldout = tmp_path / "heldout.jsonl"
    heldout.write_text((tmp_path / "text.jsonl").read_text().replace("a", "b"))
    return [f"lm.model={model}", f"text.source={tmp_path / 'text.jsonl'}", f"text.heldout={heldout}"]


@pytest.fixture
def own(config: MakeConfig, files: list[str]) -> MakeConfig:
    return lambda *more: config(*files, *more)


def overwrite_weights(folder: Path) -> None:
    """Another training run's weights: same names, shapes and sizes."""
    from safetensors.torch import load_file, save_file

    weights = {name: tensor + 0.01 for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def edit(file: Path) -> None:
    """Replace one letter in the middle."""
    text = bytearray(file.read_bytes())
    text[len(text) // 2 :] = text[len(text) // 2 :].replace(b"e", b"f", 1)
    file.write_bytes(text)


CHANGES = {
    "weights": lambda path: overwrite_weights(path / "model"),
    "config": lambda path: edit(path / "model" / "config.json"),
    "tokenizer": lambda path: edit(path / "model" / "tokenizer.json"),
    "train text": lambda path: edit(path / "text.jsonl"),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_a_finished_store_of_other_files_is_refused(own: MakeConfig, tmp_path: Path, kind: str) -> None:
    extract_all(own(), progress=False)
    extract_all(own(), progress=False)
    CHANGES[kind](tmp_path)
    with pytest.raises(
        UserError, match=rf"the train store in .* was extracted: {kind}: found '.* bytes.*', wanted '"
    ) as caught:
        extract(own(), "train", progress=False)
    assert "put them back as they were, or delete this store" in str(caught.value)
    assert str(caught.value).count("found") == 1
    if kind == "train text":
        extract(own(), "heldout", progress=False)
        edit(tmp_path / "heldout.jsonl")
        kind = "heldout text"
    with pytest.raises(UserError, match=f"the heldout store in .* was extracted: {kind}: found"):
        extract(own(), "heldout", progress=False)


@pytest.mark.parametrize("kind", ["weights", "train text"])
def test_an_unfinished_extraction_of_other_files_is_refused(
    own: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    interrupt_after_a_group(own(), monkeypatch)
    before = {file: file.read_bytes() for file in (tmp_path / "model" / "model.safetensors", tmp_path / "text.jsonl")}
    CHANGES[kind](tmp_path)
    with pytest.raises(UserError, match=f"an unfinished extraction of something else: {kind}: found '.*', wanted '"):
        extract(own(), "train", progress=False)
    for file, content in before.items():  # "set these back to finish it"
        file.write_bytes(content)
    extract(own(), "train", progress=False)


def interrupt_after_a_group(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    save = ExtractionState.save

    def stopping(state: ExtractionState, path: Path, identity: dict[str, object]) -> None:
        save(state, path, identity)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(ExtractionState, "save", stopping)
        with pytest.raises(KeyboardInterrupt):
            extract(config, "train", progress=False)


def test_a_text_that_is_edited_while_it_is_read(
    own: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = extraction._write_rows

    def meddling(*arguments: object) -> None:
        write(*arguments)  # type: ignore[arg-type]
        edit(tmp_path / "text.jsonl")

    monkeypatch.setattr(extraction, "_write_rows", meddling)
    with pytest.raises(UserError, match="was extracted: train text: found"):
        extract(own(), "train", progress=False)
    assert not (Path(own().data.store) / "train" / "index.json").exists()


def test_files_that_are_not_there_are_not_compared(own: MakeConfig, tmp_path: Path) -> None:
    made = extract(own(), "train", progress=False)
    shutil.rmtree(tmp_path / "model")
    (tmp_path / "text.jsonl").unlink()
    assert extract(own(), "train", progress=False) == made


def test_a_store_without_fingerprints_opens_with_one_warning(
    own: MakeConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check._warn_without_fingerprints.cache_clear()
    for index in extract_all(own(), progress=False):
        path = Path(own().data.store) / index.text["part"]
        write_index(path, index)
        fields = json.loads((path / "index.json").read_text())
        del fields["fingerprints"], fields["text"]["revision"]  # as the releases before wrote it
        (path / "index.json").write_text(json.dumps(fields))
    capsys.readouterr()
    overwrite_weights(tmp_path / "model")
    for _ in range(2):
        extract_all(own(), progress=False)
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 1
    assert "has no fingerprints of model and text" in warnings[0]


def test_two_stores_of_different_weights_are_refused(own: MakeConfig, tmp_path: Path) -> None:
    extract(own(), "train", progress=False)
    overwrite_weights(tmp_path / "model")
    extract(own(), "heldout", progress=False)
    with pytest.raises(UserError, match="are not of one language model: weights: found '1 files"):
        open_source(own("train.batch_tokens=60"), World(0, 1, torch.device("cpu")))


def test_heldout_text_is_checked_before_it_is_evaluated_again(
    tmp_path: Path, files: list[str], train: Callable[..., Any], capfd: pytest.CaptureFixture[str]
) -> None:
    run = train(*files, f"data.store={tmp_path / 'stores'}")
    edit(tmp_path / "heldout.jsonl")
    with pytest.raises(SystemExit) as ended:
        cli.main(["eval", str(run.dir)])
    assert ended.value.code == 2
    assert "was extracted: heldout text: found" in capfd.readouterr().err


def test_a_revision_may_be_named_by_the_commit_that_was_read(own: MakeConfig) -> None:
    index = extract(own(), "heldout", progress=False)
    index = dataclasses.replace(index, fingerprints={"heldout text": "text.revision=c0ffee"})
    check.check_store(index, own())
    check.check_store(index, own("text.revision=c0ffee"))
    with pytest.raises(UserError, match=r"text.revision: found None, wanted 'other'"):
        check.check_store(index, own("text.revision=other"))
