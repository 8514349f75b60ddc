"""Training from preferences: a recipe with a section ``preference`` trains on better and worse
responses instead of those of the data.

For dpo the pairs are those of the data (``rejected``), or the best and the worst of responses that
the model samples before the first step. ``pairs.jsonl`` in the run directory has them with their
log-likelihoods under the start, so that no second model is in memory and a resumed run reads them.
"""

import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from operator import itemgetter
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from instructblip.core import distributed
from instructblip.core.batch import Batch, send
from instructblip.core.example import Example
from instructblip.core.files import read_json_lines, write_text
from instructblip.core.progress import progress_bar
from instructblip.data.loader import Loader
from instructblip.data.order import Draw, mix
from instructblip.data.samples import Examples, collate
from instructblip.data.tokens import Tokens
from instructblip.evaluation.captions import cider, document_frequency
from instructblip.evaluation.scoring import scorer_of
from instructblip.experiment.build import Data, Variant, read_assets
from instructblip.experiment.datasets import make_mixture
from instructblip.model.decoding import GREEDY, Decoding
from instructblip.model.inference import generate_responses
from instructblip.model.instructblip import InstructBlip
from instructblip.model.preference import DirectPreference, SelfCritical, select
from instructblip.recipe.schema import PreferenceConfig, Recipe
from instructblip.training.config import TrainingConfig
from instructblip.training.train import Batches

PAIRS_FILE = "pairs.jsonl"
"""In a run directory: the pairs of dpo, with their log-likelihoods under the start."""
CIDER_REFERENCES = 20_000
"""Examples whose references decide how rare an n-gram is for the reward ``cider``."""


@dataclass(frozen=True)
class Pair:
    """Two responses to an example, and their log-likelihoods in nats under the start."""

    dataset: str
    example: int
    chosen: str
    rejected: str
    reference: tuple[float, float] | None = None


class PairSet:
    """The examples of pairs: the chosen response is the answer."""

    def __init__(self, base: Examples, pairs: Sequence[Pair]) -> None:
        self.base, self.pairs = base, pairs
        self.name, self.image_root = base.name, base.image_root

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Example:
        pair = self.pairs[index]
        return replace(self.base[pair.example], answers=(pair.chosen,))


class FixedLoader(Loader):
    """A loader whose examples have the same template and crop whenever they are drawn, so that one
    log-likelihood is the reference of all draws. Every sample counts alike, and the ids of its
    batches are ``set:example``, by number."""

    @classmethod
    def over(cls, loader: Loader, datasets: Mapping[str, Examples], recipe: Recipe) -> Self:
        """A loader like another one of other examples of the same images."""
        return cls(
            datasets,
            make_mixture(recipe, datasets),
            loader.tokens,
            {name: loader.images[name] for name in datasets},
            batch_size=loader.batch_size,
            seed=loader.seed,
            rank=loader.rank,
            world_size=loader.world_size,
            accumulate=loader.accumulate,
            workers=loader.workers,
            bucket_steps=loader.bucket_steps,
            templates=loader.templates,
            languages=loader.languages,
        )

    def _seed_of(self, slot: int) -> int:
        return self.seed_of(self.order[slot])

    def seed_of(self, draw: Draw) -> int:
        """What decides template and crop of an example."""
        name = zlib.crc32(self.names[draw.dataset].encode())
        return mix(self.seed, 3, name, self.number(draw))

    def number(self, draw: Draw) -> int:
        """The number of an example in the data."""
        return draw.example

    def collate(self, slots: Sequence[int]) -> Batch:
        return self.batch_of([self.order[slot] for slot in slots])

    def batch_of(self, draws: Sequence[Draw]) -> Batch:
        """The batch of these examples."""
        return replace(
            collate([self.sample_of(draw, self.seed_of(draw)) for draw in draws]),
            ids=tuple(f"{draw.dataset}:{draw.example}" for draw in draws),
            counts=torch.ones(len(draws), dtype=torch.int64),
        )


class PairLoader(FixedLoader):
    """The pairs of each step: the chosen responses, then the rejected ones."""

    def number(self, draw: Draw) -> int:
        return self.pair(draw).example

    def pair(self, draw: Draw) -> Pair:
        dataset = self.datasets[draw.dataset]
        assert isinstance(dataset, PairSet)
        return dataset.pairs[draw.example]

    def batch_of(self, draws: Sequence[Draw]) -> Batch:
        pairs = [self.pair(draw) for draw in draws]
        chosen = [self.sample_of(draw, self.seed_of(draw)) for draw in draws]
        rejected = [
            replace(sample, response_ids=self.tokens.response(pair.rejected))
            for sample, pair in zip(chosen, pairs, strict=True)
        ]
        known = [pair.reference for pair in pairs if pair.reference is not None]
        return replace(
            collate([*chosen, *rejected]),
            reference=torch.tensor(known).T.flatten() if known else None,  # [B]
            counts=torch.tensor([1] * len(pairs) + [0] * len(pairs)),
        )


