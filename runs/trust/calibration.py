"""How far the confidences of models tuned on Scenes can be trusted: `docs/trust.md`.

``python -m runs.trust.calibration WORK MODEL...`` writes a new world of Scenes, whose seed no model
was tuned on, into ``WORK/scenes``, answers its held-in and held-out sets with each model (one for
each seed of the tuning), and writes the page. Predictions are kept in ``WORK``, so that an
interrupted run resumes.

Every set is also asked as a closed question: a set with choices as it is, a set of short answers
with all its answers as candidates, and captions as the right one among ten. What is fitted is never
fitted to the samples that are scored: each set is split at random into halves, ``SPLITS`` times.
"""

import argparse
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
from scipy import stats

from instructblip.core.example import Example
from instructblip.core.files import write_text
from instructblip.data.prepared.dataset import DatasetView
from instructblip.evaluation.benchmarks import BENCHMARKS
from instructblip.evaluation.confidence import (
    aurc,
    conformal_quantile,
    ece,
    fit_isotonic,
    fit_temperature,
    in_set,
    log_scaled,
    selective_accuracy,
)
from instructblip.evaluation.evaluate import pick
from instructblip.evaluation.result import Result
from instructblip.evaluation.scoring import CAPTION_METRICS, is_right, right_option
from instructblip.experiment.datasets import Held, prepare_benchmarks
from instructblip.experiment.evaluate import load_answerer, score
from instructblip.recipe.load import load_recipe
from instructblip.scenes.official import write_scenes

SEED = 7100
"""Of the world; the models were tuned on that of seed 0."""
HELD_IN = ("scenes_vqav2", "scenes_okvqa", "scenes_aokvqa", "scenes_ocrvqa")
HELD_OUT = tuple(
    name for name, b in BENCHMARKS.items() if name.startswith("scenes_") and b.role == "held_out"
)
SPLITS = 20
COVERAGE, SHARE = 0.9, 0.7
CHOICES = 10
"""Captions to choose from."""


@dataclass(frozen=True)
class Changed:
    """A data set whose examples were changed."""

    examples: Sequence[Example]
    name: str
    image_root: Path

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int, /) -> Example:
        return self.examples[index]


def first(held: Held, limit: int) -> Held:
    """The samples that are answered."""
    return replace(held, dataset=DatasetView(held.dataset, pick(len(held.dataset), limit)))


def closed(held: Held) -> Held:
    """The same samples as closed questions."""
    benchmark, data = held.benchmark, held.dataset
    if benchmark.mode == "rank":
        return held
    asked = replace(benchmark, mode="rank", metric="exact_match", decoding={})
    examples = [data[i] for i in range(len(data))]
    if benchmark.metric not in CAPTION_METRICS:
        names = tuple(sorted({example.answers[0] for example in examples}))
        return Held(replace(asked, candidates=names), data)
    rng = random.Random(SEED)
    changed = []
    for example in examples:
        others = [e.answers[0] for e in examples if e.answers[0] not in example.answers]
        others = rng.sample(sorted(set(others)), CHOICES - 1)
        choices = rng.sample([example.answers[0], *others], CHOICES)
        changed.append(replace(example, choices=tuple(choices)))
    return Held(asked, Changed(changed, data.name, data.image_root))


def predict(work: Path, models: Sequence[Path], limit: int) -> "list[Model]":
    """The predictions of each model: open and closed ones by benchmark."""
    sets = sorted({BENCHMARKS[name].source for name in (*HELD_IN, *HELD_OUT)})
    write_scenes(work / "scenes", SEED, scale=5, sets=tuple(sets))
    settings = ["features.cache=on", f"evaluation.limit={limit}", "evaluation.batch_size=128"]
    recipe = load_recipe("quickstart", [f"data.root={work / 'scenes'}", *settings])
    benchmarks = [BENCHMARKS[name] for name in (*HELD_IN, *HELD_OUT)]
    asked = [first(held, limit) for held in prepare_benchmarks(recipe, benchmarks)]
    answered = []
    for number, model in enumerate(models):
        engine = load_answerer(recipe, str(model), [held.dataset for held in asked])
        results: dict[str, dict[str, Result]] = {"open": {}, "closed": {}}
        for held in asked:
            name = held.benchmark.name
            for kind, one in (("open", held), ("closed", closed(held))):
                captions = held.benchmark.metric in CAPTION_METRICS
                if kind == "open" and (captions or held.benchmark.mode == "rank"):
                    continue
                out = work / f"model{number}" / kind / name
                results[kind][name] = score(
                    engine, one, recipe.evaluation, out=out, details=True, baseline=False
                )
                print(f"{model}: {kind} {results[kind][name].describe()}", flush=True)
        answered.append(Model(results["open"], results["closed"]))
    return answered


