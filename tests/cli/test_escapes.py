"""Names, texts and answers with escape sequences and markup reach the terminal as text."""

import contextlib
import json
import re
import sys
from pathlib import Path

import pytest

from instructblip.cli import main as cli
from instructblip.core.progress import Terminal, progress_bar
from instructblip.core.terminal import escape
from instructblip.inference.engine import Engine
from tests.testing import write_json_lines, write_picture

TITLE = "\x1b]0;x\x07"
"""Renames a terminal's window."""
CLEAR = "\x1b[2J"
TURN = "\u202e"
BOLD = "[bold]"
HOSTILE = f"{TITLE}{CLEAR}{TURN}{BOLD}\x9b1A\rb"
SHOWN = r"\x1b]0;x\x07\x1b[2J\u202e[bold]\x9b1A\rb"
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]")


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Both outputs of a command, which have no control character."""
    with contextlib.suppress(SystemExit):
        cli.main(list(arguments))
    output = capsys.readouterr()
    text = output.out + output.err
    assert not CONTROL.search(text), ascii(text)
    assert "Traceback" not in text
    return text


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder of images whose name, columns, class and answers are hostile."""
    root = tmp_path / f"{CLEAR}{BOLD}"
    names = [f"{TITLE}{i}{BOLD}{TURN}.png" for i in range(12)]
    rows = []
    for i, name in enumerate(names):
        write_picture(root / name, seed=i)
        rows.append(
            {"file_name": name, "question": f"What{CLEAR}?", "answer": f"red{HOSTILE}"}
            | {f"{CLEAR}column": "x"}
        )
    write_json_lines(root / "metadata.jsonl", *rows)
    return root


def recipe(root: Path, tmp_path: Path) -> list[str]:
    sets = {"mine": {"format": "imagefolder", "root": "."}}
    text = json.dumps(
        {
            "data": {"root": str(root), "sets": sets, "prepared": str(tmp_path / "prepared")},
            "evaluation": {"validation": []},
        }
    )
    (tmp_path / "recipe.yaml").write_text(text)
    return [str(tmp_path / "recipe.yaml")]


def test_prepare_check_and_show(root: Path, tmp_path: Path, capsys) -> None:
    made = recipe(root, tmp_path)
    run(capsys, "prepare", *made)
    run(capsys, "check", *made)
    text = run(capsys, "show", *made, "-n", "1")
    assert SHOWN in text
    assert f"{escape(TITLE)}" in text  # the name of an image


def test_show_and_check_of_broken_rows(root: Path, tmp_path: Path, capsys) -> None:
    (root / f"{TITLE}0{BOLD}{TURN}.png").write_bytes(b"no image")
    write_json_lines(root / "more.jsonl", {f"{CLEAR}no": f"column{BOLD}"})
    made = recipe(root, tmp_path)
    assert escape(TITLE) in run(capsys, "check", *made)


def test_errors_and_warnings(tmp_path: Path, capsys) -> None:
    assert rf"no recipe {SHOWN}:" in run(capsys, "train", HOSTILE)
    assert SHOWN in run(capsys, "train", "quickstart", f"training.{HOSTILE}=3")
    assert SHOWN in run(capsys, "train", "quickstart", f"model.start='{HOSTILE}'")
    assert escape(CLEAR) in run(capsys, "train", "quickstart", f"--{HOSTILE}")
    assert SHOWN in run(capsys, "answer", "--image", HOSTILE, "--instruction", "What?")
    assert SHOWN in run(capsys, "inspect", HOSTILE)
    assert r"\udcff" in run(capsys, "inspect", "\udcff")


def test_answers(tmp_path: Path, capsys, monkeypatch) -> None:
    image = write_picture(tmp_path / "0.png")
    monkeypatch.setattr(Engine, "stream", lambda *_a, **_k: iter(HOSTILE))
    text = run(capsys, "answer", "--image", str(image), "--instruction", "What?")
    assert text == f"{SHOWN}\n"


@pytest.mark.parametrize("bar", [True, False])
def test_what_is_drawn_on_a_terminal(capsys, monkeypatch, bar: bool) -> None:
    """rich's own sequences stay; those of texts are escaped, with a bar below or without."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    if bar:
        with progress_bar(HOSTILE) as shown:
            shown(1, 2)
            shown.print(HOSTILE)
            print(HOSTILE)
    else:
        Terminal().print(HOSTILE, style="bold")
    printed = "".join(capsys.readouterr())
    assert "\x1b[" in printed  # of rich
    assert not re.search("\x1b\\]|\x1b\\[2J|\x07|\x9b|\u202e", printed), ascii(printed)
    assert "[bold]" in printed
    assert not bar or printed.count(SHOWN) >= 3
