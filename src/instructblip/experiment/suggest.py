"""Which images of a folder to label next, and which of its labels are probably wrong.

A label is suspect where a model that has not learned it finds it unlikely: its loss. Where the
model has learned the labels, or cannot answer yet, it is tuned out of fold: once for each part of
the labels, on the others. An image is worth a label where the model is uncertain and nothing alike
is labelled or chosen before.
"""

import itertools
import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from instructblip.core.batch import Sample
from instructblip.core.example import Example
from instructblip.core.files import replacing, scratch_directory, write_text
from instructblip.core.pages import data_url, page_template
from instructblip.core.progress import progress_bar
from instructblip.data.custom.folder import FolderSet, in_folds, read_partly
from instructblip.data.samples import collate, make_sample
from instructblip.data.templates import TEMPLATES_ZH, Language, language_of, render_prompt
from instructblip.experiment.build import Data, build
from instructblip.experiment.evaluate import load_engine
from instructblip.experiment.folder import SET, captions_in
from instructblip.experiment.tune import (
    MEASURES,
    FolderTuning,
    fingerprint,
    write_recipe,
)
from instructblip.inference.batch import row_writer
from instructblip.inference.engine import Engine
from instructblip.inference.search import thumbnail
from instructblip.model.checkpoints.directory import model_directory
from instructblip.model.decoding import GREEDY
from instructblip.recipe.load import load_recipe
from instructblip.recipe.schema import RECIPE_FILE, Recipe

OPEN = ("caption", "instruct")
"""Tasks of long answers: their probabilities are means over tokens."""
SHOWN_IMAGES = 4
"""Of one example on the page."""
BLOCK = 4096
"""Labelled examples that distances are measured to at a time."""
UNVALIDATED = ("training.validate_every=null", "training.validate_first=false")
COLUMNS = ("file_name", "question", "choices", "context", "system", "ocr_tokens", "task", "answer")
"""Those of a row that `tune` reads."""


@dataclass(frozen=True)
class Suggestion:
    """An example with a label that may be wrong, or without one.

    ``answer`` is the model's, ``chance`` its probability, calibrated where the model is; of a long
    answer the geometric mean over its tokens. ``loss`` is that of the label in nats, of a long one
    per token.
    """

    example: Example
    label: str
    answer: str
    chance: float
    loss: float = 0.0

    @property
    def is_open(self) -> bool:
        """Whether the answer is long."""
        return self.example.task in OPEN

    @property
    def reason(self) -> str:
        """Why it is on its list, for people who know no machine learning."""
        sure = f"{self.chance:.0%}" + (" a word" if self.is_open else "")
        if not self.label:
            return f"the model would answer {self.answer!r} with {sure}"
        if self.label == self.answer:
            return f"the model also answers {self.answer!r}, with {sure}"
        reason = f"the model answers {self.answer!r} with {sure}, the label says {self.label!r}"
        return f"{reason} ({self.loss:.1f} nats per token)" if self.is_open else reason

    def row(self) -> dict[str, Any]:
        """The example in the columns that `tune` reads, and what is known about it."""
        example = self.example
        texts = {
            "file_name": "|".join(example.images),
            "question": example.question,
            "choices": "|".join(example.choices),
            "context": "" if example.system else example.context,
            "system": example.system,
            "ocr_tokens": "|".join(example.ocr_tokens),
            "task": example.task,
            "answer": self.label,
        }
        known = {"model_answer": self.answer, "chance": round(self.chance, 4)}
        known |= {"loss": round(self.loss, 4)} if self.label else {}
        return texts | known | {"reason": self.reason, "row": example.where}


