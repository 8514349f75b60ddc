"""Pictures of the page for the docs, taken in headless Chromium.

    python runs/screenshots.py [--model starter] [--before starter] [--out docs/pictures]

Serves the models on a free port, asks the second example, explains the answers and takes
page_en.png, page_zh.png and, on a phone in the dark, page_phone.png; where one of them draws, also
draw_en.png and draw_zh.png.
"""

import argparse
import contextlib
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvicorn
from playwright.sync_api import Page, sync_playwright

from instructblip import load
from instructblip.core.pages import title_of
from instructblip.serving.api import create_app
from instructblip.serving.page import PATH, add_page


@contextlib.contextmanager
def served(app: Any) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(timeout=20)


@contextlib.contextmanager
def browser_page(locale: str, **options: Any) -> Iterator[Page]:
    """A page in the system's Chromium (or that of ``CHROMIUM``) that reaches this machine only;
    ``options`` are those of a context of Playwright."""
    path = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        start: Any = {"args": ["--headless", "--no-sandbox"], "executable_path": path}
        browser = playwright.chromium.launch(**start)
        options = {"viewport": {"width": 1280, "height": 1000}, **options}
        page = browser.new_context(locale=locale, **options).new_page()
        page.set_default_timeout(120_000)
        page.route(
            lambda url: not url.startswith(("http://127.0.0.1", "file:", "data:", "blob:")),
            lambda route: route.abort(),
        )
        yield page
        browser.close()


def open_page(page: Page, address: str) -> None:
    """Open the page; returns when it knows the models."""
    page.goto(address + PATH)
    page.locator("body[data-ready]").wait_for()


def ask_example(page: Page, number: int) -> None:
    """Take an example and ask it; returns when all answers are there."""
    page.locator("#examples button").nth(number).click()
    page.locator("#ask").click()
    page.locator("#history tbody tr").first.wait_for()


def explain_answers(page: Page) -> None:
    """Press what explains an answer on every card; returns when all maps are there."""
    for card in page.locator(".model").all():
        card.locator(".why").click()
        card.locator(".words button").first.wait_for()


def draw_example(page: Page) -> None:
    """Open the tab that draws and draw what stands there; returns when the images are there."""
    page.locator("#draw-tab").click()
    page.locator("#draw").click()
    page.locator("#drawn img").first.wait_for()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="starter")
    parser.add_argument("--before", default="starter")
    parser.add_argument("--out", type=Path, default=Path("docs/pictures"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    engines = {
        "instructblip": load(args.model),
        "blip2": load(args.before, instruction_aware=False),
    }
    titles = {"instructblip": title_of(args.model), "blip2": title_of(args.before)}
    phone = {"viewport": {"width": 390, "height": 844}, "color_scheme": "dark"}
    kinds: Any = (("en", "en-GB", {}), ("zh", "zh-CN", {}), ("phone", "en-GB", phone))
    with served(add_page(create_app(engines, titles=titles))) as address:
        for name, locale, options in kinds:
            with browser_page(locale, **options) as page:
                open_page(page, address)
                ask_example(page, number=1)
                explain_answers(page)
                page.screenshot(path=str(args.out / f"page_{name}.png"), full_page=True)
                if name != "phone" and any(engine.can_draw for engine in engines.values()):
                    draw_example(page)
                    page.screenshot(path=str(args.out / f"draw_{name}.png"), full_page=True)


if __name__ == "__main__":
    main()