class Preference(Variant):
    """Trains from preferences into the run directory ``out``."""

    def __init__(self, out: Path | None = None, resume: bool = False) -> None:
        self.out, self.resume = out, resume
        self.data = Data()

    def refuse(self, recipe: Recipe) -> None:
        training = recipe.training
        if recipe.drawing is not None:
            raise ValueError("a recipe has a section drawing or preference: take one of them out")
        if training.tokens_per_micro_batch is not None and training.accumulate == 1:
            raise ValueError(
                "training.tokens_per_micro_batch counts the tokens of the data, and preference "
                "trains on other responses: set training.accumulate instead"
            )
        if training.parallel == "fsdp2":
            raise ValueError("preference answers while it trains: set training.parallel=replicate")

    def read_data(self, recipe: Recipe) -> Data:
        self.data = super().read_data(recipe)
        return self.data

    def model(self, recipe: Recipe, instructblip: InstructBlip) -> nn.Module:
        settings = _settings(recipe)
        if settings.objective == "dpo":
            return DirectPreference(
                instructblip, settings.beta, settings.per_token, settings.rpo
            ).train()
        tokens, _ = read_assets(recipe, instructblip.config)
        sampling, number = sampling_of(settings), settings.num_responses
        rewards = Rewards(settings.rewards, self.data.training, tokens)
        return SelfCritical(instructblip, rewards, tokens.eos_id, sampling, number).train()

    def batches(
        self, recipe: Recipe, model: Any, loader: Callable[[TrainingConfig], Loader]
    ) -> Batches:
        fixed = FixedLoader.over(loader(recipe.training), self.data.training, recipe)
        if isinstance(model, SelfCritical):
            return fixed
        pairs = read_pairs(self.out) if self.resume else []
        if not pairs:
            model.to(distributed.resolve_device(recipe.training.device))
            pairs = make_pairs(recipe, fixed, model)
            if self.out is not None and distributed.is_main():
                write_pairs(self.out, pairs)
        return PairLoader.over(fixed, pair_sets(self.data.training, pairs), recipe)


# --- rewards -------------------------------------------------------------------------------------


class Rewards:
    """The weighted sum of the scores of responses; ``batch.ids`` are those of `FixedLoader`."""

    def __init__(
        self, weights: Mapping[str, float], datasets: Mapping[str, Examples], tokens: Tokens
    ) -> None:
        self.datasets, self.tokens = list(datasets.values()), tokens
        self.scorers = [(scorer_of(m).sample, weight) for m, weight in weights.items()]
        if "cider" in weights:
            rows = (d[i] for d in self.datasets for i in range(len(d)))
            references = [list(e.answers) for e in islice(rows, CIDER_REFERENCES)]
            frequency = document_frequency(references)
            names = list(weights)
            self.scorers[names.index("cider")] = (
                lambda p: cider([p["prediction"]], [p["answers"]], frequency=frequency).value,
                weights["cider"],
            )

    def __call__(self, batch: Batch, responses: Sequence[Sequence[int]]) -> list[float]:
        return [
            self.of(self.example(name), self.tokens.decode(list(ids)))
            for name, ids in zip(batch.ids, responses, strict=True)
        ]

    def example(self, name: str) -> Example:
        dataset, example = map(int, name.split(":"))
        return self.datasets[dataset][example]

    def of(self, example: Example, response: str) -> float:
        """The reward of one response."""
        prediction = {
            "id": example.id,
            "dataset": example.dataset,
            "prediction": response,
            "answers": list(example.answers),
            "extra": example.extra,
        }
        return sum(weight * score(prediction) for score, weight in self.scorers)


# --- pairs ---------------------------------------------------------------------------------------


def make_pairs(recipe: Recipe, loader: FixedLoader, model: DirectPreference) -> list[Pair]:
    """The pairs that training draws, with their references. All ranks call this together.

    Raises ValueError for data without rejected responses, and for samples that are all equally
    good.
    """
    settings, training = _settings(recipe), recipe.training
    datasets = dict(zip(loader.names, loader.datasets, strict=True))
    if settings.rewards:
        share = drawn(loader, 8 * settings.pairs)[: settings.pairs]
        rewards = Rewards(settings.rewards, datasets, loader.tokens)
        mine = share[loader.rank :: loader.world_size]
        pairs = list(sample_pairs(settings, loader, model.instructblip, rewards, mine))
        pairs = [pair for part in distributed.gather_objects(pairs) for pair in part]
        if not pairs:
            raise ValueError(
                f"preference: {settings.num_responses} responses to each of {len(share)} "
                f"instructions had the same reward {dict(settings.rewards)}: raise num_responses "
                "or temperature, or choose a reward that differs between them"
            )
        if distributed.is_main():
            print(f"preference: {len(pairs)} pairs of {len(share)} instructions", flush=True)
    else:
        number = training.steps * training.batch_size
        pairs = [pair_of(loader, draw) for draw in drawn(loader, number)]
    asked = PairLoader.over(loader, pair_sets(datasets, pairs), recipe)
    draws = [Draw(d, i) for d, each in enumerate(asked.datasets) for i in range(len(each))]
    mine = draws[loader.rank :: loader.world_size]
    computed = [
        (asked.pair(draw), values)
        for start in range(0, len(mine), loader.batch_size)
        for draw, values in references(asked, model, mine[start : start + loader.batch_size])
    ]
    return [
        replace(pair, reference=values)
        for part in distributed.gather_objects(computed)
        for pair, values in part
    ]


