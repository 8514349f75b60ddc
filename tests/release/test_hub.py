"""`push` against a local fake of the Hub's HTTP API: the bytes that arrive, and what is refused."""

import base64
import hashlib
import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard, constants

from instructblip.cli import main as cli
from instructblip.evaluation.evaluate import evaluate
from instructblip.inference.fingerprint import fingerprint
from instructblip.model.instructblip import InstructBlip
from instructblip.recipe.load import load_recipe
from instructblip.recipe.schema import RECIPE_FILE
from tests.evaluation.fakes import FakeEngine, benchmark, colour_questions
from tests.testing import write_model

TOKEN = "hf_aVerySecretToken"
SECRET = "alice_smith"


class FakeHub(ThreadingHTTPServer):
    """Repositories in memory: (type, name) -> branch -> files. A commit arrives in one request."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.role, self.refuse_uploads = "write", False
        self.repositories: dict[tuple[str, str], dict[str, dict[str, bytes]]] = {}
        self.objects: dict[str, bytes] = {}
        self.private: list[str] = []
        self.commits: list[str] = []
        self.requests: list[str] = []
        self.errors: list[BaseException | None] = []

    def handle_error(self, *_: Any) -> None:
        if not isinstance(error := sys.exception(), ConnectionError):  # a client that leaves
            self.errors.append(error)


class Handler(BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None: ...

    def do_GET(self) -> None:
        if self.path == "/api/whoami-v2":
            if self.headers["authorization"] != f"Bearer {TOKEN}":
                return self.reply(401, {"error": "Invalid username or password."})
            auth = {"accessToken": {"role": self.server.role}}
            return self.reply(200, {"name": "alice", "orgs": [{"name": "clinic"}], "auth": auth})
        _, _, kinds, *rest = self.path.split("/", 3)
        name = "".join(rest)
        if (kinds.removesuffix("s"), name) in self.server.repositories:
            return self.reply(200, {"id": name, "sha": "0" * 40, "siblings": [], "tags": []})
        return self.reply(404, {"error": "not found"}, {"X-Error-Code": "RepoNotFound"})

    def do_PUT(self) -> None:
        if (size := self.headers["content-length"]) is not None:
            data = self.rfile.read(int(size))
        else:  # in chunks
            data = b""
            while chunk := int(self.rfile.readline(), 16):
                data += self.rfile.read(chunk)
                self.rfile.readline()
            self.rfile.readline()
        self.server.requests.append(self.path)
        if self.server.refuse_uploads:
            return self.reply(403, {"error": "the storage is closed"})
        self.server.objects[self.path.rpartition("/")[2]] = data
        return self.reply(200, {})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        self.server.requests.append(self.path)
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            if asked.get("private") or asked.get("visibility") == "private":
                self.server.private.append(name)
            self.server.repositories.setdefault(("model", name), {"main": {}})
            return self.reply(200, {"url": f"{self.server.url}/{name}", "id": "1"})
        if self.path == "/api/validate-yaml":
            return self.reply(200, {"errors": [], "warnings": []})
        if self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**each, "actions": {"upload": {"href": f"{self.server.url}/lfs/{each['oid']}"}}}
                for each in json.loads(body)["objects"]
            ]
            return self.reply(200, {"transfer": "basic", "objects": objects})
        _, _, _, owner, name, verb, branch = self.path.split("/")
        branches = self.server.repositories["model", f"{owner}/{name}"]
        if verb == "branch":
            branches[branch] = {}
            return self.reply(200, {})
        if verb == "preupload":
            files = [
                {"path": each["path"], "uploadMode": mode(each["path"]), "shouldIgnore": False}
                for each in json.loads(body)["files"]
            ]
            return self.reply(200, {"files": files})
        assert verb == "commit"
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                branches[branch][value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                data = self.server.objects[value["oid"]]
                assert hashlib.sha256(data).hexdigest() == value["oid"]
                branches[branch][value["path"]] = data
        self.server.commits.append(f"{owner}/{name}@{branch}")
        url = f"{self.server.url}/{owner}/{name}/commit/{'1' * 40}"
        return self.reply(200, {"commitUrl": url, "commitOid": "1" * 40})

    def reply(self, code: int, value: Any, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(value).encode()
        self.send_response(code)
        for key, text in {"content-type": "application/json", **(headers or {})}.items():
            self.send_header(key, text)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


def mode(path: str) -> str:
    return "lfs" if path.endswith(".safetensors") else "regular"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    server = FakeHub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.shutdown()
    server.server_close()
    assert server.errors == []


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tuned model in a user's home, of which every file names that home where it can."""
    home = tmp_path / "home" / SECRET
    monkeypatch.setenv("HOME", str(home))
    folder = write_model(home / "out" / "run", "instructblip")
    settings = [
        "model.start=hf://Salesforce/blip2-opt-2.7b@" + "a" * 40,
        f"data.root={home}/data",
        "data.sets.mine.format=table",
        f"data.sets.mine.path={home}/data/mine.csv",
        "data.sets.mine.language=zh",
        f"features.root={home}/features",
        f"data.prepared={home}/prepared",
    ]
    recipe = yaml.safe_load(load_recipe("scenes", settings).to_yaml())
    recipe["code"] = f"{home}/code"
    (folder / RECIPE_FILE).write_text(yaml.safe_dump(recipe))
    for name in ("data.json", "features.json", "templates.json"):
        (folder / name).write_text(json.dumps({"root": str(home)}))
    for name in ("tokenizer_config.json", "qformer_tokenizer/tokenizer_config.json"):
        values = json.loads((folder / name).read_text())
        values |= {"name_or_path": f"{home}/vicuna", "tokenizer_file": f"{home}/tokenizer.json"}
        (folder / name).write_text(json.dumps(values))
    return folder


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = 0
    try:
        cli.main(["push", *arguments])
    except SystemExit as stop:
        code = int(stop.code or 0)
    out, err = capsys.readouterr()
    assert TOKEN not in out + err
    return code, out, err


