"""Answer a benchmark with a model: batch by batch, sample by sample on disk, then the score."""

import hashlib
import json
import random
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch

from instructblip.core import distributed
from instructblip.core.example import Example
from instructblip.core.progress import progress_bar
from instructblip.core.user_code import is_function
from instructblip.data.samples import Examples
from instructblip.data.templates import Rendered, render_prompt, template_hash
from instructblip.evaluation.benchmarks import Benchmark
from instructblip.evaluation.calibration import Calibration
from instructblip.evaluation.captions import CaptionTokenizer
from instructblip.evaluation.metrics import rank_among
from instructblip.evaluation.predictions import PredictionLog
from instructblip.evaluation.result import Result, constants_of, make_result
from instructblip.evaluation.scoring import probabilities, scorer_of

BatchSize = int | Literal["auto"]
FIRST_SIZE, LARGEST_SIZE = 16, 512
"""Sizes of "auto"."""
GAIN = 1.05
"""How much faster a larger batch has to be for "auto" to grow further."""
MOST_CLASSES = 20
"""Distinct answers from which a set is not one of classes."""


@runtime_checkable
class Answerer(Protocol):
    """What evaluation needs of a model; ``inference.engine.Engine`` has it.

    ``fingerprint`` changes whenever the answers could. Images are ``image_root / images[i]``.
    """

    fingerprint: str

    def answer_examples(
        self,
        examples: Sequence[Example],
        prompts: Sequence[Rendered],
        image_root: Path,
        **decoding: Any,
    ) -> list[str]:
        """Return one response per example."""
        ...

    def rank_examples(
        self,
        examples: Sequence[Example],
        prompts: Sequence[Rendered],
        image_root: Path,
        candidates: Sequence[Sequence[str]],
    ) -> list[list[float]]:
        """Return the log-likelihood of each candidate of each example."""
        ...


