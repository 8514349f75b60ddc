"""A model that answers: pictures and instructions in, texts or log-likelihoods out.

``Engine.answer`` walks the steps of training and evaluation, with the same tokens, the same
pixels and the same Q-Former; there is no second path. The instruction is taken as it is written
and read twice, by the Q-Former and by the language model; no template is put around it.
"""

import functools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch
from PIL import Image

from instructblip.core.batch import (
    Batch,
    Example,
    Sample,
)
from instructblip.data.images import ImageTransform, to_rgb
from instructblip.data.samples import ImageReader, collate, make_sample
from instructblip.data.templates import Rendered, warn_of_other_templates
from instructblip.data.tokens import Tokens
from instructblip.inference.fingerprint import fingerprint
from instructblip.inference.inputs import (
    Picture,
    batches_of,
    broadcast,
    key_of,
)
from instructblip.inference.streaming import TextStream, stream_text
from instructblip.model.attention import cross_attention
from instructblip.model.checkpoints.directory import model_directory
from instructblip.model.decoding import GREEDY, PAPER, Decoding, stored_overrides
from instructblip.model.inference import generate_responses, rank_candidates
from instructblip.model.instructblip import InstructBlip
from instructblip.model.language.generate import OnTokens
from instructblip.model.language.ranking import Normalization

if TYPE_CHECKING:
    from instructblip.text_to_image.sample import Painter


