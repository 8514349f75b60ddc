"""Answer a benchmark with a model: batch by batch, sample by sample on disk, then the figure."""

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from instructblip.core import distributed
from instructblip.core.batch import Example
from instructblip.data.samples import Examples
from instructblip.data.templates import render_prompt, template_hash
from instructblip.evaluation.batching import Batches, BatchSize
from instructblip.evaluation.benchmarks import Benchmark
from instructblip.evaluation.captions import CaptionTokenizer
from instructblip.evaluation.predictions import PredictionLog
from instructblip.evaluation.result import Result, make_result
from instructblip.evaluation.scoring import probabilities, scorer_of


class Answerer(Protocol):
    """What evaluation needs of a model: ``serving.engine.Engine``, or a test's stand-in.

    ``fingerprint`` changes whenever the answers could; pictures are ``image_root / images[i]``.
    """

    fingerprint: str

    def answer_examples(
        self, examples: Sequence[Example], prompts: Sequence[str], image_root: Path, **decoding: Any
    ) -> list[str]: ...

    def rank_examples(
        self,
        examples: Sequence[Example],
        prompts: Sequence[str],
        image_root: Path,
        candidates: Sequence[Sequence[str]],
    ) -> list[list[float]]: ...


def evaluate(
    engine: Answerer,
    benchmark: Benchmark,
    dataset: Examples,
    limit: int | None = None,
    batch_size: BatchSize = 16,
    blind_seed: int | None = None,
    out: Path | str | None = None,
    vocabulary: Sequence[str] | None = None,
    tokenizer: CaptionTokenizer = "python",
    progress: bool = True,
    together: bool = False,
) -> Result:
    """The figure of ``engine`` on ``benchmark``, whose examples are ``dataset``.

    In a process group every rank answers its share of the samples and all return the same result;
    call it on all of them.

    Args:
        limit: this many samples, spread evenly over the set; None for all.
        blind_seed: the blind control: every sample gets another sample's picture.
        out: a folder for settings.json, predictions.jsonl (as they come) and result.json. A run
            that was stopped goes on there; one with other settings is refused.
        vocabulary: the answers to rank, for benchmarks that rank the training answers.
        tokenizer: of captions; see ``evaluation.captions``.
        together: every rank answers all samples, in step: for a model whose weights they share out.

    Raises ValueError for samples without answers, repeated ids, a set too small for the blind
    control, or a benchmark that needs a vocabulary and got none.
    """
    picked = pick(len(dataset), limit)
    examples = [dataset[i] for i in picked]
    _check(examples, benchmark, vocabulary)
    if blind_seed is not None:
        examples = swap_pictures(examples, blind_seed)
    prompts = [render_prompt(example, benchmark.prompt).prompt for example in examples]
    settings = {
        "benchmark": benchmark.settings(),
        "model": engine.fingerprint,
        "samples": len(examples),
        "of": len(dataset),
        "limit": limit,
        "blind_seed": blind_seed,
        "templates": template_hash(),
        "data": _data_hash(examples, prompts, vocabulary if benchmark.vocabulary else None),
    }
    folder = None if out is None else Path(out)
    with PredictionLog(folder, settings) as log:
        share = _share(examples, prompts, log, together)
        with _progress(len(share), benchmark.name, progress) as advance:

            def answer(batch: Sequence[int]) -> None:
                own, texts = [examples[i] for i in batch], [prompts[i] for i in batch]
                found = _answer(engine, benchmark, own, texts, dataset.image_root, vocabulary)
                log.add({"index": i, **one} for i, one in zip(batch, found, strict=True))
                advance(len(batch))

            Batches(batch_size).run(share, answer)
        log.gather()
        predictions = [log.done[example.id] for example in examples]
    result = make_result(settings, predictions, tokenizer, str(dataset.image_root))
    if folder is not None and distributed.is_main():
        result.save(folder)
    return result


