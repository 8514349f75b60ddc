"""A plug-in for lmms-eval: ``lmms-eval --model instructblip_engine --model_args pretrained=DIR``.

lmms-eval finds ``manifest`` through the entry point group ``lmms_eval.models``. Generation and
multiple choice both run through the engine. Of a task's settings, ``until`` cuts answers, the
lengths and ``num_beams`` apply, and the sampling settings apply only if the task samples.
"""

from collections.abc import Callable, Sequence
from typing import Any

from lmms_eval.api.instance import GenerationResult, Instance  # pyright: ignore[reportMissingImports]
from lmms_eval.api.model import lmms  # pyright: ignore[reportMissingImports]
from lmms_eval.models.registry_v2 import ModelManifest  # pyright: ignore[reportMissingImports]

from instructblip.core.example import IMAGE_MARK
from instructblip.inference.engine import Engine
from instructblip.inference.inputs import ImageInput
from instructblip.model.placement import Kind

MODEL_ID = "instructblip_engine"
"""Differs from "instructblip", lmms-eval's adapter of transformers' class."""


def manifest() -> ModelManifest:
    """The entry that lmms-eval registers."""
    return ModelManifest(MODEL_ID, simple_class_path=f"{__name__}.{EngineLmms.__name__}")


class EngineLmms(lmms):
    """The engine behind lmms-eval's interface.

    Args:
        pretrained: a model or run directory, or "starter".
        batch_size: samples at a time; "auto" is ``max_batch_size``.
        device: "auto", "cpu" or "cuda".
        devices: where the layers of the language model are (``Placement``), with ``+`` for commas.
        quantize: "int8", "fp8" or "nf4".
    """

    def __init__(
        self,
        pretrained: str = "starter",
        batch_size: int | str = 32,
        device: str = "auto",
        max_batch_size: int | None = None,
        devices: str = "auto",
        quantize: Kind | None = None,
    ) -> None:
        super().__init__()
        size = max_batch_size or 32 if batch_size == "auto" else int(batch_size)
        self.engine = Engine.from_pretrained(
            pretrained,
            device=device,
            batch_size=size,
            devices=devices.replace("+", ","),  # a comma ends an argument of lmms-eval
            quantize=quantize,
        )

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """One answer per request; requests with the same settings share batches."""
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(i)
        answers = [""] * len(requests)
        for group in groups.values():
            settings = requests[group[0]].args[1]
            arguments = [requests[i].args for i in group]
            images = [self._images(*each[2:6]) for each in arguments]
            prompts = [
                _prompt(each[0], len(shown)) for each, shown in zip(arguments, images, strict=True)
            ]
            texts = self.engine.answer(images, prompts, **_decoding(settings))
            for i, text in zip(group, texts, strict=True):
                answers[i] = _cut(text, settings.get("until"))
        return answers

    def loglikelihood(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """(negative log-likelihood, whether greedy decoding gives it) of each continuation.

        lmms-eval chooses the smallest value, and preserves a tuple only inside a
        ``GenerationResult``. All continuations of one question are ranked together.
        """
        groups: dict[tuple[Any, ...], list[int]] = {}
        for i, request in enumerate(requests):
            context, _, _, doc_id, task, split = request.args
            groups.setdefault((context, doc_id, task, split), []).append(i)
        results: list[Any] = [None] * len(requests)
        for group in groups.values():
            context, _, *where = requests[group[0]].args
            images = self._images(*where)
            prompt = _prompt(context, len(images))
            texts = [self._continuation(requests[i]) for i in group]
            scores = self.engine.rank(images, prompt, texts)
            longest = max(len(self.engine.tokens.response(text)) for text in texts)
            (greedy,) = self.engine.answer([images], [prompt], **_greedy(longest))
            for i, text, score in zip(group, texts, scores, strict=True):
                results[i] = GenerationResult(text=(-score, greedy == text))  # type: ignore[arg-type]
        return results

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        raise NotImplementedError("conversations of several rounds are not supported")

    def _continuation(self, request: Instance) -> str:
        _, continuation, _, doc_id, task, split = request.args
        if callable(continuation):
            continuation = continuation(self.task_dict[task][split][doc_id])
        return str(continuation).strip()

    def _images(
        self, to_visual: Callable[[Any], list[ImageInput]], doc_id: int, task: str, split: str
    ) -> list[ImageInput]:
        images = to_visual(self.task_dict[task][split][doc_id])
        if not images:
            raise ValueError(f"{task} {split} {doc_id}: no image; every question needs one")
        return images


def _prompt(context: str, num_images: int) -> str:
    """The text; its image marks, which some tasks write, only where there is one for each image."""
    marked = context.count(IMAGE_MARK) == num_images
    return (context if marked else context.replace(IMAGE_MARK, "")).strip()


def _greedy(tokens: int) -> dict[str, Any]:
    """Greedy decoding of at most ``tokens`` tokens."""
    return {"num_beams": 1, "max_new_tokens": tokens, "min_new_tokens": 0,
            "repetition_penalty": 1.0, "do_sample": False}  # fmt: skip


def _decoding(settings: dict[str, Any]) -> dict[str, Any]:
    """The engine's settings from a task's ``generation_kwargs``."""
    names = ["num_beams", "max_new_tokens", "min_new_tokens", "length_penalty"]
    if settings.get("do_sample"):
        names += ["do_sample", "temperature", "top_p"]
    given = {name: settings[name] for name in names if settings.get(name) is not None}
    return _greedy(128) | given


def _cut(answer: str, until: str | Sequence[str] | None) -> str:
    """The answer up to the first of the stop strings."""
    for stop in [until] if isinstance(until, str) else until or ():
        answer = answer.split(stop)[0] if stop else answer
    return answer
