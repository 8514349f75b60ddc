"""Instruction templates, and the renderer that training, evaluation and serving share.

A template is plain text with the places ``{question}`` (what the instruction is about: a question,
a statement, the text on a meme, or the answer that a question is asked for), ``{options}``,
``{context}``, ``{ocr_tokens}`` and ``{history}``. If an example has one of the last three and its
template does not name it, it is put in front (``PARTS``), so that nothing is lost silently::

    context      Context: There are two cups.
    ocr_tokens   Words in the image: milk, fresh.
    history      Dialog history: Question: is it day? Answer: yes.

A template in Chinese has these parts in Chinese. All texts are in ``templates.yaml``.

A template may also be ``package.module:function``, a function of the user's own that takes the
example and returns the whole prompt.

Options are lettered: ``(a) red (b) blue``. The response is the bare answer, never its letter.

``<image>`` in a text says where the language model reads an image; see ``tokens.py``.
"""

import hashlib
import itertools
import json
import random
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from instructblip.core.example import IMAGE_MARK, Example
from instructblip.core.files import read_json
from instructblip.core.user_code import find_function, is_function

Language = Literal["en", "zh"]
TEMPLATES_FILE = "templates.json"
"""The file beside the weights that records the templates a model was tuned with."""

RENDERER_VERSION = 2
"""Incremented when the same template and example give another text than before."""

MAX_OCR_TOKENS = 30

_TEXTS: dict[str, Any] = yaml.safe_load(
    (Path(__file__).parent / "templates.yaml").read_text(encoding="utf-8")
)
TEMPLATES, TEMPLATES_ZH = (
    {task: tuple(texts) for task, texts in _TEXTS[language]["templates"].items()}
    for language in ("en", "zh")
)
PARTS: dict[str, str] = _TEXTS["en"]["parts"]
PARTS_ZH: dict[str, str] = _TEXTS["zh"]["parts"]
PLACES = ("question", "options", *PARTS)
_PLACE = re.compile(r"\{([^{}]*)\}")
_CHINESE = re.compile("[\u3400-\u9fff]")
_FRONT = (
    re.compile(rf"^(\s*{IMAGE_MARK})+"),
    re.compile(rf"(?<!\s)[^\S\n]*\n(\s*{IMAGE_MARK})+\s*$"),  # see data/tokens.py, _MARK
)


@dataclass(frozen=True, slots=True)
class Dialogue:
    """A prompt as turns: earlier questions with their answers, the last question, and a system
    text."""

    question: str
    history: tuple[tuple[str, str], ...] = ()
    system: str = ""

    @property
    def num_marks(self) -> int:
        """Image marks in all texts."""
        texts = (self.system, self.question, *(text for turn in self.history for text in turn))
        return sum(text.count(IMAGE_MARK) for text in texts)

    @property
    def num_characters(self) -> int:
        """Characters of the system text and of all turns."""
        return sum(map(len, (self.system, self.question, *itertools.chain(*self.history))))

    def with_beginning(self, text: str) -> "Dialogue":
        """``text`` put in front of the first question."""
        if not self.history:
            return replace(self, question=text + self.question)
        (question, answer), *rest = self.history
        return replace(self, history=((text + question, answer), *rest))

    def without_first_turn(self) -> "Dialogue":
        """The dialogue after its first answer; the image marks move to the next question."""
        marks = "".join(self.history[0]).count(IMAGE_MARK)
        return replace(self, history=self.history[1:]).with_beginning(IMAGE_MARK * marks)