@dataclass(frozen=True)
class Model:
    """The results of one model by benchmark."""

    open: dict[str, Result]
    closed: dict[str, Result]


# --- fitting and scoring -------------------------------------------------------------------------


@dataclass(frozen=True)
class Closed:
    """Closed questions: log-likelihoods of the candidates, the right ones, and marks of the
    likeliest."""

    scores: list[list[float]]
    right: list[int]
    marks: np.ndarray

    @classmethod
    def of(cls, results: Iterable[Result]) -> "Closed":
        rows = [(p, is_right(p, r.metric)) for r in results for p in r.predictions]
        return cls(
            [p["log_likelihoods"] for p, _ in rows],
            [right_option(p) for p, _ in rows],
            np.array([float(right) for _, right in rows]),
        )

    def at(self, places: Iterable[int]) -> "Closed":
        chosen = list(places)
        scores, right = [self.scores[i] for i in chosen], [self.right[i] for i in chosen]
        return Closed(scores, right, self.marks[chosen])

    def chances(self, temperature: float) -> list[np.ndarray]:
        return [log_scaled(row, temperature) for row in self.scores]


@dataclass(frozen=True)
class Open:
    """Generated answers: log-probabilities, numbers of tokens and marks."""

    log_probs: np.ndarray
    tokens: np.ndarray
    marks: np.ndarray

    @classmethod
    def of(cls, results: Iterable[Result]) -> "Open":
        rows = [(p, is_right(p, r.metric)) for r in results for p in r.predictions]
        return cls(
            np.array([p["log_prob"] for p, _ in rows]),
            np.array([p["num_tokens"] for p, _ in rows]),
            np.array([float(right) for _, right in rows]),
        )

    def at(self, places: Iterable[int]) -> "Open":
        chosen = list(places)
        return Open(self.log_probs[chosen], self.tokens[chosen], self.marks[chosen])


Figures = dict[str, float]


def least_ece(confidences: np.ndarray, draws: int = 20) -> float:
    """The error that these confidences have on average where they are exactly right: it falls with
    the number of samples only."""
    rng = np.random.default_rng(0)
    marks = rng.uniform(size=(draws, len(confidences))) < confidences
    return fmean(ece(confidences, row.astype(float)) for row in marks)


def closed_figures(fitted: Closed, tested: Closed) -> Figures:
    """What a calibration by ``fitted`` is worth on ``tested``. All but the size in percent."""
    temperature = fit_temperature(fitted.scores, fitted.marks)
    own = [-row[i] for row, i in zip(fitted.chances(temperature), fitted.right, strict=True)]
    quantile = conformal_quantile(np.array(own), COVERAGE)
    chances = tested.chances(temperature)
    sets = [in_set(row, quantile) for row in chances]
    shown = [chosen or [int(row.argmax())] for chosen, row in zip(sets, chances, strict=True)]
    before = np.exp([row.max() for row in tested.chances(1.0)])
    after = np.exp([row.max() for row in chances])
    return {
        "right": 100 * float(tested.marks.mean()),
        "ece before": 100 * ece(before, tested.marks),
        "ece after": 100 * ece(after, tested.marks),
        "ece least": 100 * least_ece(after),
        "coverage": 100 * fmean(i in c for i, c in zip(tested.right, sets, strict=True)),
        "coverage shown": 100 * fmean(i in c for i, c in zip(tested.right, shown, strict=True)),
        "size": fmean(map(len, shown)),
        "selective": 100 * selective_accuracy(after, tested.marks, SHARE),
        "aurc": 100 * aurc(after, tested.marks),
    }


