"""JSON of 10,000 levels, wherever it is read: one line that names the file."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from instructblip.cli.main import main
from instructblip.data.prepared.dataset import MANIFEST_FILE, PreparedDataset
from instructblip.evaluation.predictions import PREDICTIONS, read_predictions
from instructblip.evaluation.result import RESULT, Result
from instructblip.experiment.preference import PAIRS_FILE, read_pairs
from instructblip.inference.batch import read_requests
from instructblip.training.checkpoint import MANIFEST, verify
from instructblip.training.log import read_metrics

DEEP = '{"id": ' + "[" * 10_000 + "]" * 10_000 + "}\n"


def at_a_file(read: Callable[[Path], Any]) -> Callable[[Path, str], Any]:
    return lambda folder, name: read(folder / name)


@pytest.mark.parametrize(
    ("name", "read"),
    [
        (PREDICTIONS, at_a_file(read_predictions)),
        ("metrics.jsonl", at_a_file(read_metrics)),
        (PAIRS_FILE, lambda folder, _name: read_pairs(folder)),
        ("batch.jsonl", at_a_file(lambda path: read_requests(path, "what?"))),
        (RESULT, lambda folder, _name: Result.load(folder)),
        (MANIFEST_FILE, lambda folder, _name: PreparedDataset(folder)),
        (MANIFEST, lambda folder, _name: verify(folder)),
    ],
)
def test_a_reader_raises_one_line(
    name: str, read: Callable[[Path, str], Any], tmp_path: Path
) -> None:
    (tmp_path / PREDICTIONS).write_text("")
    (tmp_path / name).write_text(DEEP)
    with pytest.raises(ValueError, match=r"nested too deeply|no readable manifest") as error:
        read(tmp_path, name)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", [PREDICTIONS, RESULT])
def test_the_command_ends_with_code_2(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "mine" / "toy"
    folder.mkdir(parents=True)
    (folder / RESULT).write_text("{}")
    (folder / PREDICTIONS).write_text("")
    (folder / name).write_text(DEEP)
    with pytest.raises(SystemExit) as done:
        main(["compare", str(tmp_path / "mine")])
    assert done.value.code == 2
    assert "nested too deeply" in " ".join(capsys.readouterr().err.split())
