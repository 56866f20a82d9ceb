"""What an activation server lives on: rows of a model or a store, without end, and their statistics."""

from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from clt.config import Config, load_config
from clt.data.extract import extract
from clt.data.feed import (
    StoredRows,
    describe_feed,
    feed_hash,
    from_model,
    from_store,
    load,
    load_place,
    save_place,
)
from clt.data.index import read_index
from clt.data.statistics import Statistics
from clt.data.store import DiscBuffer
from clt.errors import UserError
from clt.lm.capture import capture
from clt.lm.load import load_language_model
from clt.lm.text import windows

MakeConfig = Callable[..., Config]
Keys = list[tuple[bytes, int, int, int]]


def keys(tensor: torch.Tensor, token: np.ndarray, position: np.ndarray, document: np.ndarray) -> Keys:
    """Rows as (bits, token, position, document)."""
    data = tensor.reshape(len(tensor), -1).view(torch.uint8).numpy()
    return list(zip([row.tobytes() for row in data], token.tolist(), position.tolist(), document.tolist()))


def stored_keys(rows: StoredRows) -> Keys:
    return keys(rows.store[rows.number], rows.token, rows.position, rows.document)


@pytest.fixture(scope="module")
def text_rows(lm_overrides: list[str]) -> Keys:
    """Every row of one pass over the training text, in order, computed directly."""
    config = load_config(None, lm_overrides)
    lm = load_language_model(config.lm)
    found: Keys = []
    for window in windows(config.text, "train", lm, config.lm.context):
        values = capture(lm, torch.from_numpy(window.tokens).long()[None])[0]
        at = np.flatnonzero(window.keep)
        found += keys(values[torch.from_numpy(window.keep)].half(), window.tokens[at], at, window.documents[at])
    return found


def same_rows(found: Keys, wanted: Keys) -> bool:
    """Equal columns, and equal activations up to the last bits, which depend on the batch that a window is in."""
    if [row[1:] for row in found] != [row[1:] for row in wanted]:
        return False
    a, b = (np.stack([np.frombuffer(row[0], np.float16) for row in rows]).astype("f4") for rows in (found, wanted))
    return np.allclose(a, b, rtol=2e-3, atol=1e-3)


def test_the_model_gives_the_rows_of_the_text_over_and_over(config: MakeConfig, text_rows: Keys) -> None:
    made = config()
    lm, found, marks = load_language_model(made.lm), [], []
    for mark, rows in from_model(made, lm):
        marks.append(mark)
        found += keys(rows.activations, rows.token, rows.position, rows.document)
        if mark[0] == 1:
            break
    once = len(text_rows)
    assert same_rows(found[:once], text_rows)
    assert found[once:] == found[: len(found) - once]
    mark, rows = next(from_model(made, lm, *marks[3]))
    assert mark == marks[3]
    before = sum(len(rows) for _, rows in islice(from_model(made, lm), 3))
    columns = (rows.token, rows.position, rows.document)
    assert same_rows(keys(rows.activations, *columns), text_rows[before : before + len(rows)])
    assert next(from_model(made, lm, 0, 10_000))[0] == (1, 0)


def test_the_store_gives_each_row_once_an_epoch_in_changing_order(config: MakeConfig, stores: Path) -> None:
    made = config(f"data.store={stores}", "data.block_rows=7")
    store, every = DiscBuffer(stores / "train"), slice(None)
    batches = list(islice(from_store(made), 3))
    orders = [stored_keys(rows) for _, rows in batches]
    assert [mark for mark, _ in batches] == [(0, 0), (1, 1), (2, 2)]
    wanted = keys(store[:], store.tokens(every), store.positions(every), store.documents(every))
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(wanted)
    assert orders[0] != orders[1]
    mark, rows = next(from_store(made, 2, 2))
    assert (mark, stored_keys(rows)) == ((2, 2), orders[2])


def test_statistics_are_those_of_the_first_rows_of_the_text(config: MakeConfig, text_rows: Keys) -> None:
    made = config("server.statistics_tokens=300")
    directory = Path(made.data.store) / "server"
    index, file = describe_feed(made, directory), directory / "stats.safetensors"
    assert (index.text["part"], index.rows, index.n_layers, index.d_acts) == ("train", 0, 3, 16)
    assert read_index(directory) == index
    assert read_index(Path(made.data.store) / "heldout").rows == 150
    wide = np.stack([np.frombuffer(row[0], np.float16) for row in text_rows[:300]]).reshape(300, 2, 3, 16).astype("f8")
    assert Statistics.load(file).rows == 300
    np.testing.assert_allclose(Statistics.load(file).input_mean.numpy(), wide[:, 0].mean(0), rtol=1e-3, atol=1e-4)
    made_once = file.stat().st_ino
    assert describe_feed(made, directory) == index
    assert file.stat().st_ino == made_once, "they are kept, until something else is asked for"
    more = config("server.statistics_tokens=1000000")
    describe_feed(more, directory)
    assert Statistics.load(file).rows == len(text_rows), "there are no more rows"
    made_again = file.stat().st_ino
    describe_feed(more, directory)
    assert file.stat().st_ino == made_again


@pytest.mark.parametrize("text", ["{", "[]", '{"rows": "a", "mark": [1]}', '{"rows": "a", "mark": "x"}'])
def test_a_place_in_the_text_is_kept_for_its_feed_and_a_damaged_one_is_told(tmp_path: Path, text: str) -> None:
    save_place(tmp_path, "a", [1, 2, 3])
    assert (load_place(tmp_path, "a"), load_place(tmp_path, "b")) == ((1, 2, 3), (0, 0, 0))
    (tmp_path / "position.json").write_text(text)
    with pytest.raises(
        UserError, match=r"position\.json is damaged .*; it is the place in the text: delete it to begin"
    ):
        load_place(tmp_path, "a")


def test_a_disk_that_is_full_or_gone_does_not_end_the_server(capsys: pytest.CaptureFixture) -> None:
    save_place(Path("/dev/null/store"), "a", [0, 0, 0])
    assert "the place in the text was not recorded: " in capsys.readouterr().err


def test_what_is_missing_or_of_another_config_is_said(config: MakeConfig, stores: Path) -> None:
    with pytest.raises(UserError, match=r"lm\.context: found 16, wanted 12"):
        describe_feed(config(f"data.store={stores}", "lm.context=12"), stores / "server")
    made = config("server.source=store")
    extract(made, "heldout", progress=False)
    with pytest.raises(UserError, match="train does not exist; run `clt extract CONFIG`"):
        describe_feed(made, Path(made.data.store) / "train")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match=r"server\.device=gpu but no CUDA device"):
            load(config("server.device=gpu"))


@pytest.mark.parametrize(
    "other", ["data.dtype=bfloat16", "text.source=moby.txt", "lm.context=7", "run.seed=3", "server.source=store"]
)
def test_a_feed_of_other_rows_has_another_hash(config: MakeConfig, other: str) -> None:
    assert feed_hash(config(other)) != feed_hash(config()) == feed_hash(config("data.prefetch=9", "server.rows=9"))
