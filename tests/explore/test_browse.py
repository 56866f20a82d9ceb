"""What the page asks for: tables and records against the files, prompts against the models, refusals, mistakes."""

import asyncio
import json
import re
import shutil
import socket

import numpy as np
import pytest
import torch

pytest.importorskip("starlette", reason="clt browse needs the extra `serve`")
pytest.importorskip("httpx2", reason="starlette's TestClient needs httpx2: pip install httpx2")

from starlette.testclient import TestClient

from clt import cli
from clt.errors import UserError
from clt.explore import table as tables
from clt.explore.browse import make_app, write_static
from clt.explore.prompt import Prompts
from clt.explore.table import SORTS, Query, Table
from clt.lm.replacement import ReplacementModel

URL = "http://127.0.0.1:8001"
TEXT = "abc fed gab"


@pytest.fixture(scope="module")
def client(made):
    return TestClient(make_app(made.config, made.run), URL)


def test_the_overview_is_that_of_the_arrays_and_of_the_run(client, made):
    found, arrays = client.get("/overview.json").json(), made.features.arrays
    assert found["prompt"]
    assert found["summary"] == made.features.summary
    assert found["l0_per_layer"] == pytest.approx((arrays["count"].sum(1) / made.features.tokens).tolist(), rel=1e-3)
    assert found["silent_per_layer"] == (arrays["count"] == 0).sum(1).tolist()
    assert found["figures"]["fve"] == json.loads((made.run / "summary.json").read_text())["fve"]
    points = found["points"]
    assert len(points["layer"]) == (arrays["count"] > 0).sum()
    for layer, feature, count, highest in zip(*points.values()):
        assert arrays["count"][layer, feature] == count
        assert arrays["max_activation"][layer, feature] == pytest.approx(highest, rel=1e-3)


def test_a_prompt_of_a_page_that_went_on_is_not_run(made, monkeypatch):
    monkeypatch.setattr(Prompts, "answer", lambda *_: pytest.fail("it was run"))
    scope = {"type": "http", "method": "POST", "path": "/prompt", "query_string": b"", "server": ("127.0.0.1", 8001)}
    scope["headers"] = [(b"host", b"127.0.0.1:8001")]
    received = [{"type": "http.request", "body": b'{"text": "abc"}'}, {"type": "http.disconnect"}]
    sent = []

    async def receive():
        return received.pop(0)

    async def send(message):
        sent.append(message)

    asyncio.run(make_app(made.config, made.run)(scope, receive, send))
    assert sent[0]["status"] == 503


def test_figures_of_another_step_are_not_shown(made, tmp_path):
    (tmp_path / "summary.json").write_text(json.dumps({"fve": 0.5, "steps": 10}))
    assert tables.figures(tmp_path, 9) is None
    assert tables.figures(tmp_path, 10) == {"fve": 0.5}
    (tmp_path / "report_step_00000009").mkdir()
    (tmp_path / "report_step_00000009" / "evaluation.json").write_text('{"fve": 0.25}')
    assert tables.figures(tmp_path, 9) == {"fve": 0.25}


def test_a_scatter_of_many_features_has_one_in_each_cell(made, monkeypatch):
    """With cells as large as the plot, one of all that fire."""
    table = Table(made.features)
    monkeypatch.setattr(tables, "_POINTS", 5)
    assert 5 < len(table.overview(made.run)["points"]["layer"]) <= (made.features.arrays["count"] > 0).sum()
    monkeypatch.setattr(tables, "_GRID", 1)
    points = table.overview(made.run)["points"]
    assert [len(column) for column in points.values()] == [1, 1, 1, 1]
    assert points["count"][0] == made.features.arrays["count"][points["layer"][0], points["feature"][0]]


QUERIES = [
    *({"sort": sign + key} for key in SORTS for sign in ("", "-")),
    {"layer": 1}, {"min": 0.05, "max": 0.3}, {"max": 0}, {"text": "A"}, {"logit": "b", "layer": 2}, {"text": "no such"},
    {"start": 7, "limit": 5, "sort": "-count"}, {"start": 10**6},
]  # fmt: skip


