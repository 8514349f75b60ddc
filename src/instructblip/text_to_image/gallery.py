"""Writes a folder of drawn images beside their prompts (`core.drawings`)."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from textwrap import wrap

from PIL import Image, ImageDraw, ImageFont

from instructblip.core.drawings import INDEX, Drawing, DrawnKind
from instructblip.core.files import write_json
from instructblip.text_to_image.measure import Measured
from instructblip.text_to_image.sample import save_image

COLUMNS, SIDE, TEXT, MARGIN = 6, 128, 64, 8  # of a grid; pixels
RIGHT, WRONG, INK = (30, 130, 60), (190, 50, 40), (30, 30, 30)


def write_drawings(folder: Path, measured: Sequence[Measured], shown: int = 24) -> Path:
    """Write ``shown`` images of each kind, a grid of them, and ``drawn.json`` for the report."""
    kinds = []
    for each in measured:
        images, drawings = each.images[:shown], []
        subjects = [e.image() if e.image else None for e in each.examples[:shown]]
        for number, (image, subject) in enumerate(zip(images, subjects, strict=True)):
            name, subject_name = f"{each.kind}/{number}.png", None
            save_image(image, folder / name)
            if subject is not None:
                subject_name = f"{each.kind}/{number}_subject.png"
                save_image(subject, folder / subject_name)
            prompt, right = each.examples[number].instruction, each.verdicts[number].exact
            drawings.append(Drawing(prompt, name, subject_name, right))
        kinds.append(DrawnKind(each.kind, each.figures, tuple(drawings)))
        save_image(_grid(images, drawings, subjects), folder / f"{each.kind}.png")
    write_json(folder / INDEX, [asdict(kind) for kind in kinds])
    return folder / INDEX


def _grid(
    images: Sequence[Image.Image],
    drawings: Sequence[Drawing],
    subjects: Sequence[Image.Image | None],
) -> Image.Image:
    """A green frame: the image is exactly as asked; red: it is not. The inset is the subject."""
    rows = -(-len(images) // COLUMNS)
    width, height = SIDE + 2 * MARGIN, SIDE + TEXT + 2 * MARGIN
    grid = Image.new("RGB", (COLUMNS * width, rows * height), "white")
    draw, font = ImageDraw.Draw(grid), ImageFont.load_default(size=11)
    for index, (image, drawing, subject) in enumerate(zip(images, drawings, subjects, strict=True)):
        row, column = divmod(index, COLUMNS)
        x, y = column * width + MARGIN, row * height + MARGIN
        grid.paste(image.resize((SIDE, SIDE), Image.Resampling.NEAREST), (x, y))
        frame = (x - 3, y - 3, x + SIDE + 2, y + SIDE + 2)
        draw.rectangle(frame, outline=RIGHT if drawing.right else WRONG, width=3)
        if subject is not None:
            inset = subject.resize((SIDE // 3, SIDE // 3), Image.Resampling.BILINEAR)
            grid.paste(inset, (x, y))
            draw.rectangle((x, y, x + SIDE // 3, y + SIDE // 3), outline=INK)
        lines = "\n".join(wrap(drawing.prompt, 22)[:4])
        draw.multiline_text((x, y + SIDE + 4), lines, INK, font=font)
    return grid
