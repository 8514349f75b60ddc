"""The whole way: official files -> prepare -> templates -> tokens -> collate -> loader."""

from pathlib import Path

import torch

from instructblip.data.images import ImageTransform
from instructblip.data.loader import Loader
from instructblip.data.order import Mixture
from instructblip.data.prepared.prepare import prepare
from instructblip.data.samples import ImageReader
from instructblip.data.tokens import Tokens
from tests.testing import write_vqa


def test_official_files_become_a_batch(tmp_path: Path, tokens: Tokens) -> None:
    root = write_vqa(tmp_path / "vqav2", 10)
    sets = {
        name: prepare(name, root, "train", tmp_path / "prepared")
        for name in ("vqav2", "vqav2_question")
    }
    loader = Loader(
        sets,
        Mixture({name: len(data) for name, data in sets.items()}),
        tokens,
        ImageReader(ImageTransform(image_size=8)),
        batch_size=6,
    )
    batch = loader.batch(0)
    assert len(batch) == 6
    assert batch.pixel_values is not None
    assert batch.pixel_values.shape[1:] == (3, 8, 8)
    assert batch.image_index.max() == len(batch.pixel_values) - 1
    assert set(batch.datasets) <= set(sets)
    last = batch.response_mask.sum(1) - 1
    assert (batch.response_ids[torch.arange(6), last] == tokens.eos_id).all()
