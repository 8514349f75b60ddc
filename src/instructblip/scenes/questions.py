"""What can be asked about a scene: questions with answers, statements.

`QUESTIONS` maps each kind to a function of the scene and a random generator, which returns a
question whose answer follows from the scene. It returns None where the kind does not fit the scene
(no word to read; two red things, so that "the red thing" is ambiguous).
"""

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from instructblip.scenes.language import a, at, join
from instructblip.scenes.world import COLOURS, HELD_OUT_PAIRS, SHAPES, SIZES, WORDS, Scene, Thing

FRUIT = {
    "red": "cherry",
    "green": "lime",
    "blue": "blueberry",
    "yellow": "banana",
    "purple": "plum",
    "orange": "mango",
}
SIGNAL = {"red": "stop", "green": "go", "yellow": "slow"}
CORNERS = {"circle": "0", "triangle": "3", "square": "4", "star": "5"}
ALL_PLACES = tuple(Thing("shape", "", r, c).place for r in range(3) for c in range(3))
NUMBERS = ("0", "1", "2", "3", "4")


@dataclass(frozen=True, slots=True)
class Question:
    """A question, its answer and, where the kind has them, wrong answers of the same sort."""

    kind: str
    text: str
    answer: str
    others: tuple[str, ...] = ()
    context: str = ""
    why: str = ""

    def choices(self, rng: random.Random, number: int = 4) -> tuple[tuple[str, ...], int]:
        """``number`` choices in random order and the index of the right one."""
        wrong = rng.sample(self.others, min(number - 1, len(self.others)))
        options = [self.answer, *wrong]
        rng.shuffle(options)
        return tuple(options), options.index(self.answer)


Asker = Callable[[Scene, random.Random], Question | None]


def _unique(things: tuple[Thing, ...], key: str) -> list[Thing]:
    """The things whose value of ``key`` no other thing has."""
    values = [getattr(t, key) for t in things]
    return [t for t in things if values.count(getattr(t, key)) == 1]


def _pick(rng: random.Random, things: list[Thing]) -> Thing | None:
    return rng.choice(things) if things else None


def _but(values: Iterable[str], value: str) -> tuple[str, ...]:
    return tuple(v for v in values if v != value)


def _about_shape(
    kind: str,
    forms: Sequence[str],
    answer: Callable[[Thing], str | None],
    options: Iterable[str],
    unique: str = "name",
    why: str = "",
) -> Asker:
    """Asks for a property of one shape, which ``forms`` name by its ``unique`` name or colour, or
    by its place. ``answer`` is None for shapes without the property."""

    def ask(scene: Scene, rng: random.Random) -> Question | None:
        shapes = _unique(scene.shapes, unique) if unique else scene.shapes
        if not (thing := _pick(rng, [t for t in shapes if answer(t)])):
            return None
        words = {"name": thing.name, "colour": thing.colour, "place": at(thing.place)}
        form = rng.choice(forms) if len(forms) > 1 else forms[0]  # a choice of one draws bits too
        value = str(answer(thing))
        return Question(
            kind, form.format(**words), value, _but(options, value), why=why.format(**words)
        )

    return ask


def ask_count(scene: Scene, rng: random.Random) -> Question | None:
    if not scene.shapes:
        return None
    roll = rng.random()
    if roll < 0.3:
        count, what = len(scene.shapes), "shapes"
    else:
        key, values = ("name", SHAPES) if roll < 0.65 else ("colour", tuple(COLOURS))
        present = [getattr(t, key) for t in scene.shapes]
        value = rng.choice(present) if rng.random() < 0.8 else rng.choice(values)
        count = present.count(value)
        plural = "crosses" if value == "cross" else f"{value}s"
        what = plural if key == "name" else f"{value} shapes"
    text = rng.choice((f"how many {what} are there?", f"what number of {what} is there?"))
    return Question("count", text, str(count), _but(NUMBERS, str(count)))


