"""Heat maps: where the queries look under several instructions, and what an answer comes from."""

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from unicodedata import east_asian_width

import numpy as np
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from instructblip.core.files import replacing
from instructblip.data.reading.images import load_image
from instructblip.inference.engine import Engine
from instructblip.inference.explain import Explanation
from instructblip.inference.inputs import ImageInput
from instructblip.model.explain import Method

SIDE = 320
"""Pixels of a panel."""
FONTS = (
    "DejaVu Sans", "Noto Sans CJK SC", "Noto Sans SC", "Source Han Sans SC", "WenQuanYi Micro Hei",
    "WenQuanYi Zen Hei", "Microsoft YaHei", "SimHei", "PingFang SC", "Hiragino Sans GB",
)  # fmt: skip
"""matplotlib's own font, and fonts with Chinese characters, which it has not."""


def heat_map(image: Image.Image, weights: Float[Tensor, "G G"], side: int) -> Image.Image:
    """The image as a square of ``side`` pixels, bright where the weight is high, dark elsewhere,
    also where it is negative."""
    base = np.asarray(image.resize((side, side)).convert("RGB")).astype(np.float32)
    scaled = weights.clamp(min=0).numpy() / max(float(weights.max()), 1e-9)
    small = Image.fromarray((scaled * 255).astype(np.uint8))
    heat = np.asarray(small.resize((side, side), Image.Resampling.BICUBIC), np.float32) / 255
    glow = np.stack([64 * heat, 36 * heat, 0 * heat], axis=-1)
    mixed = base * (0.25 + 0.75 * heat[..., None]) + glow
    return Image.fromarray(np.clip(mixed, 0, 255).astype(np.uint8))


def draw_looks(
    engine: Engine, image: ImageInput, instructions: Sequence[str], out: Path
) -> list[str]:
    """Draw one image under several instructions into ``out``, whole or not at all.

    The first panel shows what the model reads of the image; each further one shows an instruction,
    the answer, and where the queries look under it (the mean of all queries; `Engine.look`). The
    kind of file follows the name. Returns the answers. Raises ValueError without an instruction,
    and as `Engine.answer` for an image that cannot be read.
    """
    if not instructions:
        raise ValueError("give at least one instruction")
    image, whole = _opened(engine, image)
    answers = engine.answer(image, list(instructions))
    assert isinstance(answers, list)
    looks = engine.look(engine.samples(image, instructions))[:, 0]  # [B, Q, G, G]
    panels = [
        (heat_map(whole, look.mean(0), SIDE), text, answer)
        for look, text, answer in zip(looks, instructions, answers, strict=True)
    ]
    _draw_panels(whole, panels, len(panels) + 1, out)
    return answers


def draw_explanation(
    engine: Engine,
    image: ImageInput,
    instruction: str,
    out: Path,
    answer: str | None = None,
    method: Method = "occlusion",
) -> Explanation:
    """Draw what an answer comes from into ``out``, whole or not at all: panels of the image, of the
    whole answer and of each of its words, with their probabilities. See `Engine.explain`."""
    image, whole = _opened(engine, image)
    explained = engine.explain(image, instruction, answer, method)
    panels = [(heat_map(whole, explained.whole, SIDE), instruction, explained.answer)]
    if len(explained.words) > 1:
        panels += [
            (heat_map(whole, each, SIDE), "", f"{word} ({100 * math.exp(score):.0f} %)")
            for word, score, each in zip(
                explained.words, explained.scores, explained.maps, strict=True
            )
        ]
    _draw_panels(whole, panels, 6, out)
    return explained


def _opened(engine: Engine, image: ImageInput) -> tuple[Image.Image, Image.Image]:
    """The image, and the part of it that the model sees."""
    transform = engine.images.transform
    if not isinstance(image, Image.Image):
        image = load_image(image, window=transform.window)
    return image, image.crop(transform.seen(*image.size))


def _draw_panels(
    whole: Image.Image, panels: Sequence[tuple[Image.Image, str, str]], columns: int, out: Path
) -> None:
    """A picture of the image and of ``panels``, each with a text above it and one below."""
    from matplotlib.figure import Figure  # without pyplot, whose backend is the caller's
    from matplotlib.font_manager import get_font_names

    panels = [(whole.convert("RGB").resize((SIDE, SIDE)), "", ""), *panels]
    columns = min(columns, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(3.3 * columns, 4.4 * rows))
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    style = {"fontsize": 9, "parse_math": False}  # a user's $ is no formula
    style["family"] = [font for font in FONTS if font in get_font_names()]
    for axis in axes:
        axis.set_axis_off()
    for axis, (panel, above, below) in zip(axes, panels, strict=False):
        axis.imshow(panel)
        axis.set_title(lines(above), loc="left", **style)
        axis.text(0, SIDE * 1.03, lines(below), va="top", weight="bold", **style)
    figure.tight_layout()
    with replacing(out) as file:
        figure.savefig(file, format=out.suffix[1:] or "png", dpi=110)


def lines(text: str) -> str:
    """At most four lines of the width of a panel; a Chinese character is as wide as two letters."""
    columns = sum(1 + (east_asian_width(character) in "WF") for character in text)
    return textwrap.fill(text, 42 * len(text) // columns if text else 42, max_lines=4)