@pytest.mark.parametrize("query", QUERIES, ids=str)
def test_the_table_is_the_one_sorted_and_filtered_by_hand(client, made, query):
    features, asked = made.features, Query(**query)
    arrays, words = features.arrays, features.vocabulary

    def texts(name, place):
        return [words[id] for id in arrays[name][place] if id >= 0]

    def fits(place):
        frequency = arrays["count"][place] / features.tokens
        return (
            asked.layer in (None, place[0])
            and asked.min <= frequency <= asked.max
            and (not asked.text or any(asked.text.lower() in t.lower() for t in texts("example_tokens", place)))
            and (not asked.logit or any(asked.logit.lower() in t.lower() for t in texts("top_logits", place)))
        )

    places = [place for place in np.ndindex(arrays["count"].shape) if fits(place)]
    key, down = asked.sort.lstrip("-"), asked.sort.startswith("-")
    if key == "feature":
        places = places[::-1] if down else places
    else:
        places.sort(key=lambda place: -arrays[key][place] if down else arrays[key][place])
    found = client.get("/features", params=query).json()
    assert found["total"] == len(places)
    shown = places[asked.start : asked.start + asked.limit]
    assert [(row["layer"], row["feature"]) for row in found["rows"]] == shown
    for row, place in zip(found["rows"], shown):
        assert row["count"] == arrays["count"][place]
        assert [row[name] for name in ("max", "mean", "norm")] == pytest.approx(
            [arrays[name][place] for name in ("max_activation", "mean_activation", "decoder_norm")], rel=1e-3
        )
        assert (row["tokens"], row["top"]) == (texts("example_tokens", place), texts("top_logits", place))


@pytest.mark.parametrize(
    ("query", "told"),
    [
        ("layers=1", "unknown parameter 'layers'; known: sort,"),
        ("layer=one", "layer is 'one'; wanted a number"),
        ("layer=3", "wanted layer: 0 to 2"),
        ("sort=name", "wanted sort: one of feature, count,"),
        ("sort=--count", "wanted sort: one of feature, count,"),
        ("min=nan", "wanted min and max: 0 to 1"),
        ("max=-1", "wanted min and max: 0 to 1"),
        ("start=-1", "wanted start: 0 or more"),
        ("start=" + "9" * 30, "wanted start: 0 or more"),
        ("limit=501", "wanted limit: 1 to 500"),
    ],
)
def test_a_wrong_query_is_told(client, query, told):
    answer = client.get(f"/features?{query}")
    assert answer.status_code == 400
    assert told in answer.json()["error"]


def test_a_feature_is_its_record_and_its_row(client, made):
    for layer, feature in np.ndindex(made.features.arrays["count"].shape):
        found = client.get(f"/features/{layer}/{feature}").json()
        assert found["record"] == made.features.record(layer, feature)
        assert (found["row"]["layer"], found["row"]["feature"]) == (layer, feature)
        near = [(other["layer"], other["feature"]) for other in found["record"]["coactive"]]
        assert [(other["layer"], other["feature"]) for other in found["others"]] == near
    for path in ("3/0", "0/10", "0/" + "9" * 30, "9" * 5000 + "/0"):
        answer = client.get(f"/features/{path}")
        assert (answer.status_code, answer.json()["error"][:10]) == (404, "no feature")
    assert client.get("/features/0/-1").status_code == 404


def ask(client, **tree):
    return client.post("/prompt", content=json.dumps(tree))  # in ASCII, as it can hold half a character


def test_a_prompt_may_begin_with_the_token_that_starts_documents(client):
    assert ask(client, text=f"<|endoftext|>{TEXT}").json() == ask(client, text=TEXT).json()