@dataclass(frozen=True)
class Suggestions:
    """``wrong`` are labels, the most suspect first; ``wanted`` are examples to label, in order."""

    wrong: list[Suggestion]
    wanted: list[Suggestion]
    notes: list[str]
    """What to know about the lists, a sentence each."""

    def write(self, out: Path, root: Path, form: Literal["csv", "jsonl"] = "csv") -> list[Path]:
        """Write ``wrong`` and ``wanted``, as rows and together as a page; returns the files."""
        lists = {"wrong": self.wrong, "wanted": self.wanted}
        files = []
        for name, suggestions in lists.items():
            if not suggestions:
                continue
            rows = [each.row() for each in suggestions]
            used = [c for c in COLUMNS[:-1] if any(row[c] for row in rows)]
            columns = [*used, *(c for c in rows[0] if c not in COLUMNS[:-1])]
            path = out / f"{name}.{form}"
            path.parent.mkdir(parents=True, exist_ok=True)
            with (
                replacing(path) as temporary,
                temporary.open("w", encoding="utf-8", newline="") as file,
            ):
                write = row_writer(file, path, columns)
                for row in rows:
                    write({column: row[column] for column in columns})
            files.append(path)
        shown = {
            name: [(each, _thumbnails(each.example, root)) for each in suggestions]
            for name, suggestions in lists.items()
        }
        template = page_template(Path(__file__).with_suffix(".html.j2"))
        write_text(out / "page.html", template.render(root=root, notes=self.notes, **shown))
        return [*files, out / "page.html"]


def _thumbnails(example: Example, root: Path) -> list[str]:
    images = [thumbnail(root / name) for name in example.images[:SHOWN_IMAGES]]
    return [data_url(image, "JPEG", quality=88) for image in images]


@dataclass(frozen=True)
class Read:
    """What a model makes of an example: its answer with the probability, the mean of the queries
    that the language model reads, and the loss of each label."""

    example: Example
    answer: str
    chance: float
    embedding: Float[Tensor, " L"]
    losses: Sequence[float]


def suggest(
    root: Path,
    model: str,
    out: Path,
    folds: int = 0,
    limit: int = 100,
    overrides: Sequence[str] = (),
) -> Suggestions | None:
    """At most ``limit`` labels of the folder ``root`` that are probably wrong, and as many examples
    to label next.

    Args:
        out: has the runs of the folds until they are read.
        folds: parts of the labels; each is read by ``model`` after tuning on the others. 0 takes
            the model as it is, which may not have learned these labels.
        overrides: settings of the tuning, as those of `tune`.

    Returns None if a signal interrupted a run. Raises ValueError or FileNotFoundError for what is
    wrong with the folder, for a model that has learned the labels, and for too few of them.
    """
    captions = f"data.sets.{SET}.language="
    if not folds and (tuning := [o for o in overrides if not o.startswith(captions)]):
        raise ValueError(f"{tuning[0]} is a setting of the tuning: add --folds 3, or leave it out")
    start = start_of(model, root)  # a wrong path is reported before images are read
    if start is not None and not folds:
        raise ValueError(
            f"{model} was tuned on {root}: it knows these labels, wrong ones too. Add --folds 3, "
            f"which tunes {start} three times, each time without the labels that it then reads"
        )
    labelled, unlabelled = read_partly(root, captions_in(overrides, None))
    if folds and not len(labelled):
        raise ValueError(f"{root}: no row has an answer to tune on; leave out --folds")
    language = language_of(answer for example in labelled for answer in example.answers)
    images = max(len(example.images) for example in [*labelled, *unlabelled])
    if folds:
        engines = _tuned(
            labelled, start or model, in_folds(labelled, folds), out, overrides, images
        )
    else:
        engines = iter([(Engine.from_pretrained(model, num_frames=max(4, images)), labelled)])
    engine, read = None, []
    for engine, part in engines:
        read += read_examples(engine, part, language)
    if engine is None or len(read) < len(labelled):
        return None
    others = read_examples(engine, unlabelled, language)
    uncertainty = torch.tensor([1 - each.chance for each in others])
    chosen = choose(uncertainty, _embeddings(others), _embeddings(read), limit)
    wanted = [Suggestion(others[i].example, "", others[i].answer, others[i].chance) for i in chosen]
    return Suggestions(most_suspect(read)[:limit], wanted, _notes(engine, read, others))


def start_of(model: str, root: Path) -> str | None:
    """The start of a model that was tuned on the folder ``root``; None for any other model.

    The recipe beside the model says so; one that was exported without it is not recognised.
    """
    file = model_directory(model) / RECIPE_FILE
    if not file.is_file():
        return None
    recipe = load_recipe(file)
    roots = [Path(recipe.data.root, s.root or name) for name, s in recipe.data.sets.items()]
    tuned = any(each.resolve() == root.resolve() for each in roots)
    return recipe.model.start if tuned else None


