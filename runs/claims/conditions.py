"""The conditions that the claims compare: lists of overrides of the recipe ``quickstart``."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from instructblip.evaluation.benchmarks import select_benchmarks
from instructblip.recipe.load import load_recipe

BASE = "quickstart"
SETS = tuple(load_recipe(BASE).data.sets)

# Figure 4: inputs without an instruction, and inputs with the name of the data set in its place.
PLAIN = {
    "coco_caption": "",
    "textcaps": "",
    "aokvqa": "{question} {options}",
    "llava_detail": "{question}",
    **dict.fromkeys(("vqav2", "okvqa", "ocrvqa"), "{question}"),
}
NAMED = {name: f"{name}: {text}".strip() for name, text in PLAIN.items()}


def templates(by_set: dict[str, str]) -> list[str]:
    """Overrides that give each set of the mixture a single template."""
    return [f"data.sets.{name}.templates={json.dumps([by_set[name]])}" for name in SETS]


def named_prompts() -> list[str]:
    """Overrides that prompt every benchmark as ``NAMED`` does in training."""
    places = ("context", "history", "ocr_tokens", "question", "options")
    overrides = []
    for benchmark in select_benchmarks(["scenes"]):
        used = [f"{{{place}}}" for place in places if f"{{{place}}}" in benchmark.prompt]
        prompt = f"{benchmark.source}: {' '.join(used)}".strip()
        overrides.append(f"evaluation.prompts.{benchmark.name}={json.dumps(prompt)}")
    return overrides


TUNED: dict[str, list[str]] = {
    "instructblip": [],
    "no_instruction_in_qformer": ["model.instruction_aware=false"],
    # All sets equally often, without weights by hand.
    "no_balancing": ["data.temperature=0", *(f"data.sets.{name}.weight=1" for name in SETS)],
    "multitask_plain": templates(PLAIN),
    "multitask_names": templates(NAMED),
}
"""Condition -> the overrides of its tuning."""

FEW = 2
FEW_QUERIES: dict[str, list[str]] = {
    "few_queries": [],
    "few_queries_no_instruction": TUNED["no_instruction_in_qformer"],
}
"""Two conditions that start from a BLIP-2 with only the first ``FEW`` of its query tokens, once
with as many steps as the others and once ("..._long") with ``LONG`` times as many."""
LONG = 3

DOWNSTREAM = {"scienceqa": "scenes_scienceqa", "okvqa": "scenes_okvqa"}
"""Set to fine-tune on -> its benchmark. The first is held out from tuning, the second is not."""


@dataclass(frozen=True)
class Job:
    """One model, tuned and evaluated, in ``WORK/<name>``; ``model`` is evaluated without tuning.

    ``needs`` is the job whose model this job starts from or evaluates. ``reads`` is what the
    Q-Former reads in the evaluation: each sample's own instruction, none, or that of another sample
    of its batch.
    """

    name: str
    overrides: tuple[str, ...]
    model: str | None = None
    needs: str | None = None
    reads: Literal["own", "none", "other"] = "own"


@dataclass(frozen=True)
class Plan:
    """The settings that all jobs share."""

    work: Path
    seeds: int = 5
    steps: int = 150
    finetune_steps: int = 60
    limit: int = 100
    start: str = "starter"
    overrides: tuple[str, ...] = ()
    base: str = BASE
    """The recipe that all conditions change."""

    @property
    def common(self) -> list[str]:
        """Overrides of all recipes: stored features, no check and no validation in training."""
        return [
            f"data.root={self.work / 'scenes'}",
            "data.check=skip",
            "features.cache=on",
            f"model.start={self.start}",
            f"evaluation.limit={self.limit}",
            "evaluation.validation=[scenes_vqav2]",
            "evaluation.validation_limit=8",
            "training.validate_every=null",
            "training.save_every=100",
            "training.keep_last=1",
        ]

    def job(self, name: str, *overrides: str, **how: Any) -> Job:
        return Job(name, (*self.common, *self.overrides, *overrides), **how)

    @property
    def few_queries(self) -> Path:
        """The BLIP-2 with ``FEW`` query tokens."""
        return self.work / f"start_{FEW}_queries"

    def baseline(self) -> Job:
        return self.job("blip2/seed0", model=self.start, reads="none")

    def jobs(self) -> list[Job]:
        """All jobs, seed by seed, each after the job that it needs."""
        return [job for seed in range(self.seeds) for job in self._of_seed(seed)]

    def _of_seed(self, seed: int) -> list[Job]:
        seeds = [f"training.seed={seed}", f"data.seed={seed}"]
        start = f"model.start={self.few_queries}"
        few = {name: [*changes, start] for name, changes in FEW_QUERIES.items()}
        tuned = {name: (changes, self.steps) for name, changes in (TUNED | few).items()}
        tuned |= {f"{name}_long": (changes, LONG * self.steps) for name, changes in few.items()}
        last = {name: f"{self.work}/{name}/seed{seed}/last" for name in tuned}
        jobs = [
            self.job(f"{name}/seed{seed}", *seeds, *schedule(steps), *overrides)
            for name, (overrides, steps) in tuned.items()
        ]
        named = f"multitask_names/seed{seed}"
        jobs.append(
            self.job(f"multitask_names_in_both/seed{seed}", *named_prompts(),
                     model=last["multitask_names"], needs=named)
        )  # fmt: skip
        jobs += [
            self.job(f"{name}_unread/seed{seed}", model=last[name], needs=f"{name}/seed{seed}",
                     reads="none")
            for name in ("instructblip", "few_queries", "few_queries_long")
        ]  # fmt: skip
        for name, benchmark in DOWNSTREAM.items():
            only = [f"data.sets={{{name}: {{}}}}", f"evaluation.benchmarks=[{benchmark}]"]
            settings = [*seeds, *schedule(self.finetune_steps), *only]
            jobs += [
                self.job(f"blip2_finetuned_{name}/seed{seed}", *settings,
                         "model.instruction_aware=false"),
                self.job(f"instructblip_finetuned_{name}/seed{seed}", *settings,
                         f"model.start={last['instructblip']}", needs=f"instructblip/seed{seed}"),
            ]  # fmt: skip
        return jobs


def schedule(steps: int) -> Sequence[str]:
    """Overrides for a number of steps, a tenth of which warm up."""
    return f"training.steps={steps}", f"training.warmup_steps={max(1, steps // 10)}"