def ask_exists(scene: Scene, rng: random.Random) -> Question | None:
    if not scene.shapes:
        return None
    pairs = {(t.colour, t.name) for t in scene.shapes}
    thing = rng.choice(scene.shapes)
    if rng.random() < 0.5:
        colour, name = thing.colour, thing.name
    else:
        near = [
            (c, s)
            for c in COLOURS
            for s in SHAPES
            if (c, s) not in pairs | HELD_OUT_PAIRS and (c == thing.colour or s == thing.name)
        ]
        colour, name = rng.choice(near)
    answer = "yes" if (colour, name) in pairs else "no"
    text = rng.choice((f"is there {a(f'{colour} {name}')}?", f"is any {name} {colour}?"))
    return Question("exists", text, answer, _but(("yes", "no"), answer))


def _ask_written(
    kind: str, forms: tuple[str, ...], options: tuple[str, ...], scene: Scene, rng: random.Random
) -> Question | None:
    """The only word or the only digit of a scene."""
    things = scene.of_kind(kind)
    if len(things) != 1:
        return None
    return Question(kind, rng.choice(forms), things[0].name, _but(options, things[0].name))


def sides(first: Thing, second: Thing) -> list[str]:
    """Where ``first`` is from ``second``: "left of", "right of", "above", "below"."""
    names = []
    if first.column != second.column:
        names.append("left of" if first.column < second.column else "right of")
    if first.row != second.row:
        names.append("above" if first.row < second.row else "below")
    return names


OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def ask_beside(scene: Scene, rng: random.Random) -> Question | None:
    """The compositional question: an attribute of the only shape on one side of another."""
    cases = []
    for anchor in _unique(scene.shapes, "name"):
        for side in OPPOSITE:
            beside = [t for t in scene.shapes if t != anchor and side in sides(t, anchor)]
            if len(beside) == 1:
                cases.append((anchor, side, beside[0]))
    if not cases:
        return None
    anchor, side, thing = rng.choice(cases)
    if rng.random() < 0.5:
        text = f"what shape is {side} the {anchor.name}?"
        return Question("beside", text, thing.name, _but(SHAPES, thing.name))
    text = f"what color is the shape {side} the {anchor.name}?"
    return Question("beside", text, thing.colour, _but(COLOURS, thing.colour))


def ask_statement(scene: Scene, rng: random.Random) -> Question | None:
    """A spatial statement; the answer is "true" or "false"."""
    shapes = _unique(scene.shapes, "name")
    if len(shapes) < 2:
        return None
    first, second = rng.sample(shapes, 2)
    side = rng.choice(sides(first, second))
    answer = rng.choice(("true", "false"))
    side = side if answer == "true" else OPPOSITE[side]
    text = f"the {first.name} is {side} the {second.name}."
    return Question("statement", text, answer, _but(("true", "false"), answer))


def ask_label(scene: Scene, rng: random.Random) -> Question | None:
    """A label that fits the image or not; the answer is "yes" or "no"."""
    question = ask_exists(scene, rng)
    if question is None:
        return None
    label = question.text.removeprefix("is there ").removesuffix("?")
    if label.startswith("is any"):
        name, colour = label.removeprefix("is any ").split()
        label = a(f"{colour} {name}")
    return Question("label", label, question.answer, question.others)


def ask_most(scene: Scene, rng: random.Random) -> Question | None:
    """An image puzzle: which shape or colour appears more than once."""
    for key, what in rng.sample((("name", "shape"), ("colour", "color")), 2):
        values = [getattr(t, key) for t in scene.shapes]
        double = sorted({v for v in values if values.count(v) > 1})
        if len(double) == 1:
            others = _but(SHAPES if key == "name" else tuple(COLOURS), double[0])
            return Question("most", f"which {what} is there more than once?", double[0], others)
    return None


