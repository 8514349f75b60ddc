"""A walk through the commands of AGENTS.md, in their order, each shortened by settings, and then
through the server of tools, started as docs/howto/agents.md has it."""

import json
import os
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import anyio
import pytest
from mcp.client import Client
from mcp.client.stdio import StdioServerParameters, stdio_client

import instructblip.cli.main as cli
from tests.test_docs import COMMAND, ROOT

SHORT = {
    "scenes": ["--scale", "0.02"],
    "train": ["training.steps=2", "training.warmup_steps=1", "training.batch_size=4"],
    "evaluate": ["evaluation.benchmarks=[scenes_vqav2]", "--limit", "2"],
    "answer": ["--max-new-tokens", "3"],
}


def test_the_walk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    block = (ROOT / "AGENTS.md").read_text().split("```")[1]
    lines = COMMAND.findall(block)
    printed = {}
    for line in lines:
        _, name, *words = shlex.split(line, comments=True)
        with pytest.raises(SystemExit) as stop:
            cli.main([name, *words, *SHORT.get(name, [])])
        assert not stop.value.code, line
        printed[name] = capsys.readouterr().out
    walked = ["scenes", "check", "train", "status", "evaluate", "compare", "answer"]
    assert [*printed] == walked
    status = json.loads(printed["status"])
    assert (status["step"], status["steps"], status["running"]) == (2, 2, False)
    assert "loss" in status["last"]
    assert printed["check"].startswith("ok")
    assert "before" in printed["compare"]
    assert printed["answer"].strip()
    assert anyio.run(asked_as_a_tool, tmp_path) == status


async def asked_as_a_tool(folder: Path) -> dict[str, Any]:
    """What `status` returns about the run of the walk."""
    page = (ROOT / "docs/howto/agents.md").read_text()
    shown = json.loads(re.findall(r"```json\n(.*?)```", page, re.DOTALL)[0])
    server = shown["mcpServers"]["instructblip"]
    assert server["command"] == "instructblip"
    words = [str(folder) if word == "my_project" else word for word in server["args"]]
    arguments = ["-m", "instructblip", *words]
    parameters = StdioServerParameters(
        command=sys.executable, args=arguments, env=dict(os.environ), cwd=ROOT
    )
    async with Client(stdio_client(parameters)) as client:
        result = await client.call_tool("status", {"run": "out/mine"})
    (part,) = result.content
    assert part.type == "text"
    return json.loads(part.text)
