"""The doctor: what would go wrong in training, by file, place and reason, before the first step.

``check_dataset`` looks at every example and every picture of a prepared data set. What cannot be
used is *bad*: it counts against the allowed rate and training leaves it out. What can be used but
should be looked at is *suspect*: it is listed and counted, no more. Both stand in
``bad_samples.jsonl`` beside the prepared data; ``check.json`` says what was checked, so that
training notices a data set that has changed since.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from instructblip.core.batch import Example
from instructblip.core.files import replacing, write_json
from instructblip.data.prepared.dataset import (
    DATA_FILE,
    MANIFEST_FILE,
    PreparedDataset,
    image_names,
)
from instructblip.data.prepared.images import (
    FACTS_FILE,
    ImageFact,
    first_changed,
    read_facts,
    summary,
    update_facts,
)
from instructblip.data.prepared.prepare import BAD_FILE
from instructblip.data.templates import TEMPLATES, render_prompt
from instructblip.data.tokens import Tokens

CHECK_FILE = "check.json"
CHECK_VERSION = 3

BAD = ("unreadable picture", "too many pictures", "no answer", "no question", "placeholder")
"""Kinds of findings that make an example useless."""
LEAKED = "leaked picture"
"""A training picture that an evaluation set shows as well: bad only if leaks are left out."""

NEEDS_QUESTION = {"vqa", "multiple_choice", "read", "statement", "ask", "dialogue", "instruct"}

_PLACEHOLDER = re.compile(
    r"#(n/a|(ref|value|div/0|num|null)!|name\?)|"
    r"\W*(null|nan|undefined|todo|tbd|fixme|unk|lorem ipsum.*|placeholder|"
    r"(insert|your|the)[ _](answer|caption|text|question|response)([ _]here)?|"
    r"[<\[{](answer|caption|text|question|response|label)[>\]}])\W*",
    re.IGNORECASE | re.DOTALL,
)

_NO_CAPTION = re.compile(r"\W*(none|n/a)\W*", re.IGNORECASE)
"""Answers to a question, but empty cells where nothing was asked."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One fault of one example; a line of ``bad_samples.jsonl``."""

    index: int
    where: str
    kind: str
    reason: str

    def line(self) -> dict[str, Any]:
        file, _, record = self.where.partition(":")
        kind, reason = self.kind, self.reason
        return {
            "file": file, "record": record, "kind": kind, "reason": reason, "index": self.index
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What the doctor found in one data set. ``left_out`` are the indices of bad examples;
    ``unprepared`` counts, by kind, those that `prepare` had left out, which have none."""

    name: str
    split: str
    count: int
    pictures: int
    kinds: dict[str, int]
    unprepared: dict[str, int]
    left_out: tuple[int, ...]
    first: tuple[Finding, ...]
    path: Path

    def describe(self) -> str:
        """``vqav2 train: 9000 examples, 3000 pictures, fine``, or what is wrong with them."""
        gone = sum(self.unprepared.values())
        before = f" ({gone} left out before: {_counted(self.unprepared)})" if gone else ""
        head = (
            f"{self.name} {self.split}: {self.count} examples{before}, {self.pictures} pictures: "
            f"{_counted(self.kinds) or 'fine'}"
        )
        shown = [f"\n  {f.where}: {f.kind}: {f.reason}" for f in self.first]
        rest = f"\n  all in {self.path / 'bad_samples.jsonl'}" if self.first else ""
        return head + "".join(shown) + rest


def _counted(kinds: Mapping[str, int]) -> str:
    return ", ".join(f"{count} x {kind}" for kind, count in kinds.items())


def check_dataset(
    dataset: PreparedDataset,
    *,
    evaluated: Mapping[bytes, str] | None = None,
    against: Sequence[str] = (),
    tokens: Tokens | None = None,
    drop_leaked: bool = False,
    max_images: int | None = None,
    decode: bool = False,
) -> Diagnosis:
    """Checks every example and every picture once, and writes down what it found.

    Args:
        evaluated: sha256 of pictures in evaluation sets, and the set's name: for training sets.
        against: names of those sets, kept so that a set added later is noticed.
        tokens: finds answers longer than ``max_response`` and prompts longer than ``max_prompt``;
            without them no length is checked.
        drop_leaked: counts leaked pictures as bad.
        max_images: how many of an example the model sees; None where it is shown a choice of
            them, as of the frames of a video.
        decode: decodes every picture whole, which finds damage in the middle of a file.
    """
    facts = image_facts(dataset, decode)
    bad_kinds = {*BAD, LEAKED} if drop_leaked else {*BAD}
    kinds: Counter[str] = Counter()
    left_out: dict[int, None] = {}
    kept = _lines_of_prepare(dataset.path)
    unprepared = Counter(line["kind"] for line in kept)
    first = [
        Finding(-1, f"{line['file']}:{line['record']}", line["kind"], line["reason"])
        for line in kept[:5]
    ]
    with (
        replacing(dataset.path / BAD_FILE) as temporary,
        temporary.open("w", encoding="utf-8") as file,
    ):
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in kept)
        for finding in _findings(dataset, facts, evaluated or {}, tokens, max_images):
            kinds[finding.kind] += 1
            if finding.kind in bad_kinds:
                left_out[finding.index] = None
            if kinds[finding.kind] <= 2:
                first.append(finding)
            file.write(json.dumps(finding.line(), ensure_ascii=False) + "\n")
    write_json(
        dataset.path / CHECK_FILE,
        {
            "version": CHECK_VERSION,
            "manifest": fingerprint(dataset),
            "count": len(dataset),
            "kinds": dict(kinds),
            "against": sorted(against),
            "drop_leaked": drop_leaked,
            "most_pictures": max_images,
            "left_out": list(left_out),
        },
    )
    name, split = dataset.name, dataset.split
    return Diagnosis(
        name, split, len(dataset), len(facts), dict(kinds), dict(unprepared), tuple(left_out),
        tuple(first), dataset.path,
    )  # fmt: skip


def image_facts(dataset: PreparedDataset, decode: bool = False) -> dict[str, ImageFact]:
    """Facts about every picture of a data set as it is now; the manifest then has them, too."""
    names = image_names(dataset.path / DATA_FILE)
    title = f"checking {dataset.name} {dataset.split}"
    path = dataset.path / FACTS_FILE
    facts = update_facts(path, names, dataset.image_root, title, decode=decode)
    if dataset.manifest["images"] != summary(facts):
        dataset.manifest["images"] = summary(facts)
        write_json(dataset.path / MANIFEST_FILE, dataset.manifest)
    return facts


def evaluated_images(datasets: Iterable[PreparedDataset]) -> dict[bytes, str]:
    """sha256 of every picture in the data sets, with the name of a set that shows it."""
    found: dict[bytes, str] = {}
    for dataset in datasets:
        for fact in read_facts(dataset.path / FACTS_FILE).values():
            found.setdefault(fact.sha256, f"{dataset.name} {dataset.split}")
    found.pop(b"", None)
    return found


def fingerprint(dataset: PreparedDataset) -> str:
    """Changes when a set is prepared anew from other files."""
    return hashlib.sha256((dataset.path / MANIFEST_FILE).read_bytes()).hexdigest()


def left_out(dataset: PreparedDataset) -> tuple[int, ...]:
    """Indices of the examples that the last check found bad."""
    return tuple(_read_check(dataset).get("left_out", ()))


def unchecked(
    dataset: PreparedDataset,
    against: Collection[str] = (),
    drop_leaked: bool = False,
    max_images: int | None = None,
) -> str:
    """Why the last check does not hold for the data as it is now; empty when it does.

    ``against`` are the evaluation sets whose pictures it has to have been compared with; the rest
    is as in ``check_dataset``.
    """
    checked = _read_check(dataset)
    if not checked:
        return "was never checked"
    if checked.get("version") != CHECK_VERSION:
        return "was checked by another version"
    if checked["manifest"] != fingerprint(dataset):
        return "has changed since it was checked"
    if missing := sorted(set(against) - set(checked["against"])):
        return f"was not checked for leaked pictures against {', '.join(missing)}"
    if checked["drop_leaked"] != drop_leaked:
        return "was checked with another data.drop_leaked"
    if checked["most_pictures"] != max_images:
        return "was checked with another data.num_frames"
    changed = first_changed(dataset.image_root, read_facts(dataset.path / FACTS_FILE))
    return f"has changed since it was checked (picture {changed})" if changed else ""


def _read_check(dataset: PreparedDataset) -> dict[str, Any]:
    path = dataset.path / CHECK_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _findings(
    dataset: PreparedDataset,
    facts: Mapping[str, ImageFact],
    evaluated: Mapping[bytes, str],
    tokens: Tokens | None,
    max_images: int | None,
) -> Iterator[Finding]:
    same, ids = _Repeats(), _Repeats()
    for i, example in enumerate(dataset):
        if max_images is not None and (count := len(example.images)) > max_images:
            reason = f"{count}, and the model sees {max_images}; set data.num_frames={count}"
            yield Finding(i, example.where, "too many pictures", reason)
        for kind, reason in _faults(example, dataset.image_root, facts, evaluated, tokens):
            yield Finding(i, example.where, kind, reason)
        pictures = tuple(facts[name].sha256 for name in example.images)
        text = (example.question, example.context, example.history, example.answers)
        if (other := same.add((pictures, text), i)) != i:
            reason = f"says the same as {dataset[other].where}"
            yield Finding(i, example.where, "duplicate", reason)
        if (other := ids.add(example.id, i)) != i:
            reason = f"the id {example.id[:80]!r} is also that of {dataset[other].where}"
            yield Finding(i, example.where, "duplicate id", reason)


class _Repeats:
    """Tells what was there before, by hash: a set of millions of texts would fill the memory."""

    def __init__(self) -> None:
        self.first: dict[int, int] = {}

    def add(self, key: object, index: int) -> int:
        """The index at which ``key`` was first; ``index`` itself for a new one."""
        return self.first.setdefault(hash(key), index)


def _faults(
    example: Example,
    root: Path,
    facts: Mapping[str, ImageFact],
    evaluated: Mapping[bytes, str],
    tokens: Tokens | None,
) -> Iterator[tuple[str, str]]:
    for name in example.images:
        if fault := facts[name].fault:
            yield "unreadable picture", f"{root / name}: {fault}"
        elif other := evaluated.get(facts[name].sha256):
            yield LEAKED, f"{name} is also a picture of {other}"
    if example.split == "train" and not example.taught:
        yield "no answer", "a training example needs an answer"
    if example.task in NEEDS_QUESTION and not example.question.strip():
        yield "no question", f"the task '{example.task}' needs one"
    for reason in placeholders(example):
        yield "placeholder", reason
    if tokens is not None and example.split == "train":
        yield from _long_prompt(example, tokens)
        for answer in example.answers:
            # A token stands for at least one byte, so short answers need no tokenizer.
            if len(answer.encode()) < tokens.max_response:
                continue
            if (length := tokens.response_length(answer)) > tokens.max_response:
                yield (
                    "over-long answer",
                    f"{length} tokens; training cuts it to {tokens.max_response} "
                    f"(data.max_response): {answer[:60]!r}...",
                )


def placeholders(example: Example) -> Iterator[str]:
    """What stands in the place of its question, and of all its answers; none in a good example."""
    if _PLACEHOLDER.fullmatch(example.question):
        yield f"the question is {example.question[:80]!r}, a placeholder"
    empty = (_PLACEHOLDER,) if example.question.strip() else (_PLACEHOLDER, _NO_CAPTION)
    answers = example.answers
    if answers and all(any(one.fullmatch(answer) for one in empty) for answer in answers):
        yield f"the answer is {answers[0][:80]!r}, a placeholder"


def _long_prompt(example: Example, tokens: Tokens) -> Iterator[tuple[str, str]]:
    """What training would cut off, in the first template of the task."""
    template = None if example.task in TEMPLATES else "{question}"  # the recipe may bring its own
    prompt = render_prompt(example, template).prompt
    if len(prompt.encode()) + 2 <= tokens.max_prompt:  # as with answers, and two special tokens
        return
    if (length := tokens.prompt_length(prompt)) > tokens.max_prompt:
        yield (
            "over-long prompt",
            f"{length} tokens; training cuts its beginning to leave {tokens.max_prompt} "
            f"(data.max_prompt): {prompt[:60]!r}...",
        )


def _lines_of_prepare(path: Path) -> list[dict[str, Any]]:
    """What `prepare` had left out; lines of an earlier check carry an index and go."""
    file = path / BAD_FILE
    lines = file.read_text(encoding="utf-8").split("\n") if file.is_file() else []
    return [found for line in lines if line and "index" not in (found := json.loads(line))]
