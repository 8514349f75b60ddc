"""Images and instructions as callers give them: opened, paired, and grouped into batches."""

import tempfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from instructblip.core.batch import Sample
from instructblip.data.reading.frames import VIDEO_SUFFIXES, extract_frames
from instructblip.data.reading.images import load_image
from instructblip.data.reading.records import IMAGE_SUFFIXES, local_path
from instructblip.data.templates import Rendered

ImageInput = Image.Image | str | Path
"""A Pillow image or the path of one."""
FramesInput = ImageInput | Sequence[ImageInput]
"""An image, or the frames of a video."""
ImagesInput = FramesInput | Sequence[Sequence[ImageInput]]
"""An image, or a list of images and of videos."""
FRAMES = 4
"""Frames that stand for a video, evenly spaced, as in the paper."""
OTHERS = 8
"""Images of a folder that stand for any image; each is one more pass of the language model."""


def broadcast(
    images: ImagesInput, instructions: str | Sequence[str | Rendered]
) -> tuple[list[list[ImageInput]], list[str | Rendered]]:
    """As many lists of frames as instructions; a single one of either is repeated.

    Raises ValueError for counts that do not match and for a video without frames.
    """
    texts: list[str | Rendered] = (
        [instructions] if isinstance(instructions, str) else list(instructions)
    )
    given = [images] if isinstance(images, ImageInput) else list(images)
    videos = [[one] if isinstance(one, ImageInput) else list(one) for one in given]
    if isinstance(images, ImageInput):
        videos *= len(texts)
    if isinstance(instructions, str):
        texts *= len(videos)
    if len(videos) != len(texts):
        raise ValueError(
            f"got {len(videos)} images and {len(texts)} instructions; expected as many of one as "
            "of the other, or one of either"
        )
    if not all(videos):
        raise ValueError("a video without frames")
    return videos, texts


def image_key(image: ImageInput) -> str:
    """What identifies an image within a call: its path, or which object it is."""
    # The list that holds the object keeps it alive, so that its id is not given twice.
    return f"image {id(image)}" if isinstance(image, Image.Image) else str(image)


def group_samples(samples: Sequence[Sample], size: int) -> list[list[int]]:
    """Indices of up to ``size`` samples that form a batch: the same number of frames, and prompts
    of similar length."""
    frames = [len(sample.image_keys) for sample in samples]
    groups: list[list[int]] = []
    for i in sorted(range(len(samples)), key=lambda i: (frames[i], len(samples[i].prompt_ids))):
        if groups and len(groups[-1]) < size and frames[groups[-1][0]] == frames[i]:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def open_others(paths: Sequence[Path]) -> list[ImageInput]:
    """Images for the blind likelihood of an answer: files, and of a folder up to `OTHERS` of its
    images, evenly spread over their names.

    Raises ValueError or FileNotFoundError, naming the file, for what cannot be decoded.
    """
    chosen: list[Path] = []
    for path in paths:
        if not path.is_dir():
            chosen.append(path)
            continue
        files = sorted(f for f in path.iterdir() if f.suffix.lower() in IMAGE_SUFFIXES)
        if not files:
            raise ValueError(f"{path} holds no images; expected {', '.join(IMAGE_SUFFIXES)}")
        chosen += files[:: -(-len(files) // OTHERS)]
    return open_images(chosen)


def open_images(paths: Sequence[Path]) -> list[ImageInput]:
    """The images that one question is about: the frames of a video file, other paths as they are.

    Raises ValueError or FileNotFoundError, naming the file, for what cannot be decoded.
    """
    images: list[ImageInput] = []
    for path in (Path(local_path(str(path), "--image")) for path in paths):
        if path.is_dir():
            raise ValueError(f"{path} is a folder; give an image or a video, or --batch FOLDER")
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist")
        if path.suffix.lower() in VIDEO_SUFFIXES:
            with tempfile.TemporaryDirectory() as folder:
                files = extract_frames(path, Path(folder) / "frames", FRAMES)
                images += [load_image(file) for file in sorted(files.iterdir())]
        else:
            load_image(path)
            images.append(path)
    return images
