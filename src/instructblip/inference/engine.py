"""A model that answers: images and instructions in, texts or log-likelihoods out.

``Engine.answer`` takes the steps of training and evaluation, with the same tokens, pixels and
Q-Former; there is no second path. The instruction is used as it is written and read twice, by the
Q-Former and by the language model; no template is put around it but the chat format that the model
was tuned with, if any.
"""

import functools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from instructblip.core.batch import Batch, Sample
from instructblip.core.example import Example
from instructblip.data.images import ImageTransform
from instructblip.data.reading.decode import Window, to_rgb
from instructblip.data.samples import ImageReader, collate, make_sample
from instructblip.data.templates import Rendered, warn_of_other_templates
from instructblip.data.tokens import Tokens, check_marks
from instructblip.evaluation.calibration import (
    CALIBRATION_FILE,
    AnswerMap,
    Calibration,
    CandidateMap,
)
from instructblip.evaluation.confidence import conformal_quantile
from instructblip.evaluation.scoring import probabilities
from instructblip.inference.details import (
    Candidate,
    DetailedAnswer,
    TokenDetail,
    about_other,
    complete_texts,
    pieces_of,
)
from instructblip.inference.embedder import Embedder
from instructblip.inference.explain import Explanation, explain
from instructblip.inference.fingerprint import fingerprint
from instructblip.inference.inputs import (
    FramesInput,
    ImageInput,
    ImagesInput,
    broadcast,
    group_samples,
    image_key,
)
from instructblip.inference.streaming import TextStream, stream_text
from instructblip.model.checkpoints.directory import model_directory
from instructblip.model.checkpoints.transformers import RETRIEVAL_FILE
from instructblip.model.decoding import GREEDY, PAPER, Decoding, stored_overrides
from instructblip.model.explain import Method
from instructblip.model.inference import (
    cross_attention,
    encode_images,
    generate_responses,
    rank_candidates,
    read_prompts,
    score_tokens,
)
from instructblip.model.instructblip import InstructBlip
from instructblip.model.language.adapters import num_words
from instructblip.model.language.generate import OnTokens
from instructblip.model.language.ranking import Normalization
from instructblip.model.language.running import Prompt, Running
from instructblip.model.placement import Kind, check_placement
from instructblip.model.retrieval import Retriever
from instructblip.model.spread import place

if TYPE_CHECKING:
    from instructblip.text_to_image.sample import Painter

MAX_CHARACTERS_PER_TOKEN = 64
"""On average over a prompt; words have about 4. A longer text is cut before it is tokenized."""