@dataclass(frozen=True, slots=True)
class Rendered:
    """The texts of one sample. ``response`` is empty at inference. ``prompt`` has an
    ``IMAGE_MARK`` for each image that is not in front of it. ``dialogue`` is the prompt as turns;
    None for one question.

    ``instruction`` and ``prompt`` are the same text today; they are two fields since some systems
    show the history to the language model only.
    """

    instruction: str
    prompt: str
    response: str = ""
    dialogue: Dialogue | None = None

    @classmethod
    def of(cls, text: "str | Rendered") -> "Rendered":
        """A text that is instruction and prompt, without response."""
        return text if isinstance(text, Rendered) else cls(text, text)

    def last(self, limit: int) -> "Rendered":
        """About the last ``limit`` characters of the prompt: whole turns are removed from the
        first, then the beginning of what is left."""
        if max(len(self.instruction), len(self.prompt)) <= limit:
            return self
        turns = self.dialogue
        if turns is not None:
            while turns.history and turns.num_characters > limit:
                turns = turns.without_first_turn()
            turns = replace(turns, question=turns.question[-limit:], system=turns.system[-limit:])
        return replace(
            self,
            instruction=self.instruction[-limit:],
            prompt=self.prompt[-limit:],
            dialogue=turns,
        )

    @property
    def turns(self) -> Dialogue:
        """The prompt in the form that a chat template takes."""
        return self.dialogue or Dialogue(self.prompt)


def render_instruction(
    example: Example,
    rng: random.Random,
    template: str | None = None,
    language: Language = "en",
) -> Rendered:
    """Chooses one template of the task (unless given) and ONE answer; nothing else chooses one.

    ``answers`` has an answer as often as annotators gave it, so a uniform choice weights answers by
    their frequency. Empty answers are never chosen; ValueError for an example without others.
    """
    answers = example.taught
    if not answers:
        raise ValueError(f"{example.where}: no answer to train on; run the data check")
    chosen = template if template is not None else rng.choice(templates_of(example.task, language))
    prompt = _fill(example, chosen)
    dialogue = _dialogue(example, chosen)
    return Rendered(prompt, prompt, response=rng.choice(answers), dialogue=dialogue)


def render_prompt(example: Example, template: str | None = None) -> Rendered:
    """The prompt for inference from ``template`` or the first of the task, without response."""
    chosen = template if template is not None else templates_of(example.task)[0]
    prompt = _fill(example, chosen)
    return Rendered(prompt, prompt, dialogue=_dialogue(example, chosen))


def templates_of(task: str, language: Language = "en") -> tuple[str, ...]:
    """The templates of a task; ValueError lists the known tasks."""
    if task not in TEMPLATES:
        raise ValueError(f"no templates for task '{task}'; expected one of {', '.join(TEMPLATES)}")
    return (TEMPLATES if language == "en" else TEMPLATES_ZH)[task]


def wordings_of(task: str, template: str | None, number: int) -> tuple[str, ...]:
    """At most ``number`` other templates of a task, which name the same of question and options as
    ``template`` (None: the first of the task): the same task in other words."""
    known = templates_of(task)
    frozen = known[0] if template is None else template
    asked = {"question", "options"}.intersection(_PLACE.findall(frozen))
    same = {t for t in known if asked == {"question", "options"}.intersection(_PLACE.findall(t))}
    return tuple(t for t in known if t in same and _bare(t) != _bare(frozen))[:number]


def _bare(template: str) -> str:
    """A template without the case and the signs that end its lines."""
    return template.lower().rstrip(" .:")


def language_of(texts: Iterable[str]) -> Language:
    """Chinese if more than half of the letters are Chinese characters, else English."""
    letters = [letter for text in texts for letter in text if letter.isalpha()]
    chinese = sum(bool(_CHINESE.match(letter)) for letter in letters)
    return "zh" if 2 * chinese > len(letters) else "en"


def without_front_marks(text: str) -> str:
    """A first turn without its image marks where all stand at its beginning, or all on lines at its
    end: there the images are in front, as LLaVA reads its data, which has both forms. Any other
    text is returned as it is."""
    if IMAGE_MARK not in text:
        return text
    front = (marks.sub("", text).strip() for marks in _FRONT)
    return next((rest for rest in front if IMAGE_MARK not in rest), text)


