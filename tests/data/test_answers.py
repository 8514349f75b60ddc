"""Answers that look misspelled: what is reported, what is not, and at which cost."""

import itertools
import time

import pytest

from instructblip.core.example import Example
from instructblip.data.answers import describe_misspellings, misspellings


def asked(*answers: str, question: str = "which one?", task: str = "vqa") -> list[Example]:
    return [
        Example(
            dataset="own",
            split="train",
            id=str(number),
            images=(f"{number}.png",),
            task=task,
            question=question,
            answers=(answer,),
            where=f"metadata.csv:line {number + 2}",
        )
        for number, answer in enumerate(answers)
    ]


@pytest.mark.parametrize(
    ("rare", "usual"),
    [
        ("gren", "green"),
        ("rde", "red"),
        ("Green", "green"),
        ("elipshoid", "ellipsoid"),
        ("two red appels", "two red apples"),
        ("Грин", "Грен"),
    ],
)
def test_a_rare_answer_near_a_common_one_looks_misspelled(rare: str, usual: str):
    found = misspellings(asked(*["other"] * 30, *[usual] * 30, rare))
    assert [(each.answer, each.usual, each.count) for each in found] == [(rare, usual, 30)]
    line = f"1 answer looks like a misspelling: {rare!r} (metadata.csv:line 62), 30 times {usual!r}"
    assert describe_misspellings(found) == line


@pytest.mark.parametrize(
    ("rare", "usual"),
    [
        ("7", "17"),
        ("17 cm", "7 cm"),
        ("b", "a"),
        ("no", "yes"),
        ("abnormal", "normal"),
        ("atypical", "typical"),
        ("cat", "bat"),
        ("stone", "store room"),
        ("grey", "green"),
        ("红苹果汁", "红苹果树"),
        ("", "green"),
        ("!!!!", "!!!"),
    ],
)
def test_other_answers_do_not(rare: str, usual: str):
    assert misspellings(asked(*[usual] * 30, rare)) == []


def test_common_answers_choices_and_open_questions_are_not_compared():
    assert misspellings(asked(*["green"] * 30, *["gren"] * 4)) == []
    assert misspellings(asked(*["green"] * 9, "gren")) == []
    captions = [f"a photo of {'abcdefghij'[n % 10]}{n}" for n in range(40)]
    rows = [*["a red heart"] * 30, "a red heard", *captions]
    assert misspellings(asked(*rows, question="", task="caption")) == []
    other = asked("gren", question="another?")
    assert misspellings([*asked(*["green"] * 30), *other]) == []


def test_several_are_counted_with_the_first_of_them():
    names = "gren", "grene", "geen", "greenn", "grreen", "greem", "gree"
    found = misspellings(asked(*["green"] * 90, *names))
    text = describe_misspellings(found)
    assert text.startswith("7 answers look misspelled: 'gren' (metadata.csv:line 92), 90 times")
    assert text.endswith("; and 2 more")
    assert describe_misspellings([]) == ""


def test_many_distinct_answers_cost_little():
    letters = itertools.product("abcdefghij", repeat=4)
    names = ["".join(word) for word in itertools.islice(letters, 5000)]
    began = time.process_time()
    assert misspellings(asked(*names * 2)) == []  # an open question
    closed = [f"s{name}" for name in names[:999]]
    misspellings(asked(*closed[:500] * 12, *closed[500:]))
    assert time.process_time() - began < 3
