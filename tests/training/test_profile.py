"""A profile of a real step: every part is there, forward and backward."""

import re
from dataclasses import replace
from pathlib import Path

import torch

from instructblip.core.batch import Batch
from instructblip.training.train import train
from tests.model.test_language import tiny_model
from tests.parity.tiny import tiny_batch
from tests.training.toy import toy_config


class Batches:
    """The same batch at every step."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def iterate(self, step: int):
        while True:
            yield [self.batch]


def test_table_by_part(tmp_path: Path, capsys):
    model = tiny_model("llama")
    batch = replace(tiny_batch(model.config), datasets=(), ids=())
    config = toy_config(
        steps=6, batch_size=len(batch), profile=True, validate_every=None, save_every=10
    )
    torch.manual_seed(0)
    train(model, Batches(batch), None, config, tmp_path)
    table = (tmp_path / "profile.txt").read_text()
    assert table.strip() in capsys.readouterr().out
    assert (tmp_path / "trace.json").stat().st_size > 10_000
    rows = {}
    for line in table.splitlines()[1:]:
        name, ahead, back, share = re.split(r"\s{2,}", line.strip())
        rows[name] = (float(ahead), float(back), float(share.rstrip("%")))
    assert set(rows) == {
        "vision", "q-former", "language", "head", "input", "optimiser", "idle and the rest"
    }  # fmt: skip
    assert abs(sum(share for *_, share in rows.values()) - 100) < 1
    assert rows["vision"][1] == rows["optimiser"][1] == 0  # frozen, and no function of anything
    assert rows["q-former"][1] > 0
    assert rows["language"][1] > 0
