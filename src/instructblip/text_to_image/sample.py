"""From an instruction, and a picture or none, to pictures: guided sampling, and the painter."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor

from instructblip.core.batch import Batch
from instructblip.core.files import replacing
from instructblip.data.images import (
    ImageTransform,
    load_image,
    to_rgb,
)
from instructblip.data.tokens import Tokens
from instructblip.text_to_image.batches import collate_drawings
from instructblip.text_to_image.decoder import Decoder
from instructblip.text_to_image.model import TextToImage
from instructblip.text_to_image.tasks import DrawExample

Condition = tuple[Float[Tensor, "B K C"], Bool[Tensor, "B K"]]
MAX_CHARACTERS = 2000
MAX_IMAGES = 64


@torch.no_grad()
def sample(
    model: TextToImage,
    batch: Batch,
    *,
    steps: int = 20,
    guidance: float = 2.0,
    image_guidance: float | None = None,
    generator: torch.Generator | None = None,
    on_step: Callable[[], None] | None = None,
) -> Float[Tensor, "B 3 G G"]:
    """Pictures in [-1, 1] for a batch of instructions.

    Two scales guide separately (InstructPix2Pix, section 3.2.1)::

        none + image_guidance (picture - none) + guidance (picture and instruction - picture)

    ``image_guidance`` None guides both by ``guidance``: two passes a step instead of three. A scale
    of 1 leaves the condition as it is. ``on_step`` is called before each step and ends it all by
    raising.
    """
    decoder: Decoder = model.decoder
    weighted = _conditions(model, batch, guidance, image_guidance)
    condition, mask = (torch.cat(parts) for parts in zip(*(c for _, c in weighted), strict=True))
    scales = [scale for scale, _ in weighted]
    noisy = decoder.start(len(batch), generator)
    levels = decoder.schedule(steps)
    for place, level in enumerate(levels):
        if on_step is not None:
            on_step()
        with model.precision():
            given = decoder.predict(
                noisy.repeat(len(scales), *[1] * (noisy.ndim - 1)), level, condition, mask
            )
        parts = given.float().chunk(len(scales))
        guided = torch.stack([s * p for s, p in zip(scales, parts, strict=True)]).sum(0)
        noisy = decoder.advance(noisy, guided, place, levels)
    return decoder.pixels(noisy)


def _conditions(
    model: TextToImage, batch: Batch, guidance: float, image_guidance: float | None
) -> list[tuple[float, Condition]]:
    """Conditions with the factors of their predictions, which sum to 1; factors of 0 left out."""
    index = batch.image_index[:, 0]
    features = model.encode(batch)
    nothing, no_text = torch.full_like(index, -1), torch.zeros_like(batch.qformer_mask)
    if image_guidance is None or features is None:
        image_guidance, picture = guidance, 0.0
    else:
        picture = image_guidance - guidance
    factors: list[tuple[float, Int[Tensor, " B"], Tensor]] = [
        (guidance, index, batch.qformer_mask),
        (picture, index, no_text),
        (1 - guidance - picture, nothing, no_text),
    ]
    return [
        (factor, model.condition(features, rows, batch.qformer_ids, text))
        for factor, rows, text in factors
        if abs(factor) > 1e-6
    ]


def to_pictures(pixels: Float[Tensor, "B 3 G G"]) -> list[Image.Image]:
    """Tensors in [-1, 1] -> RGB pictures."""
    values = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1)
    return [Image.fromarray(each) for each in values.cpu().numpy()]


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a picture in the format of the file's ending, in full or not at all."""
    with replacing(path) as temporary:
        picture.save(temporary, format=Image.registered_extensions()[path.suffix.lower()])


def _check_numbers(seed: int | None, *scales: float | None) -> None:
    if seed is not None and not 0 <= seed < 1 << 63:
        raise ValueError(f"the seed must be 0 to 2^63 - 1; got {seed}")
    for scale in scales:
        if scale is not None and not math.isfinite(scale):
            raise ValueError(f"guidance must be a finite number; got {scale}")


