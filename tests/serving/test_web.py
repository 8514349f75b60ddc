"""The page in headless Chromium: it asks, shows all models, ranking, explanations and history."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi import FastAPI
from fastapi.responses import HTMLResponse
from playwright.sync_api import Page

from instructblip.inference.engine import Engine
from instructblip.inference.explain import measured
from instructblip.model.inference import cross_attention
from instructblip.serving.api import create_app
from instructblip.serving.config import ServeConfig
from instructblip.serving.page import EN, STATIC, ZH, add_page
from runs.screenshots import ask_example, browser_page, open_page
from tests.conftest import TestClient, greedy_engine, running
from tests.model.test_instructblip import tiny_batch

HTML = "<img src=x onerror='document.body.dataset.ran=1'>"
needs_browser = pytest.mark.skipif(
    (shutil.which("chromium") or shutil.which("google-chrome")) is None,
    reason="no Chromium on this machine",
)


@pytest.fixture(scope="module")
def engines(model_folder: Path, blip2_folder: Path) -> dict[str, Engine]:
    return {"instructblip": greedy_engine(model_folder), "blip2": greedy_engine(blip2_folder)}


@pytest.fixture(scope="module")
def address(engines: dict[str, Engine]) -> Iterator[str]:
    titles = {"instructblip": "starter", "blip2": HTML}
    with running(add_page(create_app(engines, titles=titles))) as address:
        yield address


def boxes(page: Page) -> list[Any]:
    """Left, top and width in pixels of the parts that an answer could move."""
    return page.locator("#ask-form, .model, .pair, .words, #history").evaluate_all(
        "all => all.map(one => one.getBoundingClientRect())"
        ".map(({x, y, width}) => [x, y, width].map(Math.round))"
    )


@needs_browser
@pytest.mark.parametrize(("locale", "words"), [("en-GB", EN), ("zh-CN", ZH)])
def test_the_page_in_a_browser(address: str, locale: str, words: dict[str, str]) -> None:
    asked: list[str] = []
    problems: list[str] = []
    with browser_page(locale) as page:
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda line: line.type == "error" and problems.append(line.text))
        open_page(page, address)
        page.locator("#examples button").nth(1).click()  # as many candidates as will be ranked
        before, empty = boxes(page), drawn(page, "blip2")
        ask_example(page, number=1)
        assert boxes(page) == before, "an answer moved something"
        text = page.locator("body").inner_text()
        for key in ("title", "ask", "history", "reasons", "ranking"):
            assert words[key] in text, key
        assert page.locator("#picture img").evaluate("image => image.naturalWidth") > 0
        for name in ("instructblip", "blip2"):
            card = page.locator(f"#model-{name}")
            assert name in card.locator("h2").inner_text()
            assert card.locator(".answer:not(.empty)").inner_text()
            bars = card.locator(".ranking").inner_text()
            assert "purple" in bars
            assert "%" in bars
            card.locator(".why").click()
            card.locator(".words button").first.wait_for()
            whole = drawn(page, name)
            reasons = card.locator(".words button")
            spoken = card.locator(".answer").inner_text().split()
            assert reasons.all_inner_texts() == [words["whole"], *spoken]
            assert f"{measured()['right']:g} %" in card.locator(".measured").inner_text()
            reasons.nth(1).click()
            assert reasons.nth(1).get_attribute("aria-pressed") == "true"
            assert empty not in (whole, drawn(page, name))
        assert "what color is the circle?" in page.locator("#history").inner_text()
    assert len(asked) > 8
    assert not [url for url in asked if not url.startswith((address, "data:"))]
    assert not problems


def drawn(page: Page, name: str) -> str:
    """The map that is drawn for a model, as a URL."""
    return page.locator(f"#model-{name} .look canvas").evaluate("canvas => canvas.toDataURL()")


@needs_browser
def test_the_page_says_where_the_image_does_not_matter(
    engines: dict[str, Engine], png: list[Path]
) -> None:
    for others in (png, ()):
        app = add_page(create_app(engines, titles={"instructblip": "starter"}, others=others))
        with running(app) as address, browser_page("en-GB") as page:
            open_page(page, address)
            ask_example(page, number=1)
            text = page.locator("#model-instructblip").inner_text()
            assert (EN["blind"] in text) == bool(others)


@needs_browser
def test_the_page_fits_a_phone(address: str) -> None:
    with browser_page("zh-CN", viewport={"width": 390, "height": 844}) as page:
        open_page(page, address)
        ask_example(page, number=1)
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


@needs_browser
def test_texts_of_others_stay_texts(address: str, png: list[Path]) -> None:
    """In the name of a model and of a file, in an instruction, a candidate and an answer."""

    def answer(route: Any) -> None:
        route.fulfill(
            content_type="text/event-stream",
            body=f'data: {{"choices": [{{"delta": {{"content": "{HTML}"}}}}]}}\n\n'
            'data: {"choices": [{"delta": {}, "logprobs": {"confidence": 0.934}}]}\n\n'
            "data: [DONE]\n\n",
        )

    with browser_page("en-GB") as page:
        page.route("**/v1/chat/completions", answer)
        open_page(page, address)
        content = {"name": f"{HTML}.png", "mimeType": "image/png", "buffer": png[0].read_bytes()}
        page.locator("#picture input").set_input_files(files=[content])  # type: ignore[arg-type]
        page.locator("#instruction").fill(HTML)
        page.locator("#candidates").fill(f"{HTML}, b")
        page.locator("#ask").click()
        page.locator("#history tbody tr").wait_for()
        for place in ("#picture .file", "#model-blip2 h2", ".ranking", ".answer"):
            assert HTML in page.locator(place).first.inner_text(), place
        assert "93 % of such answers are right" in page.locator(".state").first.inner_text()
        assert page.locator("#history tbody td", has_text=HTML).count() == 3
        page.locator("#model-blip2 .why").click()
        page.locator("#model-blip2 .words button").nth(1).wait_for()
        assert "".join(HTML.split()) in "".join(
            page.locator("#model-blip2 .words").inner_text().split()
        )
        page.wait_for_timeout(200)
        assert page.evaluate("document.body.dataset.ran") is None


@needs_browser
def test_images_are_pasted_and_dropped(address: str) -> None:
    script = """kind => {
        const data = new DataTransfer();
        data.items.add(new File([new Uint8Array(9)], kind + ".png", {type: "image/png"}));
        const [Event, name] = kind === "paste" ? [ClipboardEvent, "clipboardData"]
            : [DragEvent, "dataTransfer"];
        document.getElementById("picture").dispatchEvent(
            new Event(kind, {[name]: data, bubbles: true, cancelable: true}));
    }"""
    with browser_page("en-GB") as page:
        open_page(page, address)
        for kind in ("paste", "drop"):
            page.evaluate(script, kind)
            page.locator("#picture .file", has_text=f"{kind}.png").wait_for()
        page.locator("#ask").click()
        page.locator("#ask-form .problem", has_text=EN["no_image"]).wait_for()


@needs_browser
def test_the_page_shows_what_the_server_refuses(engines: dict[str, Engine]) -> None:
    config = ServeConfig(max_picture_bytes=100)
    app = add_page(create_app(engines, config, {"instructblip": "starter"}))
    with running(app) as address, browser_page("en-GB") as page:
        open_page(page, address)
        page.locator("#examples button").first.click()
        page.locator("#ask").click()
        page.locator("#ask-form .problem", has_text="more than 100 bytes").wait_for()
        assert page.locator("#ask").inner_text() == EN["ask"]


@needs_browser
def test_the_page_asks_for_a_key(engines: dict[str, Engine]) -> None:
    config = ServeConfig(api_keys=("secret",))
    app = add_page(create_app(engines, config, {"instructblip": "starter"}))
    with running(app) as address, browser_page("en-GB") as page:
        page.goto(f"{address}/page")
        for key in ("guess", "secret"):
            page.locator("#key").fill(key)
            page.locator("#key-form button").click()
            if key == "guess":
                page.locator("#key-form .problem", has_text=EN["key_wrong"]).wait_for()
        page.locator("body[data-ready]").wait_for()
        ask_example(page, number=1)
        assert not page.context.cookies(), "another page cannot send the key"
        assert page.evaluate("localStorage.length") == 0


@needs_browser
def test_no_page_elsewhere_frames_the_page_or_asks(address: str) -> None:
    """From another port, which is another origin: the browser shows neither page nor answer."""
    elsewhere = FastAPI()

    @elsewhere.get("/")
    async def front() -> HTMLResponse:
        return HTMLResponse(
            f'''<iframe src="{address}/page"></iframe><script>
            fetch("{address}/v1/rank", {{method: "POST", mode: "no-cors", body: "{{}}"}});
            </script>'''
        )

    with running(elsewhere) as other, browser_page("en-GB") as page:
        asked = lambda request: request.url.endswith("/v1/rank")  # noqa: E731
        with page.expect_event("requestfailed", asked) as failed:
            page.goto(other)
        assert "ERR_BLOCKED_BY_RESPONSE" in failed.value.failure
        (frame,) = page.main_frame.child_frames
        assert "page.js" not in frame.content()


def test_the_page_is_for_everyone_and_the_models_are_not(model_folder: Path) -> None:
    config = ServeConfig(api_keys=("secret",))
    engines = {"a": greedy_engine(model_folder)}
    with TestClient(add_page(create_app(engines, config, {"a": "starter"}))) as client:
        for path in ("", "/page.js", "/page.css", "/page.json"):
            answer = client.get(f"/page{path}")
            assert answer.status_code == 200
            assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
            assert "script-src 'self'" in answer.headers["content-security-policy"]
        assert client.get("/page/page.yaml").status_code == 404
        assert len(client.get("/page/page.json").json()["examples"]) == 4
        assert client.get("/v1/models").status_code == 401
    html = (STATIC / "index.html").read_text()
    assert "http" not in html.replace("http-equiv", "")
    assert "style=" not in html


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