def in_parts(prompt: str, num_images: int) -> list[str]:
    """The texts of a prompt and an ``IMAGE_MARK`` for each image, in order."""
    parts = re.split(f"({IMAGE_MARK})", prompt)
    in_front = num_images - prompt.count(IMAGE_MARK)
    return [IMAGE_MARK] * in_front + [part for part in parts if part.strip()]


def check_template(template: str) -> str:
    """Returns ``template``; ValueError names a place that does not exist."""
    for name in () if is_function(template) else _PLACE.findall(template):
        if name not in PLACES:
            raise ValueError(
                f"template {template!r}: no place '{{{name}}}'; expected "
                + ", ".join(f"{{{place}}}" for place in PLACES)
            )
    return template


def template_hash() -> str:
    """A hash of all templates and rules, kept in the checkpoint and compared at inference."""
    rules = [RENDERER_VERSION, MAX_OCR_TOKENS, PARTS, TEMPLATES, PARTS_ZH, TEMPLATES_ZH]
    return hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest()


def templates_note() -> str:
    """The content of ``templates.json``."""
    note = {"renderer": RENDERER_VERSION, "sha256": template_hash()}
    return json.dumps(note, indent=2) + "\n"


def warn_of_other_templates(directory: Path) -> None:
    """Warns when the model of a directory was tuned with other templates than these."""
    path = directory / TEMPLATES_FILE
    if path.is_file():
        known = read_json(path).get("sha256")
        if known != template_hash():
            warnings.warn(
                f"{directory}: this model was tuned with other instruction templates than this "
                "version of instructblip has; its answers to benchmark prompts may be worse. "
                "Use the version it was tuned with, or tune it again",
                stacklevel=2,
            )


def letter_options(choices: tuple[str, ...]) -> str:
    """``(a) red (b) blue``; numbers from the 27th choice on."""
    letters = [*"abcdefghijklmnopqrstuvwxyz", *map(str, range(27, len(choices) + 1))]
    return " ".join(f"({letter}) {c}" for letter, c in zip(letters, choices, strict=False))


def _fill(example: Example, template: str) -> str:
    if is_function(template):
        text = find_function(template)(example)
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{template}: expected a prompt for {example.where}; got {text!r}")
        return text
    check_template(template)
    chinese = bool(_CHINESE.search(template))
    values = {
        "question": example.question,
        "options": letter_options(example.choices),
        "context": example.context,
        "ocr_tokens": ", ".join(example.ocr_tokens[:MAX_OCR_TOKENS]),
        "history": _history(example.history, chinese),
    }
    named = set(_PLACE.findall(template))
    parts = PARTS_ZH if chinese else PARTS
    before = [part for name, part in parts.items() if values[name] and name not in named]
    text = " ".join([*before, template])
    # One pass over the template: braces in a question are text, not places.
    filled = _PLACE.sub(lambda match: values[match[1]], text)
    return re.sub(r"[ \t]+", " ", filled).strip()


def _dialogue(example: Example, template: str) -> Dialogue | None:
    """The prompt as turns. History and system text that the template itself puts into the prompt
    stay there."""
    if is_function(template):
        return None
    named = set(_PLACE.findall(template))
    history = () if "history" in named else example.history
    system = "" if "context" in named else example.system
    if not history and not system:
        return None
    rest = replace(
        example,
        history=() if history else example.history,
        context="" if system else example.context,
    )
    return Dialogue(_fill(rest, template), history, system)


def _history(turns: tuple[tuple[str, str], ...], chinese: bool) -> str:
    if chinese:
        return " ".join(f"问题：{question} 回答：{_stop(a, '。')}" for question, a in turns)
    return " ".join(f"Question: {question} Answer: {_stop(answer)}" for question, answer in turns)


def _stop(text: str, mark: str = ".") -> str:
    return text if text.endswith((".", "!", "?", "。", "！", "？")) else text + mark
