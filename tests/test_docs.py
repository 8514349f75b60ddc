"""Every command of the docs runs through the real command line, and the site builds."""

import ast
import functools
import inspect
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.models import CommandInfo

import instructblip.cli.main as cli
from instructblip.recipe.load import load_recipe

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
FOR_AGENTS = [ROOT / "AGENTS.md", *ROOT.glob("skills/*/SKILL.md")]
PAGES = [*ROOT.glob("README*.md"), *FOR_AGENTS, *DOCS.glob("*.md"), *DOCS.glob("howto/*.md")]
COMMAND = re.compile(r"^ *(?:torchrun .*-m )?(instructblip [a-z]+ .*)$", re.MULTILINE)
PLACEHOLDERS = {"RECIPE": "scenes", "MODEL": "starter"}
RECIPE = "{model: {start: starter}, data: {sets: {vqav2: {}}}, training: {warmup_steps: 10}}\n"


def commands() -> list[tuple[str, str]]:
    return [
        (page.name, line) for page in PAGES for line in COMMAND.findall(page.read_text("utf-8"))
    ]


def registered(app: typer.Typer = cli.app) -> list[CommandInfo]:
    groups = [group.typer_instance for group in app.registered_groups]
    nested = [command for group in groups if group for command in registered(group)]
    return [*app.registered_commands, *nested]


def test_there_are_commands() -> None:
    shown = {word for _, line in commands() for word in line.split()[1:3]}
    names = {command.name or command.callback.__name__ for command in registered()}
    assert not names - shown, "no page shows these commands"


@pytest.mark.parametrize(("page", "line"), commands())
def test_commands_are_those_of_the_program(
    page: str, line: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Options, values and overrides are those of the program. Other tests cover what a command
    does, so each is replaced by one that reads its recipe and records the call."""
    called: list[str] = []

    def stand_in(command: Any) -> Any:
        @functools.wraps(command)
        def record(**given: Any) -> None:
            inspect.signature(command).bind(**given)
            words = [str(word) for word in given.get("arguments") or given.get("models") or ()]
            overrides = given.get("overrides") or [word for word in words if "=" in word]
            if command.__name__ == "tune":  # its recipe has the folder as the set `own`
                overrides = ["data.sets.own.format=imagefolder", *overrides]
            recipe = None if given.get("answer") else given.get("recipe")  # else it is a model
            recipe = None if recipe and Path(recipe).is_dir() else recipe
            if recipe or overrides:
                load_recipe(recipe or "scenes", overrides)
            called.append(command.__name__)

        return record

    for command in registered():
        monkeypatch.setattr(command, "callback", stand_in(command.callback))
    (tmp_path / "keys.txt").write_text("a-key\n")
    (tmp_path / "my.yaml").write_text(RECIPE)
    (tmp_path / "my_images").mkdir()
    monkeypatch.chdir(tmp_path)
    _, *words = shlex.split(line, comments=True)
    arguments = [PLACEHOLDERS.get(word, word) for word in words]
    with pytest.raises(SystemExit) as stop:
        cli.main([*arguments, "--debug"])
    assert not stop.value.code, f"{page}: {line}"
    assert len(called) == 1


def test_python_in_the_docs_is_python() -> None:
    for page in PAGES:
        for block in re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.DOTALL):
            ast.parse(block)


def test_links_of_the_docs_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text("utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_site_has_all_pages() -> None:
    listed = re.findall(r": (\S+\.md)", (ROOT / "mkdocs.yml").read_text("utf-8"))
    assert all((ROOT / "docs" / name).is_file() for name in listed)
    for page in DOCS.rglob("*.md"):
        name = page.relative_to(DOCS).as_posix()
        assert name in listed or name.startswith("decisions/")
