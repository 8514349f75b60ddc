"""The page in headless Chromium: it asks, shows both models, bars, attention and history."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio.processing_utils
import gradio.routes
import httpx
import pytest
import torch
from fastapi.testclient import TestClient
from gradio.data_classes import ImageData

from instructblip.inference.engine import Engine
from instructblip.model.inference import cross_attention
from instructblip.serving.api import create_app
from instructblip.serving.config import ServeConfig
from instructblip.serving.page import EN, EXAMPLES, ZH, _image_input, ask, mount_page
from runs.screenshots import ask_example, browser_page
from tests.conftest import greedy_engine, running
from tests.model.test_instructblip import tiny_batch

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def engines(model_folder: Path, blip2_folder: Path) -> dict[str, Engine]:
    return {"instructblip": greedy_engine(model_folder), "blip2": greedy_engine(blip2_folder)}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where gradio keeps the files of visitors."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def address(engines: dict[str, Engine], cache: Path) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(cache))
        with running(mount_page(create_app(engines))) as address:
            yield address
        left = [file.name for file in cache.rglob("*") if file.is_file()]
        assert len(left) == len(EXAMPLES), "visitors' files outlive the server"


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize(("locale", "words"), [("en-GB", EN), ("zh-CN", ZH)])
def test_the_page_in_a_browser(address: str, locale: str, words: dict[str, str]) -> None:
    asked: list[str] = []
    with browser_page(locale) as page:
        page.on("request", lambda request: asked.append(request.url))
        ask_example(page, address, number=1)
        text = page.locator("body").inner_text()
        for key in ("title", "ask", "history", "looks", "examples"):
            assert words[key].removeprefix("# ") in text, key
        assert "__" not in text, "a label that was not translated"
        shown = page.locator("#picture img").first
        assert shown.evaluate("image => image.naturalWidth") > 0
        for name in ("instructblip", "blip2"):
            assert page.locator(f"#answer-{name} textarea").input_value() != ""
            bars = page.locator(f"#ranking-{name}").inner_text()
            assert "purple" in bars
            assert "%" in bars
        assert page.locator("#looks img").count() >= 4  # the mean and three queries
        assert "what color is the circle?" in page.locator("#history").inner_text()
    assert len(asked) > 20
    outside = [url for url in asked if not url.startswith((address, "data:", "blob:"))]
    assert not outside, "the page works without a network"


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_the_page_fits_a_phone(address: str) -> None:
    with browser_page("zh-CN") as page:
        page.set_viewport_size({"width": 390, "height": 844})
        ask_example(page, address, number=1)
        assert page.evaluate("document.documentElement.scrollWidth") == 390


def test_the_page_shows_the_answers_of_the_engines(
    model_folder: Path, blip2_folder: Path, png: list[Path]
) -> None:
    served = {"instructblip": greedy_engine(model_folder), "blip2": greedy_engine(blip2_folder)}
    with TestClient(create_app(served)) as client:
        service = client.app.state.service  # type: ignore[attr-defined]
        shown = ask(service, str(png[0]), "what?", "red, blue，red、", [])
        tuned, before = greedy_engine(model_folder), greedy_engine(blip2_folder)
        assert shown[:2] == (tuned.answer(png[0], "what?"), before.answer(png[0], "what?"))
        scores = torch.tensor(tuned.rank(png[0], "what?", ["red", "blue"]))
        assert list(shown[2]) == ["red", "blue"]
        assert list(shown[2].values()) == pytest.approx(scores.softmax(0).tolist(), abs=1e-4)
        assert shown[-1] == [[1, "what?", *shown[:2]]]
        again = ask(service, str(png[1]), "red?", "", shown[-1])
        assert again[2] is None
        assert len(again[-1]) == 2
        with pytest.raises(Exception, match="a picture and an instruction"):
            ask(service, None, "what?", "", [])
        bad = png[0].with_suffix(".txt")
        bad.write_text("no image")
        with pytest.raises(Exception, match="not an image"):
            ask(service, str(bad), "what?", "", [])


def test_the_page_asks_for_a_key(model_folder: Path) -> None:
    config = ServeConfig(api_keys=("secret",))
    with TestClient(mount_page(create_app({"a": greedy_engine(model_folder)}, config))) as client:
        assert client.get("/page/config").status_code == 401
        wrong = client.post("/page/login", data={"username": "a", "password": "guess"})
        assert wrong.status_code == 400
        right = client.post("/page/login", data={"username": "a", "password": "secret"})
        assert right.status_code == 200
        assert client.get("/page/config").status_code == 200


def press(address: str, file: Any, route: str, instruction: str = "what?") -> str:
    """Press the page's button without a browser; returns the response, whatever it is."""
    with httpx.Client(base_url=f"{address}/page/gradio_api", timeout=30) as client:
        functions = client.get(f"{address}/page/config").json()["dependencies"]
        number = next(f["id"] for f in functions if len(f["inputs"]) == 4)
        data = [file, instruction, "red, blue", None]
        call = {"data": data, "fn_index": number, "session_hash": "visitor"}
        joined = client.post(route, json=call).text
        if route != "queue/join":
            return joined
        with client.stream("GET", "queue/data", params={"session_hash": "visitor"}) as events:
            lines = []
            for line in events.iter_lines():
                lines.append(line)
                if "process_completed" in line or "close_stream" in line:
                    break
        return joined + "".join(lines)


