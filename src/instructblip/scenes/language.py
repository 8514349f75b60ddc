"""What can be said about a scene: phrases, captions, descriptions; all true of the scene."""

import random
from collections.abc import Callable

from instructblip.scenes.world import Scene, Thing


def a(text: str) -> str:
    """The noun phrase with its article."""
    return f"an {text}" if text[0] in "aeiou" else f"a {text}"


def look(thing: Thing) -> str:
    """The thing without its size and place: "red circle", "word cat", "digit 7"."""
    return f"{thing.colour if thing.kind == 'shape' else thing.kind} {thing.name}"


def phrase(thing: Thing, size: bool = False, place: bool = False) -> str:
    """A noun phrase: "a large red circle at the top left", "the word cat"."""
    if thing.kind == "shape":
        text = a(f"{thing.size} {look(thing)}" if size else look(thing))
    else:
        text = f"the {look(thing)}"
    return f"{text} {at(thing.place)}" if place else text


def at(place: str) -> str:
    return f"in the {place}" if place == "middle" else f"at the {place}"


def join(parts: list[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


CAPTIONS: tuple[Callable[[Scene], str], ...] = (
    lambda s: join([phrase(t) for t in s.things]),
    lambda s: "there is " + join([phrase(t) for t in s.things]),
    lambda s: "a picture of " + join([phrase(t) for t in s.things]),
    lambda s: join([phrase(t, size=True) for t in s.things]),
    lambda s: join([phrase(t, place=True) for t in s.things]),
)
"""Five ways to describe a scene, things in reading order: the five references of an image."""


def captions(scene: Scene) -> list[str]:
    """The five reference captions."""
    return [form(scene) for form in CAPTIONS]


def describe(scene: Scene, rng: random.Random) -> str:
    """A full description in one of ``DESCRIPTIONS``, half the time with shuffled things."""
    things = list(scene.things)
    if rng.random() < 0.5:
        rng.shuffle(things)
    return rng.choice(DESCRIPTIONS)(things)


def _facts(thing: Thing, name_first: bool) -> str:
    if thing.kind != "shape":
        return f"{look(thing)} {thing.place}"
    if name_first:
        return f"{thing.name}: {thing.colour}, {thing.size}, {thing.place}"
    return f"{thing.size} {look(thing)} {thing.place}"


def _sentence(thing: Thing) -> str:
    if thing.kind != "shape":
        return f"the {look(thing)} is {at(thing.place)}."
    return f"the {thing.name} is {thing.colour} and {thing.size}. it is {at(thing.place)}."


DESCRIPTIONS: tuple[Callable[[list[Thing]], str], ...] = (
    lambda things: join([phrase(t, size=True, place=True) for t in things]),
    lambda things: " ".join(f"{phrase(t, size=True, place=True)}." for t in things),
    lambda things: ", ".join(_facts(t, name_first=False) for t in things),
    lambda things: "; ".join(_facts(t, name_first=True) for t in things),
    lambda things: " ".join(_sentence(t) for t in things),
    lambda things: " ".join(f"{at(t.place)}: {phrase(t, size=True)}." for t in things),
)
"""Ways to describe everything about the things; some name the shape first, some its look."""


def detail(scene: Scene) -> str:
    """A full description, one sentence per thing."""
    return " ".join(f"there is {phrase(t, size=True, place=True)}." for t in scene.things)