def test_the_bytes_that_arrive_are_a_model_with_its_card(
    hub: FakeHub, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = FakeEngine(fingerprint=fingerprint(run, True))
    result = evaluate(engine, benchmark(), colour_questions())
    result.save_with_predictions(tmp_path / "results" / "toy")
    options = ("--licence", "cc-by-4.0", "--dataset", "alice/birds", "--private", "--yes")
    shown = ("--results", str(tmp_path / "results"))
    code, out, err = call(capsys, str(run), "alice/parrots", *options, *shown)
    assert (code, "instructblip:" in err) == (0, False)
    assert hub.commits == ["alice/parrots@main"]
    assert hub.private == ["alice/parrots"]
    files = hub.repositories["model", "alice/parrots"]["main"]
    for name, data in files.items():
        assert f"{len(data):15,} bytes  {name}\n" in out
        assert SECRET.encode() not in data, name
        assert TOKEN.encode() not in data, name
    assert not {RECIPE_FILE, "data.json", "features.json", "templates.json"} & {*files}
    arrived = tmp_path / "arrived"
    for name, data in files.items():
        (arrived / name).parent.mkdir(parents=True, exist_ok=True)
        (arrived / name).write_bytes(data)
    ours, theirs = InstructBlip.from_pretrained(run), InstructBlip.from_pretrained(arrived)
    weights = theirs.state_dict()
    assert all(weights[key].equal(value) for key, value in ours.state_dict().items())

    card = ModelCard(files["README.md"].decode())
    data = card.data.to_dict()
    assert data["license"] == "cc-by-4.0"
    assert data["base_model"] == "Salesforce/blip2-opt-2.7b"
    assert data["datasets"] == ["alice/birds"]
    assert data["language"] == ["en", "zh"]
    assert data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "image-text-to-text"
    assert "instructblip" in data["tags"]
    assert card.data.model_name == "parrots"
    [score] = card.data.eval_results
    assert (score.dataset_type, score.metric_type, score.metric_value) == (
        "toy",
        "exact_match",
        100,
    )
    bounds = result.interval
    assert bounds is not None
    expected = [round(bounds.low, 2), round(bounds.high, 2)]
    assert score.metric_args == {"interval_95": expected, "samples": 12, "samples_of_the_set": 12}


def test_what_is_not_known_is_left_out_with_a_line(
    hub: FakeHub, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / RECIPE_FILE).unlink()
    code, out, _ = call(capsys, str(run), "clinic/x", "--yes", "--revision", "trial")
    assert code == 0
    assert hub.commits == ["clinic/x@trial"]
    data = ModelCard(hub.repositories["model", "clinic/x"]["trial"]["README.md"].decode()).data
    for key, word in {
        "license": "the licence: give it with --licence",
        "base_model": "the base model",
        "datasets": "data sets of the Hub",
        "language": "the languages",
        "model-index": "scores",
    }.items():
        assert key not in data.to_dict()
        assert f"the card leaves out {word}" in out


def test_a_no_sends_nothing(
    hub: FakeHub, run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", open("/dev/null"))  # noqa: PTH123, SIM115
    code, out, _ = call(capsys, str(run), "alice/x")
    assert code == 1
    assert "model.safetensors" in out
    assert hub.requests == []


def test_an_upload_that_ends_early_leaves_no_commit(
    hub: FakeHub, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.refuse_uploads = True
    code, _, err = call(capsys, str(run), "alice/x", "--yes")
    assert code == 2
    assert err.rpartition("instructblip: ")[2].count("\n") == 1
    assert "nothing was committed; run the same command again" in err
    assert hub.commits == []
    assert hub.repositories["model", "alice/x"]["main"] == {}
    hub.refuse_uploads = False
    assert call(capsys, str(run), "alice/x", "--yes")[0] == 0
    assert hub.commits == ["alice/x@main"]


def test_mistakes_are_one_line_before_the_model_is_read(
    hub: FakeHub,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))

    def refused(message: str, name: str = "alice/x", *options: str) -> None:
        hub.requests.clear()
        code, _, err = call(capsys, "no/such/model", name, "--yes", *options)
        assert (code, err.count("\n")) == (2, 1), err
        assert message in err
        assert hub.requests == []

    refused("expected OWNER/NAME", "parrots")
    refused("who may write to alice, clinic", "bob/x")
    hub.repositories["dataset", "alice/x"] = {}
    refused("alice/x exists as a dataset, which takes no model")
    del hub.repositories["dataset", "alice/x"]
    hub.role = "read"
    refused("the token may only read")
    (tmp_path / "token").write_text("hf_another\n")
    refused("the Hub refused the token", "alice/x", "--token-file", str(tmp_path / "token"))
    (tmp_path / "token").write_text("")
    refused("holds no token", "alice/x", "--token-file", str(tmp_path / "token"))
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    refused("no token of the Hub is here: create one")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused("HF_HUB_OFFLINE is set, and push needs the Hub")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    refused("http://127.0.0.1:9: ")


def test_a_file_that_names_the_home_is_not_sent(
    hub: FakeHub, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "licences").mkdir()
    (run / "licences" / "a.txt").write_text(f"copied from {Path.home()}/licences")
    code, _, err = call(capsys, str(run), "alice/x", "--yes")
    assert code == 2
    assert "licences/a.txt names" in err
    assert hub.requests == []


def test_a_card_alone_is_that_of_the_export(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cli_options = ["--licence", "mit", "--dataset", "alice/birds"]
    for out, more in ((tmp_path / "card.md", ["--card"]), (tmp_path / "run", [])):
        with pytest.raises(SystemExit) as stop:
            cli.main(["export", str(run), str(out), *more, *cli_options])
        assert not stop.value.code
    card = (tmp_path / "card.md").read_text()
    assert card == (tmp_path / "run" / "README.md").read_text()
    assert SECRET not in card
    assert "the card leaves out scores" in capsys.readouterr().out
