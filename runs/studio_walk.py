"""The studio, walked in headless Chromium from an empty folder to a better model.

    python -m runs.studio_walk [--out out/studio_walk] [--count 60] [--pictures DIR] [a.b=c ...]

Adds drawn dials, types the answers, tunes, stops, resumes, compares, asks and exports; prints the
minutes of each part, the clicks and the keys. The time of a person, who thinks, comes on top.
``--pictures docs/pictures`` takes those of the docs on the way.
"""

import argparse
import contextlib
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from PIL import Image, ImageDraw
from playwright.sync_api import Page

from runs.screenshots import browser_page

QUESTION = "what does the dial show?"
PATIENT_MS = 600_000


def draw_dials(folder: Path, count: int) -> dict[str, str]:
    """Write images of dials that show 0, 4 or 8; returns the right answers by file name."""
    folder.mkdir(parents=True)
    rng, answers = random.Random(0), {}
    for number in range(count):
        value = rng.choice((0, 4, 8))
        shade = rng.randint(200, 255)
        dial = Image.new("RGB", (160, 160), (shade, shade, rng.randint(180, 255)))
        pen = ImageDraw.Draw(dial)
        x, y, radius = 80 + rng.randint(-9, 9), 90 + rng.randint(-9, 9), rng.randint(54, 66)
        rim = (x - radius, y - radius, x + radius, y + radius)
        pen.arc(rim, 180, 360, fill="black", width=7)
        pen.arc(rim, 315, 360, fill="red", width=12)
        angle = math.pi * (1 - value / 8) + rng.uniform(-0.05, 0.05)
        tip = (x + 0.9 * radius * math.cos(angle), y - 0.9 * radius * math.sin(angle))
        pen.line(((x, y), tip), "blue", 7)
        name = f"dial-{number:02}.png"
        dial.save(folder / name)
        answers[name] = str(value)
    return answers


@contextlib.contextmanager
def studio(
    folder: Path, *arguments: str, port: str = "0"
) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The command, with the address that it prints; killed at the end if it still runs."""
    command = (sys.executable, "-m", "instructblip", "studio", str(folder), "--port", port)
    path = os.pathsep.join(filter(None, sys.path))
    process = subprocess.Popen(
        (*command, *arguments),
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if line.startswith("serving at "):
                yield line.removeprefix("serving at ").strip(), process
                return
        raise RuntimeError("the studio did not start")
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.wait(timeout=30)


def take(
    page: Page, file: Path, width: int, height: int, *, dark: bool = False, chinese: bool = False
) -> None:
    """Write what a screen of that size shows."""
    page.set_viewport_size({"width": width, "height": height})
    page.emulate_media(color_scheme="dark" if dark else "light")
    if chinese:
        page.locator("#language").click()
    page.evaluate("scrollTo(0, 0)")
    page.wait_for_timeout(1500)  # images, and the suggestion
    page.screenshot(path=file)


class Walker:
    """A person at the page, whose clicks and keys are counted."""

    def __init__(self, page: Page, address: str) -> None:
        self.page, self.clicks, self.keys = page, 0, 0
        self.minutes: dict[str, float] = {}
        self.problems: list[str] = []
        self._since = time.monotonic()
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.goto(address)
        page.locator("body[data-ready]").wait_for()
        self.done("open")

    def done(self, part: str) -> None:
        now = time.monotonic()
        self.minutes[part] = round((now - self._since) / 60, 2)
        self._since = now

    def click(self, selector: str) -> None:
        self.clicks += 1
        self.page.locator(selector).click()

    def type(self, text: str) -> None:
        self.keys += len(text)
        self.page.keyboard.type(text)

    def press(self, key: str) -> None:
        self.keys += 1
        self.page.keyboard.press(key)

    def add(self, files: list[Path]) -> None:
        self.clicks += 1
        self.page.locator("#files").set_input_files(files)
        self.page.locator(".tile").nth(len(files) - 1).wait_for()
        self.page.locator("#editor").wait_for()
        self.done("add images")

    def answer(self, answers: dict[str, str]) -> None:
        """By keyboard alone, once the question is there."""
        self.click("#question")
        self.type(QUESTION)
        self.press("Enter")
        for _ in answers:
            self.type(answers[self.page.locator("#name").inner_text()])
            self.press("Enter")
        while self.page.evaluate("sessionStorage['instructblip-unsaved']") != "[]":
            self.page.wait_for_timeout(100)
        self.done("write answers")

    def tune(self, stop: bool = True, pictures: Path | None = None) -> None:
        self.click("#tune-tab")
        self.click("#tune")
        if stop:
            self.page.locator("#curve .now").wait_for(timeout=PATIENT_MS)
            if pictures:
                take(self.page, pictures / "studio_tune.png", 1280, 720)
            self.click("#stop")
            self.page.locator("#resume:visible").wait_for(timeout=PATIENT_MS)
            self.done("tune until stopped")
            self.click("#resume")
        self.page.locator("#to-compare:visible").wait_for(timeout=PATIENT_MS)
        self.done("tune to the end")

    def compare(self) -> dict[str, str]:
        """The scores by baseline."""
        self.click("#to-compare")
        self.page.locator(".bars dt").first.wait_for()
        names = self.page.locator(".bars dt").evaluate_all("all => all.map(one => one.className)")
        values = self.page.locator(".bars dt b").all_inner_texts()
        self.done("compare")
        return dict(zip(names, values, strict=True))

    def ask(self) -> list[str]:
        """The answers of the models to the question about the chosen image."""
        self.click("#try-tab")
        self.page.locator("#tried [data-model=tuned]").wait_for()
        self.click("#ask")
        answers = self.page.locator("#tried .answer:not(.empty)")
        answers.nth(1).wait_for()
        self.done("try")
        return answers.all_inner_texts()

    def export(self) -> str:
        """Where the model is."""
        self.click("#export")
        self.page.locator("#exported:not(:empty)").wait_for(timeout=PATIENT_MS)
        self.done("export")
        return self.page.locator("#exported").inner_text()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("out/studio_walk"))
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--pictures", type=Path)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    answers = draw_dials(args.out / "camera", args.count)
    began = time.monotonic()
    arguments = ("--model", "starter", *args.overrides)
    with (
        studio(args.out / "dials", *arguments) as (address, _),
        browser_page("en-GB") as page,
    ):
        walker = Walker(page, address)
        walker.add(sorted((args.out / "camera").iterdir()))
        walker.answer(answers)
        walker.tune(pictures=args.pictures)
        scores = walker.compare()
        outcome = page.locator("#outcome").inner_text()
        if args.pictures:
            take(page, args.pictures / "studio_compare.png", 1280, 900, dark=True)
        tried, exported = walker.ask(), walker.export()
        minutes = round((time.monotonic() - began) / 60, 2)
        if args.pictures:
            page.locator("#label-tab").click()
            page.locator(".tile").nth(7).click()
            take(page, args.pictures / "studio_label.png", 1280, 900)
            take(page, args.pictures / "studio_phone.png", 390, 844, chinese=True)
    result = {
        "minutes": minutes,
        "parts": walker.minutes,
        "clicks": walker.clicks,
        "keys": walker.keys,
        "outcome": outcome,
        "scores": scores,
        "tried": tried,
        "exported": exported,
        "problems": walker.problems,
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