def open_figures(fitted: Open, tested: Open, per_token: bool = False) -> Figures:
    """As `closed_figures`, of generated answers."""

    def score(rows: Open) -> np.ndarray:
        return rows.log_probs / rows.tokens if per_token else rows.log_probs

    knots = fit_isotonic(score(fitted), fitted.marks)
    after = np.interp(score(tested), *knots)
    return {
        "right": 100 * float(tested.marks.mean()),
        "ece before": 100 * ece(np.exp(score(tested)), tested.marks),
        "ece after": 100 * ece(after, tested.marks),
        "ece least": 100 * least_ece(after),
        "selective": 100 * selective_accuracy(score(tested), tested.marks, SHARE),
        "aurc": 100 * aurc(score(tested), tested.marks),
    }


def over_halves(rows: Closed | Open, figures: Callable[..., Figures], seed: int) -> list[Figures]:
    """The figures of each random split: one half is fitted to, the other is scored."""
    rng, found = np.random.default_rng(seed), []
    for _ in range(SPLITS):
        order = rng.permutation(len(rows.marks))
        half = len(order) // 2
        found.append(figures(rows.at(order[:half]), rows.at(order[half:])))
    return found


# --- the page ------------------------------------------------------------------------------------


def shown(models: Sequence[Sequence[float]], digits: int = 1) -> str:
    """The mean over models and splits. With it half the 95 % interval over the models (Student's);
    of one model half the range of 95 % of its splits; nothing for a single value."""
    values = [fmean(splits) for splits in models]
    mean, half = fmean(values), 0.0
    if len(models) > 1:
        half = float(stats.t.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5
    elif len(models[0]) > 1:
        half = 1.96 * stdev(models[0])
    return f"{mean:.{digits}f}" + (f" ± {half:.{digits}f}" if half else "")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def row_of(title: str, models: Sequence[Sequence[Figures]], names: Sequence[str]) -> list[str]:
    """One row: the figures ``names`` of all models and splits."""
    cells = []
    for name in names:
        values = [[split[name] for split in splits] for splits in models]
        cells.append(shown(values, 2 if name == "size" else 1))
    return [title, *cells]


CLOSED = (
    "right",
    "ece before",
    "ece after",
    "ece least",
    "coverage",
    "coverage shown",
    "size",
    "selective",
)
OPEN = ("right", "ece before", "ece after", "ece least", "selective", "aurc")


def write(models: Sequence[Model], limit: int, out: Path) -> None:
    """The page with all tables."""
    closed_in = [Closed.of(m.closed[name] for name in HELD_IN) for m in models]
    closed_out = [{name: Closed.of([m.closed[name]]) for name in HELD_OUT} for m in models]
    pooled = [Closed.of(m.closed[name] for name in HELD_OUT) for m in models]
    kept = [
        {name: over_halves(rows[name], closed_figures, i) for name in HELD_OUT}
        for i, rows in enumerate(closed_out)
    ]
    moved = [
        {name: [closed_figures(inside, rows[name])] for name in HELD_OUT}
        for inside, rows in zip(closed_in, closed_out, strict=True)
    ]
    within = [over_halves(rows, closed_figures, i) for i, rows in enumerate(closed_in)]
    together = [over_halves(rows, closed_figures, i) for i, rows in enumerate(pooled)]
    transferred = [[closed_figures(a, b)] for a, b in zip(closed_in, pooled, strict=True)]

    def mean_of(models: Sequence[dict[str, list[Figures]]]) -> list[list[Figures]]:
        return [
            [
                {f: fmean(one[f] for one in sets) for f in CLOSED}
                for sets in zip(*by_name.values(), strict=True)
            ]
            for by_name in models
        ]

    names = {name: f"{BENCHMARKS[name].title} (`{name}`)" for name in (*HELD_IN, *HELD_OUT)}
    by_set = [
        *(row_of(names[n], [one[n] for one in kept], CLOSED) for n in HELD_OUT),
        row_of("**mean of the ten**", mean_of(kept), CLOSED),
    ]
    by_transfer = [
        *(row_of(names[n], [one[n] for one in moved], CLOSED) for n in HELD_OUT),
        row_of("**mean of the ten**", mean_of(moved), CLOSED),
    ]
    one_map = [
        row_of("held-in by held-in", within, CLOSED),
        row_of("held-out by held-out", together, CLOSED),
        row_of("held-out by held-in", transferred, CLOSED),
    ]
    open_in = [n for n in HELD_IN if n in models[0].open]
    open_out = [
        n for n in HELD_OUT if n in models[0].open and BENCHMARKS[n].metric not in CAPTION_METRICS
    ]
    short = {
        "held-in": [Open.of(m.open[n] for n in open_in) for m in models],
        "held-out": [Open.of(m.open[n] for n in open_out) for m in models],
    }
    answers = []
    for words, per_token in (("sum", False), ("mean per token", True)):

        def figures(a: Open, b: Open, per_token: bool = per_token) -> Figures:
            return open_figures(a, b, per_token)

        for side, rows in short.items():
            found = [over_halves(one, figures, i) for i, one in enumerate(rows)]
            answers.append([words, *row_of(f"{side} by {side}", found, OPEN)])
        pairs = zip(short["held-in"], short["held-out"], strict=True)
        found = [[figures(a, b)] for a, b in pairs]
        answers.append([words, *row_of("held-out by held-in", found, OPEN)])
    head = ["calibration", *CLOSED]
    text = PAGE.format(
        who=WHO if len(models) == 1 else f"{len(models)} models were {TUNED}, one for each seed.",
        spread=OVER_SPLITS if len(models) == 1 else OVER_MODELS,
        limit=limit,
        splits=SPLITS,
        choices=CHOICES,
        seed=SEED,
        open_in=", ".join(names[n] for n in open_in),
        open_out=", ".join(names[n] for n in open_out),
        held_in=", ".join(names[n] for n in HELD_IN),
        one_map=table(head, one_map),
        by_set=table(["set", *CLOSED], by_set),
        by_transfer=table(["set", *CLOSED], by_transfer),
        answers=table(["score", "calibration", *OPEN], answers),
    )
    write_text(out, text)
    print(text)


TUNED = "tuned on Scenes with the recipe `quickstart`"
WHO = f"One model was {TUNED}: what another seed of the tuning changes is not measured."
OVER_MODELS = """± is half the 95 % interval over the models (Student's): how much they differ by
the seed of the tuning. It does not cover the choice of the samples, which all models answer."""
OVER_SPLITS = """± is half of the range that holds 95 % of the splits: how far a calibration with
half of the samples, scored with the other half, is from the mean."""

PAGE = """# How far to trust an answer

`runs/trust/calibration.py` writes this page: the tables are measured. {who} Figures are percent,
but for the size of a set. {spread} How to calibrate a model is in
[evaluation](evaluation.md#confidence).

The images are a new world of Scenes (seed {seed}), {limit} samples of each set. Nothing is fitted
to samples that are scored: where samples of the same sets calibrate, each set is split at random
into halves, {splits} times, and one half is scored by what the other gives. Held-in are
{held_in}; the samples are those of their validation splits.

Every set is asked as a closed question: with its choices; a set of short answers with all its
answers as candidates; captions (`scenes_nocaps`) as the right one among {choices}.

| column | meaning |
|---|---|
| right | share of right answers |
| ece before, ece after | expected calibration error in 15 bins: plain, and calibrated |
| ece least | what exact confidences would have with so few samples: not an error of the model |
| coverage | conformal sets, made for 90 %, that have the right answer; some are empty |
| coverage shown, size | the same with none empty, as `answer_set` gives them; candidates in them |
| selective | right answers among the 70 % most confident |
| aurc | area under the curve of risk and coverage: less is better |

## One calibration for many sets

As `instructblip calibrate` fits it: one temperature and one threshold for all sets together. The
last line is the honest question about a new kind of task: **what holds for held-out sets after a
calibration on held-in sets only?**

{one_map}

## A calibration of each held-out set

The guarantee: the set was calibrated with samples like those that are asked.

{by_set}

## Held-out sets, calibrated on held-in sets only

There is no guarantee here, since the questions are of other kinds than those of the calibration.

{by_transfer}

## Generated answers

The probability that a generated answer is right, by isotonic regression from its log-probability:
their sum over the tokens, or their mean. Before is the probability of the answer itself. Held-in:
{open_in}. Held-out: {open_out}.

{answers}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("models", type=Path, nargs="+", help="one of each seed of the tuning")
    parser.add_argument("--limit", type=int, default=400, help="samples of each set")
    parser.add_argument("--out", type=Path, default=Path("docs/trust.md"))
    given = parser.parse_args()
    write(predict(given.work, given.models, given.limit), given.limit, given.out)


if __name__ == "__main__":
    main()
