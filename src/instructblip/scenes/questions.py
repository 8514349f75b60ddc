"""What can be asked about a scene: questions with answers, statements.

Every function takes the scene and a random generator and gives a question whose answer follows from
the scene. `QUESTIONS` lists the kinds; one that does not fit a scene (no word to read, two red
things when "the red thing" is meant) gives None.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

from instructblip.scenes.language import (
    a,
    at,
    join,
)
from instructblip.scenes.world import (
    COLOURS,
    HELD_OUT_PAIRS,
    SHAPES,
    SIZES,
    WORDS,
    Scene,
    Thing,
)

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


def _unique(things: tuple[Thing, ...], key: str) -> list[Thing]:
    values = [getattr(t, key) for t in things]
    return [t for t in things if values.count(getattr(t, key)) == 1]


def _pick(rng: random.Random, things: list[Thing]) -> Thing | None:
    return rng.choice(things) if things else None


def _but(values, value: str) -> tuple[str, ...]:
    return tuple(v for v in values if v != value)


def ask_colour(scene: Scene, rng: random.Random) -> Question | None:
    if not (thing := _pick(rng, _unique(scene.shapes, "name"))):
        return None
    text = rng.choice(
        (
            f"what color is the {thing.name}?",
            f"what is the color of the {thing.name}?",
            f"the {thing.name} has which color?",
        )
    )
    return Question("color", text, thing.colour, _but(COLOURS, thing.colour),
                    why=f"the {thing.name} is {thing.colour}")  # fmt: skip


def ask_shape(scene: Scene, rng: random.Random) -> Question | None:
    if not (thing := _pick(rng, _unique(scene.shapes, "colour"))):
        return None
    text = rng.choice(
        (
            f"what shape is {thing.colour}?",
            f"which shape is {thing.colour}?",
            f"what is the {thing.colour} thing?",
        )
    )
    return Question("shape", text, thing.name, _but(SHAPES, thing.name),
                    why=f"the {thing.name} is {thing.colour}")  # fmt: skip


def ask_shape_at(scene: Scene, rng: random.Random) -> Question | None:
    if not (thing := _pick(rng, list(scene.shapes))):
        return None
    where = at(thing.place)
    text = rng.choice((f"what shape is {where}?", f"which shape is {where}?"))
    return Question("shape at", text, thing.name, _but(SHAPES, thing.name))


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


def ask_place(scene: Scene, rng: random.Random) -> Question | None:
    if not (thing := _pick(rng, _unique(scene.shapes, "name"))):
        return None
    text = rng.choice((f"where is the {thing.name}?", f"in which place is the {thing.name}?"))
    return Question("place", text, thing.place, _but(ALL_PLACES, thing.place),
                    why=f"the {thing.name} is {at(thing.place)}")  # fmt: skip


def ask_size(scene: Scene, rng: random.Random) -> Question | None:
    if not (thing := _pick(rng, _unique(scene.shapes, "name"))):
        return None
    text = rng.choice((f"is the {thing.name} small or large?", f"how big is the {thing.name}?"))
    return Question("size", text, thing.size, _but(SIZES, thing.size))


def ask_corners(scene: Scene, rng: random.Random) -> Question | None:
    known = [t for t in _unique(scene.shapes, "colour") if t.name in CORNERS]
    if not (thing := _pick(rng, known)):
        return None
    answer = CORNERS[thing.name]
    text = rng.choice(
        (
            f"how many corners has the {thing.colour} shape?",
            f"what number of corners has the {thing.colour} thing?",
        )
    )
    return Question("corners", text, answer, _but(CORNERS.values(), answer),
                    why=f"the {thing.colour} shape is a {thing.name}")  # fmt: skip


def ask_fruit(scene: Scene, rng: random.Random) -> Question | None:
    if not (thing := _pick(rng, _unique(scene.shapes, "name"))):
        return None
    answer = FRUIT[thing.colour]
    text = rng.choice(
        (
            f"which fruit has the color of the {thing.name}?",
            f"the {thing.name} has the color of which fruit?",
        )
    )
    return Question("fruit", text, answer, _but(FRUIT.values(), answer),
                    why=f"the {thing.name} is {thing.colour}")  # fmt: skip


def ask_signal(scene: Scene, rng: random.Random) -> Question | None:
    known = [t for t in _unique(scene.shapes, "name") if t.colour in SIGNAL]
    if not (thing := _pick(rng, known)):
        return None
    answer = SIGNAL[thing.colour]
    text = f"what does a traffic light mean that has the color of the {thing.name}?"
    return Question("signal", text, answer, _but(SIGNAL.values(), answer),
                    why=f"the {thing.name} is {thing.colour}")  # fmt: skip


def ask_word(scene: Scene, rng: random.Random) -> Question | None:
    words = scene.of_kind("word")
    if len(words) != 1:
        return None
    text = rng.choice(("what word is printed?", "which word can you read?", "what does it say?"))
    return Question("word", text, words[0].name, _but(WORDS, words[0].name))


def ask_digit(scene: Scene, rng: random.Random) -> Question | None:
    digits = scene.of_kind("digit")
    if len(digits) != 1:
        return None
    text = rng.choice(
        ("which digit is written?", "what number can you read?", "what digit do you see?")
    )
    return Question("digit", text, digits[0].name, _but(map(str, range(10)), digits[0].name))


def sides(first: Thing, second: Thing) -> list[str]:
    """How ``first`` lies to ``second``: "left of", "right of", "above", "below"."""
    found = []
    if first.column != second.column:
        found.append("left of" if first.column < second.column else "right of")
    if first.row != second.row:
        found.append("above" if first.row < second.row else "below")
    return found


OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


def ask_beside(scene: Scene, rng: random.Random) -> Question | None:
    """The compositional question: an attribute of the only shape on one side of another."""
    cases = []
    for anchor in _unique(scene.shapes, "name"):
        for side in OPPOSITE:
            found = [t for t in scene.shapes if t != anchor and side in sides(t, anchor)]
            if len(found) == 1:
                cases.append((anchor, side, found[0]))
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
    """A label that fits the picture or not; the answer is "yes" or "no"."""
    question = ask_exists(scene, rng)
    if question is None:
        return None
    label = question.text.removeprefix("is there ").removesuffix("?")
    if label.startswith("is any"):
        name, colour = label.removeprefix("is any ").split()
        label = a(f"{colour} {name}")
    return Question("label", label, question.answer, question.others)


def ask_most(scene: Scene, rng: random.Random) -> Question | None:
    """The picture puzzle: which shape or colour stands there more than once."""
    for key, what in rng.sample((("name", "shape"), ("colour", "color")), 2):
        values = [getattr(t, key) for t in scene.shapes]
        double = sorted({v for v in values if values.count(v) > 1})
        if len(double) == 1:
            others = _but(SHAPES if key == "name" else tuple(COLOURS), double[0])
            return Question("most", f"which {what} is there more than once?", double[0], others)
    return None


def ask_science(scene: Scene, rng: random.Random) -> Question | None:
    """A fact in the context decides: which of two made-up names fits the picture."""
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


QUESTIONS: dict[str, Callable[[Scene, random.Random], Question | None]] = {
    "color": ask_colour,
    "shape": ask_shape,
    "shape at": ask_shape_at,
    "count": ask_count,
    "exists": ask_exists,
    "place": ask_place,
    "size": ask_size,
    "corners": ask_corners,
    "fruit": ask_fruit,
    "signal": ask_signal,
    "word": ask_word,
    "digit": ask_digit,
    "beside": ask_beside,
    "statement": ask_statement,
    "label": ask_label,
    "most": ask_most,
    "science": ask_science,
    "word at": ask_word_at,
}
"""Kind of question -> function. The first twelve are held-in, the rest are never tuned on."""
HELD_IN_KINDS = tuple(QUESTIONS)[:12]
HELD_OUT_KINDS = tuple(QUESTIONS)[12:]
VQA_KINDS = ("color", "shape", "shape at", "count", "exists", "place", "size")
KNOWLEDGE_KINDS = ("corners", "fruit", "signal")
