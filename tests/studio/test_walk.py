"""A real browser walks the studio; `runs/studio_walk.py` is the long walk, to a better model."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import Page

from instructblip.studio.app import LABELS
from runs.screenshots import browser_page
from runs.studio_walk import QUESTION, Walker, draw_dials, studio

pytestmark = pytest.mark.skipif(
    (shutil.which("chromium") or shutil.which("google-chrome")) is None,
    reason="no Chromium on this machine",
)
HTML = "<img src=x onerror='document.body.dataset.ran=1'>"
SHORT = ("training.steps=30", "training.save_every=5", "training.validate_every=30")


def test_from_an_empty_folder_to_an_export(model_folder: Path, tmp_path: Path) -> None:
    """With a reload, a killed server, a hostile file and a stopped run on the way."""
    answers = draw_dials(tmp_path / "camera", 6)
    files = sorted((tmp_path / "camera").iterdir())
    folder, arguments = tmp_path / "mine", ("--model", str(model_folder), *SHORT)
    asked: list[str] = []
    with browser_page("en-GB") as page:
        page.on("request", lambda request: asked.append(request.url))
        with studio(folder, *arguments) as (address, process):
            walker = Walker(page, address)
            assert "token" not in page.url
            hostile = {"name": f"{HTML}.png", "mimeType": "image/png", "buffer": b"PK\3\4"}
            page.locator("#files").set_input_files(files=[hostile])  # type: ignore[arg-type]
            page.locator("#refusals li", has_text=HTML).wait_for()
            walker.add(files)
            walker.answer({**answers, "dial-05.png": HTML})
            page.reload()
            page.locator("body[data-ready]").wait_for()
            assert page.locator(".tile .says").all_inner_texts()[5] == HTML
            change_elsewhere(page)
            page.locator("#tune-tab").click()
            page.locator("#tune").click()
            page.locator("#stop:visible").wait_for()
            process.send_signal(signal.SIGKILL)
            process.wait()
            page.locator("#banner:visible", has_text="does not answer").wait_for()
            page.locator("#label-tab").click()
            page.locator(".tile").first.click()
            right = page.locator("#answer").input_value()
            page.locator("#answer").fill("written while it was down")
            page.locator("#state.bad").wait_for()
        port = address.split(":")[2].split("/")[0]
        with studio(folder, *arguments, port=port) as (address, process):
            page.locator("#key-dialog[open]").wait_for()
            page.locator("#key").fill(address)
            page.locator("#key-form button").click()
            page.locator("#state").get_by_text("Saved", exact=True).wait_for()
            table = (folder / "metadata.jsonl").read_text("utf-8")
            assert "written while it was down" in table
            page.locator("#answer").fill(right)  # a run resumes with the answers that it began with
            page.locator("#state").get_by_text("Saving …", exact=True).wait_for()
            page.locator("#state").get_by_text("Saved", exact=True).wait_for()
            finish_run(page)
            scores = walker.compare()
            assert {"start", "constant", "tuned"} <= scores.keys()
            assert page.locator(".sample").count()
            assert len(walker.ask()) == 2
            exported = walker.export()
            assert (folder / "tuned/model/config.json").is_file()
            assert str(folder / "tuned/model") in exported
            page.wait_for_timeout(200)
            assert page.evaluate("document.body.dataset.ran") is None
            assert page.evaluate("localStorage.length") == 0
            assert not page.context.cookies()
    assert not [url for url in asked if not url.startswith(("http://127.0.0.1", "data:", "blob:"))]
    assert not walker.problems
    row = json.loads(table.splitlines()[1])
    assert row["question"] == QUESTION
    assert row["answer"] == answers[row["file_name"]]


def change_elsewhere(page: Page) -> None:
    """Another window has changed the answer that is typed here; this page's is kept."""
    page.locator(".tile").nth(1).click()
    right = page.locator("#answer").input_value()
    page.locator("#answer").fill(f"{right} {HTML}")
    page.evaluate("entry.version = 'older'")
    page.locator("#keep-theirs", has_text=right).wait_for()
    assert HTML in page.locator("#keep-mine").inner_text()
    page.locator("#keep-mine").click()
    page.locator("#state").get_by_text("Saved", exact=True).wait_for()
    page.locator("#answer").fill(right)
    page.locator("#state").get_by_text("Saving …", exact=True).wait_for()
    page.locator("#state").get_by_text("Saved", exact=True).wait_for()


def finish_run(page: Page) -> None:
    """Stop the run if it is still at work, and resume it until its end."""
    page.locator("#tune-tab").click()
    page.locator("#stop:visible, #resume:visible, #to-compare:visible").wait_for()
    if page.locator("#stop").is_visible():
        page.locator("#curve .now").wait_for()
        if page.locator("#stop").is_visible():
            page.locator("#stop").click()
        page.locator("#resume:visible, #to-compare:visible").wait_for()
    if page.locator("#resume").is_visible():
        page.locator("#resume").click()
    page.locator("#to-compare:visible").wait_for()


def test_a_phone(model_folder: Path, tmp_path: Path) -> None:
    Image.new("RGB", (90, 60), "red").save(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text(f"file_name,caption\na.png,{'long ' * 60}\n")
    phone = {"viewport": {"width": 390, "height": 844}, "color_scheme": "dark"}
    with studio(tmp_path, "--model", str(model_folder)) as (address, _):
        for number, locale in enumerate(("en-GB", "zh-CN")):
            with browser_page(locale, **phone) as page:
                walker = Walker(page, address)
                for tab in ("tune", "compare", "try", "label"):
                    page.locator(f"#{tab}-tab").click()
                    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), tab
                assert page.locator("#tune").text_content() == LABELS["tune"][number]
                assert not walker.problems
        assert os.listdir(tmp_path / ".studio") == ["lock"], "nothing is written"  # noqa: PTH208
        assert (tmp_path / "metadata.csv").is_file()