@dataclass(frozen=True)
class _Fold(FolderTuning):
    """Trains on one side and is not validated: no label that it will read chooses a step."""

    def validates(self, recipe: Recipe) -> bool:
        return False

    def read_data(self, recipe: Recipe) -> Data:
        return Data({SET: self.training}, {SET: fingerprint(self.training)})


def _tuned(
    labelled: FolderSet,
    start: str,
    sides: Sequence[tuple[FolderSet, FolderSet]],
    out: Path,
    overrides: Sequence[str],
    images: int,
) -> Iterator[tuple[Engine, FolderSet]]:
    """For each part of the labels ``start`` tuned on the others. Ends early where a signal
    interrupts a run."""
    language = language_of(answer for example in labelled for answer in example.answers)
    began = time.monotonic()
    with scratch_directory(out) as work:
        for number, (training, part) in enumerate(sides):
            ahead = ""
            if number:
                left = (time.monotonic() - began) / number * (len(sides) - number)
                ahead = f"; about {left / 60:.1f} minutes left"
            counts = f"tunes on {len(training)} examples, then reads {len(part)}"
            print(f"fold {number + 1} of {len(sides)}: {counts}{ahead}", flush=True)
            settings = [f"features.root={work / 'features'}", *UNVALIDATED, *overrides]
            fold = work / str(number)
            recipe = write_recipe(
                labelled.image_root, start, fold, len(training), settings, images, None, language
            )
            run = build(recipe, _Fold(training, part, language), fold / "run")
            if run.train(fold / "run").stopped == "terminated":
                return
            yield load_engine(recipe, str(fold / "run" / "last")), part


def read_examples(engine: Engine, folder: FolderSet, language: Language = "en") -> list[Read]:
    """What the model of ``engine`` makes of each example, asked as `tune` evaluates it."""
    read: list[Read] = []

    def kind(example: Example) -> tuple[str, bool, int]:
        return example.task, bool(example.choices), len(engine.images.select(example.images))

    with progress_bar("reading", "examples") as bar:
        for _, group in itertools.groupby(sorted(folder, key=kind), kind):
            alike = list(group)
            for first in range(0, len(alike), engine.batch_size):
                part = alike[first : first + engine.batch_size]
                read += _read_alike(engine, part, folder.image_root, language)
                bar(len(read), len(folder))
    return read


@torch.no_grad()
def _read_alike(
    engine: Engine, examples: Sequence[Example], root: Path, language: Language
) -> list[Read]:
    """Examples of one task with as many images, as one batch."""
    task = examples[0].task
    _, prompt, _, decoding = MEASURES.get(task, ("", None, "", {}))
    prompt = TEMPLATES_ZH[task][0] if language == "zh" else prompt
    prompts = [render_prompt(example, prompt) for example in examples]
    samples = engine.encoded(
        [
            make_sample(example, text, engine.tokens, engine.images, root)
            for example, text in zip(examples, prompts, strict=True)
        ]
    )
    queries = engine.model.encode_queries(collate(samples).to(engine.device))  # [B, K, L]
    embeddings = queries.float().mean(1).cpu()
    labels = [example.taught for example in examples]
    if examples[0].choices:
        answers, losses = _among_choices(engine, samples, examples)
    else:
        known = engine.respond_in_detail(samples, GREEDY.override(**decoding))
        lengths = [max(1, each.num_tokens) if task in OPEN else 1 for each in known]
        answers = [
            (each.text, math.exp(each.log_prob / length))
            for each, length in zip(known, lengths, strict=True)
        ]
        if task not in OPEN:
            answers = [
                (text, chance if each.confidence is None else each.confidence)
                for (text, chance), each in zip(answers, known, strict=True)
            ]
        likely = engine.rank_samples(samples, labels, "mean" if task in OPEN else "sum")
        losses = [[-value for value in row] for row in likely]
    return list(map(Read, examples, *zip(*answers, strict=True), embeddings, losses))


