"""Drawing over HTTP and on the page: the engine's images, OpenAI's form, clear refusals."""

import base64
import io
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from PIL import Image

from instructblip.inference.engine import Engine
from instructblip.serving.api import create_app
from instructblip.serving.batching import Batcher, Job, TooLate
from instructblip.serving.page import EN, ZH, add_page
from runs.screenshots import browser_page, draw_example, open_page
from tests.conftest import TestClient, data_url, greedy_engine, running

ROUTE = "/v1/images/generations"
ASKED = {"prompt": "what is red?", "steps": 2}
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def client(drawing_folder: Path, model_folder: Path) -> Iterator[TestClient]:
    engines = {"answers": greedy_engine(model_folder), "draws": greedy_engine(drawing_folder)}
    with TestClient(create_app(engines), raise_server_exceptions=False) as client:
        yield client


@pytest.fixture(scope="module")
def engine(drawing_folder: Path) -> Engine:
    return greedy_engine(drawing_folder)


def decoded(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text)))


def same(left: Image.Image, right: Image.Image) -> bool:
    return np.array_equal(np.asarray(left), np.asarray(right))


def drawn(client: TestClient, **request: Any) -> list[Image.Image]:
    response = client.post(ROUTE, json={**ASKED, **request})
    assert response.status_code == 200, response.text
    return [decoded(each["b64_json"]) for each in response.json()["data"]]


def test_the_openai_client_draws(drawing_folder: Path, engine: Engine) -> None:
    with running(create_app({"draws": greedy_engine(drawing_folder)})) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0)
        answer = client.images.generate(
            prompt="what is red?",
            model="draws",
            n=2,
            size="16x16",  # type: ignore[call-overload]
            response_format="b64_json",
            extra_body={"seed": 3, "steps": 2},
        )
    assert (answer.size, answer.output_format) == ("16x16", "png")
    assert abs(answer.created - time.time()) < 60
    expected = engine.draw("what is red?", num_images=2, seed=3, steps=2)
    assert answer.data is not None
    for each, image in zip(answer.data, expected, strict=True):
        assert each.b64_json is not None
        assert same(decoded(each.b64_json), image)


def test_settings_and_subject_reach_the_decoder(
    client: TestClient, engine: Engine, png: list[Path]
) -> None:
    settings = {"seed": 1, "guidance": 4.0, "image_guidance": 1.5}
    images = drawn(client, image=data_url(png[0]), **settings)
    assert same(images[0], engine.draw(ASKED["prompt"], png[0], steps=2, **settings)[0])
    for other in ({"image": data_url(png[1])}, {"guidance": 1.0}, {"seed": 2}, {"steps": 3}):
        changed = {"image": data_url(png[0]), **settings, **other}
        assert not same(images[0], drawn(client, **changed)[0])
    assert not same(*drawn(client, n=2))  # one seed, two images
    assert not same(drawn(client)[0], drawn(client)[0])  # no seed


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_formats(client: TestClient, kind: str) -> None:
    images = [drawn(client, seed=1, output_format=each)[0] for each in ("png", kind)]
    assert images[1].format == kind.upper()
    if kind != "jpeg":
        assert same(images[0], images[1].convert("RGB"))


@pytest.mark.parametrize(
    ("request_", "status", "message"),
    [
        ({"prompt": " "}, 400, "prompt: the instruction is empty"),
        ({"prompt": "red " * 600}, 400, "2400 characters, expected at most 2000"),
        ({"prompt": "red " * 100}, 400, "tokens and the Q-Former reads at most"),
        ({"size": "1024x1024"}, 400, "this model draws 16x16; ask for that or for auto"),
        ({"model": "answers"}, 404, "this model does not draw; ask one of draws"),
        ({"model": "nothing"}, 404, "no model of that name; there are answers, draws"),
        ({"image": "file:///etc/passwd"}, 400, "image: expected data:image/"),
        ({"image": "data:image/png;base64,AAAA"}, 400, "image: not an image"),
        ({"n": 11}, 422, "less than or equal to 10"),
        ({"steps": 101}, 422, "less than or equal to 100"),
        ({"response_format": "url"}, 422, "b64_json"),
        ({"style": "vivid"}, 422, "style: this server does not know the field"),
    ],
)
def test_bad_drawing_requests_are_refused(
    client: TestClient, request_: dict[str, Any], status: int, message: str
) -> None:
    response = client.post(ROUTE, json={**ASKED, **request_})
    assert response.status_code == status, response.text
    assert message in response.json()["error"]["message"]


def test_a_server_without_a_decoder_refuses_to_draw(model_folder: Path) -> None:
    with TestClient(create_app({"answers": greedy_engine(model_folder)})) as client:
        response = client.post(ROUTE, json=ASKED)
        assert response.status_code == 404
        assert "does not draw here" in response.json()["error"]["message"]
        assert client.post("/v1/images/generations", json={}).status_code == 422


def test_a_decoder_that_does_not_fit_stops_the_server(drawing_folder: Path, tmp_path: Path) -> None:
    other = shutil.copytree(drawing_folder, tmp_path / "other")
    config = other / "text_to_image" / "config.json"
    text = config.read_text()
    start = text.index('"qformer": "') + 12
    config.write_text(text[:start] + "0" * 16 + text[start + 16 :])
    with pytest.raises(ValueError, match="another Q-Former"):
        create_app({"other": greedy_engine(other)})


def test_drawing_stops_when_nobody_waits(engine: Engine) -> None:
    batcher = Batcher(engine)
    try:
        late = Job(pixels=(), instruction="red", drawing={"steps": 100}, deadline=time.monotonic())
        with pytest.raises(TooLate):
            batcher.submit(late).result(10)
        settings = {"steps": 1000, "num_images": 64}
        job = Job(pixels=(), instruction="red", drawing=settings, deadline=time.monotonic() + 0.3)
        began = time.monotonic()
        with pytest.raises(TooLate):
            batcher.submit(job).result(60)
        assert time.monotonic() - began < 5  # of more than a minute
    finally:
        batcher.close()


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize(("locale", "words"), [("en-GB", EN), ("zh-CN", ZH)])
def test_the_tab_in_a_browser(
    drawing_folder: Path, engine: Engine, png: list[Path], locale: str, words: dict[str, str]
) -> None:
    app = add_page(create_app({"instructblip": greedy_engine(drawing_folder)}))
    with running(app) as address, browser_page(locale) as page:
        open_page(page, address)
        page.locator("#draw-tab").click()
        page.locator("#subject input").set_input_files(png[0])
        page.locator("#what").fill("what is red?")
        draw_example(page)
        text = page.locator("body").inner_text()
        assert all(words[key] in text for key in ("what", "subject", "seed"))
        sources = page.locator("#drawn img")
        shown = [sources.nth(n).get_attribute("src") or "" for n in range(sources.count())]
    expected = engine.draw("what is red?", png[0], 4, seed=0, guidance=2.0)
    for source, image in zip(shown, expected, strict=True):
        assert same(decoded(source.split(",")[1]), image)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_no_tab_where_no_model_draws(model_folder: Path) -> None:
    app = add_page(create_app({"a": greedy_engine(model_folder)}))
    with running(app) as address, browser_page("en-GB") as page:
        open_page(page, address)
        assert not page.locator("#draw-tab").is_visible()
        assert page.locator("#ask").is_visible()