@runtime_checkable
class Comparer(Protocol):
    """What retrieval needs of a model besides."""

    def compare_examples(
        self, examples: Sequence[Example], image_root: Path, texts: Sequence[str], rerank: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return scores [N, T] by which images choose texts, and texts choose images."""
        ...

    def can_match(self) -> bool:
        """Whether its heads match, which is what ``rerank`` is about, and do not only compare."""
        ...


@runtime_checkable
class DetailedAnswerer(Answerer, Protocol):
    """An answerer that knows how likely its answers are, and perhaps how far to trust them."""

    calibration: Calibration | None

    def detail_examples(
        self,
        examples: Sequence[Example],
        prompts: Sequence[Rendered],
        image_root: Path,
        **decoding: Any,
    ) -> Sequence[Any]:
        """Return one response per example with ``text``, ``log_prob`` and ``num_tokens``."""
        ...


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
    baseline: bool = True,
    details: bool = False,
) -> Result:
    """Return the score of ``engine`` on ``benchmark``, whose examples are ``dataset``.

    In a process group call it on all ranks: each answers its share of the samples, and all return
    the same result.

    Args:
        limit: number of samples, spread over the set; None for all. Those that the metric skips
            are left out of them. Warns of classes of the set that none of them has.
        blind_seed: evaluates the blind control: every sample gets the images of another one.
        out: folder for settings.json, predictions.jsonl (written as they come) and result.json. An
            interrupted evaluation resumes there; a folder of other settings is refused.
        vocabulary: the answers to rank, for benchmarks that rank the answers of training.
        tokenizer: of captions; see ``evaluation.captions``.
        together: every rank answers all samples, in step, for a model whose weights are sharded.
        baseline: whether to compute the best constant answer, of a benchmark of the role "own".
        details: whether predictions store the log-probability of a generated answer, as they do
            with a confidence for a model that is calibrated.

    Raises ValueError for samples without answers, repeated ids, a set too small for the blind
    control, or a missing vocabulary.
    """
    skips = scorer_of(benchmark.metric).skips
    chosen = [dataset[i] for i in pick(len(dataset), limit)]
    examples = [example for example in chosen if not example.extra.get(skips)]
    if len(chosen) < len(dataset):
        _warn_of_unseen_classes(chosen, dataset)
    _check(examples, benchmark, vocabulary)
    candidates = [_candidates(example, benchmark, vocabulary) for example in examples]
    asked_about = [example.images for example in examples]
    calibration = engine.calibration if isinstance(engine, DetailedAnswerer) else None
    if blind_seed is not None:
        examples = swap_images(examples, blind_seed)
    rendered = [render_prompt(example, benchmark.prompt) for example in examples]
    prompts = [each.prompt for each in rendered]
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
    if calibration is not None:
        settings["calibration"] = {"id": calibration.id, "sets": calibration.sets}
    if benchmark.mode == "retrieve" and not _comparer(engine, benchmark).can_match():
        settings["matches"] = False
    folder = None if out is None else Path(out)
    shown = progress and distributed.is_main()
    with PredictionLog(folder, settings) as log:
        if benchmark.mode == "retrieve" and distributed.is_main():
            missing = [i for i, example in enumerate(examples) if example.id not in log.done]
            comparer = _comparer(engine, benchmark)
            found = _retrieve(comparer, benchmark, dataset.image_root, examples) if missing else []
            log.add({"index": i, **found[i]} for i in missing)
        retrieves = benchmark.mode == "retrieve"
        share = [] if retrieves else _share(examples, prompts, log, together)
        with progress_bar(benchmark.name, shown=shown) as bar:

            def answer(indices: Sequence[int]) -> None:
                predictions = _answer(
                    engine,
                    benchmark,
                    dataset.image_root,
                    [examples[i] for i in indices],
                    [rendered[i] for i in indices],
                    [candidates[i] for i in indices],
                    details,
                )
                if blind_seed is not None:
                    for i, prediction in zip(indices, predictions, strict=True):
                        prediction["asked_about"] = list(asked_about[i])
                log.add({"index": i, **p} for i, p in zip(indices, predictions, strict=True))
                bar.advance(len(indices), len(share))

            in_batches(share, batch_size, answer, together)
        log.gather()
        predictions = [log.done[example.id] for example in examples]
    result = make_result(settings, predictions, tokenizer, str(dataset.image_root))
    if benchmark.role == "own" and baseline:
        result = replace(result, constants=constants_of(result))
    if folder is not None and distributed.is_main():
        result.save(folder)
    return result


def pick(count: int, limit: int | None) -> list[int]:
    """Return ``limit`` of ``count`` indices, always the same: one of each of ``limit`` equal parts,
    since sets are often sorted by kind, at a random place, since kinds may also alternate."""
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1; got {limit}")
    if limit is None or limit >= count:
        return list(range(count))
    rng = random.Random(f"{limit} of {count}")
    return [rng.randrange(i * count // limit, (i + 1) * count // limit) for i in range(limit)]


def _warn_of_unseen_classes(chosen: Sequence[Example], dataset: Examples) -> None:
    """Warn if ``chosen`` has not all answers of a set with few: at most ``MOST_CLASSES``, each for
    five examples on average."""
    classes: set[str] = set()
    for i in range(len(dataset)):
        classes.update(dataset[i].answers[:1])
        if len(classes) > MOST_CLASSES:
            return
    if 5 * len(classes) > len(dataset):
        return
    if unseen := classes.difference(*(example.answers[:1] for example in chosen)):
        warnings.warn(
            f"{dataset.name}: none of the {len(chosen)} samples of {len(dataset)} has the answer "
            f"{', '.join(map(repr, sorted(unseen)))}, so the score says nothing about it; raise "
            "the limit",
            stacklevel=3,
        )


def swap_images(examples: Sequence[Example], seed: int) -> list[Example]:
    """Return the blind control: the same texts, each with the images of another sample, repeated
    where the texts have places for more."""
    givers = derange([example.images for example in examples], seed)
    swapped = []
    for example, giver in zip(examples, givers, strict=True):
        images, marks = examples[giver].images, example.num_marks
        if marks > len(images):
            images = (images * marks)[:marks]
        swapped.append(replace(example, images=images))
    return swapped


def can_swap(dataset: Examples, limit: int | None = None) -> bool:
    """Whether the blind control of these samples exists: no image is that of more than half."""
    images = Counter(dataset[i].images for i in pick(len(dataset), limit))
    return 2 * max(images.values()) <= images.total()


def derange(keys: Sequence[Any], seed: int) -> list[int]:
    """Return for each sample the index of one whose key differs; each index occurs once.

    Samples in groups of equal keys, the groups in random order, form a ring. Turning it by the size
    of the largest group moves every sample out of its group. Raises ValueError if more than half of
    the samples have the same key: then no such exchange exists.
    """
    groups: dict[Any, list[int]] = {}
    for i, key in enumerate(keys):
        groups.setdefault(key, []).append(i)
    largest = max((len(group) for group in groups.values()), default=0)
    if 2 * largest > len(keys):
        raise ValueError(
            f"the blind control cannot swap images: {largest} of {len(keys)} samples show the "
            "same one; evaluate more samples"
        )
    rng = random.Random(seed)
    order = list(groups.values())
    rng.shuffle(order)
    for group in order:
        rng.shuffle(group)
    ring = [i for group in order for i in group]
    givers = [0] * len(ring)
    for place, i in enumerate(ring):
        givers[i] = ring[(place + largest) % len(ring)]
    return givers


def in_batches(
    indices: Sequence[int],
    size: BatchSize,
    answer: Callable[[Sequence[int]], None],
    together: bool = False,
) -> None:
    """Call ``answer`` with every index once, in order, ``size`` at a time.

    "auto" starts with 16 and doubles while that answers more samples per second. With any setting,
    a batch that does not fit into memory runs again in halves, and the size stays there. The size
    changes speed and memory, not the answers.

    With ``together`` all ranks call it with the same indices and take the sizes of the first one,
    since a rank with other batches would wait for the others for ever. For the same reason a batch
    that does not fit is an error.
    """
    if size != "auto" and size < 1:
        raise ValueError(f"batch_size must be at least 1, or auto; got {size}")
    growing, number = size == "auto", FIRST_SIZE if size == "auto" else size
    rate, done = 0.0, 0
    while done < len(indices):
        part = indices[done : done + number]
        began = time.perf_counter()
        try:
            answer(part)
        except torch.OutOfMemoryError as error:
            if together:
                error.add_note(
                    f"{len(part)} samples do not fit beside a sharded model: set "
                    f"evaluation.batch_size below {len(part)}"
                )
            if together or len(part) == 1:
                raise
            growing, number = False, len(part) // 2
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            continue
        done += len(part)
        if growing and len(part) == number:
            before, rate = rate, len(part) / max(time.perf_counter() - began, 1e-9)
            growing = rate >= GAIN * before and number < LARGEST_SIZE
            if together:
                growing = distributed.broadcast_object(growing)
            if growing:
                number = min(LARGEST_SIZE, 2 * number)


def _check(
    examples: Sequence[Example], benchmark: Benchmark, vocabulary: Sequence[str] | None
) -> None:
    for metric in (benchmark.metric, *benchmark.others):
        scorer_of(metric).require()
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
                f"{example.where}: no answers to score {benchmark.name} with; perhaps only the "
                f"server of its owner scores split '{example.split}'"
            )
        if example.id in seen:
            raise ValueError(f"{example.where}: id {example.id!r} appears twice in the set")
        seen.add(example.id)


def check_rows(benchmark: Benchmark, rows: Iterable[Example], name: str) -> None:
    """Raise ValueError, beginning with ``name``, for answers that a benchmark cannot score."""
    seen: set[str] = set()
    for row in rows:
        if not row.answers:
            raise ValueError(f"{name}: {row.where} has no answer; expected one in every row")
        metrics = (benchmark.metric, *benchmark.others)
        if any(m.startswith("vqa_accuracy") for m in metrics) and len(row.answers) < 4:
            raise ValueError(
                f"{name}: {row.where} has {len(row.answers)} answers, and vqa_accuracy compares "
                "annotators, ten in VQAv2 and here at least 4; use exact_match"
            )
        if benchmark.mode == "rank":
            offered = benchmark.candidates or row.choices
            answer = next((answer for answer in row.answers if answer in offered), None)
            if answer is None:
                raise ValueError(
                    f"{name}: {row.where} has the answer {row.answers[0][:80]!r}, which is none of "
                    f"the candidates {list(offered[:10]) or '(the row has no choices)'}; add it, "
                    "spelled as there, or leave the row out"
                )
            seen.add(answer)
    if "auroc" in (benchmark.metric, *benchmark.others) and len(seen) < 2:
        raise ValueError(
            f"{name}: every row has the answer {next(iter(seen), None)!r}, and auroc needs rows of "
            "both candidates; use accuracy, or another split"
        )


def _candidates(
    example: Example, benchmark: Benchmark, vocabulary: Sequence[str] | None
) -> tuple[str, ...]:
    """What the answer of the example is chosen from; nothing unless it is ranked."""
    if benchmark.mode != "rank":
        return ()
    if benchmark.candidates is not None:
        return benchmark.candidates
    if benchmark.vocabulary:
        return tuple(vocabulary or ())
    if not example.choices:
        raise ValueError(f"{example.where}: no choices to rank for {benchmark.name}")
    return example.choices


def _data_hash(
    examples: Sequence[Example], prompts: Sequence[str], vocabulary: Sequence[str] | None
) -> str:
    """Changes with samples, references and choices; images count by name, not by content."""
    samples = [
        [_describe(example, prompt), example.choices]
        for example, prompt in zip(examples, prompts, strict=True)
    ]
    text = json.dumps([samples, vocabulary], ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _share(
    examples: Sequence[Example], prompts: Sequence[str], log: PredictionLog, together: bool
) -> list[int]:
    """What remains for this rank, longest first: what does not fit into memory fails at once, and
    samples of a batch have similar lengths."""
    todo = [i for i, example in enumerate(examples) if example.id not in log.done]
    todo.sort(key=lambda i: (-len(examples[i].images), -len(prompts[i]), examples[i].images))
    return todo if together else todo[distributed.rank() :: distributed.world_size()]


def _answer(
    engine: Answerer,
    benchmark: Benchmark,
    image_root: Path,
    examples: Sequence[Example],
    prompts: Sequence[Rendered],
    candidates: Sequence[Sequence[str]],
    details: bool = False,
) -> list[dict[str, Any]]:
    """One scored prediction per example."""
    predictions = [_describe(e, p.prompt) for e, p in zip(examples, prompts, strict=True)]
    known = engine if isinstance(engine, DetailedAnswerer) else None
    calibration = known.calibration if known else None
    if benchmark.mode == "generate" and known and (details or calibration):
        answers = known.detail_examples(examples, prompts, image_root, **benchmark.decoding)
        for prediction, one in zip(predictions, answers, strict=True):
            scores = {"log_prob": one.log_prob, "num_tokens": one.num_tokens}
            prediction |= {"prediction": one.text, **scores}
    elif benchmark.mode == "generate":
        texts = engine.answer_examples(examples, prompts, image_root, **benchmark.decoding)
        for prediction, text in zip(predictions, texts, strict=True):
            prediction["prediction"] = text
    else:
        # Each candidate in all its wordings, ranked together.
        worded = [[(c, *benchmark.verbalizers.get(c, ())) for c in names] for names in candidates]
        flat = [[wording for wordings in names for wording in wordings] for names in worded]
        ranked = engine.rank_examples(examples, prompts, image_root, flat)
        for prediction, wordings, row in zip(predictions, worded, ranked, strict=True):
            prediction |= _choose(wordings, row)
    if calibration is not None:
        for prediction in predictions:
            if (confidence := calibration.confidence(prediction)) is not None:
                prediction["confidence"] = confidence
    computed = [m for m in (benchmark.metric, *benchmark.others) if is_function(m)]
    for prediction in predictions if computed else ():
        prediction["scores"] = {m: scorer_of(m).sample(prediction) for m in computed}
    sample = scorer_of(benchmark.metric).sample
    return [{**prediction, "score": sample(prediction)} for prediction in predictions]


def _comparer(engine: Answerer, benchmark: Benchmark) -> Comparer:
    if not isinstance(engine, Comparer):
        raise ValueError(f"{benchmark.name} needs a model of this package with retrieval heads")
    return engine


def _retrieve(
    engine: Comparer, benchmark: Benchmark, image_root: Path, examples: Sequence[Example]
) -> list[dict[str, Any]]:
    """One scored prediction per image: the best text, and the ranks of what belongs together."""
    texts = list(dict.fromkeys(answer for example in examples for answer in example.answers))
    scores = engine.compare_examples(examples, image_root, texts, benchmark.rerank)
    to_text, to_image = (score.double().numpy() for score in scores)
    columns = {text: column for column, text in enumerate(texts)}
    images_of: dict[str, list[int]] = {}
    for i, example in enumerate(examples):
        for text in dict.fromkeys(example.answers):
            images_of.setdefault(text, []).append(i)
    sample = scorer_of(benchmark.metric).sample
    predictions = []
    for i, example in enumerate(examples):
        mine = [columns[text] for text in example.answers]
        prediction = {
            **_describe(example, ""),
            "prediction": texts[int(to_text[i].argmax())],
            "text_rank": rank_among(to_text[i], mine),
            "image_ranks": [rank_among(to_image[:, c], [i]) for c in mine],
            "equal_ranks": [rank_among(to_image[:, c], images_of[texts[c]]) for c in mine],
        }
        predictions.append({**prediction, "score": sample(prediction)})
    return predictions


def _choose(candidates: Sequence[Sequence[str]], scores: Sequence[float]) -> dict[str, Any]:
    """The best candidate and the scores of all. A candidate, here a tuple of wordings, scores as
    its likeliest wording; ``scores`` has all wordings in one row."""
    if any(score != score for score in scores):
        raise ValueError("a candidate's log-likelihood is NaN: the output of the model is broken")
    rest = iter(scores)
    best = [max(next(rest) for _ in wordings) for wordings in candidates]
    return {
        "prediction": candidates[max(range(len(best)), key=best.__getitem__)][0],
        "candidates": [wordings[0] for wordings in candidates],
        "log_likelihoods": best,
        "probabilities": probabilities(best),
    }


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
