"""A real browser walks the studio; `runs/studio_walk.py` is the long walk, to a better model."""

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import Page

from instructblip.experiment.tune import CHOSEN, UNSEEN
from instructblip.studio.app import LABELS
from runs.screenshots import browser_page
from runs.studio_walk import QUESTION, Walker, draw_dials, studio
from tests.evaluation.test_verdict import ANSWERS, WRONG, verdict

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
            enter(page, "written while it was down")
            page.locator("#unsaved").click()
            page.locator("#state.bad").wait_for()
        port = address.split(":")[2].split("/")[0]
        with studio(folder, *arguments, port=port) as (address, process):
            page.locator("#key-dialog[open]").wait_for()
            page.locator("#key").fill(address)
            page.locator("#key-form button").click()
            page.locator("#state").get_by_text("Saved", exact=True).wait_for()
            table = (folder / "metadata.jsonl").read_text("utf-8")
            assert "written while it was down" in table
            enter(page, right)  # a run resumes with the answers that it began with
            wait_saved(page)
            finish_run(page)
            scores = walker.compare()
            assert {"start", "constant", "tuned"} <= scores.keys()
            assert page.locator(".sample").count()
            assert page.locator("#sentence").inner_text().endswith(CHOSEN)
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
    rows = {row["file_name"]: row for row in map(json.loads, table.splitlines())}
    assert rows["dial-02.png"]["question"] == QUESTION
    assert rows["dial-02.png"]["answer"] == answers["dial-02.png"]


def change_elsewhere(page: Page) -> None:
    """Another window has changed the answer that is typed here; this page's is kept."""
    page.locator(".tile").nth(1).click()
    right = page.locator("#answer").input_value()
    page.locator("#answer").fill(f"{right} {HTML}")
    page.evaluate("entry.version = 'older'")
    page.locator("#answer").press("Enter")
    page.locator("#unsaved").click()
    page.locator("#keep-theirs", has_text=right).wait_for()
    assert HTML in page.locator("#keep-mine").inner_text()
    page.locator("#keep-mine").click()
    page.locator("#state").get_by_text("Saved", exact=True).wait_for()
    enter(page, right)
    wait_saved(page)


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


@pytest.fixture(scope="module")
def opened_studio(
    model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, str]]:
    """A folder of images that no test shares, and the address of its studio."""
    folder = tmp_path_factory.mktemp("studio") / "mine"
    draw_dials(folder, 5)
    with studio(folder, "--model", str(model_folder)) as (address, _):
        yield folder, address


def stored_answers(folder: Path) -> dict[str, str]:
    lines = (folder / "metadata.jsonl").read_text("utf-8").splitlines()
    return {row["file_name"]: row["answer"] for row in map(json.loads, lines)}


def open_image(page: Page, name: str) -> None:
    page.locator(f".tile[aria-label^='{name}']").click()
    page.locator("#name", has_text=name).wait_for()


def enter(page: Page, answer: str) -> None:
    page.locator("#answer").fill(answer)
    page.locator("#answer").press("Enter")


def wait_saved(page: Page) -> None:
    while page.evaluate("sessionStorage['instructblip-unsaved']") != "[]":
        page.wait_for_timeout(50)


def test_a_refused_answer_is_marked_and_can_be_chosen(opened_studio: tuple[Path, str]) -> None:
    """Two tabs answer about one image, and neither has read the folder since."""
    folder, address = opened_studio
    tile = ".tile[aria-label^='dial-00.png']"
    with browser_page("en-GB") as page:
        Walker(page, address)
        other = page.context.new_page()
        Walker(other, address)
        for tab in (page, other):
            tab.evaluate("refresh = () => {}")
            open_image(tab, "dial-00.png")
            tab.locator("#question").fill("which color?")
        enter(page, "yellow")
        wait_saved(page)
        enter(other, "red")
        other.locator("#unsaved:visible").wait_for()
        assert "!" in other.locator(tile).inner_text()
        assert "✓" not in other.locator(tile).inner_text()
        assert other.locator("#filters", has_text="To look at 1").count()
        assert "red" not in other.locator("#earlier").inner_text()
        assert stored_answers(folder)["dial-00.png"] == "yellow"
        other.locator("#unsaved").click()
        assert other.locator("#name").inner_text() == "dial-00.png"
        assert "yellow" in other.locator("#keep-theirs").inner_text()
        other.locator("#keep-mine", has_text="red").click()
        wait_saved(other)
        assert "✓" in other.locator(tile).inner_text()
        assert other.locator("#unsaved").is_hidden()
        assert stored_answers(folder)["dial-00.png"] == "red"


