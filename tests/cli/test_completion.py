"""What bash completes: commands, recipes, models and benchmarks."""

import pytest

from instructblip.cli import main as cli
from instructblip.cli.options import MODELS
from instructblip.model.checkpoints.directory import NAMES


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("instructblip ev", {"evaluate"}),
        ("instructblip train quick", {"quickstart", "quickstart_real"}),
        ("instructblip evaluate star", {"starter"}),
        ("instructblip evaluate den", {"dense"}),
        ("instructblip answer --model sma", {"small"}),
        ("instructblip evaluate starter --benchmarks scenes_ok", {"scenes_okvqa"}),
        (
            "instructblip evaluate x --benchmarks okvqa,scenes_held_",
            {
                "okvqa,scenes_held_in",
                "okvqa,scenes_held_out",
            },
        ),
        ("instructblip export x --car", {"--card"}),
    ],
)
def test_bash(
    line: str,
    expected: set[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("_INSTRUCTBLIP_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", line)
    monkeypatch.setenv("COMP_CWORD", str(len(line.split()) - 1))
    with pytest.raises(SystemExit):
        cli.main([])
    assert {*capsys.readouterr().out.split()} == expected


def test_the_script_for_bash(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("_INSTRUCTBLIP_COMPLETE", "source_bash")
    with pytest.raises(SystemExit):
        cli.main([])
    assert "complete -o default -F" in capsys.readouterr().out


def test_the_models_are_those_of_the_package() -> None:
    assert MODELS == NAMES