class Engine:
    """A model with its tokenizers, its image reader and its decoding settings.

    Not safe to call from several threads at once.

    Args:
        model: on the device where it runs.
        tokens: the tokenizers; that of the Q-Former is ignored for a BLIP-2.
        images: reads the images; its transform does not augment.
        decoding: settings of ``answer`` below those of a call.
        fingerprint: changes whenever the answers could; names the model in evaluation results.
        batch_size: samples answered at a time.
        calibration: turns log-likelihoods into confidences.

    Raises:
        ValueError: for an instruction-aware model without a Q-Former tokenizer.
    """

    def __init__(
        self,
        model: InstructBlip,
        tokens: Tokens,
        images: ImageReader,
        decoding: Decoding = PAPER,
        fingerprint: str = "in memory",
        batch_size: int = 32,
        calibration: Calibration | None = None,
    ) -> None:
        aware = model.config.instruction_aware
        if aware and tokens.qformer is None:
            raise ValueError(
                "an instruction-aware Q-Former needs its tokenizer; expected the folder "
                "qformer_tokenizer/ in the model directory (a BLIP-2 loads without)"
            )
        self.model = model
        longest = min(tokens.max_instruction, model.config.qformer.max_position_embeddings)
        qformer = tokens.qformer if aware else None
        self.tokens = replace(tokens, qformer=qformer, max_instruction=longest)
        self.images = images
        self.decoding = decoding
        self.fingerprint = fingerprint
        self.batch_size = batch_size
        self.calibration = calibration

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        device: str | torch.device = "auto",
        dtype: torch.dtype | None = None,
        instruction_aware: bool | None = None,
        batch_size: int = 32,
        decoding: Mapping[str, Any] | None = None,
        num_frames: int = 4,
        window: Window = "auto",
        devices: str = "auto",
        quantize: Kind | None = None,
        **limits: int,
    ) -> "Engine":
        """Load a model or run directory, "starter" or "small", with its tokenizers and settings.

        Args:
            device: where the model runs; "auto" is the first of ``devices``, or a GPU if there is
                one.
            dtype: type of image encoder and language model; None is fp32 on a CPU and bf16 on a
                GPU. The Q-Former is always fp32.
            instruction_aware: whether the Q-Former reads the instruction; None as the model was
                saved: a BLIP-2's does not, an InstructBLIP's does.
            decoding: settings above those that the directory stores, which are above the paper's.
            num_frames: frames of a video that evaluation reads.
            window: of images with more than 8 bits; "auto" takes the one that the model was trained
                with, if its directory names one.
            devices: where the layers of the language model are; "auto", several with commas, or
                "disk" (``Placement``).
            quantize: weights of the language model in 8 or 4 bits: "int8", "fp8" or "nf4".
            limits: ``max_instruction``, ``max_prompt`` and ``max_response`` of ``Tokens``.
        """
        directory = model_directory(path)
        warn_of_other_templates(directory)
        placement = check_placement(devices, quantize)
        model = InstructBlip.from_pretrained(
            directory, instruction_aware=instruction_aware, as_stored=True
        )
        try:
            stored = PAPER.override(**stored_overrides(model.generation_settings))
        except ValueError as error:
            raise ValueError(f"{directory / 'generation_config.json'}: {error}") from None
        settings = stored.override(**(decoding or {}))
        tokens = Tokens.from_pretrained(directory, **limits)
        tokens.check_rows(num_words(model.config.language), model.config.qformer.vocab_size)
        place(model, placement, device, dtype, settings)
        transform = ImageTransform.from_pretrained(directory)
        if window != "auto":
            transform = replace(transform, window=window)
        return cls(
            model,
            tokens,
            ImageReader(transform, num_frames),
            settings,
            fingerprint(directory, model.config.instruction_aware, window, quantize),
            batch_size,
            stored_calibration(directory, model.config.instruction_aware, quantize),
        )

    def with_images(self, images: ImageReader) -> "Engine":
        """The same model with another image reader, such as one of stored features."""
        kept = self.decoding, self.fingerprint, self.batch_size, self.calibration
        return Engine(self.model, self.tokens, images, *kept)

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return self.model.query_tokens.device

    @overload
    def answer(
        self,
        images: ImageInput,
        instructions: str,
        *,
        details: Literal[True],
        blind: Sequence[ImageInput] = (),
        **decoding: Any,
    ) -> DetailedAnswer: ...

    @overload
    def answer(
        self,
        images: ImagesInput,
        instructions: str | Sequence[str],
        *,
        details: Literal[True],
        blind: Sequence[ImageInput] = (),
        **decoding: Any,
    ) -> Any: ...

    @overload
    def answer(self, images: ImageInput, instructions: str, **decoding: Any) -> str: ...

    @overload
    def answer(
        self, images: ImagesInput, instructions: str | Sequence[str], **decoding: Any
    ) -> str | list[str]: ...

    def answer(
        self,
        images: ImagesInput,
        instructions: str | Sequence[str],
        *,
        details: bool = False,
        blind: Sequence[ImageInput] = (),
        **decoding: Any,
    ) -> Any:
        """The model's answer: a text for one image and one instruction, a list for lists.

        A single image goes with all instructions of a list, and a single instruction with all
        images. An image that is itself a list holds the frames of a video, or several images; each
        ``<image>`` in the instruction is the place of one of them (`data/tokens.py`).

        Args:
            details: whether to return `DetailedAnswer` instead of texts, for one more pass of the
                language model.
            blind: other images; the details then say how likely each answer is about them, which
                is what the instruction alone suggests. Each of them takes one more pass.
            decoding: settings of ``Decoding`` (num_beams, max_new_tokens, ...) above the engine's.

        Raises:
            ValueError: before an image is read, for an unknown setting, a value out of its range,
                counts that do not match, or more ``<image>`` than images.
            FileNotFoundError: for a missing image.
        """
        settings = self.decoding.override(**decoding)
        single = isinstance(images, ImageInput) and isinstance(instructions, str)
        if blind and not details:
            raise ValueError("blind images change the details only: add details=True")
        samples = self.samples(images, instructions)
        others = self.encoded(self.samples(list(blind), "")) if blind else ()
        answers: list[str | DetailedAnswer] = [""] * len(samples)
        for group in group_samples(samples, self.batch_size):
            chosen = [samples[i] for i in group]
            if details:
                given = self.respond_in_detail(chosen, settings, others)
            else:
                given = [self.tokens.decode(ids) for ids in self.respond(chosen, settings)]
            for i, answer in zip(group, given, strict=True):
                answers[i] = answer
        return answers[0] if single else answers

    def respond_in_detail(
        self, samples: Sequence[Sample], decoding: Decoding, others: Sequence[Sample] = ()
    ) -> list[DetailedAnswer]:
        """As `respond`, with all that is known of each answer."""
        samples = self.encoded(samples)
        rows = self.respond(samples, decoding)
        ended = [len(ids) < decoding.max_new_tokens for ids in rows]
        return self.detail(samples, rows, ended, others)

    def encoded(self, samples: Sequence[Sample]) -> list[Sample]:
        """The samples with the features of their images, which several passes can then read."""
        batch = self._collate(samples)
        features = self.model.features_of(batch)  # [N, P, V]
        return [
            replace(
                sample,
                pixels=None,
                scales=None,
                features=tuple(features[i] for i in row[: len(sample.image_keys)]),
            )
            for sample, row in zip(samples, batch.image_index.tolist(), strict=True)
        ]

    def detail(
        self,
        samples: Sequence[Sample],
        rows: Sequence[list[int]],
        ended: Sequence[bool],
        others: Sequence[Sample] = (),
        likeliest: int = 0,
    ) -> list[DetailedAnswer]:
        """What is known of the answers with the token ids ``rows``, as one batch.

        Args:
            ended: whether the end token ended each answer.
            others: samples whose images stand for no image, as in `answer`.
            likeliest: tokens to list in the place of each token.
        """
        whole = [
            [*ids, self.tokens.eos_id] if end else ids for ids, end in zip(rows, ended, strict=True)
        ]
        scored = score_tokens(self.model, self._collate(samples), whole, likeliest)
        blind = [
            [
                sum(token.log_prob for token in tokens)
                for tokens in score_tokens(
                    self.model, self._collate([about_other(s, other) for s in samples]), whole
                )
            ]
            for other in others
        ]
        answers = []
        for i, (ids, tokens) in enumerate(zip(rows, scored, strict=True)):
            log_prob = sum(token.log_prob for token in tokens)
            confidence = None
            if self.calibration is not None and self.calibration.answers is not None:
                confidence = self.calibration.answers.confidence(log_prob)
            texts = [*pieces_of(self.tokens.decode, ids), ""]
            before = complete_texts(self.tokens.decode, ids) if likeliest else texts
            given = tuple(
                TokenDetail(
                    text,
                    token.log_prob,
                    tuple((self._added(ids[:n], before[n], id_), p) for id_, p in token.likeliest),
                )
                for n, (text, token) in enumerate(zip(texts, tokens, strict=False))
            )
            answers.append(
                DetailedAnswer(
                    text=self.tokens.decode(ids),
                    tokens=given,
                    log_prob=log_prob,
                    finish_reason="stop" if ended[i] else "length",
                    confidence=confidence,
                    blind_log_prob=_mean_chance([row[i] for row in blind]) if blind else None,
                )
            )
        return answers

    def _added(self, ids: list[int], text: str, id_: int) -> str:
        """What a token would add behind others and their text; the name of one that adds none."""
        added = self.tokens.decode([*ids, id_])[len(text) :]
        return added or str(self.tokens.language.convert_ids_to_tokens(id_))

    def stream(
        self, image: FramesInput, instruction: str | Rendered, **decoding: Any
    ) -> Iterator[str]:
        """Yields the answer in pieces as they are generated; joined they equal ``answer``.

        With beams there is one piece. ``image`` may be a list of the frames of a video.
        """
        settings = self.decoding.override(**decoding)
        (sample,) = self.samples([_frames(image)], [instruction])
        yield from stream_text(
            TextStream(self.tokens, self.ends),
            lambda on_tokens: self.respond([sample], settings, on_tokens)[0],
        )

    @property
    def ends(self) -> tuple[int, ...]:
        """The tokens that end an answer: the model's, and that of its chat format."""
        ends = self.model.language_model.generation_config.eos_token_id
        ends = self.tokens.eos_id if ends is None else ends
        ends = (ends,) if isinstance(ends, int) else tuple(ends)
        chats = self.tokens.chat_template is not None
        return tuple(dict.fromkeys((*ends, self.tokens.eos_id))) if chats else ends

    def respond(
        self, samples: Sequence[Sample], decoding: Decoding, on_tokens: OnTokens | None = None
    ) -> list[list[int]]:
        """Token ids of the answer to each sample, as one batch. All samples must have the same
        number of frames. See ``generate_responses``."""
        batch = self._collate(samples)
        return generate_responses(self.model, batch, on_tokens, decoding, self.ends)

    @property
    def can_join(self) -> bool:
        """Whether answers without beams can start beside others that run (`running`): not with a
        language model that needs whole batches, such as T5."""
        return self.model.language.reads_trees

    @property
    def is_half(self) -> bool:
        """Whether the language model runs in half precision."""
        return self.model.language_model.dtype.itemsize < 4

    def running(self) -> Running:
        """Where answers grow token by token, each from its prompt (`read`) on."""
        return Running(self.model.language, self.model.language_precision)

    def read(self, samples: Sequence[Sample]) -> list[Prompt]:
        """The prompts of samples after the language model has read them, as one batch."""
        return read_prompts(self.model, self._collate(samples))

    def encode(self, pixels: Sequence[Float[Tensor, "3 S S"]]) -> list[Float[Tensor, "P V"]]:
        """The features of images, as one batch; a sample may have them instead of its pixels."""
        return encode_images(self.model, torch.stack(list(pixels)).to(self.device))

    @overload
    def rank(
        self,
        image: FramesInput,
        instruction: str,
        candidates: Sequence[str],
        normalization: Literal["sum"] = "sum",
        *,
        details: Literal[True],
    ) -> list[Candidate]: ...

    @overload
    def rank(
        self,
        image: FramesInput,
        instruction: str,
        candidates: Sequence[str],
        normalization: Normalization = "sum",
    ) -> list[float]: ...

    def rank(
        self,
        image: FramesInput,
        instruction: str,
        candidates: Sequence[str],
        normalization: Normalization = "sum",
        *,
        details: bool = False,
    ) -> Any:
        """Log-likelihood in nats of each candidate as the answer, its end token included.

        ``image`` may be a list of the frames of a video. ``normalization`` "mean" divides by the
        number of tokens; "sum" favors short candidates. With ``details`` each is a `Candidate` with
        its probability, calibrated where the model is; that is of sums only.
        """
        if details and normalization != "sum":
            raise ValueError("probabilities are of summed log-likelihoods: leave out normalization")
        samples = self.samples([_frames(image)], instruction)
        scores = self.rank_samples(samples, [candidates], normalization)[0]
        return self.candidates(candidates, scores) if details else scores

    def candidates(self, texts: Sequence[str], scores: Sequence[float]) -> list[Candidate]:
        """The candidates with their log-likelihoods ``scores`` and their probabilities."""
        fitted = None if self.calibration is None else self.calibration.candidates
        chances = probabilities(scores) if fitted is None else fitted.probabilities(scores)
        return [
            Candidate(text, score, chance, fitted is not None)
            for text, score, chance in zip(texts, scores, chances, strict=True)
        ]

    def answer_set(
        self,
        image: FramesInput,
        instruction: str,
        candidates: Sequence[str],
        coverage: float = 0.9,
    ) -> list[str]:
        """Candidates among which the right one is with the probability ``coverage``, the likeliest
        first: few where the model is sure.

        The probability holds on average over questions like those of the calibration, not for each
        question (`evaluation.confidence`). Raises ValueError without a calibration of candidates,
        and for a coverage that is not between 0 and 1.
        """
        fitted = self.require_calibration("candidates")
        conformal_quantile(np.array(fitted.misfits), coverage)  # refused before an image is read
        scores = self.rank(image, instruction, candidates)
        return [candidates[i] for i in fitted.answer_set(scores, coverage)]

    @overload
    def require_calibration(self, part: Literal["answers"]) -> AnswerMap: ...

    @overload
    def require_calibration(self, part: Literal["candidates"]) -> CandidateMap: ...

    def require_calibration(self, part: Literal["answers", "candidates"]) -> Any:
        """The part of the calibration for generated answers or for candidates. Raises ValueError
        without it."""
        fitted = None if self.calibration is None else getattr(self.calibration, part)
        if fitted is None:
            raise ValueError(
                f"the model has no calibration of {part}: run `instructblip calibrate MODEL`, "
                f"which writes {CALIBRATION_FILE} beside it"
            )
        return fitted

    def rank_samples(
        self,
        samples: Sequence[Sample],
        candidates: Sequence[Sequence[str]],
        normalization: Normalization = "sum",
        on_chunk: Callable[[], None] | None = None,
    ) -> list[list[float]]:
        """Log-likelihoods of each sample's candidates, as one batch. See ``rank_candidates``."""
        distinct = {text for texts in candidates for text in texts}
        known = {text: self.tokens.response(text) for text in distinct}
        ids = [[known[text] for text in texts] for texts in candidates]
        batch = self._collate(samples)
        scores = rank_candidates(self.model, batch, ids, normalization, on_chunk=on_chunk)
        return [row.tolist() for row in scores]

    def look(self, samples: Sequence[Sample]) -> Float[Tensor, "B F Q G G"]:
        """Attention of each query token to the G x G places of the image, as one batch; see
        ``cross_attention``. Class and register tokens, which have no place, are left out."""
        vision = self.model.config.vision
        weights = cross_attention(self.model, self._collate(samples)).cpu()
        return weights[..., vision.num_prefix_tokens :].unflatten(-1, (vision.grid, vision.grid))

    @overload
    def explain(
        self,
        image: ImageInput,
        instruction: str,
        answer: str | None = None,
        method: Method = "occlusion",
    ) -> Explanation: ...

    @overload
    def explain(
        self,
        image: FramesInput,
        instruction: str,
        answer: str | None = None,
        method: Method = "occlusion",
    ) -> Explanation | list[Explanation]: ...

    def explain(
        self,
        image: FramesInput,
        instruction: str,
        answer: str | None = None,
        method: Method = "occlusion",
    ) -> Explanation | list[Explanation]:
        """Where in the image each word of ``answer`` comes from; None is the model's own answer.

        Several images (a list) have an explanation each. Weights and mode of the model stay as they
        are. Raises ValueError for an empty answer, and what `answer` raises.
        """
        single = isinstance(image, ImageInput)
        if answer is None:
            answer = str(self.answer(image if single else [list(image)], [instruction])[0])
        text = Rendered(instruction, instruction, answer)
        explained = self.explain_sample(self.samples([_frames(image)], [text])[0], method)
        return explained[0] if single else explained

    def explain_sample(
        self,
        sample: Sample,
        method: Method = "occlusion",
        on_pass: Callable[[], None] = lambda: None,
    ) -> list[Explanation]:
        """An explanation of the response of a sample for each of its images, see `explain`.
        ``on_pass`` is called before each pass of the model; an error that it raises ends it."""
        batch = self._collate([sample])
        return explain(self.model, self.tokens, batch, method, self.batch_size, on_pass)

    def draw(
        self,
        instruction: str,
        image: ImageInput | None = None,
        num_images: int = 1,
        seed: int | None = None,
        **settings: Any,
    ) -> list[Image.Image]:
        """Images of what ``instruction`` describes; ``image`` shows the subject that it refers to.

        ``settings`` are those of ``Painter.draw``: steps, guidance, image_guidance, on_step. Raises
        FileNotFoundError if the model's directory holds no decoder.
        """
        return self.painter.draw(instruction, image, num_images, seed, **settings)

    def embed(
        self,
        images: ImageInput | Sequence[ImageInput] | None = None,
        texts: str | Sequence[str] | None = None,
        instruction: str | None = None,
    ) -> Tensor:
        """Unit vectors of images [N, Q, E] or of texts [N, E]; see ``Embedder.embed``."""
        return self.embedder.embed(images, texts, instruction)

    def match(
        self, images: ImageInput | Sequence[ImageInput], texts: str | Sequence[str]
    ) -> Float[Tensor, " N"]:
        """The probability that each text fits its image; see ``Embedder.match``."""
        return self.embedder.match(images, texts)

    @functools.cached_property
    def embedder(self) -> Embedder:
        """The heads of retrieval around this model's image encoder, loaded at first use. Raises
        ValueError for a model without heads."""
        retriever = Retriever.of(self.model)
        assert self.model.assets is not None
        return Embedder(retriever, self.model.assets, self.images.transform)

    @property
    def can_embed(self) -> bool:
        """Whether there are heads of retrieval in the model's directory."""
        return self.model.assets is not None and (self.model.assets / RETRIEVAL_FILE).is_file()

    @property
    def can_draw(self) -> bool:
        """Whether there is a decoder in the model's directory."""
        from instructblip.text_to_image.pretrained import holds_decoder

        return self.model.assets is not None and holds_decoder(self.model.assets)

    @functools.cached_property
    def painter(self) -> "Painter":
        """The decoder around this model's Q-Former, loaded at first use."""
        from instructblip.text_to_image.pretrained import from_pretrained
        from instructblip.text_to_image.sample import Painter

        if self.model.assets is None:
            raise ValueError("a model that was not loaded from a directory has no decoder")
        shared = self.model if self.model.config.instruction_aware else None
        drawing = from_pretrained(self.model.assets, shared).requires_grad_(False)
        for part in drawing.children():
            if part is not shared:  # whose language model may be on several devices
                part.to(self.device)
        tokens = Tokens.from_pretrained(self.model.assets)
        return Painter(drawing, tokens, self.images.transform)

    def answer_examples(
        self,
        examples: Sequence[Example],
        prompts: Sequence[Rendered],
        image_root: Path,
        **decoding: Any,
    ) -> list[str]:
        """One answer per example and prompt, as one batch: the entry of evaluation.

        Settings that are not given are those of ``GREEDY``, not the stored ones: a score depends on
        the benchmark's settings alone.
        """
        samples = self._example_samples(examples, prompts, image_root)
        rows = self.respond(samples, GREEDY.override(**decoding))
        return [self.tokens.decode(ids) for ids in rows]

    def detail_examples(
        self,
        examples: Sequence[Example],
        prompts: Sequence[Rendered],
        image_root: Path,
        **decoding: Any,
    ) -> list[DetailedAnswer]:
        """As `answer_examples`, with the details of each answer."""
        samples = self._example_samples(examples, prompts, image_root)
        return self.respond_in_detail(samples, GREEDY.override(**decoding))

    def rank_examples(
        self,
        examples: Sequence[Example],
        prompts: Sequence[Rendered],
        image_root: Path,
        candidates: Sequence[Sequence[str]],
    ) -> list[list[float]]:
        """Summed log-likelihoods of each example's candidates, as one batch."""
        return self.rank_samples(self._example_samples(examples, prompts, image_root), candidates)

    def compare_examples(
        self, examples: Sequence[Example], image_root: Path, texts: Sequence[str], rerank: int
    ) -> tuple[Float[Tensor, "N T"], Float[Tensor, "N T"]]:
        """Scores of the first image of each example with each text; see ``Embedder.compare``."""
        images = [image_root / example.images[0] for example in examples]
        return self.embedder.compare(images, texts, rerank)

    def can_match(self) -> bool:
        """Whether the heads match as well; see ``Retriever.can_match``."""
        return self.embedder.retriever.can_match

    def _example_samples(
        self, examples: Sequence[Example], prompts: Sequence[Rendered], image_root: Path
    ) -> list[Sample]:
        return [
            make_sample(example, prompt, self.tokens, self.images, image_root)
            for example, prompt in zip(examples, prompts, strict=True)
        ]

    def samples(
        self, images: ImagesInput, instructions: str | Sequence[str | Rendered]
    ) -> list[Sample]:
        """What the model reads of images and instructions, paired as in `answer`, which says what
        is raised."""
        videos, texts = broadcast(images, instructions)
        pixels: dict[str, Tensor] = {}
        samples = []
        for frames, text in zip(videos, texts, strict=True):
            check_marks(Rendered.of(text).prompt, len(frames))
        for frames, text in zip(videos, texts, strict=True):
            keys = tuple(image_key(frame) for frame in frames)
            for key, frame in zip(keys, frames, strict=True):
                if key not in pixels:
                    pixels[key] = self._pixels(frame, key)
            samples.append(self.sample(keys, tuple(pixels[key] for key in keys), text))
            if self.lost_tokens(text):
                most = self.tokens.max_prompt
                warnings.warn(
                    f"a prompt has more than {most} tokens: it lost its beginning", stacklevel=3
                )
        return samples

    def lost_tokens(self, text: str | Rendered) -> int:
        """Number of tokens at the beginning of a prompt that are cut off since it is too long.

        Of a text that is cut before it is tokenized only what is left is counted.
        """
        text = self._cut(text)
        size = len(Rendered.of(text).prompt.encode(errors="surrogatepass"))
        if self.tokens.chat_template is None and size + 2 <= self.tokens.max_prompt:
            return 0  # a token stands for at least one byte; two are special
        return max(0, self.tokens.prompt_length(text) - self.tokens.max_prompt)

    def sample(
        self,
        keys: tuple[str, ...],
        pixels: tuple[Float[Tensor, "3 S S"], ...],
        text: str | Rendered,
    ) -> Sample:
        """What the model reads: the frames with their keys, and the instruction."""
        check_marks(Rendered.of(text).prompt, len(keys))
        texts = self.tokens.tokenize(self._cut(text), len(keys))
        return Sample(image_keys=keys, pixels=pixels, **texts._asdict())

    def _cut(self, text: str | Rendered) -> Rendered:
        """The end of a text that can hold the tokens that are read: the rest costs time only."""
        longest = max(self.tokens.max_prompt, self.tokens.max_instruction)
        return Rendered.of(text).last(MAX_CHARACTERS_PER_TOKEN * longest)

    def _pixels(self, image: ImageInput, key: str) -> Float[Tensor, "3 S S"]:
        if isinstance(image, Image.Image):
            return self.images.transform(to_rgb(image, self.images.transform.window))
        return self.images.load(key, None, flip=False)

    def _collate(self, samples: Sequence[Sample]) -> Batch:
        return collate(list(samples)).to(self.device)


def stored_calibration(
    directory: Path, instruction_aware: bool, quantize: Kind | None = None
) -> Calibration | None:
    """The calibration in a model directory; None, with a warning, for one of other weights, which
    those in 8 or 4 bits are too."""
    stored = Calibration.load(directory)
    if stored is None or stored.model == fingerprint(
        directory, instruction_aware, quantize=quantize
    ):
        return stored
    again = f"{directory} --quantize {quantize}` for these" if quantize else f"{directory}` again"
    warnings.warn(
        f"{directory / CALIBRATION_FILE} is of other weights or settings and is ignored: run "
        f"`instructblip calibrate {again}",
        stacklevel=3,
    )
    return None


def load(path: str | Path, **options: Any) -> Engine:
    """``instructblip.load``: the same as ``Engine.from_pretrained``."""
    return Engine.from_pretrained(path, **options)


def _frames(image: FramesInput) -> list[ImageInput]:
    return [image] if isinstance(image, ImageInput) else list(image)


def _mean_chance(log_probs: Sequence[float]) -> float:
    """The logarithm of the mean of probabilities."""
    return float(np.logaddexp.reduce(log_probs) - np.log(len(log_probs)))
