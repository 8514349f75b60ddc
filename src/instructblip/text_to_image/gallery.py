"""A folder of drawn images beside their prompts: written by the benchmark, read by the report."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import wrap

from PIL import Image, ImageDraw, ImageFont
from pydantic import TypeAdapter, ValidationError

from instructblip.core.files import write_json
from instructblip.text_to_image.measure import Figures, Measured
from instructblip.text_to_image.sample import save_picture

INDEX = "drawn.json"
COLUMNS, SIDE, TEXT, MARGIN = 6, 128, 64, 8  # of a grid; pixels
RIGHT, WRONG, INK = (30, 130, 60), (190, 50, 40), (30, 30, 30)


@dataclass(frozen=True, slots=True)
class Drawing:
    """A prompt, its image, the subject image if there is one, and the checker's verdict. Images are
    file names relative to the folder."""

    prompt: str
    picture: str
    subject: str | None
    right: bool


@dataclass(frozen=True, slots=True)
class DrawnKind:
    """The figures of one kind of prompt and some of its drawings."""

    kind: str
    figures: Figures
    drawings: tuple[Drawing, ...]


_INDEX: TypeAdapter[tuple[DrawnKind, ...]] = TypeAdapter(tuple[DrawnKind, ...])


def write_drawings(folder: Path, measured: Sequence[Measured], shown: int = 24) -> Path:
    """Write ``shown`` images of each kind, a grid of them, and ``drawn.json`` for the report."""
    kinds = []
    for each in measured:
        images, drawings = each.images[:shown], []
        subjects = [e.image() if e.image else None for e in each.examples[:shown]]
        for number, (image, subject) in enumerate(zip(images, subjects, strict=True)):
            name, subject_name = f"{each.kind}/{number}.png", None
            save_picture(image, folder / name)
            if subject is not None:
                subject_name = f"{each.kind}/{number}_subject.png"
                save_picture(subject, folder / subject_name)
            prompt, right = each.examples[number].instruction, each.verdicts[number].exact
            drawings.append(Drawing(prompt, name, subject_name, right))
        kinds.append(DrawnKind(each.kind, each.figures, tuple(drawings)))
        save_picture(_grid(images, drawings, subjects), folder / f"{each.kind}.png")
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


def read_drawings(folder: Path) -> tuple[DrawnKind, ...]:
    """What ``write_drawings`` wrote. Raises FileNotFoundError or ValueError naming the file."""
    path = folder / INDEX
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} holds no drawings: {INDEX} is missing; write them with "
            f"`python benchmarks/draw.py --out {folder}`"
        )
    try:
        return _INDEX.validate_json(path.read_bytes())
    except ValidationError as error:
        raise ValueError(f"{path}: {error}") from None
