"""The picture world: real images with real names, in the official formats of published sets.

Splits are by name, never by image. A fifth of the names is held out: no training image shows them,
no training text names them, and no word of theirs is in a known name. The style ``fluent`` is in no
training image, and neither are photos of names that are also emoji.

==============  ================================================================================
held in         coco_caption, composites (captions of several images on a page), vqav2 (what, is
                this, and on composites where, how many, is there), okvqa (which kind), aokvqa
                (choose the name)
known names     their ``val`` splits, ``named`` ("what is this?") and ``places`` (where and how
                many, on composites) show the unseen style; ``photos`` (choose the name) shows
                unseen photos
held-out names  nocaps, vizwiz ("what is this?"), scienceqa (choose the name), kind_new (which kind)
held-out types  vsr (true or false), gqa (left or right of), iconqa (odd one out), compare (are
                both of the same kind)
==============  ================================================================================
"""

import hashlib
import random
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from pathlib import Path

from PIL import Image

from instructblip.scenes import formats
from instructblip.scenes.formats import Asked, SetFolder
from instructblip.scenes.language import a
from instructblip.scenes.official import WrittenSet, write_sets
from instructblip.scenes.pictures.catalog import (
    NO_ARTICLE,
    SIDE,
    Picture,
    open_cut,
    place,
    read_catalog,
    single,
)

