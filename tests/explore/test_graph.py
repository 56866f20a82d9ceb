"""`clt graph` without circuit-tracer: what it refuses, and the server of the page. tests/interop has the real one."""

import json
import stat
import sys

import pytest

from clt import cli
from clt.errors import UserError
from clt.explore.graph import make_graph

# Stands for an environment whose circuit-tracer runs another language model: next tokens get other probabilities.
OTHER = """#!{python}
import json, sys
if sys.argv[2] != "-c":
    found = dict(active=1, replacement=1, completeness=1, next=[[5, 0.9]], page="")
    open(sys.argv[4], "w").write(json.dumps(found))
"""


def test_without_circuit_tracer_the_message_has_the_line_that_installs_it(made, capsys):
    with pytest.raises(SystemExit):
        cli.main(["graph", str(made.run), "abc", "--no-serve"])
    told = capsys.readouterr().err
    assert f"{sys.executable} has no circuit-tracer" in told
    assert "python -m venv tracer && tracer/bin/pip install circuit-tracer==0.5.0" in told
    assert "--python tracer/bin/python" in told


def test_a_python_that_is_not_there_is_named(made, tmp_path):
    with pytest.raises(UserError, match=r"--python nowhere/python: No such file"):
        make_graph(made.config, made.run, 10, "abc", tmp_path, "nowhere/python")


def test_a_graph_of_another_language_model_is_refused(made, tmp_path):
    python = tmp_path / "python"
    python.write_text(OTHER.format(python=sys.executable))
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    with pytest.raises(UserError, match=r"has probability 0.900 by circuit-tracer's language model, and 0.0"):
        make_graph(made.config, made.run, 10, "abc", tmp_path / "graphs", str(python))
    python.write_text(f"#!{sys.executable}\nimport sys\nsys.exit(7 * (sys.argv[2] != '-c'))")
    with pytest.raises(UserError, match="circuit-tracer has ended with status 7"):
        make_graph(made.config, made.run, 10, "abc", tmp_path / "graphs", str(python))
    with pytest.raises(UserError, match="the prompt has 0 tokens"):
        make_graph(made.config, made.run, 10, "", tmp_path / "graphs", str(python))


@pytest.fixture
def client(tmp_path):
    pytest.importorskip("starlette", reason="the page needs the extra `serve`")
    from starlette.testclient import TestClient

    from clt.explore.graphs import make_app

    page, graphs = tmp_path / "page", tmp_path / "graphs"
    for folder in (page, graphs / "features" / "run-10"):
        folder.mkdir(parents=True)
    (page / "index.html").write_text("the page")
    (graphs / "a.json").write_text('{"nodes": [], "qParams": {}}')
    (graphs / "features" / "run-10" / "7.json").write_text('{"index": 7}')
    (tmp_path / "secret.json").write_text('{"nodes": []}')
    return TestClient(make_app(graphs, page), "http://127.0.0.1", client=("127.0.0.1", 1))


def test_the_page_gets_its_files_and_no_others(client, tmp_path):
    assert client.get("/").text == "the page"
    assert client.get("/graph_data/a.json").json() == {"nodes": [], "qParams": {}}
    assert client.get("/data/features/run-10/7.json").json() == {"index": 7}
    for path in ("/data/nothing.json", f"/data/{tmp_path}/secret.json", "/data/..%2fsecret.json"):
        assert client.get(path).status_code == 404
    assert client.get("/data/a.json", headers={"host": "evil.example"}).status_code == 400
    assert client.get("/data/a.json", headers={"origin": "http://evil.example"}).status_code == 403


def test_what_the_user_pins_is_kept(client, tmp_path):
    saved = tmp_path / "graphs" / "a.json"
    assert client.post("/save_graph/a", json={"qParams": {"pinnedIds": "1_2"}, "timestamp": 1}).status_code == 200
    assert json.loads(saved.read_text()) == {"nodes": [], "qParams": {"pinnedIds": "1_2"}}
    for name in ("b", "..%2fsecret", "features"):
        assert client.post(f"/save_graph/{name}", json={"qParams": {}}).status_code in (404, 405)
    assert client.post("/save_graph/a", json=[]).status_code == 400
    assert json.loads((tmp_path / "secret.json").read_text()) == {"nodes": []}
