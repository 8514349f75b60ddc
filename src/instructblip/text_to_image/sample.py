"""From an instruction, and an image or none, to drawn images: guided sampling, and ``Painter``."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Int
from PIL import Image
from torch import Tensor

from instructblip.core.batch import Batch
from instructblip.core.files import replacing
from instructblip.data.images import ImageTransform
from instructblip.data.reading.decode import to_rgb
from instructblip.data.reading.images import load_image
from instructblip.data.tokens import Tokens
from instructblip.text_to_image.batches import collate_drawings
from instructblip.text_to_image.decoder import Condition, Decoder, Images, Latents, Mask
from instructblip.text_to_image.model import TextToImage
from instructblip.text_to_image.pretrained import from_pretrained
from instructblip.text_to_image.tasks import DrawExample

MAX_CHARACTERS = 2000
MAX_IMAGES = 64
MAX_STEPS = 1000


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
) -> Images:
    """Images in [-1, 1] for a batch of instructions.

    Two scales guide separately (InstructPix2Pix, section 3.2.1)::

        none + image_guidance (image - none) + guidance (image and instruction - image)

    ``image_guidance`` None uses ``guidance`` for both: two passes a step instead of three. A scale
    of 1 leaves the condition as it is. ``on_step`` is called before each step; what it raises ends
    the sampling.
    """
    decoder: Decoder = model.decoder
    weighted = _conditions(model, batch, guidance, image_guidance)
    scales = [scale for scale, _ in weighted]
    condition, mask = (torch.cat(parts) for parts in zip(*(c for _, c in weighted), strict=True))

    def guided(noisy: Latents, level: float) -> Latents:
        if on_step is not None:
            on_step()
        repeated = noisy.repeat(len(scales), *[1] * (noisy.ndim - 1))
        with model.precision():
            prediction = decoder.predict(repeated, level, condition, mask)
        parts = prediction.float().chunk(len(scales))
        return torch.stack([s * p for s, p in zip(scales, parts, strict=True)]).sum(0)

    return decoder.sample(guided, len(batch), steps, generator)


def _conditions(
    model: TextToImage, batch: Batch, guidance: float, image_guidance: float | None
) -> list[tuple[float, tuple[Condition, Mask]]]:
    """Conditions with the factors of their predictions. The factors sum to 1; those of 0 drop."""
    index = batch.image_index[:, 0]
    features = model.encode(batch)
    no_image, no_text = torch.full_like(index, -1), torch.zeros_like(batch.qformer_mask)
    if image_guidance is None or features is None:
        image_guidance = guidance
    image_only = image_guidance - guidance
    factors: list[tuple[float, Int[Tensor, " B"], Int[Tensor, "B I"]]] = [
        (guidance, index, batch.qformer_mask),
        (image_only, index, no_text),
        (1 - guidance - image_only, no_image, no_text),
    ]
    return [
        (factor, model.condition(features, rows, batch.qformer_ids, text))
        for factor, rows, text in factors
        if abs(factor) > 1e-6
    ]


def save_image(image: Image.Image, path: Path) -> None:
    """Write an image in the format of the file's suffix, whole or not at all."""
    with replacing(path) as file:
        image.save(file, format=Image.registered_extensions()[path.suffix.lower()])


class Painter:
    """A model that draws, with its tokenizer and its image transform."""

    def __init__(
        self, model: TextToImage, tokens: Tokens, transform: ImageTransform, batch_size: int = 32
    ) -> None:
        longest = model.instructblip.config.qformer.max_position_embeddings
        self.model, self.transform, self.batch_size = model.eval(), transform, batch_size
        self.tokens = replace(tokens, max_instruction=min(tokens.max_instruction, longest))

    @classmethod
    def from_pretrained(cls, path: str | Path, device: str | torch.device = "cpu") -> "Painter":
        """Load a directory with a decoder beside the InstructBLIP, or "starter"."""
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
        """``num_images`` images that follow ``instruction``, with ``image`` as the subject.

        The same ``seed`` draws the same images; None uses a random one. Raises ValueError for an
        instruction that is empty or longer than the Q-Former reads, for numbers out of range, and
        for an image that cannot be read.
        """
        self.check(instruction, num_images, steps)
        if seed is not None and not 0 <= seed < 1 << 63:
            raise ValueError(f"the seed must be 0 to 2^63 - 1; got {seed}")
        for scale in (guidance, image_guidance):
            if scale is not None and not math.isfinite(scale):
                raise ValueError(f"guidance must be a finite number; got {scale}")
        subject = None
        if image is not None:
            window = self.transform.window
            is_open = isinstance(image, Image.Image)
            loaded = to_rgb(image, window) if is_open else load_image(image, window=window)
            subject = lambda: loaded  # noqa: E731
        generator = torch.Generator()
        if seed is None:
            generator.seed()
        else:
            generator.manual_seed(seed)
        return self.draw_examples(
            [DrawExample(instruction, None, subject)] * num_images,
            generator,
            steps=steps,
            guidance=guidance,
            image_guidance=image_guidance,
            on_step=on_step,
        )

    def draw_examples(
        self, examples: Sequence[DrawExample], generator: torch.Generator, **settings
    ) -> list[Image.Image]:
        """One image for each example, ``batch_size`` at a time; ``settings`` as in ``sample``."""
        images = []
        device = self.model.conditioner.generation_queries.device
        size = self.model.decoder.image_size
        for start in range(0, len(examples), self.batch_size):
            prompts = [replace(e, target=None) for e in examples[start : start + self.batch_size]]
            batch = collate_drawings(prompts, self.tokens, self.transform, size)
            pixels = sample(self.model, batch.to(device), generator=generator, **settings)
            values = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().byte()
            images += map(Image.fromarray, values.permute(0, 2, 3, 1).cpu().numpy())
        return images

    def check(self, instruction: str, num_images: int = 1, steps: int = 20) -> None:
        """Raise the ValueError that ``draw`` would for these arguments; it names no file."""
        if not instruction.strip():
            raise ValueError(
                'the instruction is empty; state what to draw: "draw a red circle at the left"'
            )
        if len(instruction) > MAX_CHARACTERS:
            raise ValueError(
                f"the instruction has {len(instruction)} characters, expected at most "
                f"{MAX_CHARACTERS}; shorten it"
            )
        assert self.tokens.qformer is not None
        length = len(self.tokens.qformer(instruction, verbose=False)["input_ids"])
        if length > self.tokens.max_instruction:
            raise ValueError(
                f"the instruction has {length} tokens and the Q-Former reads at most "
                f"{self.tokens.max_instruction}; shorten it"
            )
        if not 1 <= num_images <= MAX_IMAGES:
            raise ValueError(f"num_images must be 1 to {MAX_IMAGES}; got {num_images}")
        if not 1 <= steps <= MAX_STEPS:
            raise ValueError(f"steps must be 1 to {MAX_STEPS}; got {steps}")
