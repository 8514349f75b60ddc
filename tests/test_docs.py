"""Every command of the docs runs through the real command line, and the site builds."""

import ast
import inspect
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from instructblip import cli, stages, stages_use

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.zh-CN.md", ROOT / "docs" / "index.md", *(ROOT / "docs/howto").glob("*.md")]


def commands() -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        for block in re.findall(r"```console\n(.*?)```", page.read_text("utf-8"), re.DOTALL):
            found += [(page.name, line) for line in block.splitlines() if line.strip()]
    return found


def test_there_are_commands() -> None:
    stages_named = {line.split()[1] for _, line in commands()}
    assert {"answer", "chat", "serve", "tune", "inspect", "import", "export"} <= stages_named


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

        return record

    for module in (stages, stages_use):
        for name, stage in vars(module).copy().items():
            if inspect.isfunction(stage) and stage.__module__ == module.__name__:
                monkeypatch.setattr(module, name, stand_in(name, stage))
    (tmp_path / "keys.txt").write_text("a-key\n")
    monkeypatch.chdir(tmp_path)
    program, *arguments = shlex.split(line)
    assert program == "instructblip"
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
    for page in PAGES[1:]:
        assert page.relative_to(ROOT / "docs").as_posix() in listed
