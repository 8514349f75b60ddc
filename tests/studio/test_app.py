"""The routes of a studio: keys, uploads, rows, and runs that survive the server."""

import ast
import io
import itertools
import os
import re
import signal
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from instructblip.inference.engine import Engine
from instructblip.serving.config import ServeConfig
from instructblip.studio import project as project_module
from instructblip.studio.app import CHINESE, LABELS, STATIC, create_studio
from instructblip.studio.project import opened
from instructblip.studio.runs import Runs
from tests.conftest import TestClient, greedy_engine
from tests.data.test_cost import many_scans
from tests.testing import write_picture

TOKEN = "a-token-of-this-test"
API = "/v1/studio"
SETTINGS = ("training.steps=40", "training.save_every=2", "training.validate_every=20")


@pytest.fixture(scope="module")
def engine(model_folder: Path) -> Engine:
    return greedy_engine(model_folder)


@pytest.fixture
def client(engine: Engine, model_folder: Path, tmp_path: Path) -> Iterator[TestClient]:
    root = tmp_path / "mine"
    with opened(root, root / "tuned") as project:
        runs = Runs(project, root / "tuned", str(model_folder), SETTINGS)
        config = ServeConfig(api_keys=(TOKEN,), max_picture_bytes=100_000, max_pixels=50_000)
        app = create_studio(project, engine, str(model_folder), runs, config)
        with TestClient(app, headers={"Authorization": f"Bearer {TOKEN}"}) as client:
            yield client


def png(seed: int = 0, size: tuple[int, int] = (12, 10)) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", size, (seed * 20 % 256, 9, seed)).save(data, "PNG")
    return data.getvalue()


def add(client: TestClient, name: str, data: bytes) -> Any:
    return client.post(f"{API}/picture", params={"name": name}, content=data)


def save(client: TestClient, **row: str) -> Any:
    return client.post(f"{API}/row", json=row)


def test_images_and_rows_are_there_after_a_reload(client: TestClient, tmp_path: Path) -> None:
    assert add(client, "a.png", png()).json() == {"name": "a.png", "new": True}
    assert add(client, "b.png", png()).json() == {"name": "a.png", "new": False}
    row = save(client, image="a.png", question="q?", answer="<b>1</b>").json()["row"]
    shown = client.get(API).json()
    assert [(i["name"], i["rows"]) for i in shown["images"]] == [("a.png", [row])]
    assert (shown["answers"], shown["usable"], shown["least"]) == (1, 1, 4)
    for size in ("small", "large"):
        view = client.get(f"{API}/picture", params={"name": "a.png", "size": size})
        assert Image.open(io.BytesIO(view.content)).format == "JPEG"
    file = client.get(f"{API}/picture", params={"name": "a.png", "size": "file"})
    assert file.content == (tmp_path / "mine/a.png").read_bytes()
    assert file.headers["content-type"] == "application/octet-stream"
    assert file.headers["x-content-type-options"] == "nosniff"


def test_another_window_gets_both_texts(client: TestClient) -> None:
    add(client, "a.png", png())
    row = save(client, image="a.png", answer="one").json()["row"]
    known = {"image": "a.png", "id": row["id"], "version": row["version"]}
    assert save(client, **known, answer="two").status_code == 200
    refused = save(client, **known, answer="three")
    assert refused.status_code == 409
    assert refused.json()["row"]["answer"] == "two"


def zipped() -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("x", "y")
    return data.getvalue()


@pytest.mark.parametrize(
    ("data", "status", "message"),
    [
        (zipped(), 400, "not an image"),
        (b"", 400, "not an image"),
        (b"<svg onload='alert(1)'/>", 400, "not an image"),
        (png(size=(200, 200))[:200], 400, "damaged"),
        (png(size=(300, 300)), 413, "more than 50000 pixels"),
        (many_scans(91), 400, "save the image again"),
        (b"\x89PNG" + b"\0" * 200_000, 400, "larger than"),
    ],
)
def test_hostile_files_are_not_stored(
    data: bytes, status: int, message: str, client: TestClient, tmp_path: Path
) -> None:
    refused = add(client, "a.png", data)
    assert refused.status_code == status
    assert message in refused.json()["error"]["message"]
    assert [path.name for path in (tmp_path / "mine").iterdir()] == [".studio"]