def file_of(path: str) -> dict[str, Any]:
    """A file as the page's JavaScript names it."""
    return {"path": path, "meta": {"_type": "gradio.FileData"}}


ROUTES = pytest.mark.parametrize("route", ["run/predict", "queue/join"])


@ROUTES
@pytest.mark.parametrize("where", ["picture", "instruction"])
def test_no_file_of_the_server_is_served(
    address: str, cache: Path, tmp_path: Path, png: list[Path], route: str, where: str
) -> None:
    secret = tmp_path / "instructblip-secret.png"
    secret.write_bytes(png[0].read_bytes())
    for path in ("/etc/passwd", str(secret)):
        given: Any = file_of(path)
        if where == "picture":
            text = press(address, given, route)
        else:
            text = press(address, None, route, given)
        assert "root:" not in text
        assert "error" in text.lower()
        assert not list(cache.glob(f"*/{Path(path).name}"))
        read = httpx.get(f"{address}/page/gradio_api/file={path}")
        assert read.status_code == 403


@ROUTES
@pytest.mark.parametrize("where", ["picture", "instruction"])
def test_the_page_fetches_nothing(
    address: str, monkeypatch: pytest.MonkeyPatch, route: str, where: str
) -> None:
    asked = []

    async def fetch(url: str, *_more: Any) -> None:
        asked.append(url)
        raise ConnectionError

    monkeypatch.setattr(gradio.processing_utils, "async_ssrf_protected_get", fetch)
    monkeypatch.setattr(gradio.routes, "secure_url_stream_response", fetch)
    for url in ("http://pictures.example/a.png", "https://pictures.example/a.png"):
        given: Any = file_of(url)
        if where == "picture":
            text = press(address, given, route)
        else:
            text = press(address, None, route, given)
        assert "error" in text.lower()
        assert httpx.get(f"{address}/page/gradio_api/file={url}").status_code == 403
    assert not asked


@ROUTES
def test_an_uploaded_image_is_answered(
    address: str, engines: dict[str, Engine], png: list[Path], route: str
) -> None:
    with png[0].open("rb") as file:
        sent = httpx.post(f"{address}/page/gradio_api/upload", files={"files": file})
    (path,) = sent.json()
    assert engines["instructblip"].answer(png[0], "what?") in press(address, file_of(path), route)


def test_attention_equals_that_of_the_layer(engines: dict[str, Engine]) -> None:
    model = engines["blip2"].model
    batch = tiny_batch(model.config)
    weights = cross_attention(model, batch)
    samples, frames, queries, patches = weights.shape
    assert (samples, frames, queries) == (3, 1, model.config.num_query_tokens)
    assert patches == model.config.vision.num_tokens
    torch.testing.assert_close(weights.sum(-1), torch.ones(samples, frames, queries))
    # attention with these weights is the layer's output where there is one head
    layer = [la.crossattention for la in model.qformer.encoder.layer if la.crossattention][-1]
    assert layer is not None
    seen: list = []
    handle = layer.attention.register_forward_hook(lambda _m, args, out: seen.append((args, out)))
    heads, layer.attention.num_heads = layer.attention.num_heads, 1
    try:
        weights = cross_attention(model, batch)
    finally:
        layer.attention.num_heads = heads
        handle.remove()
    (_, states, _, index), output = seen[0]
    value = layer.attention.value(states)
    value = value if index is None else value[index]
    torch.testing.assert_close(weights.flatten(0, 1) @ value, output, rtol=1e-4, atol=1e-5)


def test_gradio_does_not_open_uploads(tmp_path: Path) -> None:
    """It would read a costly image without limits, before the page's own are applied."""
    file = tmp_path / "picture.png"
    file.write_bytes(b"no image")
    upload = _image_input("", 100, "picture")
    assert upload.get_block_name() == "image"
    assert upload.preprocess(ImageData(path=str(file), orig_name="picture.png")) == str(file)
    assert upload.preprocess(None) is None
