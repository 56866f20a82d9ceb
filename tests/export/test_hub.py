"""Pushing to and reading from a hub: a small server on this machine that answers the few requests of its client."""

import hashlib
import json
import re
from base64 import b64decode
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import huggingface_hub.constants
import pytest
import torch

from clt import cli
from clt.errors import UserError
from clt.hub import fetch, local_directory, upload
from clt.model.spec import CLTConfig
from clt.model.transcoder import CrossLayerTranscoder

NAME, TOKEN = "ann/clt", "hf_good"
# Of the call that huggingface_hub makes of httpx to upload a large file.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")


class Hub(ThreadingHTTPServer):
    """Repositories of one user, who logs in with TOKEN; a repository is a list of commits, each {path: bytes}."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Requests)
        self.repositories: dict[str, list[dict[str, bytes]]] = {}
        self.branches: dict[str, int] = {}
        self.private: set[str] = set()
        self.objects: dict[str, bytes] = {}  # of git-lfs, by their sha256
        self.full = False  # no more of these
        self.fetched: list[str] = []
        self.status = 200  # of every answer, if another


def sha(number: int) -> str:
    return f"{number:040x}"


class Requests(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, status: int, body: bytes | dict | list = b"", **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub, login = self.server, self.headers.get("Authorization") == f"Bearer {TOKEN}"
        path = self.path.partition("?")[0]
        match = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(revision|tree)/([^/]+)", path)
        resolve = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.*)", path)
        found = match or resolve
        if hub.status != 200:
            return self.answer(hub.status)
        if found is None or found[1] not in hub.repositories or (found[1] in hub.private and not login):
            return self.answer(401 if not login else 404, X_Error_Code="RepoNotFound")
        commits, revision = hub.repositories[found[1]], found[3] if match else found[2]
        shas = {sha(n): n for n in range(len(commits))} | {"main": len(commits) - 1} | hub.branches
        if revision not in shas:
            return self.answer(404, X_Error_Code="RevisionNotFound")
        files, commit = commits[shas[revision]], sha(shas[revision])
        if match and match[2] == "revision":
            siblings = [{"rfilename": name} for name in files]
            return self.answer(200, {"id": found[1], "sha": commit, "siblings": siblings, "tags": []})
        if match:
            sizes = [{"type": "file", "path": n, "size": len(b), "oid": etag(b)} for n, b in files.items()]
            return self.answer(200, sizes)
        data = files[found[3]]
        if self.command == "GET":
            hub.fetched.append(found[3])
        return self.answer(200, data, ETag=f'"{etag(data)}"', X_Repo_Commit=commit)

    def do_POST(self) -> None:
        hub, body = self.server, self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer(401, {"error": "Invalid credentials"})
        if self.path == "/api/validate-yaml":
            bad = [{"message": '"license" must be one of [...]'}] if b"license: nonsense" in body else []
            return self.answer(400 if bad else 200, {"errors": bad, "warnings": []})
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            owner, name = asked.get("organization") or "ann", asked["name"]
            if owner != "ann":
                return self.answer(403, {"error": "You don't have the rights to create a model there"})
            status = 409 if f"{owner}/{name}" in hub.repositories else 200
            hub.repositories.setdefault(f"{owner}/{name}", [{}])
            if asked.get("private") or asked.get("visibility") == "private":
                hub.private.add(f"{owner}/{name}")
            return self.answer(status, {"url": f"https://huggingface.co/{owner}/{name}", "id": f"{owner}/{name}"})
        if self.path.endswith(".git/info/lfs/objects/batch"):
            return self.answer(200, {"transfer": "basic", "objects": [*map(self.lfs, json.loads(body)["objects"])]})
        if self.path == "/verify":
            file = json.loads(body)
            assert len(hub.objects[file["oid"]]) == file["size"]
            return self.answer(200)
        match = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main", self.path.partition("?")[0])
        assert match is not None, self.path
        if match[2] == "preupload":
            names = [file["path"] for file in json.loads(body)["files"]]
            modes = ["lfs" if name.endswith(".safetensors") else "regular" for name in names]
            files = [{"path": n, "uploadMode": mode, "shouldIgnore": False} for n, mode in zip(names, modes)]
            return self.answer(200, {"files": files})
        lines = [json.loads(line) for line in body.splitlines()]
        files = {line["value"]["path"]: b64decode(line["value"]["content"]) for line in lines if line["key"] == "file"}
        large = [line["value"] for line in lines if line["key"] == "lfsFile"]
        files |= {value["path"]: hub.objects[value["oid"]] for value in large}
        commits = hub.repositories[match[1]]
        commits.append(commits[-1] | files)
        return self.answer(
            200, {"commitUrl": f"https://huggingface.co/{match[1]}/commit/{sha(1)}", "commitOid": sha(1)}
        )

    def lfs(self, file: dict) -> dict:
        """How a file is to be uploaded: not at all, if it is there."""
        if self.server.full:
            return file | {"error": {"code": 507, "message": "your storage is full"}}
        endpoint = f"http://127.0.0.1:{self.server.server_port}"
        actions = {"upload": {"href": f"{endpoint}/objects/{file['oid']}"}, "verify": {"href": f"{endpoint}/verify"}}
        return file if file["oid"] in self.server.objects else file | {"actions": actions}

    def do_PUT(self) -> None:
        data, oid = self.rfile.read(int(self.headers["Content-Length"])), self.path.removeprefix("/objects/")
        assert hashlib.sha256(data).hexdigest() == oid
        if self.server.status != 200:
            return self.answer(self.server.status)
        self.server.objects[oid] = data
        return self.answer(200)


def etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """The server; this process talks to it, is not logged in, and has an empty cache."""
    server = Hub()
    thread = Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    constants = huggingface_hub.constants  # read from the environment when the package is imported
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # another protocol, of another package
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.chdir(tmp_path)
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def login(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)


@pytest.fixture(scope="module")
def run(train) -> Path:
    return train(plots=True).dir


def transcoder(seed: int = 0) -> CrossLayerTranscoder:
    torch.manual_seed(seed)
    return CrossLayerTranscoder(2, 4, CLTConfig(d_features=8))


def there(hub: Hub, *seeds: int) -> None:
    """A repository with a commit of a transcoder for each seed, and files beside it that nobody should fetch."""
    folder = Path("made")
    hub.repositories[NAME] = [{}]
    for seed in seeds:
        transcoder(seed).save_pretrained(folder)
        files = {file.name: file.read_bytes() for file in folder.iterdir()}
        hub.repositories[NAME].append(files | {"model.pt": b"a pickle", "modeling.py": b"raise SystemExit"})


def same(one: CrossLayerTranscoder, other: CrossLayerTranscoder) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_a_run_goes_up_and_comes_back(hub, login, run, capsys):
    cli.main(["push", str(run), NAME, "--license", "mit"])
    assert f"{run} is at " in capsys.readouterr().out
    files = hub.repositories[NAME][-1]
    plots = {f"report/{plot.name}" for plot in (run / "report").glob("*.png")}
    assert files.keys() == {"README.md", "config.json", "model.safetensors"} | plots
    assert b"\nlicense: mit\n" in files["README.md"]
    assert list(hub.objects.values()) == [files["model.safetensors"]], "the weights go the way of large files"
    assert f'from_pretrained("{NAME}")'.encode() in files["README.md"]
    back = CrossLayerTranscoder.from_pretrained(NAME)
    checkpoint = CrossLayerTranscoder.from_pretrained(run / "checkpoints" / "step_00000010")
    assert same(back, checkpoint)
    assert back.config == checkpoint.config
    assert sorted(hub.fetched) == ["config.json", "model.safetensors"]
    cli.main(["push", str(run), NAME])  # another commit
    assert len(hub.repositories[NAME]) == 3
    assert not hub.private
    for secret in (run.name, "pytest", "/tmp"):
        assert not [name for name, data in files.items() if secret.encode() in data], secret


def test_an_export_goes_up_with_its_name_in_the_card(hub, login, tmp_path):
    export = tmp_path / "export"
    (export / "layer_0").mkdir(parents=True)
    texts = {
        "README.md": 'ReplacementModel.from_pretrained("gpt2", "DIRECTORY")\nload_from_disk("DIRECTORY/layer_0")\n',
        "config.yaml": "model_kind: cross_layer_transcoder",
    }
    for name in (*texts, "W_enc_0.safetensors", "layer_0/cfg.json", "weights.pt", "notes.txt"):
        (export / name).write_text(texts.get(name, name))
    cli.main(["push", str(export), NAME, "--private"])
    files = hub.repositories[NAME][-1]
    card = files.pop("README.md").decode()
    assert card == f'ReplacementModel.from_pretrained("gpt2", "{NAME}")\nload_from_disk("DIRECTORY/layer_0")\n'
    wanted = ("config.yaml", "W_enc_0.safetensors", "layer_0/cfg.json")
    assert files == {name: (export / name).read_bytes() for name in wanted}
    assert hub.private == {NAME}


def test_a_revision_and_files_that_no_one_asked_for(hub):
    there(hub, 1, 2)
    hub.branches["old"] = 1
    assert same(CrossLayerTranscoder.from_pretrained(NAME), transcoder(2))
    for revision in ("old", sha(1)):
        assert same(CrossLayerTranscoder.from_pretrained(NAME, revision=revision), transcoder(1))
    assert set(hub.fetched) == {"config.json", "model.safetensors"}


def test_a_directory_of_that_name_wins(hub):
    there(hub, 1)
    transcoder(3).save_pretrained(NAME)
    assert same(CrossLayerTranscoder.from_pretrained(NAME), transcoder(3))
    assert not hub.fetched
    with pytest.raises(UserError, match=r"revision='old' is for the hub, but ann/clt is a name on this machine"):
        CrossLayerTranscoder.from_pretrained(NAME, revision="old")


def test_of_a_run_the_newest_checkpoint_is_read(hub):
    for number, step in ((1, 900), (2, 1000), (3, 50)):
        transcoder(number).save_pretrained(f"{NAME}/checkpoints/step_{step:08d}")
    assert same(CrossLayerTranscoder.from_pretrained(NAME), transcoder(2))
    assert same(CrossLayerTranscoder.from_pretrained(f"{NAME}/checkpoints/step_00000900"), transcoder(1))


def test_only_a_text_of_two_names_is_asked_for(hub):
    """Paths are not, nor what can be no name of the hub's: they are missing directories."""
    for name in (Path("ann/gone"), "./gone", "../gone", "/ann/gone", "gone", "a/b/c"):
        assert local_directory(name) == Path(name)
    with pytest.raises(UserError, match=r"ann/gone/config.json cannot be read"):
        CrossLayerTranscoder.from_pretrained(Path("ann/gone"))


