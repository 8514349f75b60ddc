"""The data check: what would go wrong in training, by file, record and reason, before any step.

``check_dataset`` looks at every example and every image of a prepared data set. A *bad* example
cannot be used: it counts against the allowed rate, and training leaves it out. A *suspect* one can
be used but may deserve a look: it is only listed and counted. ``bad_samples.jsonl`` beside the
prepared data lists both, and ``check.json`` records what was checked, so that training notices data
that has changed since.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from instructblip.core.example import IMAGE_MARK, Example
from instructblip.core.files import read_json, read_json_lines, replacing, write_json
from instructblip.data.answers import misspellings, placeholders
from instructblip.data.prepared.dataset import MANIFEST_FILE, PreparedDataset
from instructblip.data.prepared.images import FACTS_FILE, ImageFact, first_changed, read_facts
from instructblip.data.prepared.near import ALIKE, NEAR, Look, NearPair, near_duplicates
from instructblip.data.prepared.prepare import BAD_FILE
from instructblip.data.reading.decode import NARROW, Window
from instructblip.data.templates import TEMPLATES, render_prompt
from instructblip.data.tokens import Tokens

CHECK_FILE = "check.json"
CHECK_VERSION = 3

TOO_MANY_MARKS = "<image> without image"
"""An example whose texts have more image marks than it has images."""
SHARED_GROUP = "group on both sides"
"""A training example whose group an evaluation set has as well."""
BAD = {
    *("unreadable image", "too many images", "no answer", "no question", "placeholder"),
    SHARED_GROUP,
    TOO_MANY_MARKS,
}
"""Kinds of findings that make an example unusable."""
NEAR_DUPLICATE = "near-duplicate"
"""A training image that looks like an image of an evaluation set; it may be another one."""
LEAKED = "leaked image"
"""A training image that an evaluation set shows as well: left out only with ``drop_leaked``."""

NEEDS_QUESTION = {"vqa", "multiple_choice", "read", "statement", "ask", "dialogue", "instruct"}


@dataclass(frozen=True, slots=True)
class Evaluated:
    """What evaluation sets show: nothing of it may be trained on."""

    images: dict[bytes, str] = field(default_factory=dict)
    """sha256 of an image -> name of a set."""
    looks: dict[str, Look] = field(default_factory=dict)
    """Image and set -> its look. Near-duplicates are looked for where there are any."""
    groups: dict[tuple[str, str], str] = field(default_factory=dict)
    """(entry of the recipe, group) -> name of a set."""


class Context(NamedTuple):
    """The positions of a language model, and what the images of a sample take of them."""

    length: int
    num_queries: int
    num_frames: int
    """Images that the model sees at most."""


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """The result of checking one data set of ``count`` examples and ``num_images`` images.

    ``kinds`` counts the findings by kind and ``left_out`` has the indices of the examples that
    training skips. ``num_bad`` of them are bad; the others are leaked and left out on request.
    ``unprepared`` counts by kind those that `prepare` left out, which have no index. ``shown`` are
    the first findings of each kind as text.
    """

    name: str
    split: str
    count: int
    num_images: int
    kinds: dict[str, int]
    unprepared: dict[str, int]
    left_out: tuple[int, ...]
    num_bad: int
    shown: tuple[str, ...]
    path: Path

    def describe(self) -> str:
        """``vqav2 train: 9000 examples, 3000 images: fine``, or the faults in place of fine."""
        missing = sum(self.unprepared.values())
        before = f" ({missing} left out before: {_counted(self.unprepared)})" if missing else ""
        text = (
            f"{self.name} {self.split}: {self.count} examples{before}, {self.num_images} images: "
            f"{_counted(self.kinds) or 'fine'}"
        )
        more = [f"all in {self.path / BAD_FILE}"] if self.shown else []
        return "\n  ".join([text, *self.shown, *more])


def _counted(kinds: Mapping[str, int]) -> str:
    return ", ".join(f"{count} x {kind}" for kind, count in kinds.items())


def check_dataset(
    dataset: PreparedDataset,
    *,
    evaluated: Evaluated | None = None,
    against: Sequence[str] = (),
    tokens: Tokens | None = None,
    context: Context | None = None,
    drop_leaked: bool = False,
    max_images: int | None = None,
    decode: bool = False,
    perceptual: bool = False,
    window: Window = "auto",
) -> Diagnosis:
    """Checks every example and every image once, and writes the findings beside the data.

    Args:
        evaluated: what evaluation sets show: for training sets.
        against: names of these sets, recorded so that a set added later is noticed.
        tokens: measures answers and prompts, which it limits; without it no length is checked.
        context: with ``tokens``, what a whole sample has to fit into; None without a limit.
        drop_leaked: leaves examples with leaked images out, which are not bad for that.
        max_images: images of an example that the model sees; None if an example may have more, as
            a video has more frames.
        decode: decodes every image whole, which finds damage in the middle of a file.
        perceptual: decodes every image at a small scale, to find near-duplicates.
        window: of images with more than 8 bits; a chosen one is not reported.
    """
    facts = dataset.update_images(decode, perceptual)
    kinds: Counter[str] = Counter()
    left_out: dict[int, None] = {}
    bad: set[int] = set()
    skipped = _skipped_by_prepare(dataset.path)
    shown = [f"{s['file']}:{s['record']}: {s['kind']}: {s['reason']}" for s in skipped[:5]]
    with (
        replacing(dataset.path / BAD_FILE) as temporary,
        temporary.open("w", encoding="utf-8") as file,
    ):
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in skipped)
        notes = {name: _note(fact, window) for name, fact in facts.items() if fact.note}
        findings = _findings(
            dataset, facts, notes, evaluated or Evaluated(), tokens, context, max_images
        )
        for index, where, kind, reason in findings:
            kinds[kind] += 1
            if kind in BAD:
                bad.add(index)
            if kind in BAD or (drop_leaked and kind == LEAKED):
                left_out[index] = None
            if kinds[kind] <= 2:
                shown.append(f"{where}: {kind}: {reason}")
            name, _, record = where.partition(":")
            line = {"file": name, "record": record, "kind": kind, "reason": reason, "index": index}
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    content = {
        "version": CHECK_VERSION,
        "manifest": fingerprint(dataset),
        "count": len(dataset),
        "kinds": dict(kinds),
        "against": sorted(against),
        "drop_leaked": drop_leaked,
        "most_pictures": max_images,
        "left_out": list(left_out),
        "bad": len(bad),
    }
    write_json(dataset.path / CHECK_FILE, content)
    return Diagnosis(
        name=dataset.name,
        split=dataset.split,
        count=len(dataset),
        num_images=len(facts),
        kinds=dict(kinds),
        unprepared=dict(Counter(line["kind"] for line in skipped)),
        left_out=tuple(left_out),
        num_bad=len(bad),
        shown=tuple(shown),
        path=dataset.path,
    )


def evaluated_by(datasets: Iterable[PreparedDataset]) -> Evaluated:
    """What the data sets show, each with the name of a set that shows it."""
    evaluated = Evaluated()
    for dataset in datasets:
        title = f"{dataset.name} {dataset.split}"
        for name, fact in read_facts(dataset.path / FACTS_FILE).items():
            if fact.sha256:  # not of images that cannot be read
                evaluated.images.setdefault(fact.sha256, title)
            if fact.look is not None:
                evaluated.looks[f"{name} of {title}"] = fact.look
        if dataset.has_groups:
            for example in dataset:
                evaluated.groups.setdefault((example.dataset, example.extra["group"]), title)
    return evaluated


def fingerprint(dataset: PreparedDataset) -> str:
    """A hash that changes when the set is prepared again from other files."""
    return hashlib.sha256((dataset.path / MANIFEST_FILE).read_bytes()).hexdigest()


def left_out(dataset: PreparedDataset) -> tuple[int, ...]:
    """Indices of the examples that training skips, by the last check."""
    return tuple(_read_check(dataset).get("left_out", ()))


def num_bad(dataset: PreparedDataset) -> int:
    """How many of ``left_out`` are bad; all, where an earlier version checked."""
    return _read_check(dataset).get("bad", len(left_out(dataset)))


def findings(dataset: PreparedDataset) -> dict[str, int]:
    """Number of findings of the last check, by kind."""
    return _read_check(dataset).get("kinds", {})


def unchecked(
    dataset: PreparedDataset,
    against: Collection[str] = (),
    drop_leaked: bool = False,
    max_images: int | None = None,
) -> str:
    """Why the last check does not cover the data as it is now; empty when it does.

    ``against`` are the evaluation sets that its images must have been compared with; the other
    arguments are those of ``check_dataset``.
    """
    checked = _read_check(dataset)
    if not checked:
        return "was never checked"
    if checked.get("version") != CHECK_VERSION:
        return "was checked by another version"
    if checked["manifest"] != fingerprint(dataset):
        return "has changed since it was checked"
    if missing := sorted(set(against) - set(checked["against"])):
        return f"was not checked for leaked images against {', '.join(missing)}"
    if checked["drop_leaked"] != drop_leaked:
        return "was checked with another data.drop_leaked"
    if checked["most_pictures"] != max_images:
        return "was checked with another data.num_frames"
    changed = first_changed(dataset.image_root, read_facts(dataset.path / FACTS_FILE))
    return f"has changed since it was checked (image {changed})" if changed else ""


def _read_check(dataset: PreparedDataset) -> dict[str, Any]:
    path = dataset.path / CHECK_FILE
    return read_json(path) if path.is_file() else {}


def _note(fact: ImageFact, window: Window) -> tuple[str, str] | None:
    """(kind, reason) of what is unusual about an image, with what ``window`` makes of it."""
    kind, _, reason = (fact.note or "").partition(": ")
    if kind != NARROW:
        return kind, reason
    if window == "full":
        return kind, f"{reason}, nearly all alike in 8 bits; set data.window=auto or [low, high]"
    if window == "auto":
        return kind, f"{reason}, stretched to 0 to 255 by data.window=auto"
    return None


def _findings(
    dataset: PreparedDataset,
    facts: Mapping[str, ImageFact],
    notes: Mapping[str, tuple[str, str] | None],
    evaluated: Evaluated,
    tokens: Tokens | None,
    context: Context | None,
    max_images: int | None,
) -> Iterator[tuple[int, str, str, str]]:
    """(index, ``Example.where``, kind, reason) of each fault."""
    near = _near_duplicates(facts, evaluated)
    # Where a content or an id occurs first, by its hash: millions of texts would fill the memory.
    contents: dict[int, int] = {}
    ids: dict[int, int] = {}
    misspelled = {each.index: each.reason for each in misspellings(dataset)}
    for i, example in enumerate(dataset):
        faults = list(_faults(example, dataset.image_root, facts, evaluated, max_images))
        if tokens is not None:
            faults += too_long(example, tokens, context)
        faults += [(NEAR_DUPLICATE, near[name]) for name in example.images if name in near]
        faults += [("misspelling", misspelled[i])] if i in misspelled else []
        noted = [(name, note) for name in example.images if (note := notes.get(name))]
        faults += [(kind, f"{name}: {reason}") for name, (kind, reason) in noted]
        images = tuple(facts[name].sha256 for name in example.images)
        text = (example.question, example.context, example.history, example.answers)
        if (first := contents.setdefault(hash((images, text)), i)) != i:
            faults.append(("duplicate", f"has the images and texts of {dataset[first].where}"))
        if (first := ids.setdefault(hash(example.id), i)) != i:
            reason = f"the id {example.id[:80]!r} is also that of {dataset[first].where}"
            faults.append(("duplicate id", reason))
        for kind, reason in faults:
            yield i, example.where, kind, reason


def _near_duplicates(facts: Mapping[str, ImageFact], evaluated: Evaluated) -> dict[str, str]:
    """Training image -> why it is a near-duplicate of an evaluated one, but not the same file."""
    looks = {
        name: look
        for name, fact in facts.items()
        if (look := fact.look) is not None and fact.sha256 not in evaluated.images
    }
    nearest: dict[str, NearPair] = {}
    for pair in near_duplicates(looks, evaluated.looks):
        nearest[pair.left] = min(nearest.get(pair.left, pair), pair, key=lambda p: p.difference)
    return {
        name: f"{name} looks like {pair.right} ({pair.bits} of 64 bits differ, and colors by "
        f"{pair.difference:.0f} of 255; at most {NEAR} and {ALIKE} count as alike)"
        for name, pair in nearest.items()
    }


def _faults(
    example: Example,
    root: Path,
    facts: Mapping[str, ImageFact],
    evaluated: Evaluated,
    max_images: int | None,
) -> Iterator[tuple[str, str]]:
    """(kind, reason) of what is wrong with one example by itself."""
    if max_images is not None and (count := len(example.images)) > max_images:
        reason = f"{count}, and the model sees {max_images}; set data.num_frames={count}"
        yield "too many images", reason
    for name in example.images:
        if fault := facts[name].fault:
            yield "unreadable image", f"{root / name}: {fault}"
        elif other := evaluated.images.get(facts[name].sha256):
            yield LEAKED, f"{name} is also an image of {other}"
    group = example.extra.get("group", "")
    if other := evaluated.groups.get((example.dataset, group)):
        yield SHARED_GROUP, f"{group!r} is also in {other}"
    if example.split == "train" and not example.taught:
        yield "no answer", "a training example needs an answer"
    if example.task in NEEDS_QUESTION and not example.question.strip():
        yield "no question", f"the task '{example.task}' needs one"
    for reason in placeholders(example):
        yield "placeholder", reason
    if (marks := example.num_marks) > (count := len(example.images)):
        yield TOO_MANY_MARKS, f"the texts have {marks} {IMAGE_MARK} and the example {count} images"


def too_long(
    example: Example, tokens: Tokens, context: Context | None
) -> Iterator[tuple[str, str]]:
    """(kind, reason) of texts that would be cut: the prompt, in the first template of the task, and
    answers, of an evaluation set those that the model cannot write in full; and of samples that
    then exceed the context. A token is at least one byte, so short texts need no tokenizer."""
    template = None if example.task in TEMPLATES else "{question}"  # a recipe may have its own
    rendered = render_prompt(example, template)
    prompt = rendered.prompt
    limit = tokens.max_prompt
    # The prompt may have two special tokens.
    if len(prompt.encode()) + 2 > limit and (length := tokens.prompt_length(rendered)) > limit:
        cut = f"its beginning is cut to leave {limit} (data.max_prompt)"
        yield "over-long prompt", f"{length} tokens; {cut}: {prompt[:60]!r}..."
    limit = tokens.max_response
    for answer in example.answers:
        if len(answer.encode()) >= limit and (length := tokens.response_length(answer)) > limit:
            cut = f"training cuts it to {limit} (data.max_response)"
            if example.split != "train":
                cut = f"the model writes at most {limit} (max_new_tokens of decoding)"
            yield "over-long answer", f"{length} tokens; {cut}: {answer[:60]!r}..."
    longest = max(example.answers, key=len, default="")
    if context is None:
        return
    images = min(len(example.images), context.num_frames)
    room = context.length - images * context.num_queries
    if len(prompt.encode()) + len(longest.encode()) + 4 > room:
        length = min(tokens.prompt_length(prompt), tokens.max_prompt)
        length += min(tokens.response_length(longest), tokens.max_response)
        if length > room:
            yield (
                "over-long sample",
                f"{images} x {context.num_queries} queries and {length} tokens of prompt and "
                f"answer; the language model reads {context.length} together: lower "
                "data.num_frames, data.max_prompt or data.max_response",
            )


def _skipped_by_prepare(path: Path) -> list[dict[str, Any]]:
    """The lines that `prepare` wrote; those of an earlier check have an index and are dropped."""
    return [record for record in read_json_lines(path / BAD_FILE) if "index" not in record]
