"""Drawn pictures beside their prompts, as one picture file and as cards of the report."""

from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap

from PIL import Image, ImageDraw, ImageFont

from instructblip.text_to_image.sample import save_picture

SIDE, TEXT, MARGIN = 128, 64, 8
RIGHT, WRONG, INK = (30, 130, 60), (190, 50, 40), (30, 30, 30)


def write_gallery(
    path: Path,
    pictures: Sequence[Image.Image],
    prompts: Sequence[str],
    right: Sequence[bool] | None = None,
    references: Sequence[Image.Image | None] | None = None,
    columns: int = 6,
) -> Path:
    """A grid; a frame says whether the checker found everything, a small inset is the subject."""
    rows = -(-len(pictures) // columns)
    width, height = SIDE + 2 * MARGIN, SIDE + TEXT + 2 * MARGIN
    grid = Image.new("RGB", (columns * width, rows * height), "white")
    draw, font = ImageDraw.Draw(grid), ImageFont.load_default(size=11)
    for index, (picture, prompt) in enumerate(zip(pictures, prompts, strict=True)):
        row, column = divmod(index, columns)
        x, y = column * width + MARGIN, row * height + MARGIN
        grid.paste(picture.resize((SIDE, SIDE), Image.Resampling.NEAREST), (x, y))
        if right is not None:
            frame = (x - 3, y - 3, x + SIDE + 2, y + SIDE + 2)
            draw.rectangle(frame, outline=RIGHT if right[index] else WRONG, width=3)
        if references is not None and (reference := references[index]) is not None:
            inset = reference.resize((SIDE // 3, SIDE // 3), Image.Resampling.BILINEAR)
            grid.paste(inset, (x, y))
            draw.rectangle((x, y, x + SIDE // 3, y + SIDE // 3), outline=INK)
        draw.multiline_text((x, y + SIDE + 4), "\n".join(wrap(prompt, 22)[:4]), INK, font=font)
    save_picture(grid, path)
    return path