def test_what_the_hub_does_not_have(hub):
    there(hub, 1)
    hub.repositories["ann/other"] = [{"pytorch_model.bin": b"a pickle", "config.yaml": b"{}"}]
    for name, revision, said in (
        ("ann/gone", None, r"there is no directory ann/gone, nor such a model on the hub \(http.*`hf auth login`"),
        (NAME, "v9", r"ann/clt on the hub .* has no revision 'v9'; wanted a branch, tag or commit"),
        ("ann/other", None, r"ann/other on the hub has no config.json .* wanted what `clt push` has written"),
        ("ann/a--b", None, r"the hub .* refused ann/a--b \(HFValidationError: "),
    ):
        with pytest.raises(UserError, match=said):
            CrossLayerTranscoder.from_pretrained(name, revision=revision)
    assert not hub.fetched


def test_a_damaged_file_of_the_hub(hub):
    there(hub, 1)
    hub.repositories[NAME][-1]["model.safetensors"] = b"not one"
    with pytest.raises(UserError, match=r"model.safetensors is damaged"):
        CrossLayerTranscoder.from_pretrained(NAME)


def test_a_private_one_needs_a_login(hub, monkeypatch):
    there(hub, 1)
    hub.private.add(NAME)
    with pytest.raises(UserError, match="`hf auth login`"):
        CrossLayerTranscoder.from_pretrained(NAME)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert same(CrossLayerTranscoder.from_pretrained(NAME), transcoder(1))


