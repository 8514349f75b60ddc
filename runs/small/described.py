"""Pictures of the training world, described in words: samples without an image.

Each sample describes what an image of the training world shows and asks about it as the world does:
what, of which kind, is it, choose, where, how many. Held-out names and held-out types of question
are in none of them.
"""

import random
from collections.abc import Callable

from instructblip.core.batch import Example
from instructblip.data.templates import Rendered, render_prompt, templates_of
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
    named,
    page_captions,
)

FORMS = ("{}.", "A picture of {}.", "The picture shows {}.", "Picture: {}.", "There is {}.")
"""How one image is described."""


def one(world: World, rng: random.Random) -> tuple[str, Asked]:
    """One image, described, and a question about it."""
    picture = rng.choice(world.train)
    questions: list[Callable[[], Asked]] = [
        lambda: ask(world, picture, rng),
        lambda: Asked(question=rng.choice(KIND_QUESTIONS), answer=picture.kind),
        lambda: choose(world, picture, rng, rng.choice(CHOOSE_QUESTIONS)),
    ]
    return rng.choice(FORMS).format(named(picture.name)), rng.choice(questions)()


def several(world: World, rng: random.Random) -> tuple[str, Asked]:
    """A page of one to four images, described, and a question about it."""
    number = rng.choice((1, 2, 2, 3, 4, 4))
    table = list(SIDES) if number == 2 else list(CORNERS)
    places = table if number in (2, 4) else rng.sample(table, number)
    shown: dict[str, Picture] = dict(
        zip(places, world.several(world.train, number, rng), strict=True)
    )
    question = ask_composite(world, shown, rng)
    forms = page_captions({place: picture.name for place, picture in shown.items()})
    form = forms[0] if "at the" in question.question else rng.choice(forms)
    return form[0].upper() + form[1:] + ".", question


def described(world: World, rng: random.Random) -> Rendered:
    """One sample: the description and the question in the words of a template, and the answer."""
    description, asked = several(world, rng) if rng.random() < 0.3 else one(world, rng)
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
    text = f"{description} {render_prompt(example, rng.choice(templates_of(task))).prompt}"
    return Rendered(text, text, asked.answer)
