"""Every command of the docs runs through the real command line, and the site builds."""

import ast
import inspect
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from instructblip.cli import (
    main as cli,
)
from instructblip.cli import (
    stages,
    stages_measure,
    stages_use,
)

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [*ROOT.glob("README*.md"), *DOCS.glob("*.md"), *DOCS.glob("howto/*.md")]
COMMAND = re.compile(r"^ *(?:torchrun .*-m )?(instructblip [a-z]+ .*)$", re.MULTILINE)
PLACEHOLDERS = {"RECIPE": "scenes", "MODEL": "starter"}
RECIPE = "{model: {start: starter}, data: {sets: {vqav2: {}}}, training: {warmup_steps: 10}}\n"


def commands() -> list[tuple[str, str]]:
    return [
        (page.name, line) for page in PAGES for line in COMMAND.findall(page.read_text("utf-8"))
    ]


def test_there_are_commands() -> None:
    shown = {line.split()[1] for _, line in commands()}
    registered = [
        command for app in (cli.app, cli.measure, cli.use) for command in app.registered_commands
    ]
    names = {command.name or command.callback.__name__ for command in registered}
    assert not names - shown, "a command that no page shows"


@pytest.mark.parametrize(("page", "line"), commands())
def test_commands_reach_their_stage(
    page: str, line: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Options, values and overrides are those of the program: what a stage then does has tests of
    its own, so here each is replaced by one that checks that it is called as it is declared."""
    called: list[str] = []

    def stand_in(name: str, stage: Any) -> Any:
        def record(*args: Any, **kwargs: Any) -> Any:
            inspect.signature(stage).bind(*args, **kwargs)
            called.append(name)
            return name == "check"  # whether all is well

        return record

    for module in (stages, stages_measure, stages_use):
        for name, stage in vars(module).copy().items():
            own = inspect.isfunction(stage) and stage.__module__ == module.__name__
            if own and name != "recipe_of":
                monkeypatch.setattr(module, name, stand_in(name, stage))
    (tmp_path / "keys.txt").write_text("a-key\n")
    (tmp_path / "my.yaml").write_text(RECIPE)
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