def _data_hash(
    examples: Sequence[Example], prompts: Sequence[str], vocabulary: Sequence[str] | None
) -> str:
    """Changes with the samples, their references and the answers to choose from; the pictures
    count by name."""
    own = [
        [_describe(example, prompt), example.choices]
        for example, prompt in zip(examples, prompts, strict=True)
    ]
    text = json.dumps([own, vocabulary], ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _share(
    examples: Sequence[Example], prompts: Sequence[str], log: PredictionLog, together: bool
) -> list[int]:
    """What is left to answer for this rank, longest first: what does not fit into memory fails at
    once, and batches are even."""
    todo = [i for i, example in enumerate(examples) if example.id not in log.done]
    todo.sort(key=lambda i: (-len(examples[i].images), -len(prompts[i]), examples[i].images))
    return todo if together else todo[distributed.rank() :: distributed.world_size()]


def pick(count: int, limit: int | None) -> list[int]:
    """``limit`` of ``count`` indices, spread evenly: sets are often sorted by kind."""
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1; got {limit}")
    if limit is None or limit >= count:
        return list(range(count))
    return [i * count // limit for i in range(limit)]


def derange(keys: Sequence[Any], seed: int) -> list[int]:
    """For each sample the index of another one whose key differs; each index is given once.

    Samples are sorted by key, the order of the keys drawn at random, and then turned by the size
    of the largest group of equal keys: nobody lands in the own group. ValueError if one key
    belongs to more than half of the samples, where no such exchange exists.
    """
    groups: dict[Any, list[int]] = {}
    for i, key in enumerate(keys):
        groups.setdefault(key, []).append(i)
    largest = max((len(group) for group in groups.values()), default=0)
    if 2 * largest > len(keys):
        raise ValueError(
            f"the blind control cannot swap pictures: {largest} of {len(keys)} samples show the "
            "same one; evaluate more samples"
        )
    rng = random.Random(seed)
    order = sorted(groups.values(), key=lambda group: group[0])
    rng.shuffle(order)
    for group in order:
        rng.shuffle(group)
    row = [i for group in order for i in group]
    givers = [0] * len(row)
    for place, i in enumerate(row):
        givers[i] = row[(place + largest) % len(row)]
    return givers


def swap_pictures(examples: Sequence[Example], seed: int) -> list[Example]:
    """The blind control: the same texts, each with the pictures of another sample."""
    givers = derange([example.images for example in examples], seed)
    return [
        replace(example, images=examples[giver].images)
        for example, giver in zip(examples, givers, strict=True)
    ]


def candidates_of(
    example: Example, benchmark: Benchmark, vocabulary: Sequence[str] | None
) -> tuple[str, ...]:
    """What the sample's answer is chosen from."""
    if benchmark.candidates is not None:
        return benchmark.candidates
    if benchmark.vocabulary:
        return tuple(vocabulary or ())
    if not example.choices:
        raise ValueError(f"{example.where}: no choices to rank for {benchmark.name}")
    return example.choices


def _check(
    examples: Sequence[Example], benchmark: Benchmark, vocabulary: Sequence[str] | None
) -> None:
    scorer_of(benchmark.metric)
    if not examples:
        raise ValueError(f"{benchmark.name}: the data set holds no examples")
    if benchmark.vocabulary and not vocabulary:
        raise ValueError(
            f"{benchmark.name} ranks the answers of its training split; give them as vocabulary"
        )
    seen: set[str] = set()
    for example in examples:
        if not example.answers:
            raise ValueError(
                f"{example.where}: no answers to score {benchmark.name} with; split "
                f"'{example.split}' may be scored by its owner's server only"
            )
        if example.id in seen:
            raise ValueError(f"{example.where}: id {example.id!r} appears twice in the set")
        seen.add(example.id)


def _answer(
    engine: Answerer,
    benchmark: Benchmark,
    examples: Sequence[Example],
    prompts: Sequence[str],
    image_root: Path,
    vocabulary: Sequence[str] | None,
) -> list[dict[str, Any]]:
    """One prediction per example, scored."""
    found = [_describe(e, p) for e, p in zip(examples, prompts, strict=True)]
    if benchmark.mode == "generate":
        texts = engine.answer_examples(examples, prompts, image_root, **benchmark.decoding)
        for prediction, text in zip(found, texts, strict=True):
            prediction["prediction"] = text
    else:
        candidates = [candidates_of(example, benchmark, vocabulary) for example in examples]
        ranked = _rank(engine, benchmark, examples, prompts, image_root, candidates)
        for prediction, names, scores in zip(found, candidates, ranked, strict=True):
            best = max(range(len(scores)), key=scores.__getitem__)
            prediction |= {
                "prediction": names[best],
                "candidates": list(names),
                "log_likelihoods": scores,
                "probabilities": probabilities(scores),
            }
    sample = scorer_of(benchmark.metric).sample
    return [{**prediction, "score": sample(prediction)} for prediction in found]


def _rank(
    engine: Answerer,
    benchmark: Benchmark,
    examples: Sequence[Example],
    prompts: Sequence[str],
    image_root: Path,
    candidates: Sequence[Sequence[str]],
) -> list[list[float]]:
    """Log-likelihood of each candidate in its best wording."""
    worded = [[(c, *benchmark.verbalizers.get(c, ())) for c in own] for own in candidates]
    flat = [[wording for group in own for wording in group] for own in worded]
    ranked = engine.rank_examples(examples, prompts, image_root, flat)
    found = []
    for groups, scores in zip(worded, ranked, strict=True):
        if any(score != score for score in scores):
            raise ValueError("a candidate's log-likelihood is NaN: the model's output is broken")
        rest = iter(scores)
        found.append([max(next(rest) for _ in group) for group in groups])
    return found


def _describe(example: Example, prompt: str) -> dict[str, Any]:
    return {
        "id": example.id,
        "dataset": example.dataset,
        "images": list(example.images),
        "question": example.question,
        "prompt": prompt,
        "answers": list(example.answers),
        "extra": example.extra,
    }


@contextmanager
def _progress(total: int, name: str, shown: bool) -> Iterator[Callable[[int], None]]:
    """A function that moves a bar on the main rank's standard error; it vanishes when done."""
    if not shown or not distributed.is_main():
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    console = Console(stderr=True)
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    with bar:
        task = bar.add_task(name, total=total)
        yield lambda count: bar.advance(task, count)