def test_a_prompt_is_answered_by_both_models(client, made):
    """A changed feature through nnsight, which shares no hook with what is tested."""
    lm = made.lm
    ids = torch.tensor([[0, *lm.tokenizer(TEXT)["input_ids"]]])
    keep = torch.ones_like(ids, dtype=torch.bool)
    keep[0, 0] = False
    model = ReplacementModel(lm, made.transcoder)

    def off(layer, features):
        changed = features.clone()
        if layer == 1:
            changed[..., chosen["feature"]] *= 0
        return changed

    with torch.no_grad():
        replaced = model.run(ids, keep)
    found = ask(client, text=TEXT).json()
    assert found["tokens"] == [made.features.vocabulary[id] for id in ids[0].tolist()]
    assert found["keep"] == keep[0].tolist()
    assert [row for row in found["features"] if row["layer"] == 1], "the test has nothing to turn off"
    for row in found["features"]:
        wanted = (replaced.features[row["layer"]][0, :, row["feature"]] * keep[0]).tolist()
        assert dict(row["runs"][0]) == pytest.approx({at: value for at, value in enumerate(wanted) if value}, rel=1e-3)
    shown = {(row["layer"], row["feature"]) for row in found["features"]}
    firing = {(layer, f) for layer in range(3) for f in range(10) if (replaced.features[layer][0, 1:, f] > 0).any()}
    assert shown == firing  # fewer than are shown at most
    chosen = next(row for row in found["features"] if row["layer"] == 1)
    with torch.no_grad():
        changed = model.run(ids, keep, off)
        logits = [lm.model(ids).logits, replaced.logits, changed.logits]
    after = ask(client, text=TEXT, changes=[[1, chosen["feature"], 0]]).json()
    p = [of.softmax(-1)[0] for of in logits]
    assert not torch.equal(p[1], p[2])
    number = {text: id for id, text in enumerate(made.features.vocabulary)}
    for at, rows in enumerate(after["next"]):
        for text, *values in rows:
            assert values == pytest.approx([of[at, number[text]].item() for of in p], rel=2e-3)
        for of in p:
            assert {made.features.vocabulary[id] for id in of[at].topk(8).indices} <= {row[0] for row in rows}
        kl = [(p[0][at] * (p[0][at] / other[at]).log()).sum().item() for other in p[1:]]
        assert after["kl"][at] == pytest.approx(kl, rel=1e-2, abs=1e-6)
    (row,) = (r for r in after["features"] if (r["layer"], r["feature"]) == (1, chosen["feature"]))
    assert row["runs"] == [chosen["runs"][0], []]


@pytest.mark.parametrize(
    ("status", "tree", "told"),
    [
        (400, {}, "text is None; wanted the prompt"),
        (400, {"text": 5}, "text is 5"),
        (400, {"text": "\ud800"}, "surrogates not allowed"),
        (400, {"text": "a", "changes": {}}, "wanted at most 64 of [layer, feature, factor]"),
        (400, {"text": "a", "changes": [[0, 0]]}, "[layer, feature, factor]"),
        (400, {"text": "a", "changes": [[0, 0, "0"]]}, "[layer, feature, factor]"),
        (400, {"text": "a", "changes": [[0, 0, 1e9]]}, "from -100 to 100"),
        (400, {"text": "a", "changes": [[0, 0, 10**400]]}, "from -100 to 100"),
        (400, {"text": "a", "changes": [[0, 0, 1]] * 65}, "at most 64"),
        (422, {"text": "a", "changes": [[0, 10, 0]]}, "there is no feature 10 of layer 0"),
        (422, {"text": "a", "changes": [[-1, 0, 0]]}, "there is no feature 0 of layer -1"),
        (422, {"text": ""}, "the prompt has 0 tokens; wanted 1 to 15"),
        (422, {"text": "<|endoftext|>"}, "the prompt has 0 tokens; wanted 1 to 15"),
        (422, {"text": "ab " * 40}, "tokens; wanted 1 to 15"),
        (413, {"text": "a" * 70_000}, "wanted a shorter prompt"),
    ],
)
def test_a_wrong_prompt_is_told(client, status, tree, told):
    answer = ask(client, **tree)
    assert (answer.status_code, told in answer.json()["error"]) == (status, True), answer.text


