"""Pictures and instructions as callers give them: paired, named, and sorted into batches."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from instructblip.core.batch import Sample

Picture = Image.Image | str | Path
"""A Pillow image or the path of one."""


def broadcast(
    images: Picture | Sequence[Picture] | Sequence[Sequence[Picture]],
    instructions: str | Sequence[str],
) -> tuple[list[list[Picture]], list[str]]:
    """As many lists of frames as instructions."""
    texts = [instructions] if isinstance(instructions, str) else list(instructions)
    given = [images] if isinstance(images, Picture) else list(images)
    videos = [[one] if isinstance(one, Picture) else list(one) for one in given]
    if isinstance(images, Picture):
        videos *= len(texts)
    if isinstance(instructions, str):
        texts *= len(videos)
    if len(videos) != len(texts):
        raise ValueError(
            f"got {len(videos)} pictures and {len(texts)} instructions; expected as many of one as "
            "of the other, or one of either"
        )
    if not all(videos):
        raise ValueError("a video without frames")
    return videos, texts


def key_of(picture: Picture) -> str:
    """What tells a picture from the others of a call: its path, or which object it is."""
    # Alive as long as the list that holds it, so that the id is not given twice.
    return f"image {id(picture)}" if isinstance(picture, Image.Image) else str(picture)


def batches_of(samples: Sequence[Sample], size: int) -> list[list[int]]:
    """Indices of up to ``size`` samples that go together: as many frames, and about as long."""
    order = sorted(
        range(len(samples)),
        key=lambda i: (len(samples[i].image_keys), len(samples[i].prompt_ids)),
    )
    batches: list[list[int]] = []
    for i in order:
        fits = (
            batches
            and len(batches[-1]) < size
            and len(samples[batches[-1][0]].image_keys) == len(samples[i].image_keys)
        )
        if fits:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches
