"""What the Dockerfile promises, as far as it can be read and run without Docker."""

import fnmatch
import re
import urllib.error
from pathlib import Path

import pytest

from instructblip.inference.engine import Engine
from instructblip.serving.api import create_app
from runs.container import Step, read_steps, write_context
from tests.conftest import greedy_engine, running
from tests.test_docs import ROOT

PAGE = (ROOT / "docs/howto/container.md").read_text("utf-8")


@pytest.fixture(scope="module")
def steps() -> list[Step]:
    return read_steps((ROOT / "Dockerfile").read_text("utf-8"))


def one(steps: list[Step], name: str) -> Step:
    (step,) = (step for step in steps if step.name == name)
    return step


def test_the_base_is_pinned_and_the_user_has_no_rights(steps: list[Step]) -> None:
    assert re.fullmatch(r"debian:\d+\.\d+-slim", one(steps, "FROM").text)
    names = [step.name for step in steps]
    assert "RUN" not in names[names.index("USER") :]
    user, group = map(int, one(steps, "USER").text.split(":"))
    assert user == group > 999
    assert any(f"useradd --uid {user} " in step.text for step in steps)


def test_versions_are_those_of_the_tested_set(steps: list[Step]) -> None:
    variables = " ".join(step.text for step in steps if step.name == "ENV")
    installs = [step.text for step in steps if "pip install" in step.text]
    assert "PIP_CONSTRAINT=/opt/build/constraints.txt" in variables
    assert len(installs) == 3
    assert "--no-deps" in installs[-1]


def test_the_default_command_is_that_of_the_page(steps: list[Step]) -> None:
    words = one(steps, "ENTRYPOINT").words + one(steps, "CMD").words
    assert f"\n{' '.join(words)}\n" in PAGE
    assert one(steps, "VOLUME").words == ["/data", "/models"]


def test_the_health_check_asks_the_server(steps: list[Step], model_folder: Path) -> None:
    words = Step("CMD", [], one(steps, "HEALTHCHECK").text.removeprefix("CMD ")).words
    assert words[:2] == ["python", "-c"]
    engines: dict[str, Engine] = {"instructblip": greedy_engine(model_folder)}
    with running(create_app(engines)) as address:
        asked = words[2].replace("http://127.0.0.1:8000", address)
        assert address in asked
        exec(asked, {})
    with pytest.raises(urllib.error.URLError):
        exec(asked, {})


def test_the_context_has_what_the_package_needs(steps: list[Step], tmp_path: Path) -> None:
    write_context(tmp_path)
    copied = [word for step in steps if step.name == "COPY" for word in step.words[:-1]]
    assert copied
    assert all((tmp_path / name).is_file() for name in copied)
    assert {path.name for path in tmp_path.iterdir()} >= {"README.md", "LICENSE", "src"}
    assert (tmp_path / "src/instructblip/cli/main.py").is_file()
    files = [path.name for path in tmp_path.rglob("*") if path.is_file()]
    assert not fnmatch.filter(files, "*.pyc")


def test_a_dockerfile_is_read_as_docker_reads_it() -> None:
    text = "# a comment\nFROM a:1\nRUN --mount=type=bind,target=/c one \\\n# between\n  && two\n"
    text += 'CMD ["x", "y z"]\n'
    start, run, command = read_steps(text)
    assert start == Step("FROM", [], "a:1")
    assert run.options == ["--mount=type=bind,target=/c"]
    assert run.text.split() == ["one", "&&", "two"]
    assert command.words == ["x", "y z"]
