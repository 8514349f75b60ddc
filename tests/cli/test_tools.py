"""The server for agents, with a real client over a pipe, and the paths that it refuses."""

import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import jsonschema_rs
import pytest
from mcp.client import Client
from mcp.client.stdio import StdioServerParameters, stdio_client
from mcp.shared.exceptions import MCPError

from instructblip.cli import tools
from instructblip.scenes.official import write_scenes
from tests.testing import write_picture

COMMAND = [sys.executable, "-m", "instructblip", "mcp", "--root"]
QUICK = ["training.steps=15", "training.warmup_steps=1", "training.batch_size=4"]
QUICK += ["training.log_every=1", "training.device=cpu", "data.root=scenes"]
QUICK += ["evaluation.validation=[scenes_vqav2]"]


@asynccontextmanager
async def connected(root: Path) -> AsyncIterator[Client]:
    command, *arguments = [*COMMAND, str(root)]
    server = StdioServerParameters(command=command, args=arguments, env=dict(os.environ))
    async with Client(stdio_client(server)) as client:
        yield client


def text_of(result: Any) -> str:
    return "\n".join(part.text for part in result.content)


def test_the_tools_and_what_they_refuse(tmp_path: Path) -> None:
    async def session() -> None:
        async with connected(tmp_path) as client:
            listed = {tool.name: tool for tool in (await client.list_tools()).tools}
            assert {"check", "tune", "train", "status", "evaluate", "answer"} <= {*listed}
            for tool in listed.values():
                jsonschema_rs.meta.validate(tool.input_schema)
                assert tool.description
            train = listed["train"].input_schema
            assert train["required"] == ["recipe"]
            assert train["properties"]["resume"]["type"] == "boolean"
            answer = listed["answer"].input_schema["properties"]
            assert answer["model"]["default"] == "starter"
            assert {"num_beams", "quantize"} <= {*answer}

            wrong = await client.call_tool("train", {"recipe": "scenes", "stepz": 3})
            assert (wrong.is_error, "stepz" in text_of(wrong)) == (True, True)
            wrong = await client.call_tool("status", {"run": "nowhere"})
            assert (wrong.is_error, "give the directory of a run" in text_of(wrong)) == (True, True)
            with pytest.raises(MCPError, match="no tool 'push'") as error:
                await client.call_tool("push", {})
            assert error.value.code == -32602

    anyio.run(session)


