"""A plug-in for lmms-eval: ``lmms-eval --model instructblip_engine --model_args pretrained=DIR``.

lmms-eval finds ``manifest`` through the entry point group ``lmms_eval.models``. Generation and
multiple choice both run through the engine; ``until`` cuts an answer, ``max_new_tokens`` and
``num_beams`` of a task are kept, its sampling settings only where the task samples.
"""

from collections.abc import Callable, Sequence
from typing import Any

from lmms_eval.api.instance import GenerationResult, Instance  # pyright: ignore[reportMissingImports]
from lmms_eval.api.model import lmms  # pyright: ignore[reportMissingImports]
from lmms_eval.models.registry_v2 import ModelManifest  # pyright: ignore[reportMissingImports]

from instructblip.inference.engine import Engine
from instructblip.inference.inputs import ImageInput

MODEL_ID = "instructblip_engine"
"""Not "instructblip", which is lmms-eval's own adapter of transformers' class."""


def manifest() -> ModelManifest:
    """What lmms-eval registers."""
    return ModelManifest(MODEL_ID, simple_class_path=f"{__name__}.{EngineLmms.__name__}")


class EngineLmms(lmms):
    """Args: a model or run directory, or "starter"; samples at a time; "auto", "cpu", "cuda"."""

    def __init__(
        self,
        pretrained: str = "starter",
        batch_size: int | str = 32,
        device: str = "auto",
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        size = max_batch_size or 32 if batch_size == "auto" else int(batch_size)
        self.engine = Engine.from_pretrained(pretrained, device=device, batch_size=size)

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """One answer a request; those with the same settings go together."""
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(i)
        said = [""] * len(requests)
        for group in groups.values():
            settings = requests[group[0]].args[1]
            asked = [requests[i].args for i in group]
            images = [self._pictures(*arguments[2:6]) for arguments in asked]
            texts = [_prompt(arguments[0]) for arguments in asked]
            answers = self.engine.answer(images, texts, **_decoding(settings))
            for i, answer in zip(group, answers, strict=True):
                said[i] = _cut(answer, settings.get("until"))
        return said

    def loglikelihood(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """(negative log-likelihood, whether greedy decoding says it) of each continuation.

        lmms-eval takes the smallest value as its choice, and keeps a tuple whole only inside a
        ``GenerationResult``. All continuations of one question are ranked together.
        """
        groups: dict[tuple[Any, ...], list[int]] = {}
        for i, request in enumerate(requests):
            context, _, _, doc_id, task, split = request.args
            groups.setdefault((context, doc_id, task, split), []).append(i)
        found: list[Any] = [None] * len(requests)
        for group in groups.values():
            context, _, *where = requests[group[0]].args
            images, prompt = self._pictures(*where), _prompt(context)
            texts = [self._continuation(requests[i]) for i in group]
            scores = self.engine.rank(images, prompt, texts)
            longest = max(len(self.engine.tokens.response(text)) for text in texts)
            (greedy,) = self.engine.answer([images], [prompt], **_greedy(longest))
            for i, text, score in zip(group, texts, scores, strict=True):
                found[i] = GenerationResult(text=(-score, greedy == text))  # type: ignore[arg-type]
        return found

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        raise NotImplementedError("conversations of several rounds are not supported")

    def _continuation(self, request: Instance) -> str:
        _, continuation, _, doc_id, task, split = request.args
        if callable(continuation):
            continuation = continuation(self.task_dict[task][split][doc_id])
        return str(continuation).strip()

    def _pictures(
        self, to_visual: Callable[[Any], list[ImageInput]], doc_id: int, task: str, split: str
    ) -> list[ImageInput]:
        pictures = to_visual(self.task_dict[task][split][doc_id])
        if not pictures:
            raise ValueError(f"{task} {split} {doc_id}: no picture; every question needs one")
        return pictures


def _prompt(context: str) -> str:
    """The text as it is, without the place that some tasks mark for the picture."""
    return context.replace("<image>", "").strip()


def _greedy(tokens: int) -> dict[str, Any]:
    return {"num_beams": 1, "max_new_tokens": tokens, "min_new_tokens": 0,
            "repetition_penalty": 1.0, "do_sample": False}  # fmt: skip


def _decoding(settings: dict[str, Any]) -> dict[str, Any]:
    """The engine's settings from a task's ``generation_kwargs``."""
    names = ["num_beams", "max_new_tokens", "min_new_tokens", "length_penalty"]
    if settings.get("do_sample"):
        names += ["do_sample", "temperature", "top_p"]
    found = {name: settings[name] for name in names if settings.get(name) is not None}
    return _greedy(128) | found


def _cut(answer: str, until: str | Sequence[str] | None) -> str:
    for stop in [until] if isinstance(until, str) else until or ():
        answer = answer.split(stop)[0] if stop else answer
    return answer
