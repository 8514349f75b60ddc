"""Objects that answers name: CHAIR of captions, their F1, and the yes and no of POPE.

CHAIR (Rohrbach and others, "Object Hallucination in Image Captioning", 2018) counts the objects
that a caption names and the image does not show. An object counts as often as the caption names it,
and the image shows the annotated objects (``extra["objects"]`` of a sample) and those that the
references name. Which words name an object is the vocabulary's:

- ``scenes``: a shape with its colour ("red circle"), a printed word ("word cat"), a digit
  ("digit 7"). The references of Scenes name everything that an image shows, so the score is exact.
- ``coco``: the 80 categories of COCO with everyday synonyms, ``objects.yaml``.
- the path of a file: a line for each object, its name and its synonyms with commas between them, as
  in the authors' ``synonyms.txt``.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from instructblip.scenes.world import COLOURS, SHAPES, WORDS

_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)?")


@dataclass(frozen=True)
class Vocabulary:
    """``names`` maps the words of a phrase to the object that it names."""

    names: Mapping[tuple[str, ...], str]

    @classmethod
    def of(cls, groups: Iterable[Sequence[str]]) -> "Vocabulary":
        """Each group holds an object and its synonyms. The first group that has a phrase keeps
        it."""
        names: dict[tuple[str, ...], str] = {}
        for name, *synonyms in groups:
            for phrase in (name, *synonyms):
                names.setdefault(tuple(_words(phrase)), name)
        return cls(names)

    def mentions(self, text: str) -> list[str]:
        """The objects that a text names, in order and as often as it does. The longest phrase
        wins: a "hot dog" is no dog."""
        words, found, start = _words(text), [], 0
        while start < len(words):
            for end in range(min(len(words), start + self._longest), start, -1):
                if (name := self.names.get(tuple(words[start:end]))) is not None:
                    found.append(name)
                    start = end
                    break
            else:
                start += 1
        return found

    @property
    def _longest(self) -> int:
        return max(map(len, self.names))


def _words(text: str) -> list[str]:
    return [_singular(word) for word in _WORD.findall(text.lower())]


def _singular(word: str) -> str:
    """A word without the ending of a plural, alike for vocabulary and text."""
    if word in _PLURALS:
        return _PLURALS[word]
    for ending, singular in (("ies", "y"), ("sses", "ss"), ("shes", "sh"), ("ches", "ch")):
        if word.endswith(ending) and len(word) > len(ending) + 1:
            return word.removesuffix(ending) + singular
    if word.endswith("s") and not word.endswith(("ss", "us", "is")) and len(word) > 3:
        return word[:-1]
    return word


_PLURALS = {"people": "person", "men": "man", "women": "woman", "children": "child"}
_PLURALS |= {"mice": "mouse", "knives": "knife", "geese": "goose", "sheep": "sheep"}
_PLURALS |= {"buses": "bus", "couches": "couch", "benches": "bench", "skis": "ski", "ties": "tie"}


@cache
def vocabulary(name: str) -> Vocabulary:
    """The vocabulary called ``name``, or that of a file.

    Raises FileNotFoundError for a file that does not exist, and ValueError for one without an
    object.
    """
    if name == "scenes":
        pairs = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
        texts = [*(f"word {word}" for word in WORDS), *(f"digit {digit}" for digit in range(10))]
        return Vocabulary.of([each] for each in (*pairs, *texts))
    if name == "coco":
        file = Path(__file__).with_suffix(".yaml")
        listed: Mapping[str, list[str]] = yaml.safe_load(file.read_text(encoding="utf-8"))
        return Vocabulary.of([each, *synonyms] for each, synonyms in listed.items())
    path = Path(name)
    if not path.is_file():
        raise FileNotFoundError(
            f"objects {name!r}: no such file; expected scenes, coco, or the path of a file with a "
            "line for each object: its name, its synonyms, with commas between them"
        )
    lines = path.read_text(encoding="utf-8").splitlines()
    groups = [[part.strip() for part in line.split(",") if _words(part)] for line in lines]
    if not any(groups):
        raise ValueError(f"{path}: no object; expected lines such as `person, man, woman`")
    return Vocabulary.of(filter(None, groups))


class Named(NamedTuple):
    """What an answer names: ``mentions`` with repetitions, and what the image shows."""

    mentions: list[str]
    shown: frozenset[str]

    @property
    def invented(self) -> int:
        """Mentions of what the image does not show."""
        return sum(name not in self.shown for name in self.mentions)

    @property
    def found(self) -> int:
        """Objects of the image that are named."""
        return len(self.shown.intersection(self.mentions))

    @property
    def truth(self) -> float:
        """Share of the mentions that the image shows. Without any: 1 if there is nothing to name,
        else 0, since silence says nothing true."""
        if not self.mentions:
            return float(not self.shown)
        return 1 - self.invented / len(self.mentions)

    @property
    def f1(self) -> float:
        """F1 of mentions and objects, where a repeated mention is a wrong one."""
        total = len(self.mentions) + len(self.shown)
        return 2 * self.found / total if total else 1.0


def named(prediction: Mapping[str, Any], objects: str) -> Named:
    """The objects that the prediction of a sample names, by the vocabulary ``objects``."""
    words = vocabulary(objects)
    annotated = (words.mentions(name) or [name] for name in prediction["extra"].get("objects", ()))
    described = (words.mentions(answer) for answer in prediction["answers"])
    shown = frozenset(name for names in (*annotated, *described) for name in names)
    return Named(words.mentions(prediction["prediction"]), shown)


def says_yes(text: str) -> bool:
    """Whether POPE reads an answer as yes (RUCAIBox/POPE ``evaluate.py``): unless a word of its
    first sentence is No, no or not. Commas are no part of a word; "isn't" and nothing are a
    yes."""
    first = text.split(".")[0].replace(",", "")
    return {"No", "no", "not"}.isdisjoint(first.split(" "))


def yes_no_scores(answered: Sequence[bool], right: Sequence[bool]) -> dict[str, float]:
    """POPE's further scores in percent: precision, recall and F1 of the yes, and how often it is
    answered. A score without a yes to divide by is 0."""
    pairs = list(zip(answered, right, strict=True))
    hits = sum(s and r for s, r in pairs)
    return {
        "precision": _percent(hits, sum(answered)),
        "recall": _percent(hits, sum(right)),
        "f1": _percent(2 * hits, sum(answered) + sum(right)),
        "yes_ratio": _percent(sum(answered), len(pairs)),
    }


def _percent(part: int, whole: int) -> float:
    return 100 * part / whole if whole else 0.0


def counts(rows: Iterable[Named]) -> Iterator[tuple[int, int, int, int, int]]:
    """Of each answer: mentions, invented ones, whether there is one, objects named, objects."""
    for row in rows:
        invented = row.invented
        yield len(row.mentions), invented, int(invented > 0), row.found, len(row.shown)
