"""Drawn pictures beside their prompts: one picture file, and a folder that the report reads."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import wrap

from PIL import Image, ImageDraw, ImageFont
from pydantic import TypeAdapter, ValidationError

from instructblip.core.files import write_json
from instructblip.text_to_image.measure import Figures, Measured
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


@dataclass(frozen=True, slots=True)
class Drawing:
    """A picture, its prompt, the picture it was drawn from or none, and the checker's verdict.
    Pictures are named relative to the folder."""

    prompt: str
    picture: str
    subject: str | None
    right: bool


@dataclass(frozen=True, slots=True)
class DrawnKind:
    """The figures of one kind of prompt and some of its pictures."""

    kind: str
    figures: Figures
    drawings: tuple[Drawing, ...]


INDEX = "drawn.json"
_INDEX: TypeAdapter[tuple[DrawnKind, ...]] = TypeAdapter(tuple[DrawnKind, ...])


def write_drawings(folder: Path, measured: Sequence[Measured], shown: int = 24) -> Path:
    """``shown`` pictures of each kind, a grid of them, and ``drawn.json`` for the report."""
    kinds = []
    for each in measured:
        examples, own = each.examples[:shown], []
        subjects = [e.image() if e.image else None for e in examples]
        for number, (example, subject) in enumerate(zip(examples, subjects, strict=True)):
            picture, reference = f"{each.kind}/{number}.png", f"{each.kind}/{number}_subject.png"
            save_picture(each.pictures[number], folder / picture)
            if subject is not None:
                save_picture(subject, folder / reference)
            right = each.verdicts[number].exact
            name = None if subject is None else reference
            own.append(Drawing(example.instruction, picture, name, right))
        kinds.append(DrawnKind(each.kind, each.figures, tuple(own)))
        prompts, right = [d.prompt for d in own], [d.right for d in own]
        grid = folder / f"{each.kind}.png"
        write_gallery(grid, each.pictures[:shown], prompts, right, subjects)
    write_json(folder / INDEX, [asdict(kind) for kind in kinds])
    return folder / INDEX


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