def test_bad_requests_are_refused(client: TestClient, tmp_path: Path) -> None:
    add(client, "a.png", png())
    (tmp_path / "secret.png").write_bytes(png())
    for name in ("../secret.png", str(tmp_path / "secret.png"), ".studio/lock", "", "a\0.png"):
        assert client.get(f"{API}/picture", params={"name": name}).status_code in (400, 404)
        assert save(client, image=name, answer="x").status_code in (400, 404)
    assert save(client, image="a.png", answer="x" * 16_001).status_code == 422
    assert save(client, image="a.png", path="/etc/passwd").status_code == 422
    assert client.get("/studio", params={"file": "/etc/passwd"}).text.startswith("<!DOCTYPE html>")
    assert client.post(f"{API}/stop").json()["error"]["message"] == "nothing is at work"
    assert client.post(f"{API}/export").status_code == 400
    assert client.post(f"{API}/tune", json={"resume": True}).status_code == 400


def test_everything_but_the_page_needs_the_token(client: TestClient) -> None:
    for path in ("", "/studio.js", "/studio.css", "/client.js", "/page.css", "/studio.json"):
        assert client.get(f"/studio{path}", headers={"Authorization": ""}).status_code == 200
    calls = [("GET", p) for p in ("", "/picture?name=a", "/run", "/results", "/report")]
    calls += [("POST", p) for p in ("/picture?name=a", "/row", "/tune", "/stop", "/export")]
    for method, path in calls:
        for header in ({"Authorization": ""}, {"Authorization": "Bearer wrong"}):
            assert client.request(method, API + path, headers=header).status_code == 401
        other = client.request(method, API + path, headers={"Host": "evil.example"})
        assert other.status_code == 421
        if method == "POST":
            other = client.post(API + path, headers={"Origin": "http://evil.example"})
            assert other.status_code == 403


