"""Pictures of the training world, described in words: samples without an image.

Each sample describes what an image of the training world shows and asks about it as the world does:
what, of which kind, is it, choose, where, how many. Held-out names and held-out types of question
are in none of them.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from instructblip.core.example import Example
from instructblip.data.templates import Rendered, render_prompt, templates_of
from instructblip.data.tokens import Tokens
from instructblip.scenes.formats import Asked
from instructblip.scenes.pictures.catalog import Picture
from instructblip.scenes.pictures.world import (
    CHOOSE_QUESTIONS,
    CORNERS,
    KIND_QUESTIONS,
    SIDES,
    World,
    ask,
    ask_composite,
    choose,
)

SLOTS = 4
"""Places of a page: its corners in reading order, or its two sides, or the one image on it."""


ASKED = ("where", "where", "count", "count", "there", "not there")
"""What is asked about a page; the number of things is learned slowest."""


class Described(NamedTuple):
    """The name at each place of a page (None where nothing is), and a question about it."""

    names: tuple[str | None, ...]
    text: Rendered


def slots(shown: Mapping[str, str]) -> tuple[str | None, ...]:
    """The names of a page in reading order, of the name at each of its places."""
    return tuple(shown.get(place) for place in (SIDES if "left" in shown else CORNERS))


def page_of(names: Sequence[str | None]) -> dict[str, str]:
    """What `slots` was given, without its empty places."""
    table = SIDES if len(names) == len(SIDES) else CORNERS
    return {place: name for place, name in zip(table, names, strict=True) if name}


def spelled(tokens: Tokens, names: Sequence[str | None], number: int) -> list[int]:
    """The token that each of ``number`` queries stands for: a quarter of the queries spells the
    name at a place, cut to it, and end tokens fill the rest. ``tokens`` have no chat format, in
    which a word has no space in front of it and is often several tokens."""
    assert tokens.chat_template is None
    end, room = tokens.response("a")[-1], number // SLOTS
    ids: list[int] = []
    for name in (*names, *[None] * (SLOTS - len(names))):
        word = tokens.response(name)[:-1][:room] if name else []
        ids += [*word, *[end] * (room - len(word))]
    return ids


def one(world: World, rng: random.Random) -> tuple[tuple[str | None, ...], Asked]:
    """One image and a question about it."""
    picture = rng.choice(world.train)
    questions: list[Callable[[], Asked]] = [
        lambda: ask(world, picture, rng),
        lambda: Asked(question=rng.choice(KIND_QUESTIONS), answer=picture.kind),
        lambda: choose(world, picture, rng, rng.choice(CHOOSE_QUESTIONS)),
    ]
    return (picture.name,), rng.choice(questions)()


def several(world: World, rng: random.Random) -> tuple[tuple[str | None, ...], Asked]:
    """A page of one to four images and a question about it."""
    number = rng.choice((1, 2, 2, 3, 4, 4))
    table = list(SIDES) if number == 2 else list(CORNERS)
    places = table if number in (2, 4) else rng.sample(table, number)
    shown: dict[str, Picture] = dict(
        zip(places, world.several(world.train, number, rng), strict=True)
    )
    asked = ask_composite(world, shown, rng, ASKED)
    return slots({place: p.name for place, p in shown.items()}), asked


def described(world: World, rng: random.Random) -> Described:
    """One sample: the names of a page, the question in the words of a template, and the answer."""
    names, asked = several(world, rng) if rng.random() < 0.5 else one(world, rng)
    task = "multiple_choice" if asked.choices else "vqa"
    example = Example(
        dataset="described",
        split="train",
        id="",
        images=(),
        task=task,
        question=asked.question,
        answers=(asked.answer,),
        choices=asked.choices,
    )
    text = render_prompt(example, rng.choice(templates_of(task))).prompt
    return Described(names, Rendered(text, text, asked.answer))