class Engine:
    """Model, tokenizers and picture transform, and the decoding settings stored with them.

    Not safe to call from several threads at once.

    Args:
        model: on the device it shall run on.
        tokens: without a Q-Former tokenizer for a BLIP-2; one that is there is then not used.
        transform: with ``train=False``.
        decoding: defaults of ``answer``.
        fingerprint: changes whenever the answers could; names the model in evaluation results.
        batch_size: samples answered at a time.
    """

    def __init__(
        self,
        model: InstructBlip,
        tokens: Tokens,
        transform: ImageTransform,
        decoding: Decoding = PAPER,
        fingerprint: str = "in memory",
        batch_size: int = 32,
    ) -> None:
        aware = model.config.instruction_aware
        if aware and tokens.qformer is None:
            raise ValueError(
                "an instruction-aware Q-Former needs its tokenizer; expected the folder "
                "qformer_tokenizer/ in the model directory (a BLIP-2 loads without)"
            )
        self.model = model
        longest = min(tokens.max_instruction, model.config.qformer.max_position_embeddings)
        self.tokens = replace(
            tokens, qformer=tokens.qformer if aware else None, max_instruction=longest
        )
        self.images = ImageReader(transform)
        self.decoding = decoding
        self.fingerprint = fingerprint
        self.batch_size = batch_size

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        device: str | torch.device = "auto",
        dtype: torch.dtype | None = None,
        instruction_aware: bool | None = None,
        batch_size: int = 32,
        decoding: Mapping[str, Any] | None = None,
    ) -> "Engine":
        """Load a model directory, a run directory or "starter", with its tokenizers and settings.

        Args:
            device: "auto" takes a GPU if there is one.
            dtype: type of image encoder and language model; None keeps fp32 on a CPU and takes
                bf16 on a GPU. The Q-Former is always fp32.
            instruction_aware: None keeps what the directory is: a BLIP-2's Q-Former reads no
                instruction, an InstructBLIP's does.
            decoding: settings above the stored ones, which are above the paper's.
        """
        directory = model_directory(path)
        warn_of_other_templates(directory)
        model = InstructBlip.from_pretrained(directory, instruction_aware=instruction_aware)
        stored = _stored_decoding(directory, model)
        place = _device(device)
        dtype = dtype or (torch.float32 if place.type == "cpu" else torch.bfloat16)
        model.requires_grad_(False)
        model.to_training_dtypes(frozen_dtype=dtype).to(place).eval()
        return cls(
            model,
            Tokens.from_pretrained(directory),
            ImageTransform.from_pretrained(directory),
            decoding=stored.override(**(decoding or {})),
            fingerprint=fingerprint(directory, model.config.instruction_aware),
            batch_size=batch_size,
        )

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return self.model.query_tokens.device

    @overload
    def answer(self, images: Picture, instructions: str, **decoding: Any) -> str: ...

    @overload
    def answer(
        self,
        images: Picture | Sequence[Picture] | Sequence[Sequence[Picture]],
        instructions: str | Sequence[str],
        **decoding: Any,
    ) -> str | list[str]: ...

    def answer(
        self,
        images: Picture | Sequence[Picture] | Sequence[Sequence[Picture]],
        instructions: str | Sequence[str],
        **decoding: Any,
    ) -> str | list[str]:
        """What the model says. One picture and one instruction give a text, lists give a list.

        A single picture serves all instructions of a list, and a single instruction all pictures.
        A picture that is itself a list holds the frames of a video. ``decoding`` overrides
        settings of the engine's ``Decoding`` (num_beams, max_new_tokens, ...). Raises ValueError
        for an unknown setting or a value out of its range, before an image is read.
        """
        settings = self.decoding.override(**decoding)
        single = isinstance(images, Picture) and isinstance(instructions, str)
        videos, texts = broadcast(images, instructions)
        samples = self._samples(videos, texts)
        found: dict[int, str] = {}
        for places in batches_of(samples, self.batch_size):
            ids = self.respond([samples[i] for i in places], settings)
            found |= {i: self.tokens.decode(own) for i, own in zip(places, ids, strict=True)}
        said = [found[i] for i in range(len(samples))]
        return said[0] if single else said

    def stream(
        self, image: Picture | Sequence[Picture], instruction: str, **decoding: Any
    ) -> Iterator[str]:
        """The pieces of an answer as they come; joined they are what ``answer`` says.

        With beams there is one piece. ``image`` may be a list of the frames of a video.
        """
        settings = self.decoding.override(**decoding)
        frames = [image] if isinstance(image, Picture) else list(image)
        (sample,) = self._samples([frames], [instruction])
        yield from stream_text(
            TextStream(self.tokens, self.ends),
            lambda on_tokens: self.respond([sample], settings, on_tokens)[0],
        )

    @property
    def ends(self) -> tuple[int, ...]:
        """The tokens that end an answer."""
        ends = self.model.language_model.generation_config.eos_token_id
        ends = self.tokens.eos_id if ends is None else ends
        return (ends,) if isinstance(ends, int) else tuple(ends)

    def respond(
        self, samples: Sequence[Sample], decoding: Decoding, on_tokens: OnTokens | None = None
    ) -> list[list[int]]:
        """Token ids of the answer to each sample, as one batch. All samples must have as many
        frames. See ``generate_responses``."""
        return generate_responses(self.model, self._collate(list(samples)), on_tokens, decoding)

    def rank(
        self,
        image: Picture | Sequence[Picture],
        instruction: str,
        candidates: Sequence[str],
        normalization: Normalization = "sum",
    ) -> list[float]:
        """Log-likelihood in nats of each candidate as the answer, its end token included.

        ``image`` is a picture, or a list of the frames of a video. ``normalization`` "mean" divides
        by the number of tokens: "sum" favours short candidates.
        """
        frames = [image] if isinstance(image, Picture) else list(image)
        samples = self._samples([frames], [instruction])
        return self.rank_samples(samples, [candidates], normalization)[0]

    def rank_samples(
        self,
        samples: Sequence[Sample],
        candidates: Sequence[Sequence[str]],
        normalization: Normalization = "sum",
        on_chunk: Callable[[], None] | None = None,
    ) -> list[list[float]]:
        """Log-likelihoods of each sample's candidates, as one batch. See ``rank_candidates``."""
        ids = [self.tokens.candidates(list(texts)) for texts in candidates]
        batch = self._collate(list(samples))
        scores = rank_candidates(self.model, batch, ids, normalization, on_chunk=on_chunk)
        return [own.tolist() for own in scores]

    def look(self, samples: Sequence[Sample]) -> torch.Tensor:
        """Where each query looks, [B, F, Q, P], as one batch; see ``cross_attention``."""
        return cross_attention(self.model, self._collate(list(samples))).cpu()

    def draw(
        self,
        instruction: str,
        image: Picture | None = None,
        num_images: int = 1,
        seed: int | None = None,
        **settings: Any,
    ) -> list[Image.Image]:
        """Pictures of what ``instruction`` says; ``image`` is the subject it speaks of.

        ``settings`` are those of ``Painter.draw``: steps, guidance, image_guidance, on_step. Raises
        FileNotFoundError where the model's directory holds no decoder.
        """
        return self.painter.draw(instruction, image, num_images, seed, **settings)

    @property
    def can_draw(self) -> bool:
        """Whether there is a decoder in the model's directory."""
        from instructblip.text_to_image.pretrained import holds_decoder

        return self.model.assets is not None and holds_decoder(self.model.assets)

    @functools.cached_property
    def painter(self) -> "Painter":
        """The decoder around this model's Q-Former, loaded when it is first asked for."""
        from instructblip.text_to_image.pretrained import from_pretrained
        from instructblip.text_to_image.sample import Painter

        if self.model.assets is None:
            raise ValueError("a model that was not loaded from a directory has no decoder")
        shared = self.model if self.model.config.instruction_aware else None
        drawing = from_pretrained(self.model.assets, shared).requires_grad_(False)
        tokens = Tokens.from_pretrained(self.model.assets)
        return Painter(drawing.to(self.device), tokens, self.images.transform)

    def answer_examples(
        self, examples: Sequence[Example], prompts: Sequence[str], image_root: Path, **decoding: Any
    ) -> list[str]:
        """One answer per example and prompt, as one batch: the entry of evaluation.

        Settings that are not given are those of ``GREEDY``, not the stored ones: a score depends on
        the benchmark's settings alone.
        """
        batch = self._batch_of(examples, prompts, image_root)
        ids = generate_responses(self.model, batch, decoding=GREEDY.override(**decoding))
        return [self.tokens.decode(own) for own in ids]

    def rank_examples(
        self,
        examples: Sequence[Example],
        prompts: Sequence[str],
        image_root: Path,
        candidates: Sequence[Sequence[str]],
    ) -> list[list[float]]:
        """Log-likelihoods of each example's candidates, summed, as one batch."""
        batch = self._batch_of(examples, prompts, image_root)
        ids = [self.tokens.candidates(list(texts)) for texts in candidates]
        return [scores.tolist() for scores in rank_candidates(self.model, batch, ids)]

    def _batch_of(
        self, examples: Sequence[Example], prompts: Sequence[str], image_root: Path
    ) -> Batch:
        samples = [
            make_sample(example, Rendered(prompt, prompt), self.tokens, self.images, image_root)
            for example, prompt in zip(examples, prompts, strict=True)
        ]
        return self._collate(samples)

    def _samples(self, videos: Sequence[Sequence[Picture]], texts: Sequence[str]) -> list[Sample]:
        pixels: dict[str, torch.Tensor] = {}
        samples = []
        for frames, text in zip(videos, texts, strict=True):
            keys = tuple(key_of(frame) for frame in frames)
            for key, frame in zip(keys, frames, strict=True):
                if key not in pixels:
                    pixels[key] = self._pixels(frame, key)
            samples.append(self.sample(keys, tuple(pixels[key] for key in keys), text))
            if self.lost_tokens(text):
                most = self.tokens.max_prompt
                warnings.warn(
                    f"a prompt has more than {most} tokens: it lost its beginning", stacklevel=2
                )
        return samples

    def lost_tokens(self, text: str) -> int:
        """Tokens at the beginning of a prompt that the model will not read: it is too long."""
        if len(text.encode(errors="surrogatepass")) + 2 <= self.tokens.max_prompt:
            return 0  # a token stands for at least one byte; two are special
        return max(0, self.tokens.prompt_length(text) - self.tokens.max_prompt)

    def sample(self, keys: tuple[str, ...], pixels: tuple[torch.Tensor, ...], text: str) -> Sample:
        """What the model reads: frames, each [3, S, S] and with a key, and the instruction."""
        qformer_ids, prompt_ids, _ = self.tokens.tokenize(Rendered(text, text))
        return Sample(
            image_keys=keys, pixels=pixels, qformer_ids=qformer_ids, prompt_ids=prompt_ids
        )

    def _pixels(self, picture: Picture, key: str) -> torch.Tensor:
        if isinstance(picture, Image.Image):
            return self.images.transform(to_rgb(picture))
        return self.images.load(key, None, flip=False)

    def _collate(self, samples: list[Sample]) -> Batch:
        return collate(samples).to(self.device)


def load(path: str | Path, **options: Any) -> Engine:
    """``instructblip.load``: the same as ``Engine.from_pretrained``."""
    return Engine.from_pretrained(path, **options)


def _stored_decoding(directory: Path, model: InstructBlip) -> Decoding:
    """The paper's decoding below what the model directory stores."""
    try:
        return PAPER.override(**stored_overrides(model.generation_settings))
    except ValueError as error:
        raise ValueError(f"{directory / 'generation_config.json'}: {error}") from None


def _device(device: str | torch.device) -> torch.device:
    if device != "auto":
        return torch.device(device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