def test_a_broken_row_and_an_answer(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    write_picture(folder / "a.png")
    rows = [{"file_name": name, "caption": "a red star"} for name in ("a.png", "b.png")]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = "{model: {start: starter}, data: {root: ., sets: {mine: {format: imagefolder}}}}"
    (tmp_path / "my.yaml").write_text(recipe)
    asked = {"image": ["mine/a.png"], "instruction": "What is red?", "max_new_tokens": 3}
    lines: list[tuple[float, str | None]] = []

    async def report(progress: float, total: float | None, message: str | None) -> None:
        lines.append((progress, message))

    async def session() -> None:
        async with connected(tmp_path) as client:
            checked = await client.call_tool("check", {"recipe": "my.yaml"})
            assert checked.is_error
            assert "FAILED" in text_of(checked)
            assert "b.png" in text_of(checked)
            answer = await client.call_tool("answer", asked, progress_callback=report)
            assert not answer.is_error
            assert text_of(answer).strip()
            assert lines == [(1, text_of(answer).strip())]

    anyio.run(session)


def test_a_cancelled_training_resumes(tmp_path: Path) -> None:
    write_scenes(tmp_path / "scenes", scale=0.02)
    arguments = {"recipe": "quickstart", "overrides": QUICK, "out": "run"}

    def logged() -> list[int]:
        file = tmp_path / "run/metrics.jsonl"
        rows = map(json.loads, file.read_text().splitlines()) if file.exists() else ()
        return [row["step"] for row in rows if "loss" in row]

    async def session() -> None:
        async with connected(tmp_path) as client:
            async with anyio.create_task_group() as group:
                group.start_soon(client.call_tool, "train", arguments)
                with anyio.fail_after(60):
                    while not logged():
                        await anyio.sleep(0.05)
                group.cancel_scope.cancel()
            with anyio.fail_after(60):
                status = {"running": True}
                while status["running"]:
                    status = json.loads(text_of(await client.call_tool("status", {"run": "run"})))
            assert 0 < status["step"] < 15
            trained = await client.call_tool("train", {**arguments, "resume": True})
            assert not trained.is_error, text_of(trained)
            assert "finished at step 15" in text_of(trained)

    anyio.run(session)
    assert logged() == list(range(1, 16))


def test_only_the_protocol_is_on_stdout(tmp_path: Path) -> None:
    client = {"protocolVersion": "2025-06-18", "capabilities": {}}
    client |= {"clientInfo": {"name": "test", "version": "1"}}
    sent = [
        {"id": 1, "method": "initialize", "params": client},
        {"method": "notifications/initialized"},
        {"id": 2, "method": "ping"},
        {"id": 3, "method": "tools/unknown"},
        {"id": 4, "method": "tools/call", "params": {"name": 7}},
        {"id": 5, "method": "tools/call", "params": {"name": "status", "arguments": {}}},
    ]
    pipe = subprocess.PIPE
    answers = {}
    with subprocess.Popen([*COMMAND, str(tmp_path)], stdin=pipe, stdout=pipe, text=True) as server:
        assert server.stdin
        assert server.stdout
        for each in sent:
            server.stdin.write(json.dumps({"jsonrpc": "2.0", **each}) + "\n{nothing\n")
            server.stdin.flush()
            if "id" in each:
                answers[each["id"]] = json.loads(server.stdout.readline())
        server.stdin.close()
        assert server.stdout.read() == ""
    assert server.returncode == 0
    assert answers[1]["result"]["protocolVersion"] == "2025-06-18"
    assert answers[2]["result"] == {}
    assert answers[3]["error"]["code"] == -32601
    assert answers[4]["error"]["code"] == -32602
    assert answers[5]["result"]["isError"]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    (root / "run").mkdir(parents=True)
    (root / "run/recipe.yaml").write_text("{data: {root: /data, sets: {vqav2: {}}}}")
    (root / "based.yaml").write_text("base: ../other.yaml\n")
    (root / "ring.yaml").write_text("base: ring.yaml\n")
    (root / "good.yaml").write_text("{base: scenes, data: {root: scenes}}")
    (tmp_path / "other.yaml").write_text("secret")
    (root / "link").symlink_to(tmp_path)
    return root


def words(root: Path, name: str, arguments: dict[str, Any]) -> list[str]:
    command = next(each for each in tools.COMMANDS if each.__name__ == name)
    return tools.words_of(command, tools.arguments_of(command), root)(arguments)


@pytest.mark.parametrize(
    ("name", "arguments", "outside"),
    [
        ("status", {"run": "/etc"}, "/etc"),
        ("status", {"run": "../root2"}, "../root2"),
        ("status", {"run": "link"}, "link"),
        ("answer", {"image": ["a.png", "link/b.png"]}, "link/b.png"),
        ("answer", {"image": ["file:///etc/a.png"]}, "file:/etc/a.png"),
        ("answer", {"batch": "file:/etc"}, "file:/etc"),
        ("evaluate", {"arguments": ["starter", "data.root=file:/etc"]}, "file:/etc"),
        ("answer", {"model": "/models/blip2"}, "/models/blip2"),
        ("answer", {"model": "s3://bucket/model"}, "s3://bucket/model"),
        ("answer", {"model": "run"}, "/data"),
        ("train", {"recipe": "/etc/passwd"}, "/etc/passwd"),
        ("train", {"recipe": "based.yaml"}, "other.yaml"),
        ("train", {"recipe": "scenes", "overrides": ["data.root=/etc"]}, "/etc"),
        ("train", {"recipe": "scenes", "overrides": ["data.sets={a: {root: ../b}}"]}, "../b"),
        ("train", {"recipe": "scenes", "out": "link/run"}, "link/run"),
        ("evaluate", {"arguments": ["scenes", "run"]}, "/data"),
        ("evaluate", {"arguments": ["starter", "data.root=/etc"]}, "/etc"),
        ("compare", {"models": ["/results"]}, "/results"),
        ("tune", {"root": ".."}, ".."),
    ],
)
def test_no_path_leaves_the_root(
    root: Path, name: str, arguments: dict[str, Any], outside: str
) -> None:
    with pytest.raises(ValueError, match="the root of the tools") as error:
        words(root, name, arguments)
    assert f"{outside}' is outside {root}" in str(error.value)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("answer", {"instruction": "x" * 100_000}, r"answer: the arguments have 100,0\d\d char"),
        ("status", {"run": "a" * 100_000}, "expected at most 65,536"),
        ("answer", {"image": ["a.png"] * 10_000}, "put many questions into a JSONL file"),
        ("status", {"run": "a\0b"}, "status: a text has a NUL character; leave it out"),
        ("evaluate", {"arguments": []}, "evaluate: arguments: List should have at least 1 item"),
    ],
)
def test_arguments_that_no_command_line_holds(
    root: Path, name: str, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        words(root, name, arguments)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("train", {"recipe": "good.yaml"}, "train -- good.yaml"),
        (
            "train",
            {"recipe": "ring.yaml", "resume": True},
            "train --resume -- ring.yaml",
        ),
        (
            "evaluate",
            {"arguments": ["starter", "data.root=scenes"], "limit": 4, "blind": True},
            "evaluate --limit=4 --blind -- starter data.root=scenes",
        ),
        (
            "answer",
            {"image": ["a.png", "b.png"], "instruction": "--txt", "model": "hf://OWNER/NAME"},
            "answer --image=a.png --image=b.png --instruction=--txt --model=hf://OWNER/NAME --",
        ),
        (
            "answer",
            {"image": ["a.png"], "instruction": "\\u0000"},
            r"answer --image=a.png --instruction=\u0000 --",
        ),
        (
            "compare",
            {"models": ["a", "b"], "form": "json"},
            "compare --format=json -- a b",
        ),
    ],
)
def test_the_words_of_a_command(
    root: Path, name: str, arguments: dict[str, Any], expected: str
) -> None:
    assert words(root, name, arguments) == expected.split()


def test_each_text_is_a_path_or_is_not() -> None:
    """A new parameter of a command is sorted here before agents can give it."""
    texts = {
        name
        for command in tools.COMMANDS
        for name, kind, _, _ in tools.parameters(command)
        if str in tools.parts(kind) and name not in tools.NAMES_OF_PLACES
    }
    assert texts == {"instruction", "candidates", "min_confidence", "benchmarks", "group"} | {
        "batch_size",
        "devices",
        "quantize",
    }
