"""The text that the starter's language model learns from: scenes told in words, and their tasks.

No picture is involved. A document is one description followed by several turns, each of them an
instruction (the same templates that tuning uses, and plainer ones) and its response. All kinds of
question occur, those held out from tuning too: the language model plays Vicuna, which knows how to
answer them when the scene is told in words.
"""

import random
from dataclasses import dataclass, replace

from instructblip.core.example import Example
from instructblip.data.templates import TEMPLATES, render_instruction
from instructblip.scenes.language import (
    DESCRIPTIONS,
    at,
    captions,
    describe,
    detail,
)
from instructblip.scenes.questions import (
    FRUIT,
    HELD_IN_KINDS,
    QUESTIONS,
    Question,
)
from instructblip.scenes.world import (
    COLOURS,
    SHAPES,
    Scene,
    Thing,
    sample_scene,
)
from instructblip.scenes.writers import motion_questions, walk

PLAIN = {
    "vqa": ("Question: {question} Short answer:", "{question} Short answer:"),
    "multiple_choice": (
        "Question: {question} Options: {options}. Short answer:",
        "{question} Options: {options}. Answer:",
    ),
    "caption": ("A short image description.", "A short image description:"),
    "statement": ('Is this true or false? "{question}" Answer:', "{question} True or false?"),
    "classify": (
        'This is an image with: "{question}" written on it. Is it correct? Answer:',
        "Label: {question}. Is it correct? Answer yes or no.",
        'Does the label "{question}" fit the image? Answer:',
        "Is this in the image: {question}? Short answer:",
    ),
    "instruct": ("{question}",),
    "ask": ("Answer: {question}. Question:",),
    "dialogue": ("Question: {question} Short answer:", "{question} Short answer:"),
    "read": ("Question: {question} Short answer:", "{question} Short answer:"),
    "caption_ocr": ("A short image description with the words in it:",),
}
DETAIL_INSTRUCTIONS = (
    "Describe the image in detail.",
    "Tell me everything that you see.",
    "What is in the picture? Say size, color and place of each thing.",
    "Give a full description of the picture.",
)
SHARES = {
    "cloze": 6, "list": 2, "vqa": 38, "multiple_choice": 12, "caption": 5, "detail": 1,
    "statement": 10, "classify": 8, "ask": 2, "dialogue": 6, "read": 8,
}  # fmt: skip
LIST_INSTRUCTIONS = ("List the things.", "Name each thing.", "Go through the things one by one.")
CLOZE_ENDS = ("", "", ":", " is", "?", "? Answer:", "? Short answer:")


def question_of(scene: Scene, rng: random.Random, kinds: tuple[str, ...]) -> Question:
    """A question of one of the kinds that fits the scene; what is written there comes first."""
    while True:
        written = [k for k in ("word", "digit") if k in kinds and scene.of_kind(k)]
        if written and rng.random() < 0.35 and (q := QUESTIONS[rng.choice(written)](scene, rng)):
            return q
        if question := QUESTIONS[rng.choice(kinds)](scene, rng):
            return question


BASIC_KINDS = ("color", "shape", "shape at", "place", "size", "exists")
VQA_KINDS = (*HELD_IN_KINDS, *BASIC_KINDS, "exists", *3 * ("count",), "shape at", *2 * ("beside",))
CHOICE_KINDS = (*HELD_IN_KINDS, "color", "place", *3 * ("most", "science"), "count", "beside")


def _cloze(scene: Scene, rng: random.Random, ends: tuple[str, ...] = CLOZE_ENDS) -> tuple[str, str]:
    """A phrase that ends, or nearly ends, with the thing it asks about.

    The first step of a question: a model that has learned to find the attributes of a thing right
    after its name only has to carry them from there to the end of a longer question.
    """
    shapes = scene.shapes
    thing = rng.choice(shapes) if shapes else None
    if thing is None:
        return "the word" if scene.of_kind("word") else "the digit", scene.things[0].name
    cases = []
    if [t.name for t in shapes].count(thing.name) == 1:
        name = rng.choice((thing.name, f"{thing.colour} {thing.name}"))
        cases += [
            (f"the color of the {thing.name}", thing.colour),
            (f"the size of the {name}", thing.size),
            (f"the place of the {name}", thing.place),
        ]
    if [t.colour for t in shapes].count(thing.colour) == 1:
        cases.append((f"the shape that is {thing.colour}", thing.name))
    for kind in ("color", "place", "size", "shape"):
        question = QUESTIONS[kind](scene, rng)
        text = question.text.removesuffix("?") if question else ""
        if text.endswith((*SHAPES, *COLOURS)):
            cases.append((text, question.answer))
    cases.append((f"the shape {at(thing.place)}", thing.name))
    cases.append((f"the color {at(thing.place)}", thing.colour))
    text, answer = rng.choice(cases)
    return text + rng.choice(ends), answer