def ask_science(scene: Scene, rng: random.Random) -> Question | None:
    """A fact in the context decides: which of two made-up names fits the image."""
    if not (thing := _pick(rng, _unique(scene.shapes, "name"))):
        return None
    other = rng.choice(_but(COLOURS, thing.colour))
    names = rng.sample(("metal", "glass", "wood", "stone"), 2)
    facts = [f"{thing.colour} things are {names[0]}", f"{other} things are {names[1]}"]
    rng.shuffle(facts)
    return Question("science", f"what is the {thing.name} made of?", names[0], (names[1],),
                    context=f"{join(facts)}.")  # fmt: skip


def ask_word_at(scene: Scene, rng: random.Random) -> Question | None:
    """Two printed words: the one at a place."""
    words = scene.of_kind("word")
    if len(words) < 2:
        return None
    word, other = rng.sample(words, 2)
    side = rng.choice(sides(word, other))
    extreme = {"left of": "left", "right of": "right", "above": "top", "below": "bottom"}[side]
    if rng.random() < 0.5:
        text = f"which word is {at(word.place)}?"
    else:
        text = f"which word is further to the {extreme}?"
    return Question("word at", text, word.name, (other.name,))


QUESTIONS: dict[str, Asker] = {
    "color": _about_shape(
        "color",
        (
            "what color is the {name}?",
            "what is the color of the {name}?",
            "the {name} has which color?",
        ),
        lambda t: t.colour,
        COLOURS,
        why="the {name} is {colour}",
    ),
    "shape": _about_shape(
        "shape",
        ("what shape is {colour}?", "which shape is {colour}?", "what is the {colour} thing?"),
        lambda t: t.name,
        SHAPES,
        unique="colour",
        why="the {name} is {colour}",
    ),
    "shape at": _about_shape(
        "shape at",
        ("what shape is {place}?", "which shape is {place}?"),
        lambda t: t.name,
        SHAPES,
        unique="",
    ),
    "count": ask_count,
    "exists": ask_exists,
    "place": _about_shape(
        "place",
        ("where is the {name}?", "in which place is the {name}?"),
        lambda t: t.place,
        ALL_PLACES,
        why="the {name} is {place}",
    ),
    "size": _about_shape(
        "size", ("is the {name} small or large?", "how big is the {name}?"), lambda t: t.size, SIZES
    ),
    "corners": _about_shape(
        "corners",
        (
            "how many corners has the {colour} shape?",
            "what number of corners has the {colour} thing?",
        ),
        lambda t: CORNERS.get(t.name),
        CORNERS.values(),
        unique="colour",
        why="the {colour} shape is a {name}",
    ),
    "fruit": _about_shape(
        "fruit",
        ("which fruit has the color of the {name}?", "the {name} has the color of which fruit?"),
        lambda t: FRUIT[t.colour],
        FRUIT.values(),
        why="the {name} is {colour}",
    ),
    "signal": _about_shape(
        "signal",
        ("what does a traffic light mean that has the color of the {name}?",),
        lambda t: SIGNAL.get(t.colour),
        SIGNAL.values(),
        why="the {name} is {colour}",
    ),
    "word": partial(
        _ask_written,
        "word",
        ("what word is printed?", "which word can you read?", "what does it say?"),
        WORDS,
    ),
    "digit": partial(
        _ask_written,
        "digit",
        ("which digit is written?", "what number can you read?", "what digit do you see?"),
        tuple(map(str, range(10))),
    ),
    "beside": ask_beside,
    "statement": ask_statement,
    "label": ask_label,
    "most": ask_most,
    "science": ask_science,
    "word at": ask_word_at,
}
"""Kind of question to its function. The first twelve are held-in, the rest are never tuned on."""
HELD_IN_KINDS = tuple(QUESTIONS)[:12]
VQA_KINDS = ("color", "shape", "shape at", "count", "exists", "place", "size")
KNOWLEDGE_KINDS = ("corners", "fruit", "signal")