class Painter:
    """A model that draws, with its tokenizer and its picture transform."""

    def __init__(
        self, model: TextToImage, tokens: Tokens, transform: ImageTransform, batch_size: int = 32
    ) -> None:
        longest = model.instructblip.config.qformer.max_position_embeddings
        self.model, self.transform, self.batch_size = model.eval(), transform, batch_size
        self.tokens = replace(tokens, max_instruction=min(tokens.max_instruction, longest))

    @classmethod
    def from_pretrained(cls, path: str | Path, device: str | torch.device = "cpu") -> "Painter":
        """A directory with a decoder beside the InstructBLIP, or "starter"."""
        from instructblip.text_to_image.pretrained import from_pretrained

        model = from_pretrained(path)
        assert model.instructblip.assets is not None
        return cls(
            model.requires_grad_(False).to(device),
            Tokens.from_pretrained(model.instructblip.assets),
            ImageTransform.from_pretrained(model.instructblip.assets),
        )

    def draw(
        self,
        instruction: str,
        image: Image.Image | str | Path | None = None,
        num_images: int = 1,
        seed: int | None = None,
        *,
        steps: int = 20,
        guidance: float = 2.0,
        image_guidance: float | None = None,
        on_step: Callable[[], None] | None = None,
    ) -> list[Image.Image]:
        """``num_images`` pictures of what ``instruction`` says, given ``image`` as the subject.

        The same ``seed`` draws the same pictures; None draws others every time. Raises ValueError
        for an instruction that is empty or longer than the Q-Former reads, for numbers out of
        range, and for a picture that cannot be read.
        """
        self.check(instruction, num_images, steps)
        _check_numbers(seed, guidance, image_guidance)
        reference = None
        if image is not None:
            loaded = to_rgb(image) if isinstance(image, Image.Image) else load_image(image)
            reference = lambda: loaded  # noqa: E731
        example = DrawExample(instruction, None, reference)
        generator = torch.Generator()
        if seed is None:
            generator.seed()
        else:
            generator.manual_seed(seed)
        return self.draw_examples(
            [example] * num_images,
            generator,
            steps=steps,
            guidance=guidance,
            image_guidance=image_guidance,
            on_step=on_step,
        )

    def draw_examples(
        self, examples: Sequence[DrawExample], generator: torch.Generator, **settings
    ) -> list[Image.Image]:
        """One picture for each example, ``batch_size`` at a time."""
        pictures = []
        device = self.model.conditioner.generation_queries.device
        for start in range(0, len(examples), self.batch_size):
            wanted = [
                DrawExample(e.instruction, None, e.image, where=e.where)
                for e in examples[start : start + self.batch_size]
            ]
            batch = collate_drawings(
                wanted,
                self.tokens,
                self.transform,
                self.model.decoder.image_size,
            )
            pixels = sample(self.model, batch.to(device), generator=generator, **settings)
            pictures += to_pictures(pixels)
        return pictures

    def check(self, instruction: str, num_images: int = 1, steps: int = 20) -> None:
        """Raise the ValueError that ``draw`` would; what it says names no file."""
        if not instruction.strip():
            raise ValueError(
                'the instruction is empty; say what to draw: "draw a red circle at the left"'
            )
        if len(instruction) > MAX_CHARACTERS:
            raise ValueError(
                f"the instruction has {len(instruction)} characters, at most {MAX_CHARACTERS} are "
                "read; shorten it"
            )
        assert self.tokens.qformer is not None
        length = len(self.tokens.qformer(instruction, verbose=False)["input_ids"])
        longest = self.tokens.max_instruction
        if length > longest:
            raise ValueError(
                f"the instruction has {length} tokens and the Q-Former reads at most {longest}; "
                "shorten it"
            )
        if not 1 <= num_images <= MAX_IMAGES:
            raise ValueError(f"num_images must be 1 to {MAX_IMAGES}; got {num_images}")
        if not 1 <= steps <= 1000:
            raise ValueError(f"steps must be 1 to 1000; got {steps}")