def test_an_answer_of_a_removed_image_goes_when_it_is_emptied(
    opened_studio: tuple[Path, str],
) -> None:
    folder, address = opened_studio
    with browser_page("en-GB") as page:
        Walker(page, address)
        open_image(page, "dial-01.png")
        page.locator("#question").fill("which color?")
        enter(page, "blue")
        wait_saved(page)
        (folder / "dial-01.png").rename(folder / "away")
        page.locator("#filters", has_text="To look at 1").wait_for()
        page.evaluate("refresh()")
        open_image(page, "dial-01.png")
        enter(page, "")
        page.locator("#unsaved").wait_for(state="hidden")
        wait_saved(page)
        assert "dial-01.png" not in stored_answers(folder)
        (folder / "away").rename(folder / "dial-01.png")
        open_image(page, "dial-01.png")
        page.locator("#filters", has_text="To look at 0").wait_for()


def test_what_is_refused_is_shown_and_not_tried_again(opened_studio: tuple[Path, str]) -> None:
    folder, address = opened_studio
    with browser_page("en-GB") as page:
        Walker(page, address)
        open_image(page, "dial-03.png")
        page.locator("#question").fill("which color?")
        (folder / "dial-03.png").rename(folder / "away")
        enter(page, "green")
        page.locator("#unsaved:visible").wait_for()
        (folder / "away").rename(folder / "dial-03.png")
        page.evaluate("refresh()")
        page.wait_for_timeout(2500)  # longer than between two turns of the page
        assert "dial-03.png" not in stored_answers(folder)
        page.locator("#unsaved").click()
        page.locator("#state.bad", has_text="there is no picture").wait_for()
        page.locator("#answer").press("Enter")
        wait_saved(page)
        assert stored_answers(folder)["dial-03.png"] == "green"


def test_a_draft_is_kept_over_a_reload_and_is_no_answer(opened_studio: tuple[Path, str]) -> None:
    folder, address = opened_studio
    with browser_page("en-GB") as page:
        Walker(page, address)
        open_image(page, "dial-02.png")
        page.locator("#answer").fill("half typed answ")
        page.wait_for_timeout(1000)
        page.reload()
        page.locator("body[data-ready]").wait_for()
        assert page.locator("#name").inner_text() == "dial-02.png"
        assert page.locator("#answer").input_value() == "half typed answ"
        assert page.locator("#state").inner_text() == LABELS["draft"][0]
        assert "half" not in page.locator("#grid").inner_text()
        table = folder / "metadata.jsonl"
        assert not table.is_file() or "half" not in table.read_text("utf-8")
        enter(page, "a whole answer")
        wait_saved(page)
        assert stored_answers(folder)["dial-02.png"] == "a whole answer"


def test_a_verdict_has_its_reservations_in_both_languages(
    opened_studio: tuple[Path, str],
) -> None:
    """In English the sentences of `tune`, with the counts in both."""
    alike = frozenset(f"{number}.png" for number in range(9))
    good = verdict(WRONG, ANSWERS, lookalikes=alike, group_column="patient_id")
    facts = [*good.headline_facts, *good.caution_facts, ("chosen",)]
    results = {"outcome": "better", "alike": True, "facts": facts, "sets": [], "samples": []}
    shown = {}
    with browser_page("en-GB") as page:
        Walker(page, opened_studio[1])
        for spoken in ("en", "zh"):
            set_results = "([made, spoken]) => { results = made; language = spoken; showAll(); }"
            page.evaluate(set_results, [results, spoken])
            page.evaluate("showTab('compare')")
            shown[spoken] = page.locator("#outcome, #sentence").all_inner_texts()
    assert " ".join(shown["en"]) == f"{good.headline} {good.caution} {CHOSEN}"
    title, text = shown["zh"]
    assert title == "更好，但须谨慎"
    for part in (
        "40 张留出的图片中有 9 张",
        "训练后答对 40 个，训练前答对 0 个",
        "patient_id",
        "略微偏高",
    ):
        assert part in text
    assert "kept back" not in text