def test_without_a_network(hub, monkeypatch):
    """What has been fetched before is still there; the rest is one message, which names the hub that was asked."""
    there(hub, 1)
    CrossLayerTranscoder.from_pretrained(NAME)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert same(CrossLayerTranscoder.from_pretrained(NAME), transcoder(1))
    with pytest.raises(UserError, match=r"hub \(http://127.0.0.1:9\) cannot be reached, and .* no copy of ann/new"):
        CrossLayerTranscoder.from_pretrained("ann/new")
    with pytest.raises(UserError, match=r"hub \(http://127.0.0.1:9\) cannot be reached, so nothing was pushed to ann"):
        upload(NAME, {"README.md": b""}, "message", private=False)


def test_a_hub_that_is_down(hub):
    hub.status = 500
    with pytest.raises(UserError, match=r"the hub .*500 Internal Server Error"):
        fetch(NAME, None, ["config.json"])


def test_pushes_that_are_refused(hub, run, tmp_path, monkeypatch, capsys):

    def refused(*words: object) -> str:
        with pytest.raises(SystemExit) as end:
            cli.main(["push", *map(str, words)])
        assert end.value.code == 2
        return capsys.readouterr().err

    assert "nobody is logged in to the hub" in refused(run, NAME)
    monkeypatch.setenv("HF_TOKEN", "hf_bad")
    assert "refused ann/clt to this login (status 401)" in refused(run, NAME)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert "refused bob/clt to this login (status 403)" in refused(run, "bob/clt")
    assert "'clt' is no name on the hub; wanted user/name" in refused(run, "clt")
    assert '"license" must be one of' in refused(run, NAME, "--license", "nonsense")
    assert "is neither a run (with checkpoints/) nor what `clt export` has written" in refused(tmp_path, NAME)
    hub.status = 403  # of its storage
    assert "refused ann/clt to this login (status 403)" in refused(run, NAME)
    hub.status, hub.full = 200, True
    assert "refused ann/clt (ValueError: LFS batch API returned errors" in (found := refused(run, NAME))
    assert "your storage is full" in found
    for name in ("README.md", "config.yaml", "model.safetensors"):  # of somebody else
        (tmp_path / name).write_text("data: private")
    assert "nor what `clt export` has written" in refused(tmp_path, NAME)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    assert "it has not finished" in refused(tmp_path / "run", NAME)
    for file in ("config.yaml", "summary.json"):
        (tmp_path / "run" / file).write_bytes((run / file).read_bytes())
    assert "is of step 0, its summary of 10" in refused(tmp_path / "run", NAME)
    assert all(commits == [{}] for commits in hub.repositories.values())