def test_a_full_disk_is_one_plain_line(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    add(client, "a.png", png())

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device", str(tmp_path))

    monkeypatch.setattr(project_module, "write_text", full)
    monkeypatch.setattr(project_module, "replacing", full)
    for refused in (save(client, image="a.png", answer="x"), add(client, "b.png", png(3))):
        assert refused.status_code == 507
        assert refused.json()["error"]["message"].startswith(
            "the disk is full: nothing was changed"
        )
    monkeypatch.undo()
    assert save(client, image="a.png", answer="x").status_code == 200


def test_a_suggestion_with_its_confidence_comes_from_the_models_route(client: TestClient) -> None:
    from tests.conftest import body

    path = write_picture(Path(client.get(API).json()["folder"]) / "a.png")
    answer = client.post("/v1/chat/completions", json=body(path, model="start", logprobs=True))
    assert answer.json()["choices"][0]["logprobs"]["log_likelihood"] < 0


def test_every_text_is_in_both_languages() -> None:
    assert all(len(texts) == 2 for texts in LABELS.values())
    for english, chinese in LABELS.values():
        assert {c for c in english if c in "01{}"} == {c for c in chinese if c in "01{}"}
    html = (STATIC / "index.html").read_text("utf-8")
    script = (STATIC / "studio.js").read_text("utf-8")
    named = {part.split('"')[0] for part in html.split('data-text="')[1:]}
    named |= {part.split('"')[0] for part in script.split('words("')[1:]}
    named |= {part.split('"')[0] for part in script.split('fill("')[1:]}
    assert named <= LABELS.keys()
    assert "innerHTML" not in script
    assert "style=" not in html
    assert "http" not in html
    assert yaml.safe_dump(LABELS)


SOURCE = STATIC.parents[1]
AT_START = ("another studio is open", "{0} is not a folder")
UNASKED = ("no decoder:", "{0} {1}; at most", "{0} of {1} characters", "{0}: {1} images; at most")
PASSED_ON = ("{0}: {1}", "{0} bytes; expected")
"""Errors before there is a page, of requests that the page does not make, and of other rooms."""


def messages_in(tree: ast.AST) -> Iterator[str]:
    """The texts in code, with ``{0}``, ``{1}``, ... for the values of f-strings."""
    if isinstance(tree, ast.Constant) and isinstance(tree.value, str):
        yield tree.value
    elif isinstance(tree, ast.JoinedStr):
        count = itertools.count()
        yield "".join(
            str(part.value) if isinstance(part, ast.Constant) else f"{{{next(count)}}}"
            for part in tree.values
        )
    else:
        for child in ast.iter_child_nodes(tree):
            yield from messages_in(child)


def test_errors_of_the_server_have_a_chinese_form() -> None:
    """Each that the page can get is translated as it is written, and none that was removed is."""
    translations = CHINESE["messages"]
    written: set[str] = set()
    for room in ("studio", "serving", "data", "experiment"):
        for path in (SOURCE / room).rglob("*.py"):
            written |= {*messages_in(ast.parse(path.read_text("utf-8")))}
    assert translations.keys() <= written
    for english, chinese in translations.items():
        places = re.findall(r"{\d}", english)
        assert places == [f"{{{n}}}" for n in range(len(places))]
        assert {*re.findall(r"{\d}", chinese)} <= {*places}
    raised: set[str] = set()
    files = [SOURCE / "studio" / f"{name}.py" for name in ("app", "pictures", "project", "runs")]
    files += [SOURCE / "serving" / f"{name}.py" for name in ("decoder", "decoders", "service")]
    for path in files:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                raised |= {text for each in node.exc.args[-2:] for text in messages_in(each)}
    left = {text for text in raised - translations.keys() if " " in text.strip(", :")}
    assert not [text for text in left if not text.startswith((*AT_START, *UNASKED, *PASSED_ON))]


def test_the_line_under_a_score_is_its_interval() -> None:
    english, chinese = LABELS["interval"]
    assert "95 % interval of each score" in english
    assert "95 % 置信区间" in chinese


def test_an_answer_of_a_missing_image_does_not_block_tuning(
    client: TestClient, tmp_path: Path
) -> None:
    add(client, "a.png", png())
    row = save(client, image="a.png", question="q?", answer="one").json()["row"]
    (tmp_path / "mine/a.png").unlink()
    assert [f["bad"] for f in client.get(API).json()["findings"]] == [True]
    known = {"image": "a.png", "id": row["id"], "version": row["version"]}
    assert save(client, **known, question="q?").status_code == 200
    assert [f["bad"] for f in client.get(API).json()["findings"]] == [False]


def wait_for(runs: Runs, *statuses: str) -> dict[str, Any]:
    end = time.monotonic() + 120
    while time.monotonic() < end:
        state = runs.state()
        if state["status"] in statuses:
            return state
        time.sleep(0.1)
    raise AssertionError(runs.state())


def test_a_run_survives_the_server_and_resumes(model_folder: Path, tmp_path: Path) -> None:
    """A server that is started later sees the run of one that was killed, stops and resumes it."""
    root = tmp_path / "mine"
    for number in range(8):
        write_picture(root / f"{number}.png", seed=number)
    with opened(root, root / "tuned") as project:
        for number in range(8):
            project.save(f"{number}.png", "what is red?", "cat" if number % 2 else "blue")
        slow = ("training.steps=4000", *SETTINGS[1:])
        killed = Runs(project, root / "tuned", str(model_folder), slow)
        killed.tune()
        with pytest.raises(ValueError, match="a run is at work"):
            killed.tune()
        runs = Runs(project, root / "tuned", str(model_folder), SETTINGS)
        while not runs.state().get("losses"):
            assert runs.state()["status"] == "running", runs.state()
            time.sleep(0.1)
        assert runs.state()["seconds_left"] > 0
        os.kill(runs._job()["pid"], signal.SIGKILL)
        os.waitpid(runs._job()["pid"], 0)
        stopped = wait_for(runs, "stopped")
        assert stopped["resumable"]
        row = project.annotations()[0]
        changed = project.save(row.images[0], "what is red?", "cat", row.id, row.version)
        assert changed is not None
        assert runs.state()["changed"], "`tune --resume` refuses other data"
        project.save(row.images[0], "what is red?", "blue", row.id, changed.version)
        assert not runs.state()["changed"]
        assert stopped["step"] < 4000
        runs.tune(resume=True)
        while runs.state()["step"] <= stopped["step"]:
            assert runs.state()["status"] == "running", runs.state()
            time.sleep(0.1)
        runs.stop()
        assert wait_for(runs, "stopped")["step"] > stopped["step"]
