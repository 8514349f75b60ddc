"""One annotation of a data set, which needs no torch: a table is read, and its errors are reported,
before a model is imported."""

from dataclasses import dataclass, field
from typing import Any

IMAGE_MARK = "<image>"
"""The place of an image in a text, as LLaVA writes it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One annotation of one data set, as its owner wrote it: no template, no tokens, no pixels.

    ``images`` are paths relative to the image root; more than one are shown together, in order:
    the frames of a video, or several images. ``answers`` are all accepted answers (ten for
    VQAv2, five references for COCO): one of them is chosen when the instruction is rendered.
    ``history`` are the earlier turns of a dialogue as (question, answer). ``where`` names file and
    record for error messages.
    ``extra`` holds what one metric needs and nothing else does (question type, label, ...).
    """

    dataset: str
    split: str
    id: str
    images: tuple[str, ...]
    task: str
    question: str = ""
    answers: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    context: str = ""
    ocr_tokens: tuple[str, ...] = ()
    history: tuple[tuple[str, str], ...] = ()
    where: str = ""
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def system(self) -> str:
        """The context where it is the system text of a dialogue: a reader says so in ``extra``,
        since a context may also be a passage to read."""
        return self.context if self.extra.get("system") else ""

    @property
    def num_marks(self) -> int:
        """Images whose place the texts state; the others are in front."""
        texts = (self.context, self.question, *(text for turn in self.history for text in turn))
        return sum(text.count(IMAGE_MARK) for text in texts)

    @property
    def taught(self) -> list[str]:
        """The answers that a model can learn: not the empty ones."""
        return [answer for answer in self.answers if answer.strip()]
