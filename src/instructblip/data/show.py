"""Training samples as the model reads them: pixels, texts, tokens, and which tokens carry loss.

The samples come from the training loader, so crop, template, answer and token ids are those of the
step that is shown. Which tokens carry loss is read from the collated batch.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float
from PIL import Image

from instructblip.core.batch import Batch
from instructblip.core.example import Example
from instructblip.core.files import write_text
from instructblip.core.pages import data_url, page_template
from instructblip.core.terminal import escape
from instructblip.data.images import ImageTransform
from instructblip.data.loader import Loader
from instructblip.data.order import CYCLE
from instructblip.data.samples import collate
from instructblip.data.templates import Rendered

if TYPE_CHECKING:
    from rich.text import Text

MAX_CYCLES = 64


@dataclass(frozen=True, slots=True)
class Token:
    """One token id and its text; ``loss`` says whether it is a label."""

    id: int
    text: str
    loss: bool


@dataclass(frozen=True, slots=True)
class Shown:
    """One training sample. ``images`` are what the model sees, S x S, and ``image_names`` their
    names in ``example.images``."""

    name: str
    step: int
    example: Example
    rendered: Rendered
    image_names: tuple[str, ...]
    images: tuple[Image.Image, ...]
    qformer: tuple[Token, ...]
    language: tuple[Token, ...]

    @property
    def texts(self) -> dict[str, str]:
        """The texts by name; the instruction only where it differs from the prompt."""
        rendered = self.rendered
        texts = {"prompt": rendered.prompt, "response": rendered.response}
        if rendered.instruction == rendered.prompt:
            return texts
        return {"instruction": rendered.instruction, **texts}

    @property
    def num_labels(self) -> int:
        """Tokens that carry loss."""
        return sum(token.loss for token in self.language)


def training_samples(loader: Loader, count: int) -> Iterator[Shown]:
    """The first ``count`` samples of each set, in the order in which training draws them.

    Sets that are drawn too rarely have fewer: the search ends after ``MAX_CYCLES`` cycles.
    """
    slots: list[list[int]] = [[] for _ in loader.names]
    wanted = sum(count for share in loader.order.shares if share)
    for slot in range(MAX_CYCLES * CYCLE):
        of_set = slots[loader.order[slot].dataset]
        if len(of_set) < count:
            of_set.append(slot)
            wanted -= 1
        if not wanted:
            break
    for name, of_set in zip(loader.names, slots, strict=True):
        for slot in of_set:
            yield _show(loader, name, slot)


def _show(loader: Loader, name: str, slot: int) -> Shown:
    example, rendered = loader.rendered(slot)
    sample = loader.sample(slot)
    assert sample.pixels is not None
    reader, tokens = loader.images[name], loader.tokens
    batch = collate([sample])
    return Shown(
        name=name,
        step=loader.step_of(slot),
        example=example,
        rendered=rendered,
        image_names=reader.select(example.images),
        images=tuple(_to_image(frame.numpy(), reader.transform) for frame in sample.pixels),
        qformer=tuple(_tokens(tokens.qformer, batch, "qformer", False)) if tokens.qformer else (),
        language=(
            *_tokens(tokens.language, batch, "prompt", False),
            *_tokens(tokens.language, batch, "response", True),
        ),
    )


def _tokens(tokenizer: Any, batch: Batch, part: str, labels: bool) -> Iterator[Token]:
    ids = getattr(batch, f"{part}_ids")[0].tolist()
    mask = getattr(batch, f"{part}_mask")[0].tolist()
    for number, text, real in zip(ids, tokenizer.convert_ids_to_tokens(ids), mask, strict=True):
        if real:
            yield Token(number, text.replace("▁", "␣").replace("Ġ", "␣"), labels)


def _to_image(pixels: Float[np.ndarray, "3 S S"], transform: ImageTransform) -> Image.Image:
    """Undoes the normalisation."""
    values = pixels.transpose(1, 2, 0) * np.asarray(transform.std) + np.asarray(transform.mean)
    return Image.fromarray(np.clip(np.rint(values * 255), 0, 255).astype(np.uint8))


def to_terminal(shown: Shown, colour: bool) -> "Text":
    """The sample as text; with ``colour`` the image in half blocks, and labels in green."""
    from rich.text import Text

    text = Text()
    head = f"{shown.name}  step {shown.step}  {shown.example.where}  id {shown.example.id}"
    text.append(f"{escape(head)}\n", "bold")
    text.append(f"image      {escape(', '.join(shown.image_names))}\n")
    if colour:
        for line in _half_blocks(shown.images[0]):
            text.append_text(line)
    for name, value in shown.texts.items():
        text.append(f"{name:11}{escape(value)}\n")
    if shown.qformer:
        text.append("Q-Former   " + " ".join(token.text for token in shown.qformer) + "\n", "dim")
    text.append("tokens     ")
    for token in shown.language:
        mark = token.text if colour or not token.loss else f"[{token.text}]"
        text.append(mark, "bold green" if token.loss else "dim").append(" ")
    of_all = f"{shown.num_labels} of {len(shown.language)}"
    return text.append(
        f"\n           {of_all} carry loss (in {'green' if colour else 'brackets'})\n"
    )


def _half_blocks(image: Image.Image, columns: int = 32) -> "Iterator[Text]":
    """Lines of ▀: the foreground colour is the upper pixel of a pair, the background the lower."""
    from rich.text import Text

    small = np.asarray(image.resize((columns, columns), Image.Resampling.BOX))
    for upper, lower in zip(small[::2], small[1::2], strict=True):
        line = Text("           ")
        for above, below in zip(upper.tolist(), lower.tolist(), strict=True):
            line.append("▀", "rgb({},{},{}) on rgb({},{},{})".format(*above, *below))
        yield line.append("\n")


def write_page(path: Path, shown: Iterable[Shown], facts: Mapping[str, str]) -> Path:
    """Writes an offline HTML page with ``facts`` about the run and the samples."""
    sets: dict[str, list[Shown]] = {}
    for one in shown:
        sets.setdefault(one.name, []).append(one)
    template = page_template(Path(__file__).with_name("show.html.j2"), data_url=data_url)
    write_text(path, template.render(sets=sets, facts=facts))
    return path
