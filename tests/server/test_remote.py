"""Training data from a server: what a run gets of it, and what becomes of one that was started again."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from clt.config import Config, load_config
from clt.data.describe import verify
from clt.data.loader import Loader
from clt.data.statistics import Statistics
from clt.data.store import DiscBuffer
from clt.errors import UserError
from clt.server.remote import fetch_heldout, open_server
from tests.server.conftest import Server
from tests.server.test_app import TOKEN


@pytest.fixture(scope="module")
def server(serve) -> Server:
    return serve("server.max_batch=100", CLT_SERVER_TOKEN=TOKEN)  # less than some of the reader's batches


@pytest.fixture
def reader(server, lm_overrides, tmp_path, monkeypatch):
    """reader(*overrides): the config of a run that reads from the server."""
    monkeypatch.delenv("CLT_SERVER_TOKEN", raising=False)
    for name, token in (("token", TOKEN), ("other", "another-token-0123456789")):
        (tmp_path / name).write_text(token)
        (tmp_path / name).chmod(0o600)

    def make(*overrides: str) -> Config:
        keys = ["data.source=server", f"data.url={server.url}", f"data.token_file={tmp_path / 'token'}"]
        return load_config(None, [*lm_overrides, f"data.store={tmp_path / 'here'}", *keys, *overrides])

    return make


def test_a_loader_reads_rows_of_the_store_from_the_server(server, reader):
    store, train = open_server(reader()), DiscBuffer(server.store / "train")
    known = {row.numpy().tobytes() for row in train[:]}
    sizes = [60, 59, 60, 1, 200]
    with Loader(store, map(np.arange, sizes), prefetch=2) as loader:
        batches = [batch.clone() for batch in loader]
    assert [len(batch) for batch in batches] == sizes
    assert all(row.numpy().tobytes() in known for row in torch.cat(batches))
    assert len({row.numpy().tobytes() for row in torch.cat(batches)}) > 200
    assert torch.equal(store.statistics.input_mean, train.statistics.input_mean)
    assert (len(store), store.index.n_layers) == (1000, 3)
    assert list(store.consumed) == [store.client.stats()["segment"]]
    assert sum(store.consumed.values()) >= sum(sizes)


def test_heldout_rows_become_a_store_that_runs_share(server, reader):
    config = reader()
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(fetch_heldout, config) for _ in range(4)]:
            done.result()
    here, there = DiscBuffer(f"{config.data.store}/heldout"), DiscBuffer(server.store / "heldout")
    assert torch.equal(here[:], there[:])
    for name in ("documents", "tokens", "positions"):
        assert np.array_equal(getattr(here, name)(slice(None)), getattr(there, name)(slice(None)))
    verify(here.path)
    assert Statistics.load(f"{config.data.store}/train/stats.safetensors").rows > 0


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("lm.layers=[0]", r"the server http.* has other rows than the config asks for: .*lm\.layers"),
        ("data.token_file={}/other", "answered 401: the token is not this server's"),
        ("data.url=localhost", "is not of the form"),
        ("data.url=null", r"data\.url is null"),
    ],
)
def test_a_server_that_is_not_the_configs_is_told(reader, tmp_path, override, told):
    with pytest.raises(UserError, match=told):
        open_server(reader(override.format(tmp_path)))


def test_a_copy_of_another_number_of_held_out_rows_is_refused(reader):
    with pytest.raises(UserError, match=r"more than data.heldout_tokens=100 held-out rows"):
        fetch_heldout(reader("data.heldout_tokens=100"))
    with pytest.raises(UserError, match=r"data.heldout_tokens: found 150, wanted 151"):
        fetch_heldout(reader("data.heldout_tokens=151"))
