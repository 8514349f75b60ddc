"""Instruction templates, and the renderer that training, evaluation and serving share.

A template is plain text with the places ``{question}`` (what the instruction is about: a question,
a statement, the text on a meme, or the answer that a question is asked for), ``{options}``,
``{context}``, ``{ocr_tokens}`` and ``{history}``. If an example has one of the last three and its
template does not name it, it is put in front (``PARTS``), so that nothing is lost silently::

    context      Context: There are two cups.
    ocr_tokens   Words in the image: milk, fresh.
    history      Dialog history: Question: is it day? Answer: yes.

A template in Chinese (``templates_zh.py``) has these parts in Chinese.

Options are lettered: ``(a) red (b) blue``. The response is the bare answer, never its letter.
"""

import hashlib
import json
import random
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from instructblip.core.batch import Example
from instructblip.data.templates_zh import PARTS_ZH, TEMPLATES_ZH

Language = Literal["en", "zh"]
TEMPLATES_FILE = "templates.json"
"""The file beside the weights that records the templates a model was tuned with."""

RENDERER_VERSION = 2
"""Incremented when the same template and example give another text than before."""

MAX_OCR_TOKENS = 30

PARTS = {
    "context": "Context: {context}",
    "ocr_tokens": "Words in the image: {ocr_tokens}.",
    "history": "Dialog history: {history}",
}
PLACES = ("question", "options", *PARTS)
_PLACE = re.compile(r"\{([^{}]*)\}")
_CHINESE = re.compile("[\u3400-\u9fff]")


@dataclass(frozen=True, slots=True)
class Rendered:
    """The texts of one sample. ``response`` is empty at inference.

    ``instruction`` and ``prompt`` are the same text today; they are two fields since some systems
    show the history to the language model only.
    """

    instruction: str
    prompt: str
    response: str = ""


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
    return Rendered(instruction=prompt, prompt=prompt, response=rng.choice(answers))


def render_prompt(example: Example, template: str | None = None) -> Rendered:
    """The prompt for inference from ``template`` or the first of the task, without response."""
    chosen = template if template is not None else templates_of(example.task)[0]
    prompt = _fill(example, chosen)
    return Rendered(instruction=prompt, prompt=prompt)


def templates_of(task: str, language: Language = "en") -> tuple[str, ...]:
    """The templates of a task; ValueError lists the known tasks."""
    if task not in TEMPLATES:
        raise ValueError(f"no templates for task '{task}'; expected one of {', '.join(TEMPLATES)}")
    return (TEMPLATES if language == "en" else TEMPLATES_ZH)[task]


def check_template(template: str) -> str:
    """Returns ``template``; ValueError names a place that does not exist."""
    for name in _PLACE.findall(template):
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
        known = json.loads(path.read_text(encoding="utf-8")).get("sha256")
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


def _history(turns: tuple[tuple[str, str], ...], chinese: bool) -> str:
    if chinese:
        return " ".join(f"问题：{question} 回答：{_stop(a, '。')}" for question, a in turns)
    return " ".join(f"Question: {question} Answer: {_stop(answer)}" for question, answer in turns)


def _stop(text: str, mark: str = ".") -> str:
    return text if text.endswith((".", "!", "?", "。", "！", "？")) else text + mark


