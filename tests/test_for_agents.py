"""A walk through the commands of AGENTS.md, in their order, each shortened by settings."""

import json
import shlex
from pathlib import Path

import pytest

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