def _turn(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """One instruction and its response."""
    task = rng.choices(list(SHARES), weights=list(SHARES.values()))[0]
    fields: dict = {}
    if task == "cloze":
        return _cloze(scene, rng)
    if task == "list":
        return rng.choice(LIST_INSTRUCTIONS), rng.choice(DESCRIPTIONS[2:5])(list(scene.things))
    if task == "caption":
        answer = rng.choice(captions(scene))
        task = "caption_ocr" if scene.of_kind("word") and rng.random() < 0.5 else task
    elif task == "detail":
        task, answer = "instruct", detail(scene)
        fields = {"question": rng.choice(DETAIL_INSTRUCTIONS)}
    elif task in ("statement", "classify"):
        question = QUESTIONS["statement" if task == "statement" else "label"](scene, rng)
        if question is None:
            return _turn(scene, rng)
        fields, answer = {"question": question.text}, question.answer
    elif task == "read":
        question = QUESTIONS["word at"](scene, rng)
        if question is None:
            return _turn(scene, rng)
        words = [t.name for t in scene.of_kind("word")]
        fields, answer = {"question": question.text}, question.answer
        if rng.random() < 0.5:
            fields["ocr_tokens"] = tuple(rng.sample(words, len(words)))
    elif task == "ask":
        question = question_of(scene, rng, HELD_IN_KINDS)
        fields, answer = {"question": question.answer}, question.text
    else:
        kinds = CHOICE_KINDS if task == "multiple_choice" else VQA_KINDS
        question = question_of(scene, rng, kinds)
        fields = {"question": question.text, "context": question.context}
        answer = question.answer
        if task == "multiple_choice":
            fields["choices"] = question.choices(rng, rng.choice((2, 3, 4, 4)))[0]
        if task == "dialogue":
            turns = [question_of(scene, rng, HELD_IN_KINDS) for _ in range(rng.randint(1, 2))]
            fields["history"] = tuple((t.text, t.answer) for t in turns)
    example = Example(
        dataset="text", split="train", id="", images=(), task=task, answers=(answer,), **fields
    )
    templates = PLAIN[task] if rng.random() < 0.5 or task == "classify" else TEMPLATES[task]
    rendered = render_instruction(example, rng, template=rng.choice(templates))
    return rendered.prompt, rendered.response


@dataclass(frozen=True)
class Document:
    """What there is, and what is asked about it: pairs of instruction and response.

    ``description`` is read word by word; ``things`` says the same, one entry for each thing, to be
    read as one position each: the sum of its words. A query token of a Q-Former is such a sum.
    """

    description: str
    things: tuple[str, ...]
    turns: list[tuple[str, str]]


@dataclass(frozen=True)
class Lesson:
    """What is asked in a lesson, and how.

    ``kinds``: of question, each document of one; none: phrases about single attributes.
    ``ends``: how phrases may end. ``questions``: the share of turns that are whole questions.
    """

    kinds: tuple[str, ...]
    ends: tuple[str, ...]
    questions: float


MATCHES = ("exists", "statement", "statement", "beside", "beside", "count", "shape at", "science",
           "word at", "word at")  # fmt: skip
TERMS = (
    (
        Lesson((), ("",), 0.0),
        Lesson((), ("", "?", ":"), 0.0),
        Lesson((), CLOZE_ENDS, 0.0),
        Lesson((), CLOZE_ENDS, 0.6),
    ),
    (
        Lesson(("exists", "exists", "statement"), ("", "?", ":"), 0.0),
        Lesson(("exists", "statement", "beside", "word at"), ("", "?", ":"), 0.1),
        Lesson(MATCHES, ("", "?", ":"), 0.2),
        Lesson(MATCHES, CLOZE_ENDS, 0.6),
    ),
)
"""The lessons of each term. Which attribute belongs to which thing is the first hard step, two
matches at once (a colour and a shape, two places) the second. Either is learned when a phrase ends
with what it asks about, and carried from there, little by little, to whole questions; without the
lessons the plateau of guessing among the things present is not left (docs/log.md). After the last
lesson of a term comes everything."""


def document(rng: random.Random, turns: int = 5, lesson: Lesson | None = None) -> Document:
    """What happens to be in a scene, and what a lesson asks about it, or anything."""
    if lesson:
        return _lesson(rng, lesson, 2 * turns)
    if rng.random() < 0.08:
        return _video(rng, turns)
    words = rng.choice((0, 0, 0, 1, 2))
    digits = 1 if words == 0 and rng.random() < 0.25 else 0
    shapes = rng.choice(((1, 1), (2, 2), (2, 2), (3, 3), (1, 3)))
    scene = sample_scene(rng, shapes, words, digits, pairs="any")
    pairs = [_turn(scene, rng) for _ in range(turns)]
    return Document(describe(scene, rng), things(scene, rng), pairs)


def _lesson(rng: random.Random, lesson: Lesson, turns: int) -> Document:
    kind = rng.choice(lesson.kinds) if lesson.kinds else ""
    few = 2 if kind in ("statement", "beside") else 1
    shapes = (0, 1) if kind == "word at" else rng.choice([(n, n) for n in range(few, 4)])
    asked: dict[str, str] = {}
    # A dictionary, so that no question comes twice: its answer could be copied from the first.
    while not asked:
        scene = sample_scene(rng, shapes, 2 if kind == "word at" else 0, pairs="any")
        turn = _match if kind else _single
        asked = dict(turn(scene, rng, lesson, kind) for _ in range(turns))
        asked.pop("", None)
    return Document(describe(scene, rng), things(scene, rng), list(asked.items()))


def _single(scene: Scene, rng: random.Random, lesson: Lesson, kind: str) -> tuple[str, str]:
    if rng.random() < lesson.questions:
        question = question_of(scene, rng, BASIC_KINDS)
        return f"{question.text} Short answer:", question.answer
    return _cloze(scene, rng, lesson.ends)


def _match(scene: Scene, rng: random.Random, lesson: Lesson, kind: str) -> tuple[str, str]:
    """A question of the kind, whole or cut to end with what it asks about; "" where none fits."""
    if kind == "exists" and rng.random() < 0.3:
        return _any(scene, rng)
    if not (question := QUESTIONS[kind](scene, rng)):
        return "", ""
    if rng.random() < lesson.questions:
        return _whole(question, rng), question.answer
    text = question.text
    for end in ("?", ".", " are there", " is there", " made of"):
        text = text.removesuffix(end)
    return f"{question.context} {text}".strip() + rng.choice(lesson.ends), question.answer


def _any(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """The simplest yes or no: whether one attribute occurs at all."""
    key, values, what = rng.choice(
        (("colour", tuple(COLOURS), "anything"), ("name", SHAPES, "any"))
    )
    present = [getattr(t, key) for t in scene.shapes]
    value = rng.choice(present if rng.random() < 0.5 else values)
    return f"{what} {value}", "yes" if value in present else "no"


def _whole(question: Question, rng: random.Random) -> str:
    if question.kind == "statement":
        return rng.choice(PLAIN["statement"]).format(question=question.text)
    return rng.choice(PLAIN["vqa"]).format(question=f"{question.context} {question.text}".strip())


def _video(rng: random.Random, turns: int) -> Document:
    """Four frames in a row, in which one of two shapes moves."""
    while True:
        scene = sample_scene(rng, (2, 2), pairs="any")
        first, second = scene.shapes
        if first.name != second.name and first.colour != second.colour:
            break
    moving, still = rng.sample([first, second], 2)
    frames = [
        Scene(tuple(rng.sample([replace(moving, row=row, column=column), still], 2)), scene.seed)
        for row, column in walk(moving, still, rng)
    ]
    told = " then: ".join(describe(frame, rng) for frame in frames)
    asked = rng.sample(motion_questions(moving, still), min(turns, 4))
    turns_ = [(rng.choice(PLAIN["vqa"]).format(question=text), answer) for text, answer in asked]
    return Document(told, tuple(t for frame in frames for t in things(frame, rng)), turns_)


def things(scene: Scene, rng: random.Random) -> tuple[str, ...]:
    """The words of each thing, the things in any order."""

    def words(thing: Thing) -> str:
        first = f"{thing.size} {thing.colour}" if thing.kind == "shape" else thing.kind
        return f"{first} {thing.name} {thing.place}"

    return tuple(words(t) for t in rng.sample(scene.things, len(scene.things)))


def texts(rng: random.Random, documents: int) -> list[str]:
    """Loose lines of text for the training of tokenizers."""
    lines = [" ".join(FRUIT.values())]
    for _ in range(documents):
        one = document(rng)
        lines.append(one.description)
        lines += [f"{prompt} {response}" for prompt, response in one.turns]
    for templates in TEMPLATES.values():
        lines += [template.replace("{", " ").replace("}", " ") for template in templates] * 20
    return lines