def test_errors_are_chinese_on_the_chinese_page(opened_studio: tuple[Path, str]) -> None:
    """An image that is refused, an answer without its image, and an error without a translation."""
    folder, address = opened_studio
    broken = {"name": "x.png", "mimeType": "image/png", "buffer": b"PK\3\4"}
    with browser_page("zh-CN") as page:
        Walker(page, address)
        page.locator("#files").set_input_files(files=[broken])  # type: ignore[arg-type]
        page.locator("#refusals", has_text="x.png: 不是图片；支持的格式：JPEG").wait_for()
        page.evaluate("refresh = () => {}")
        open_image(page, "dial-04.png")
        (folder / "dial-04.png").rename(folder / "away")
        enter(page, "green")
        page.locator("#unsaved:visible").click()
        page.locator("#state", has_text="未保存：没有图片 'dial-04.png'。").wait_for()
        (folder / "away").rename(folder / "dial-04.png")
        page.locator("#answer").press("Enter")
        wait_saved(page)
        shown = page.evaluate("translated('a message of a room far below')")
        assert shown == LABELS["unknown"][1].format("a message of a room far below")
        page.locator("#try-tab").click()
        page.evaluate("command('/export')")
        page.locator("#export-problem", has_text="尚未训练模型。").wait_for()


def test_a_table_that_is_broken_by_hand_is_stated_and_the_page_recovers(
    opened_studio: tuple[Path, str],
) -> None:
    folder, address = opened_studio
    table = folder / "metadata.jsonl"
    before = table.read_bytes() if table.is_file() else b""
    with browser_page("zh-CN") as page:
        Walker(page, address)
        table.write_text('{"file_name": "a.png"\n')
        page.reload()
        page.locator("#banner", has_text="出现问题（原文）").wait_for()
        assert "metadata.jsonl" in page.locator("#banner").inner_text()
        table.write_bytes(before)
        page.locator("body[data-ready]").wait_for()
        assert page.locator("#banner").is_hidden()


def test_a_split_folder_is_tuned_as_it_is_split(model_folder: Path, tmp_path: Path) -> None:
    for split, count in (("train", 6), ("val", 2), ("test", 2)):
        answers = draw_dials(tmp_path / split, count)
        rows = (f"{name},{QUESTION},{answer}\n" for name, answer in answers.items())
        table = tmp_path / split / "metadata.csv"
        table.write_text("file_name,question,answer\n" + "".join(rows))
    with (
        studio(tmp_path, "--model", str(model_folder), *SHORT) as (address, _),
        browser_page("en-GB") as page,
    ):
        walker = Walker(page, address)
        marks = page.locator(".tile .split").all_inner_texts()
        assert sorted(marks) == ["test"] * 2 + ["train"] * 6 + ["val"] * 2
        assert page.locator("#name").inner_text() == "train/dial-00.png"
        walker.tune(stop=False)
        ready = page.locator("#ready").inner_text()
        assert ready.startswith("6 pictures to learn from, 4 kept back")
        walker.compare()
        assert page.locator("#sentence").inner_text().endswith(UNSEEN)
        shown = page.locator(".sample img").evaluate_all("all => all.map(o => o.dataset.name)")
        assert sorted(shown) == ["test/dial-00.png", "test/dial-01.png"]
        assert not walker.problems


CONTRAST = """() => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const light = (color) => {
    canvas.fillStyle = color;
    canvas.fillRect(0, 0, 1, 1);
    const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map((v) => {
      return v / 255 <= 0.03928 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (one) => {
    const color = getComputedStyle(one).backgroundColor;
    return color === "rgba(0, 0, 0, 0)" && one.parentElement ? ground(one.parentElement) : color;
  };
  const weak = [];
  for (const one of document.querySelectorAll("body *")) {
    const hint = one.placeholder && !one.value;
    const isText = hint || [...one.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    if (!isText || one.disabled || !one.checkVisibility()) continue;
    const color = getComputedStyle(one, hint ? "::placeholder" : null).color;
    const [dark, bright] = [light(color), light(ground(one))].sort((a, b) => a - b);
    if ((bright + 0.05) / (dark + 0.05) < 4.5) weak.push(`${one.id} ${one.className}`);
  }
  return weak;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_can_be_read(scheme: str, opened_studio: tuple[Path, str]) -> None:
    """Each has a contrast of 4.5 to 1 at least, also where something is to be looked at."""
    folder, address = opened_studio
    (folder / "copy.png").write_bytes((folder / "dial-02.png").read_bytes())
    (folder / "broken.png").write_bytes(b"PNG")
    with browser_page("en-GB", color_scheme=scheme) as page:
        Walker(page, address)
        page.locator(".mark.look").first.wait_for()
        open_image(page, "broken.png")
        page.locator("#findings li").wait_for()
        assert page.evaluate(CONTRAST) == []
    (folder / "copy.png").unlink()
    (folder / "broken.png").unlink()