TEMPLATES: dict[str, tuple[str, ...]] = {
    "caption": (
        "A short image description:",
        "A short caption of the image:",
        "Describe the image in a short sentence.",
        "Write a short caption for this picture.",
        "What does the picture show? Answer in one short sentence.",
        "Say briefly what is in the image.",
        "Briefly describe this picture.",
        "Tell me in a few words what you see.",
        "Give a short description of the picture.",
        "In one sentence, what is in this image?",
        "Look at the image and describe it briefly.",
        "Sum up the picture in one short sentence.",
    ),
    "caption_ocr": (
        "A short image description with the words in it:",
        "A short caption that uses the words in the image:",
        "Describe the image briefly. Mention the words you can read.",
        "Write a short caption for this picture. Include the words in it.",
        "Briefly say what is shown and what is written.",
        "In one short sentence, describe the picture and its words.",
        "Read the words in the image, then describe it briefly.",
        "What does the picture show, and what does it say? Answer briefly.",
        "Give a short description of the picture and the words on it.",
        "Sum up the image and what is written in it, in one sentence.",
    ),
    "vqa": (
        "Question: {question} Short answer:",
        "{question} Short answer:",
        "{question} Answer briefly.",
        "Question: {question} Answer in a few words.",
        "Look at the image and answer briefly: {question}",
        "Answer the question about the picture in a few words. {question}",
        "{question} A short answer is:",
        "Give a short answer to this question about the image: {question}",
        "From the picture, answer in one or two words: {question}",
        "{question} Use the image and keep the answer short.",
        "Q: {question} Short A:",
        "What is the short answer to the question? {question}",
    ),
    "multiple_choice": (
        "Question: {question} Options: {options}. Short answer:",
        "{question} Options: {options}. Answer:",
        "Question: {question} Choose one of these: {options}. Answer:",
        "{question} Which of these is right? {options}. Answer:",
        "Pick the right option. Question: {question} Options: {options}.",
        "Look at the image and choose. {question} {options}. Answer:",
        "Answer with one of the options. {question} Options: {options}.",
        "{question} The choices are {options}. The right choice is:",
        "Options: {options}. Question: {question} Answer:",
        "Choose the best answer to the question: {question} {options}. Answer:",
        "{question} Select one: {options}. Short answer:",
    ),
    "read": (
        "Question: {question} Short answer:",
        "{question} Read the image and answer briefly.",
        "Read the words in the picture. {question} Short answer:",
        "Use the words in the image to answer: {question} Short answer:",
        "{question} Look at what is written. Short answer:",
        "Answer briefly from the words you can read. {question}",
        "{question} Answer with the words in the picture.",
        "Read, then answer in a few words: {question}",
        "What is written tells the answer. {question} Short answer:",
        "Question about the words in the image: {question} Short answer:",
    ),
    "ask": (
        "Answer: {question}. Question:",
        'Ask a question about the image with the answer "{question}".',
        'Write a question about the picture. Its answer is "{question}". Question:',
        "The answer is {question}. What is the question?",
        "Which question about this image has the answer {question}?",
        "Look at the picture and ask a question. Answer: {question}. Question:",
        'What could be asked here, if the answer is "{question}"?',
        "Give a question that {question} is the right answer to.",
        "Make a question for the answer {question}. Question:",
        "{question} is the answer. The question about the image is:",
    ),
    "statement": (
        'Based on the image, is this statement true or false? "{question}" Answer:',
        '"{question}" True or false? Short answer:',
        "True or false: {question} Answer:",
        "Is it true or false? {question} Answer:",
        'Look at the picture. Is this right? "{question}" Answer true or false.',
        "Statement: {question} Is the statement true or false? Answer:",
        "Check this statement with the image: {question} True or false?",
        'The picture shows this: "{question}" True or false? Answer:',
        "Say true or false. {question}",
        "{question} Is this true or false for the image? Short answer:",
    ),
    "classify": (
        'This is an image with: "{question}" written on it. Is it hateful? Answer:',
        'Words in the image: "{question}". Is it hateful, yes or no?',
        'The picture says "{question}". Is this hateful? Short answer:',
        "Is this image hateful? It says: {question}. Answer yes or no.",
        'Read "{question}" and look at the image. Is it hateful? Answer:',
        'Does this picture attack people? It says "{question}". Answer:',
        "Text: {question}. Is the image with this text hateful? Answer:",
        'With "{question}" on it, is the image hateful? Yes or no?',
        "Question: is the picture hateful? Its text: {question}. Short answer:",
        'Is it hateful to show this image with "{question}"? Answer yes or no.',
    ),
    "dialogue": (
        "Question: {question} Short answer:",
        "{question} Short answer:",
        "{question} Answer briefly.",
        "Next question: {question} Short answer:",
        "Go on with the dialog. Question: {question} Answer:",
        "Now answer this about the image: {question} Short answer:",
        "The next question is: {question} Answer in a few words.",
        "{question} Give a short answer.",
        "Keep the dialog in mind. {question} Short answer:",
        "Last question: {question} Answer:",
    ),
    # The question of these data sets (LLaVA) is the whole instruction.
    "instruct": ("{question}",),
}
