"""Looking firings up, token by token and feature by feature, against loops over random ones."""

import pickle

import numpy as np
import pytest

from clt.explore import firings
from clt.explore.firings import OF_LAYER, OF_TEXT, Firings, OfLayer
from clt.explore.records import choose, falling

P, F = 40, 9


@pytest.fixture
def fired() -> list[tuple[int, int, float]]:
    """(place, feature, activation), token by token; on some tokens nothing fires, and feature 4 never does."""
    generator = np.random.default_rng(0)
    return [
        (place, feature, float(np.float32(generator.random() + 0.1)))
        for place in range(P)
        for feature in range(F)
        if feature != 4 and place % 5 and generator.random() < 0.3
    ]


@pytest.fixture
def layer(fired) -> OfLayer:
    places, features, values = zip(*fired)
    ends = np.searchsorted(places, np.arange(P), "right")
    return OfLayer(np.array(features, np.int32), np.array(values, np.float32), ends.astype(np.int64))


@pytest.mark.parametrize("group", [1, 7, 20, 1 << 25])
def test_firings_by_feature(fired, layer, group, monkeypatch):
    monkeypatch.setattr(firings, "GROUP", group)
    wanted = [[(p, np.float32(value)) for p, f, value in fired if f == feature] for feature in range(F)]
    found = [list(zip(places.tolist(), values)) for places, values in layer.by_feature(F)]
    assert found == wanted
    assert layer.counts(F).tolist() == [len(of_feature) for of_feature in wanted]
    assert found[4] == []


def test_firings_by_token(fired, layer):
    for places in ([0], [3], [1, 2, 6, 39], list(range(P))):
        wanted = [f for place in places for p, f, _ in fired if p == place]
        assert layer.at(np.array(places)).tolist() == wanted


def test_nothing_fires():
    layer = OfLayer(np.empty(0, np.int32), np.empty(0, np.float32), np.zeros(P, np.int64))
    assert [len(places) for places, _ in layer.by_feature(F)] == [0] * F
    assert layer.at(np.array([0, 5])).tolist() == []


def test_other_processes_open_the_files_themselves(tmp_path):
    for name, kind in OF_TEXT.items():
        np.zeros(4, kind).tofile(tmp_path / f"text.{name}")
    for name, kind in OF_LAYER.items():
        np.ones(4 if name == "end" else 0, kind).tofile(tmp_path / f"layer_0.{name}")
    data = pickle.dumps(Firings(tmp_path, 1, 2))
    assert len(data) < 1000
    assert pickle.loads(data).layers[0].end.tolist() == [1, 1, 1, 1]  # noqa: S301


def test_equal_activations_stay_in_the_order_of_the_text():
    values = np.array([0.5, 2.0, 0.5, 1e-30, 2.0, 3e30], np.float32)
    assert falling(values).tolist() == [5, 1, 4, 0, 2, 3]


def test_a_list_has_one_example_of_a_document_and_no_token_stands_in_two():
    """Of 40 firings, highest first, in two documents: the other lists go to the next lower one."""
    documents = np.arange(40) % 2
    groups = choose(np.arange(40), documents)
    assert groups == [[0, 1], [2, 3], [9, 12], [17, 20], [25, 28], [33, 36]]
    many = choose(np.arange(40), np.arange(40))
    assert many[0] == list(range(16))
    assert many[1] == []
    assert many[3:] == [[17, 19, 21, 23], [25, 27, 29, 31], [33, 35, 37, 39]]