def drawn(loader: Loader, slots: int) -> list[Draw]:
    """The different examples of the first ``slots`` slots, in their order."""
    return list(dict.fromkeys(loader.order[slot] for slot in range(slots)))


def pair_of(loader: FixedLoader, draw: Draw) -> Pair:
    """The pair that the data have."""
    name, example = loader.names[draw.dataset], loader.datasets[draw.dataset][draw.example]
    rejected = example.extra.get("rejected")
    if not rejected or not example.taught:
        raise ValueError(
            f"data.sets.{name}: {example.where} has no chosen and rejected response, and "
            "preference.rewards is empty: give columns chosen and rejected, or rewards by which "
            "responses of the model are ordered"
        )
    return Pair(name, draw.example, example.taught[0], rejected)


def sampling_of(settings: PreferenceConfig) -> Decoding:
    return GREEDY.override(temperature=settings.temperature, max_new_tokens=settings.max_new_tokens)


def sample_pairs(
    settings: PreferenceConfig,
    loader: FixedLoader,
    model: InstructBlip,
    rewards: Rewards,
    draws: Sequence[Draw],
) -> Iterator[Pair]:
    """The best and the worst of ``num_responses`` responses to each example, if they differ."""
    sampling, size, number = sampling_of(settings), loader.batch_size, settings.num_responses
    with progress_bar("preference: responses", shown=distributed.is_main()) as bar:
        for start in range(0, len(draws), size):
            part = draws[start : start + size]
            batch = loader.batch_of(part).to(model.query_tokens.device)
            copies = torch.arange(len(part)).repeat_interleave(number)
            many, ends = select(batch, copies), (loader.tokens.eos_id,)
            torch.manual_seed(mix(loader.seed, 7, loader.rank, start) >> 1)
            with torch.no_grad():
                queries = model.encode_queries(batch)[send(copies, model.query_tokens.device)]
            rows = generate_responses(model, many, decoding=sampling, ends=ends, queries=queries)
            values = rewards(many, rows)
            for i, draw in enumerate(part):
                responses = [
                    (values[j], loader.tokens.decode(rows[j]))
                    for j in range(i * number, (i + 1) * number)
                    if 0 < len(rows[j]) < settings.max_new_tokens
                ]
                if settings.references:
                    example, rendered = loader.render(draw, loader.seed_of(draw))
                    responses.append((rewards.of(example, rendered.response), rendered.response))
                best = max(responses, key=itemgetter(0), default=(0.0, ""))
                worst = min(responses, key=itemgetter(0), default=(0.0, ""))
                if best[0] > worst[0]:
                    yield Pair(loader.names[draw.dataset], draw.example, best[1], worst[1])
            bar.advance(len(part), len(draws))


@torch.no_grad()
def references(
    loader: PairLoader, model: DirectPreference, draws: Sequence[Draw]
) -> Iterator[tuple[Draw, tuple[float, float]]]:
    """The log-likelihoods of the chosen and the rejected response of each pair."""
    batch = loader.batch_of(draws).to(model.instructblip.query_tokens.device)
    values = model.responses(batch).tolist()
    yield from zip(draws, zip(values[: len(draws)], values[len(draws) :], strict=True), strict=True)


def pair_sets(datasets: Mapping[str, Examples], pairs: Sequence[Pair]) -> dict[str, PairSet]:
    """The pairs of each data set that has any."""
    by_set: dict[str, list[Pair]] = {}
    for pair in pairs:
        by_set.setdefault(pair.dataset, []).append(pair)
    return {name: PairSet(datasets[name], by_set[name]) for name in datasets if name in by_set}


def read_pairs(out: Path | None) -> list[Pair]:
    """The pairs of a run that is resumed; none if it wrote none."""
    rows = [] if out is None else read_json_lines(out / PAIRS_FILE)
    return [Pair(**{**row, "reference": tuple(row["reference"])}) for row in rows]


def write_pairs(out: Path, pairs: Sequence[Pair]) -> None:
    lines = (json.dumps(asdict(pair), ensure_ascii=False) + "\n" for pair in pairs)
    write_text(out / PAIRS_FILE, "".join(lines))


def _settings(recipe: Recipe) -> PreferenceConfig:
    assert recipe.preference is not None
    return recipe.preference
