"""Pictures of the page for the docs, taken in headless Chromium.

    python runs/screenshots.py [--model starter] [--before starter] [--out docs/pictures]

Serves the models on a free port, asks the second example and takes page_en.png and page_zh.png;
where one of them draws, also draw_en.png and draw_zh.png.
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
from instructblip.serving.api import create_app
from instructblip.serving.page import EN, PATH, ZH, mount_page


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
def browser_page(locale: str) -> Iterator[Page]:
    """A page in the system's Chromium (or that of ``CHROMIUM``) that reaches this machine only."""
    path = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    with sync_playwright() as playwright:
        options: Any = {"args": ["--headless", "--no-sandbox"], "executable_path": path}
        browser = playwright.chromium.launch(**options)
        context = browser.new_context(locale=locale, viewport={"width": 1280, "height": 1250})
        page = context.new_page()
        page.set_default_timeout(120_000)
        page.route(
            lambda url: not url.startswith(("http://127.0.0.1", "data:", "blob:")),
            lambda route: route.abort(),
        )
        yield page
        browser.close()


def ask_example(page: Page, address: str, number: int) -> None:
    """Open the page, take an example and ask it; returns when the answers are there."""
    page.goto(address + PATH)
    page.locator("#ask").wait_for()
    page.locator("#examples .gallery-item").nth(number).click()
    page.locator("#picture img").first.wait_for()
    page.locator("#ask").click()
    page.locator("#looks img").first.wait_for()
    page.wait_for_timeout(1000)


def draw_example(page: Page, address: str, words: dict[str, str]) -> None:
    """Open the tab that draws and draw what stands there; returns when the pictures are there."""
    page.goto(address + PATH)
    page.get_by_role("tab", name=words["draw_tab"]).click()
    page.locator("#draw-button").click()
    page.locator("#drawn img").first.wait_for()
    page.wait_for_timeout(500)


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
    with served(mount_page(create_app(engines))) as address:
        for language, locale in (("en", "en-GB"), ("zh", "zh-CN")):
            with browser_page(locale) as page:
                ask_example(page, address, number=1)
                page.screenshot(path=str(args.out / f"page_{language}.png"), full_page=True)
                if any(engine.can_draw for engine in engines.values()):
                    draw_example(page, address, {"en": EN, "zh": ZH}[language])
                    page.screenshot(path=str(args.out / f"draw_{language}.png"), full_page=True)


if __name__ == "__main__":
    main()