def _among_choices(
    engine: Engine, samples: Sequence[Sample], examples: Sequence[Example]
) -> tuple[list[tuple[str, float]], list[list[float]]]:
    """The best choice of each example with its probability, and the loss of each label among the
    choices."""
    ranked = engine.rank_samples(samples, [example.choices for example in examples])
    answers, losses = [], []
    for example, scores in zip(examples, ranked, strict=True):
        options = engine.candidates(example.choices, scores)
        best = max(options, key=lambda option: option.probability)
        answers.append((best.text, best.probability))
        total = float(torch.tensor(scores).logsumexp(0))
        by_text = dict(zip(example.choices, scores, strict=True))
        losses.append([total - by_text[label] for label in example.taught])
    return answers, losses


def most_suspect(read: Sequence[Read]) -> list[Suggestion]:
    """All labels, the one with the largest loss first. Short and long answers, whose losses cannot
    be compared, are merged by their places among their own kind."""
    labels = [
        Suggestion(each.example, label, each.answer, each.chance, loss)
        for each in read
        for label, loss in zip(each.example.taught, each.losses, strict=True)
    ]
    placed = []
    for is_open in (False, True):
        of_kind = [each for each in labels if each.is_open == is_open]
        of_kind.sort(key=lambda each: -each.loss)
        placed += [((i + 0.5) / len(of_kind), each) for i, each in enumerate(of_kind)]
    return [each for _, each in sorted(placed, key=lambda pair: pair[0])]


def choose(
    uncertainty: Float[Tensor, " N"],
    embeddings: Float[Tensor, "N L"],
    known: Float[Tensor, "M K"],
    limit: int,
) -> list[int]:
    """The places of ``limit`` of N examples, one after the other: the one with the largest
    uncertainty times distance to the nearest that is chosen or known (K is L, or M is 0). Of equal
    ones the first."""
    count = len(embeddings)
    if not count:
        return []
    every = torch.cat([embeddings, known]) if len(known) else embeddings
    every = torch.nn.functional.normalize(
        (every - every.mean(0)) / (every.std(0, correction=0) + 1e-6), dim=1
    )
    own, labelled = every[:count], every[count:]
    nearest = torch.full((count,), 2.0)  # the largest distance of unit vectors
    for part in labelled.split(BLOCK) if len(known) else ():
        nearest = torch.minimum(nearest, torch.cdist(own, part).amin(1))
    chosen: list[int] = []
    for _ in range(min(limit, count)):
        worth = uncertainty * nearest
        worth[chosen] = -1.0
        chosen.append(int(worth.argmax()))
        nearest = torch.minimum(nearest, torch.cdist(own, own[chosen[-1:]])[:, 0])
    return chosen


def _embeddings(read: Sequence[Read]) -> Float[Tensor, "N L"]:
    return torch.stack([each.embedding for each in read]) if read else torch.zeros(0, 0)


def _notes(engine: Engine, read: Sequence[Read], others: Sequence[Read]) -> list[str]:
    """What to know about the lists."""
    short = [each for each in read if each.example.task not in OPEN]
    notes = []
    if short:
        agree = sum(each.answer in each.example.answers for each in short) / len(short)
        labels = Counter(answer for each in short for answer in set(each.example.answers))
        best = labels.most_common(1)[0][1] / len(short)
        notes.append(
            f"The model's answer is the label of {agree:.0%} of {len(short)} examples with short "
            f"answers; the most frequent label alone is that of {best:.0%}."
        )
        if agree <= best:
            notes.append(
                "So it cannot judge these labels: tune it on other data, or add --folds 3, which "
                "tunes it on them out of fold."
            )
    if long := len(read) - len(short):
        notes.append(
            f"{long} examples have captions or long answers: these are ordered by the loss per "
            "token, which finds wrong words less surely than wrong short answers."
        )
    if engine.calibration is None and len(short) + len(others):
        notes.append(
            "Percentages are the model's, which may be too sure; after `instructblip calibrate` "
            "they are how often such answers are right."
        )
    if not others:
        notes.append("Every image has a label, so there is none to choose for labelling.")
    if not read:
        notes.append("No row has a label, so there is none to doubt.")
    return notes