FORMAT_VERSION = 3
UNSEEN_STYLE = "fluent"
HELD_OUT = 5
"""One in so many names is held out."""
CELL = SIDE * 13 // 28
_LOW, _HIGH = SIDE // 56, SIDE - SIDE // 56 - CELL
CORNERS = {
    "top left": (_LOW, _LOW),
    "top right": (_HIGH, _LOW),
    "bottom left": (_LOW, _HIGH),
    "bottom right": (_HIGH, _HIGH),
}
SIDES = {"left": (_LOW, (SIDE - CELL) // 2), "right": (_HIGH, (SIDE - CELL) // 2)}
KIND_QUESTIONS = (
    "what kind of thing is this?",
    "which category does this belong to?",
    "what type of thing is it?",
)
CHOOSE_QUESTIONS = ("what is this?", "which of these is in the picture?")


def write_pictures(
    root: str | Path, packages: str | Path, seed: int = 0, scale: float | int = 1.0
) -> dict[str, Path]:
    """Write the sets of the picture world below ``root``; returns the folder of each.

    ``packages`` is where `packages.fetch` has put the images. ``scale`` multiplies the size of
    every set. The rest is as for `scenes.official.write_scenes`. Raises FileNotFoundError where a
    package is missing.
    """
    world = World(read_catalog(Path(packages)))
    settings = {"format": FORMAT_VERSION, "world": "pictures", "seed": seed, "scale": scale}
    sets = {n: WrittenSet(partial(write, world), sizes) for n, (write, sizes) in SETS.items()}
    return write_sets(Path(root), sets, settings, SetFolder, "instructblip pictures write")


class World:
    """The images by what a model may see of them in training."""

    def __init__(self, catalog: list[Picture]) -> None:
        held = {p.head for p in catalog if _digest(p.head) % HELD_OUT == 0}
        self.known = [p for p in catalog if not held & {*p.name.split()}]
        drawn = {p.name for p in self.known if p.style not in (UNSEEN_STYLE, "tux")}
        self.photos = [p for p in self.known if p.photo and p.name in drawn]
        unseen = {*self.photos}
        self.train = [p for p in self.known if p.style != UNSEEN_STYLE and p not in unseen]
        seen = {p.name for p in self.train}
        self.unseen_style = [p for p in self.known if p.style == UNSEEN_STYLE and p.name in seen]
        words = {word for p in self.train for word in p.name.split()}
        new = [p for p in catalog if p.head in held and not words & {*p.name.split()}]
        self.new = [p for p in new if p.style not in ("twitter", "openmoji")]
        self.kinds = sorted({p.kind for p in self.train})
        for group in (self.train, self.photos, self.unseen_style, self.new):
            if len({p.head for p in group}) < 5:
                raise ValueError("the packages hold too few images; remove them and fetch again")

    @cached_property
    def known_names(self) -> dict[str, str]:
        """Each name that training shows, and its kind."""
        return _names(self.train)

    @cached_property
    def new_names(self) -> dict[str, str]:
        """Each held-out name, and its kind."""
        return _names(self.new)

    def names_beside(self, picture: Picture) -> dict[str, str]:
        """The names among which ``picture`` is asked about: known with known, new with new."""
        return self.known_names if picture.name in self.known_names else self.new_names

    def others(self, picture: Picture, number: int, rng: random.Random) -> list[str]:
        """Names of other things, about half of them of the same kind."""
        names = self.names_beside(picture)
        other = [name for name in names if name.split()[-1] != picture.head]
        same = [name for name in other if names[name] == picture.kind]
        alike = rng.sample(same, min(len(same), (number + 1) // 2))
        rest = [name for name in other if names[name] != picture.kind]
        return alike + rng.sample(rest, number - len(alike))

    def images(self, group: list[Picture], number: int, rng: random.Random) -> Iterator[Picture]:
        """``number`` images of the group; each comes before one comes twice."""
        while number > 0:
            few = rng.sample(group, min(number, len(group)))
            number -= len(few)
            yield from few

    def several(self, group: list[Picture], number: int, rng: random.Random) -> list[Picture]:
        """``number`` images with different names."""
        chosen: list[Picture] = []
        while len(chosen) < number:
            picture = rng.choice(group)
            if all(picture.head != other.head for other in chosen):
                chosen.append(picture)
        return chosen


def _names(pictures: list[Picture]) -> dict[str, str]:
    return dict(sorted({(p.name, p.kind) for p in pictures}))


def _digest(text: str) -> int:
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16)


# What is asked about one image


def article(kind: str) -> str:
    """The kind with its article, if it takes one."""
    return kind if kind in NO_ARTICLE else a(kind)


def named(name: str) -> str:
    """The name with its article; a plural takes none."""
    plural = name.endswith("s") and not name.endswith(("ss", "us", "is"))
    return name if plural else a(name)


def captions(picture: Picture) -> list[str]:
    """Captions in the order of a set with three references for each image."""
    name = named(picture.name)
    return [name, f"{name}, {article(picture.kind)}", f"a picture of {name}"]


def _open(question: str, answer: str, kind: str) -> Asked:
    return Asked(question=question, answer=answer, answers=(answer,) * 10, kind=kind)


def ask(world: World, picture: Picture, rng: random.Random) -> Asked:
    """What this is, or whether it is something or of a kind."""
    what = rng.choice(("what", "what", "is", "is not", "kind", "not kind"))
    if what == "what":
        texts = ("what is this?", "what is in the picture?", "what do you see?")
        return _open(rng.choice(texts), picture.name, "what")
    if what in ("is", "is not"):
        name = picture.name if what == "is" else world.others(picture, 1, rng)[0]
        return _open(f"is this {named(name)}?", "yes" if what == "is" else "no", "is")
    wrong = rng.choice([kind for kind in world.kinds if kind != picture.kind])
    text = f"is this {article(picture.kind if what == 'kind' else wrong)}?"
    return _open(text, "yes" if what == "kind" else "no", "is")


def choose(world: World, picture: Picture, rng: random.Random, question: str) -> Asked:
    """Which of four names the image has."""
    choices = [picture.name, *world.others(picture, 3, rng)]
    rng.shuffle(choices)
    return Asked(
        question=question,
        answer=picture.name,
        answers=(picture.name,) * 10,
        kind="choose",
        choices=tuple(choices),
        right=choices.index(picture.name),
    )


# Composites


def compose(pictures: list[Picture], places: list[tuple[int, int]]) -> Image.Image:
    """The images side by side on white, each at its place."""
    page = Image.new("RGB", (SIDE, SIDE), "white")
    for picture, (left, top) in zip(pictures, places, strict=True):
        place(page, open_cut(picture.path), left, top, CELL)
    return page


def composite(
    world: World, group: list[Picture], rng: random.Random
) -> tuple[Image.Image, dict[str, Picture]]:
    """One to four images on a page, by their places."""
    number = rng.choice((1, 2, 2, 3, 4, 4))
    table = SIDES if number == 2 else CORNERS
    places = list(table) if number in (2, 4) else rng.sample(list(table), number)
    pictures = world.several(group, number, rng)
    page = compose(pictures, [table[where] for where in places])
    return page, dict(zip(places, pictures, strict=True))


NUMBERS = ("one thing", "two things", "three things", "four things")


def page_captions(shown: dict[str, str]) -> list[str]:
    """Captions of a page, of the name at each place."""
    names = [named(name) for name in shown.values()]
    listed = ", ".join(names[:-1]) + " and " * (len(names) > 1) + names[-1]
    places = [f"{name} at the {place}" for name, place in zip(names, shown, strict=True)]
    return [", ".join(places), listed, f"{NUMBERS[len(names) - 1]}: {listed}"]


PLACES = ("where", "where", "count")


def ask_composite(
    world: World,
    shown: dict[str, Picture],
    rng: random.Random,
    asked: tuple[str, ...] = (*PLACES, "there", "not there"),
) -> Asked:
    """What is where, how many things there are, or whether something is there."""
    what = rng.choice(asked)
    if what == "where":
        where = rng.choice(list(shown))
        return _open(f"what is at the {where}?", shown[where].name, "where")
    if what == "count":
        return _open("how many things are there?", str(len(shown)), "count")
    picture = rng.choice(list(shown.values()))
    if what == "there":
        return _open(f"is there {named(picture.name)} in the picture?", "yes", "there")
    heads = {other.head for other in shown.values()}
    names = [n for n in world.names_beside(picture) if n.split()[-1] not in heads]
    return _open(f"is there {named(rng.choice(names))} in the picture?", "no", "there")


# The sets


Writer = Callable[[World, SetFolder, int], None]


def coco_caption(world: World, out: SetFolder, number: int) -> None:
    group = world.train if out.split == "train" else world.unseen_style
    chosen = world.images(group, number, out.rng)
    formats.coco_caption(out, ((single(p), captions(p)) for p in chosen))


def composites(world: World, out: SetFolder, number: int) -> None:
    """Pages of one to four training images, captioned by place, by name and by number."""

    def shown() -> Iterator[tuple[Image.Image, list[str]]]:
        for _ in range(number):
            page, pictures = composite(world, world.train, out.rng)
            yield page, page_captions({place: p.name for place, p in pictures.items()})

    formats.coco_caption(out, shown())


def nocaps(world: World, out: SetFolder, number: int) -> None:
    chosen = world.images(world.new, number, out.rng)
    formats.nocaps(out, ((single(p), captions(p)) for p in chosen))


def vqav2(world: World, out: SetFolder, number: int) -> None:
    """Half of the questions are about one image, half about composites, two for each."""
    group = world.train if out.split == "train" else world.unseen_style

    def asked() -> Iterator[tuple[Image.Image, list[Asked]]]:
        for picture in world.images(group, number // 2, out.rng):
            yield single(picture), [ask(world, picture, out.rng)]
        for _ in range(number // 4):
            page, shown = composite(world, group, out.rng)
            texts = [ask_composite(world, shown, out.rng) for _ in range(2)]
            yield page, list({q.question: q for q in texts}.values())

    formats.vqav2(out, asked())


def _asked_kind(world: World, group: list[Picture], out: SetFolder, number: int) -> None:
    chosen = world.images(group, number, out.rng)
    formats.okvqa(
        out, ((single(p), [_open(out.rng.choice(KIND_QUESTIONS), p.kind, "kind")]) for p in chosen)
    )


def okvqa(world: World, out: SetFolder, number: int) -> None:
    _asked_kind(world, world.train if out.split == "train" else world.unseen_style, out, number)


def kind_new(world: World, out: SetFolder, number: int) -> None:
    _asked_kind(world, world.new, out, number)


def named_set(world: World, out: SetFolder, number: int) -> None:
    group = world.train if out.split == "train" else world.unseen_style
    chosen = world.images(group, number, out.rng)
    formats.okvqa(out, ((single(p), [_open("what is this?", p.name, "what")]) for p in chosen))


def places(world: World, out: SetFolder, number: int) -> None:
    """What is where, or how many things there are, on pages of several images."""

    def asked() -> Iterator[tuple[Image.Image, list[Asked]]]:
        for _ in range(number):
            page, shown = composite(world, world.unseen_style, out.rng)
            yield page, [ask_composite(world, shown, out.rng, PLACES)]

    formats.okvqa(out, asked())


def _chosen(world: World, group: list[Picture], out: SetFolder, number: int) -> formats.OneQuestion:
    for picture in world.images(group, number, out.rng):
        yield single(picture), choose(world, picture, out.rng, out.rng.choice(CHOOSE_QUESTIONS))


def aokvqa(world: World, out: SetFolder, number: int) -> None:
    group = world.train if out.split == "train" else world.unseen_style
    formats.aokvqa(out, _chosen(world, group, out, number))


def photos(world: World, out: SetFolder, number: int) -> None:
    formats.aokvqa(out, _chosen(world, world.photos, out, min(number, len(world.photos))))


def scienceqa(world: World, out: SetFolder, number: int) -> None:
    formats.scienceqa(out, _chosen(world, world.new, out, number))


def vizwiz(world: World, out: SetFolder, number: int) -> None:
    chosen = world.images(world.new, number, out.rng)
    formats.vizwiz(out, ((single(p), _open("what is this?", p.name, "what")) for p in chosen))


def vsr(world: World, out: SetFolder, number: int) -> None:
    """Statements about one image, half of them true."""

    def stated() -> formats.OneQuestion:
        for i, picture in enumerate(world.images(world.unseen_style, number, out.rng)):
            name = world.others(picture, 1, out.rng)[0] if i % 2 else picture.name
            text = f"The picture shows {named(name)}."
            yield single(picture), Asked(question=text, answer="false" if i % 2 else "true",
                                         kind="shows")  # fmt: skip

    formats.vsr(out, stated())


def gqa(world: World, out: SetFolder, number: int) -> None:
    """What is left or right of something."""

    def related() -> formats.OneQuestion:
        for _ in range(number):
            pair = world.several(world.unseen_style, 2, out.rng)
            page = compose(pair, list(SIDES.values()))
            i = out.rng.randrange(2)
            text = f"what is {tuple(SIDES)[i]} of the {pair[1 - i].name}?"
            yield page, _open(text, pair[i].name, "relation")

    formats.gqa(out, related())


def compare(world: World, out: SetFolder, number: int) -> None:
    """Whether two things are of the same kind; in half of the samples they are."""

    def compared() -> formats.OneQuestion:
        for i in range(number):
            pair = world.several(world.unseen_style, 2, out.rng)
            while (pair[0].kind == pair[1].kind) != (i % 2 == 0):
                pair = world.several(world.unseen_style, 2, out.rng)
            page = compose(pair, list(SIDES.values()))
            answer = "no" if i % 2 else "yes"
            yield page, _open("are both things of the same kind?", answer, "compare")

    formats.gqa(out, compared())


def iconqa(world: World, out: SetFolder, number: int) -> None:
    """Three things of one kind and one of another: which one does not belong."""
    by_kind: dict[str, list[Picture]] = {}
    for picture in world.unseen_style:
        by_kind.setdefault(picture.kind, []).append(picture)
    large = [kind for kind, group in by_kind.items() if len({p.head for p in group}) >= 3]

    def odd() -> formats.OneQuestion:
        for _ in range(number):
            kind = out.rng.choice(large)
            four = world.several(by_kind[kind], 3, out.rng)
            heads = {p.head for p in four}
            others = [p for p in world.unseen_style if p.kind != kind and p.head not in heads]
            stranger = out.rng.choice(others)
            four.append(stranger)
            out.rng.shuffle(four)
            choices = [p.name for p in four]
            out.rng.shuffle(choices)
            yield (
                compose(four, list(CORNERS.values())),
                Asked(
                    question="which of these does not belong with the others?",
                    answer=stranger.name,
                    kind="odd",
                    choices=tuple(choices),
                    right=choices.index(stranger.name),
                ),
            )

    formats.iconqa(out, odd())


SETS: dict[str, tuple[Writer, dict[str, int]]] = {
    "coco_caption": (coco_caption, {"train": 1800, "val": 200}),
    "composites": (composites, {"train": 1400}),
    "vqav2": (vqav2, {"train": 4000, "val": 300}),
    "okvqa": (okvqa, {"train": 1800, "val": 200}),
    "aokvqa": (aokvqa, {"train": 1800, "val": 200}),
    "named": (named_set, {"train": 1800, "val": 200}),
    "places": (places, {"val": 200}),
    "photos": (photos, {"val": 200}),
    "nocaps": (nocaps, {"val": 200}),
    "vizwiz": (vizwiz, {"val": 200}),
    "scienceqa": (scienceqa, {"test": 200}),
    "kind_new": (kind_new, {"val": 200}),
    "vsr": (vsr, {"test": 200}),
    "gqa": (gqa, {"test": 200}),
    "iconqa": (iconqa, {"test": 200}),
    "compare": (compare, {"test": 200}),
}
"""Each set: its writer, and samples per split, before scaling."""
