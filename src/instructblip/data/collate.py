"""``list[Sample]`` -> ``Batch``: equal pictures once, text padded on the right."""

import torch
from torch import Tensor

from instructblip.core.batch import Batch, Sample
from instructblip.data.reading.frames import repeated

PAD_ID = 0
"""Written where the mask is 0. Any valid id would do: no one reads it."""


def collate(samples: list[Sample]) -> Batch:
    """B samples with F frames each; ValueError when they cannot stand in one batch.

    Two samples with the keys ("a", "b") and ("b", "c") give N = 3 pictures and
    ``image_index`` [[0, 1], [1, 2]]. F is the most that a sample has; one with fewer repeats its
    own in order. Each is still encoded once, but the language model then reads F * Q query tokens
    where it would read fewer for that sample alone.
    """
    if not samples:
        raise ValueError("a batch needs at least one sample")
    cached = [sample.features is not None for sample in samples]
    if any(cached) != all(cached):
        raise ValueError("some samples bring pixels and some features; expected all alike")
    most = max(len(sample.image_keys) for sample in samples)
    slots: dict[str, int] = {}
    pictures: list[Tensor] = []
    index = []
    for sample in samples:
        frames = sample.features if sample.features is not None else sample.pixels
        if frames is None or len(frames) != len(sample.image_keys):
            raise ValueError(
                f"{sample.dataset} {sample.id}: {len(sample.image_keys)} image keys and "
                f"{len(frames or ())} pictures; expected as many of one as of the other"
            )
        if most and not frames:
            raise ValueError(
                f"{sample.dataset} {sample.id}: no picture, others in the batch have {most}; "
                "expected one at least"
            )
        for key, picture in zip(sample.image_keys, frames, strict=True):
            if key not in slots:
                slots[key] = len(pictures)
                pictures.append(picture)
        own = [slots[key] for key in sample.image_keys]
        index.append([own[i] for i in repeated(len(own), most)])
    stacked = torch.stack(pictures)
    qformer_ids, qformer_mask = pad([sample.qformer_ids for sample in samples])
    prompt_ids, prompt_mask = pad([sample.prompt_ids for sample in samples])
    response_ids, response_mask = pad([sample.response_ids for sample in samples])
    return Batch(
        image_index=torch.tensor(index, dtype=torch.int64),
        qformer_ids=qformer_ids,
        qformer_mask=qformer_mask,
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        response_ids=response_ids,
        response_mask=response_mask,
        pixel_values=None if cached[0] else stacked,
        image_features=stacked if cached[0] else None,
        datasets=tuple(sample.dataset for sample in samples),
        ids=tuple(sample.id for sample in samples),
    )


def pad(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Ids and mask, int64 [B, longest]: ``[[5, 6], [7]]`` -> ``[[5, 6], [7, 0]]``."""
    longest = max(len(row) for row in rows)
    ids = torch.tensor([row + [PAD_ID] * (longest - len(row)) for row in rows], dtype=torch.int64)
    mask = torch.tensor(
        [[1] * len(row) + [0] * (longest - len(row)) for row in rows], dtype=torch.int64
    )
    return ids.view(len(rows), longest), mask.view(len(rows), longest)
