"""What can be asked about a scene: questions with answers, statements.

`QUESTIONS` maps each kind to a function of the scene and a random generator, which returns a
question whose answer follows from the scene. It returns None where the kind does not fit the scene
(no word to read; two red things, so that "the red thing" is ambiguous). Kinds that ask for a
property of one thing are listed in ``questions.yaml``.
"""

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

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
FACTS = {"fruit": ("colour", FRUIT), "signal": ("colour", SIGNAL), "corners": ("name", CORNERS)}
"""What a property of a shape implies: name -> the property and its table."""
OPTIONS: dict[str, Iterable[str]] = {
    "colour": COLOURS,
    "name": SHAPES,
    "place": ALL_PLACES,
    "size": SIZES,
    "word": WORDS,
    "digit": tuple(map(str, range(10))),
    **{name: table.values() for name, (_, table) in FACTS.items()},
}
"""The answers to what ``questions.yaml`` asks."""


@dataclass(frozen=True, slots=True)
class Question:
    """A question, its answer and, where the kind has them, wrong answers of the same sort.

    ``cells`` (row, column) are those of the things that the answer is read from; none where it
    follows from what is not there, or from a number.
    """

    kind: str
    text: str
    answer: str
    others: tuple[str, ...] = ()
    context: str = ""
    why: str = ""
    cells: tuple[tuple[int, int], ...] = ()

    def choices(self, rng: random.Random, number: int = 4) -> tuple[tuple[str, ...], int]:
        """``number`` choices in random order and the index of the right one."""
        wrong = rng.sample(self.others, min(number - 1, len(self.others)))
        options = [self.answer, *wrong]
        rng.shuffle(options)
        return tuple(options), options.index(self.answer)


Asker = Callable[[Scene, random.Random], Question | None]


def _cells(*things: Thing) -> tuple[tuple[int, int], ...]:
    return tuple((t.row, t.column) for t in things)


def _unique(things: tuple[Thing, ...], key: str) -> list[Thing]:
    """The things whose value of ``key`` no other thing has."""
    values = [getattr(t, key) for t in things]
    return [t for t in things if values.count(getattr(t, key)) == 1]


def _but(values: Iterable[str], value: str) -> tuple[str, ...]:
    return tuple(v for v in values if v != value)


def _about_shape(kind: str, by: str, asks: str, forms: Sequence[str], why: str = "") -> Asker:
    """Asks for a property of one shape; see ``questions.yaml``."""

    def answer(thing: Thing) -> str | None:
        if asks not in FACTS:
            return getattr(thing, asks)
        key, table = FACTS[asks]
        return table.get(getattr(thing, key))

    def ask(scene: Scene, rng: random.Random) -> Question | None:
        things = [t for t in _unique(scene.shapes, by) if answer(t)]
        if not things:
            return None
        thing = rng.choice(things)
        words = {"name": thing.name, "colour": thing.colour, "place": at(thing.place)}
        form = rng.choice(forms) if len(forms) > 1 else forms[0]  # a choice of one draws bits too
        value = str(answer(thing))
        others = _but(OPTIONS[asks], value)
        return Question(kind, form.format(**words), value, others, why=why.format(**words),
                        cells=_cells(thing))  # fmt: skip

    return ask


def _about_text(kind: str, asks: str, forms: Sequence[str]) -> Asker:
    """Asks what the only word or the only digit of a scene is."""

    def ask(scene: Scene, rng: random.Random) -> Question | None:
        things = scene.of_kind(asks)
        if len(things) != 1:
            return None
        name = things[0].name
        others = _but(OPTIONS[asks], name)
        return Question(kind, rng.choice(forms), name, others, cells=_cells(things[0]))

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
    there = (t for t in scene.shapes if (t.colour, t.name) == (colour, name))
    return Question("exists", text, answer, _but(("yes", "no"), answer), cells=_cells(*there))


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
        answer, others = thing.name, _but(SHAPES, thing.name)
    else:
        text = f"what color is the shape {side} the {anchor.name}?"
        answer, others = thing.colour, _but(COLOURS, thing.colour)
    return Question("beside", text, answer, others, cells=_cells(thing))


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
    others = _but(("true", "false"), answer)
    return Question("statement", text, answer, others, cells=_cells(first, second))


def ask_label(scene: Scene, rng: random.Random) -> Question | None:
    """A label that fits the image or not; the answer is "yes" or "no"."""
    question = ask_exists(scene, rng)
    if question is None:
        return None
    label = question.text.removeprefix("is there ").removesuffix("?")
    if label.startswith("is any"):
        name, colour = label.removeprefix("is any ").split()
        label = a(f"{colour} {name}")
    return replace(question, kind="label", text=label)


def ask_most(scene: Scene, rng: random.Random) -> Question | None:
    """An image puzzle: which shape or colour appears more than once."""
    for key, what in rng.sample((("name", "shape"), ("colour", "color")), 2):
        values = [getattr(t, key) for t in scene.shapes]
        double = sorted({v for v in values if values.count(v) > 1})
        if len(double) == 1:
            others = _but(SHAPES if key == "name" else tuple(COLOURS), double[0])
            text = f"which {what} is there more than once?"
            same = (t for t in scene.shapes if getattr(t, key) == double[0])
            return Question("most", text, double[0], others, cells=_cells(*same))
    return None


def ask_science(scene: Scene, rng: random.Random) -> Question | None:
    """A fact in the context decides: which of two made-up names fits the image."""
    if not (things := _unique(scene.shapes, "name")):
        return None
    thing = rng.choice(things)
    other = rng.choice(_but(COLOURS, thing.colour))
    names = rng.sample(("metal", "glass", "wood", "stone"), 2)
    facts = [f"{thing.colour} things are {names[0]}", f"{other} things are {names[1]}"]
    rng.shuffle(facts)
    return Question("science", f"what is the {thing.name} made of?", names[0], (names[1],),
                    context=f"{join(facts)}.", cells=_cells(thing))  # fmt: skip


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
    return Question("word at", text, word.name, (other.name,), cells=_cells(word))


def _listed() -> dict[str, Asker]:
    listed = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
    return {
        kind: (_about_shape if "by" in settings else _about_text)(kind, **settings)
        for kind, settings in listed.items()
    }


QUESTIONS: dict[str, Asker] = {
    **_listed(),
    "count": ask_count,
    "exists": ask_exists,
    "beside": ask_beside,
    "statement": ask_statement,
    "label": ask_label,
    "most": ask_most,
    "science": ask_science,
    "word at": ask_word_at,
}
"""Kind of question to its function."""
VQA_KINDS = ("color", "shape", "shape at", "count", "exists", "place", "size")
KNOWLEDGE_KINDS = ("corners", "fruit", "signal")
HELD_IN_KINDS = (*VQA_KINDS, *KNOWLEDGE_KINDS, "word", "digit")
"""The kinds that instruction tuning sees; the others are never tuned on."""