@pytest.mark.parametrize("body", [b"", b"[1]", b"\xff", b"[" * 60_000])
def test_a_prompt_that_is_no_json_object_is_told(client, body):
    answer = client.post("/prompt", content=body)
    assert (answer.status_code, "no JSON object" in answer.json()["error"]) == (400, True)


@pytest.mark.parametrize(
    ("status", "headers"),
    [
        (400, {"host": "evil.example:8001"}),
        (403, {"origin": "http://evil.example"}),
        (403, {"origin": "http://127.0.0.1:1"}),
        (403, {"sec-fetch-site": "cross-site"}),
        (200, {"origin": URL, "sec-fetch-site": "same-origin"}),
        (200, {"host": "localhost:8001"}),
    ],
)
def test_other_sites_are_refused(client, status, headers):
    assert client.get("/overview.json", headers=headers).status_code == status
    if "origin" in headers:
        assert client.post("/prompt", json={"text": "abc"}, headers=headers).status_code == status


def test_a_server_that_other_machines_reach_refuses(made):
    assert TestClient(make_app(made.config, made.run), "http://10.0.0.1:8001").get("/").status_code == 403


def test_the_page_may_load_nothing_else_and_its_links_may_come_from_elsewhere(client):
    answer = client.get("/", headers={"sec-fetch-site": "cross-site"})
    assert answer.status_code == 200
    assert "default-src 'none'; script-src 'self';" in answer.text
    assert "<script" in answer.text
    assert "onclick" not in answer.text


@pytest.mark.parametrize("kind", ["checksums", "weights", "tokenizer"])
def test_features_of_other_models_are_not_mixed_with_those_that_are_there(made, tmp_path, kind):
    run = shutil.copytree(made.run, tmp_path / "run")
    summary = json.loads((run / "features" / "summary.json").read_text())
    summary["identity"][kind] = "of another one"
    (run / "features" / "summary.json").write_text(json.dumps(summary))
    answer = ask(TestClient(make_app(made.config, run), URL), text=TEXT)
    assert answer.status_code == 422
    assert re.search(f"was made: {kind}: found 'of another one'", answer.json()["error"])


def test_a_damaged_record_is_told(made, tmp_path):
    run = shutil.copytree(made.run, tmp_path / "run")
    (run / "features" / "layer_1.bin").write_bytes(b"")
    answer = TestClient(make_app(made.config, run), URL).get("/features/1/0")
    assert (answer.status_code, "layer_1.bin is damaged" in answer.json()["error"]) == (500, True)


def test_the_static_pages_are_the_page_and_the_files(made, tmp_path):
    write_static(made.run, tmp_path / "site")
    overview = json.loads((tmp_path / "site" / "overview.json").read_text())
    assert not overview.pop("prompt")
    assert overview == json.loads(json.dumps(Table(made.features).overview(made.run)))
    copied = {file.name for file in (tmp_path / "site" / "features").iterdir()}
    layers = {f"layer_{layer}.bin" for layer in range(3)}
    assert copied == {"summary.json", "summary.safetensors", "vocabulary.json.gz", "index.json.gz", *layers}
    for name in copied:
        assert (tmp_path / "site" / "features" / name).read_bytes() == (made.features.directory / name).read_bytes()
    (tmp_path / "file").touch()
    for there in ("site", "file"):
        with pytest.raises(UserError, match="is a file, or not empty"):
            write_static(made.run, tmp_path / there)


def test_mistakes_on_the_command_line_are_told(made, tmp_path, capsys):
    def told(*arguments):
        with pytest.raises(SystemExit) as ended:
            cli.main(["browse", *map(str, arguments)])
        assert ended.value.code == 2
        return capsys.readouterr().err

    assert "has no config.yaml" in told(tmp_path)
    shutil.copy(made.run / "config.yaml", tmp_path)
    assert "make the features with `clt features RUN`" in told(tmp_path)
    assert "make the features with `clt features RUN`" in told(tmp_path, "--static", tmp_path / "site")
    assert not (tmp_path / "site").exists()
    assert "--port is 0; wanted a port number" in told(made.run, "--port", 0)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"--port={port}: Address already in use" in told(made.run, "--port", port)
