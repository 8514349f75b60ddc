"""What looks wrong in the texts of examples: placeholders, and answers that look misspelled."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from instructblip.core.example import Example

_PLACEHOLDER = re.compile(
    r"#(n/a|(ref|value|div/0|num|null)!|name\?)|"
    r"\W*(null|nan|undefined|todo|tbd|fixme|unk|lorem ipsum.*|placeholder|"
    r"(insert|your|the)[ _](answer|caption|text|question|response)([ _]here)?|"
    r"[<\[{](answer|caption|text|question|response|label)[>\]}])\W*",
    re.IGNORECASE | re.DOTALL,
)
_NO_CAPTION = re.compile(r"\W*(none|n/a)\W*", re.IGNORECASE)
"""Valid answers to a question, but empty cells where there is no question."""

MOST_QUESTIONS, MOST_ANSWERS, MOST_CHARACTERS = 1000, 1000, 80
"""Of the questions, of the answers to each and of an answer, which `misspellings` compares."""
RARE, USUAL = 2, 10
"""A misspelled answer occurs at most ``RARE`` times, and the one that is meant ``USUAL`` times as
often."""
CLOSED = 5
"""Times that each answer to a closed question occurs on average."""
SHORT_WORD, LONG_WORD = 3, 8
"""Letters from which one edit of a word is a misspelling, and from which two are."""


def placeholders(example: Example) -> Iterator[str]:
    """Why an example has a placeholder in place of its question or of all its answers."""
    if _PLACEHOLDER.fullmatch(example.question):
        yield f"the question is {example.question[:80]!r}, a placeholder"
    patterns = (_PLACEHOLDER,) if example.question.strip() else (_PLACEHOLDER, _NO_CAPTION)
    answers = example.answers
    if answers and all(any(p.fullmatch(answer) for p in patterns) for answer in answers):
        yield f"the answer is {answers[0][:80]!r}, a placeholder"


class Misspelling(NamedTuple):
    """An answer that looks like a misspelling of one that is far more common."""

    index: int
    """Of the example."""
    where: str
    answer: str
    usual: str
    count: int
    """How often the usual answer occurs."""

    @property
    def reason(self) -> str:
        """``'gren', 60 times 'green'``."""
        return f"{self.answer!r}, {self.count} times {self.usual!r}"


def misspellings(examples: Iterable[Example]) -> list[Misspelling]:
    """The answers that look misspelled, in the order of the examples.

    An answer is compared with the others to its question where these are few, as labels are: one
    that occurs once or twice is reported if another one is far more common and differs in one word,
    by one edit (by two, if it is long), after its first letter. Numbers and choices are never
    reported, nor scripts without upper and lower case, where a character may be a word.
    """
    counts: dict[str, Counter[str]] = {}
    rare: dict[tuple[str, str], list[tuple[int, str]]] = {}
    for index, example in enumerate(examples):
        if len(example.answers) != 1 or example.choices:
            continue
        question, answer = example.question, example.answers[0]
        if question not in counts and len(counts) == MOST_QUESTIONS:
            continue
        count = counts.setdefault(question, Counter())
        if len(count) > MOST_ANSWERS:  # an open question
            continue
        count[answer] += 1
        if count[answer] <= RARE:
            rare.setdefault((question, answer), []).append((index, example.where))
    found = []
    for question, count in counts.items():
        if len(count) <= MOST_ANSWERS and CLOSED * len(count) <= count.total():
            for answer, usual in _misspelled(count):
                for index, where in rare[question, answer]:
                    found.append(Misspelling(index, where, answer, usual, count[usual]))
    return sorted(found)


def describe_misspellings(found: Sequence[Misspelling], most: int = 5) -> str:
    """The line about them, with the first ``most``; empty without any."""
    if not found:
        return ""
    looks = "answer looks like a misspelling" if len(found) == 1 else "answers look misspelled"
    listed = [
        f"{each.answer!r} ({each.where}), {each.count} times {each.usual!r}"
        for each in found[:most]
    ]
    more = f"; and {len(found) - most} more" if len(found) > most else ""
    return f"{len(found)} {looks}: {'; '.join(listed)}{more}"


def _misspelled(count: Counter[str]) -> Iterator[tuple[str, str]]:
    """(answer, what is meant) of the answers to one question."""
    usual: dict[tuple[str, int], list[str]] = defaultdict(list)
    for answer, times in count.most_common():
        if times >= USUAL and _is_comparable(answer):
            usual[_key(answer)].append(answer)
    for answer, times in count.items():
        if times <= RARE and _is_comparable(answer):
            near = (other for other in usual[_key(answer)] if USUAL * times <= count[other])
            if meant := next((other for other in near if _is_near(answer, other)), None):
                yield answer, meant


def _is_comparable(answer: str) -> bool:
    letters = [c for c in answer[: MOST_CHARACTERS + 1] if c.isalnum()]
    cased = all(c.lower() != c.upper() for c in letters)
    return bool(letters) and cased and len(answer) <= MOST_CHARACTERS


def _key(answer: str) -> tuple[str, int]:
    """What a misspelling leaves as it is: the first letter, and the number of words."""
    words = answer.casefold().split()
    return words[0][0], len(words)


def _is_near(answer: str, other: str) -> bool:
    """Whether one word differs, by as few edits as a misspelling has."""
    words = zip(answer.casefold().split(), other.casefold().split(), strict=True)
    differing = [(a, b) for a, b in words if a != b]
    if not differing:  # but for upper case or white space
        return True
    (a, b), *more = differing
    most = 1 if min(len(a), len(b)) < LONG_WORD else 2
    return not more and len(b) >= SHORT_WORD and a[0] == b[0] and _edits(a, b, most) <= most


def _edits(a: str, b: str, most: int) -> int:
    """The least number of letters to insert, remove, replace or swap with the next, which turn one
    word into the other (optimal string alignment); more than ``most`` where it is more."""
    if abs(len(a) - len(b)) > most:
        return most + 1
    before: list[int] = []
    above = list(range(len(b) + 1))
    for i, letter in enumerate(a, 1):
        row = [i]
        for j, other in enumerate(b, 1):
            edits = min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (letter != other))
            if i > 1 and j > 1 and letter == b[j - 2] and a[i - 2] == other:
                edits = min(edits, before[j - 2] + 1)
            row.append(edits)
        before, above = above, row
    return above[-1]
