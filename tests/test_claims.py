"""The program behind docs/claims.md: its conditions, its verdicts, and how it resumes."""

import json
import math
import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from instructblip.core.example import Example
from instructblip.data.order import Mixture
from instructblip.data.templates import render_instruction
from instructblip.evaluation.benchmarks import select_benchmarks
from instructblip.evaluation.evaluate import evaluate
from instructblip.model.checkpoints.directory import model_directory
from instructblip.model.instructblip import InstructBlip
from instructblip.recipe.load import differences, load_recipe
from runs.claims import judge, measure, write
from runs.claims.conditions import BASE, DOWNSTREAM, FEW_QUERIES, SETS, TUNED, Job, Plan
from tests.evaluation.fakes import COLOURS, FakeEngine, ListDataset, benchmark, colour_questions


def test_each_condition_is_a_recipe_that_changes_one_thing() -> None:
    base = load_recipe(BASE)
    changed = {
        name: {line.split(":")[0] for line in differences(base, load_recipe(BASE, overrides))}
        for name, overrides in TUNED.items()
    }
    templates = {f"data.sets.{name}.templates" for name in SETS}
    assert changed["instructblip"] == set()
    assert changed["no_instruction_in_qformer"] == {"model.instruction_aware"}
    assert changed["multitask_plain"] == changed["multitask_names"] == templates
    recipe = load_recipe(BASE, TUNED["no_balancing"])
    weights = {name: entry.weight for name, entry in recipe.data.sets.items()}
    sizes = {name: 10**place for place, name in enumerate(SETS)}
    even = Mixture(sizes, weights, recipe.data.temperature).probabilities
    assert list(even.values()) == pytest.approx([1 / len(SETS)] * len(SETS))


def test_multitask_inputs_hold_no_instruction() -> None:
    asked = Example(
        dataset="okvqa", split="train", id="1", images=("a.png",), task="vqa",
        question="what is red?", answers=("a dog",), where="here",
    )  # fmt: skip
    prompts = {}
    for name in ("multitask_plain", "multitask_names"):
        (template,) = load_recipe(BASE, TUNED[name]).data.sets["okvqa"].templates or ()
        prompts[name] = render_instruction(asked, random.Random(0), template).prompt
    assert prompts == {
        "multitask_plain": "what is red?",
        "multitask_names": "okvqa: what is red?",
    }


def test_jobs_are_recipes_and_come_after_what_they_need(tmp_path: Path) -> None:
    plan = Plan(tmp_path, seeds=2, steps=40, finetune_steps=10, overrides=("data.augment=true",))
    jobs = plan.jobs()
    names = [job.name for job in jobs]
    assert (
        len(set(names))
        == len(names)
        == 2 * (len(TUNED) + 2 * len(FEW_QUERIES) + 4 + 2 * len(DOWNSTREAM))
    )
    for place, job in enumerate(jobs):
        recipe = measure.recipe_of(plan, job)
        assert recipe.data.augment
        assert job.needs is None or job.needs in names[:place]
        if job.model is None:
            assert recipe.training.seed == recipe.data.seed == int(job.name[-1])
            steps = {"finetuned": 10, "long": 120}
            known = (steps[word] for word in steps if word in job.name)
            assert recipe.training.steps == next(known, 40)
    by_name = {job.name: measure.recipe_of(plan, job) for job in jobs}
    tuned = by_name["instructblip_finetuned_scienceqa/seed1"]
    assert tuned.model.start == str(tmp_path / "instructblip/seed1/last")
    assert list(tuned.data.sets) == ["scienceqa"]
    assert tuned.evaluation.benchmarks == ("scenes_scienceqa",)
    asked = by_name["multitask_names_in_both/seed0"].evaluation.prompts
    assert set(asked) == {one.name for one in select_benchmarks(["scenes"])}
    assert asked["scenes_gqa"] == "gqa: {question}"
    unread = {job.name for job in (plan.baseline(), *jobs) if job.reads == "none"}
    assert unread == {"blip2/seed0"} | {
        f"{name}_unread/seed{seed}"
        for name in ("instructblip", "few_queries", "few_queries_long")
        for seed in (0, 1)
    }


def test_few_queries_are_the_first_ones(tmp_path: Path) -> None:
    measure.keep_queries("starter", 2, tmp_path / "few")
    few = InstructBlip.from_pretrained(tmp_path / "few")
    whole = InstructBlip.from_pretrained(model_directory("starter"))
    assert few.config.num_query_tokens == 2
    assert torch.equal(few.query_tokens, whole.query_tokens[:, :2])
    recipe = measure.recipe_of(plan := Plan(tmp_path), plan.jobs()[len(TUNED)])
    assert recipe.model.start == str(plan.few_queries)


def test_intervals_cover_seeds_and_samples() -> None:
    seeds = judge.estimate([1.0, 2.0, 3.0])
    assert (seeds.mean, seeds.half) == pytest.approx((2, 4.30265 / 3**0.5), abs=1e-4)
    draws = np.random.default_rng(0).normal(2.0, 0.5, 1000)
    samples = judge.estimate([2.0, 2.0, 2.0], draws)
    assert samples.half == pytest.approx(1.96 * draws.std(ddof=1), rel=0.01)
    both = judge.estimate([1.0, 2.0, 3.0], draws)
    assert samples.half < both.half
    assert both.half < seeds.half + samples.half
    assert judge.estimate([2.0, 2.0]).half == 0
    assert math.isnan(judge.estimate([2.0], draws).half)


@pytest.mark.parametrize(
    ("mean", "half", "verdict"),
    [
        (1.0, 0.9, "holds"),
        (1.0, 1.1, "undecided"),
        (-1.0, 0.9, "does not hold"),
        (9.0, math.nan, "undecided"),
    ],
)
def test_the_interval_decides(mean: float, half: float, verdict: str) -> None:
    assert judge.Estimate(mean, half).verdict == verdict


class Partial(FakeEngine):
    """Answers a share of the images correctly; the seed decides which."""

    def __init__(self, share: float, seed: int) -> None:
        super().__init__(fingerprint=f"{share} {seed}")
        self.share, self.rng = share, np.random.default_rng(seed)

    def answer_examples(self, examples: Any, *_: Any, **decoding: Any) -> list[str]:
        answers = super().answer_examples(examples, [], Path(), **decoding)
        right = self.rng.random(len(answers)) < self.share
        return [a if is_right else "pink" for is_right, a in zip(right, answers, strict=True)]


def write_results(folder: Path, share: float, seed: int, names: dict[str, str]) -> None:
    """Write the results of one run as `measure` does."""
    examples = colour_questions(60).examples
    data = ListDataset([replace(e, choices=COLOURS) for e in examples])
    for name, role in names.items():
        shown = benchmark(name=name, title=name, role=role)
        evaluate(Partial(share, seed), shown, data, out=folder / "results" / name, progress=False)
    (folder / measure.DONE).write_text('{"seconds": 30}')


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("claims")
    sets = {"scenes_a": "held_in", "scenes_b": "held_out", "scenes_c": "held_out"}
    shares = {"instructblip": 0.9, "blip2": 0.3, "no_balancing": 0.9, "multitask_plain": 1.0}
    shares |= {"blip2_finetuned_okvqa": 0.2, "instructblip_finetuned_okvqa": 0.9}
    for name, share in shares.items():
        names = {"scenes_okvqa": "held_in"} if "finetuned" in name else sets
        for seed in range(1 if name == "blip2" else 3):
            write_results(work / name / f"seed{seed}", share, seed, names)
    plan = {"work": "w", "steps": 9, "finetune_steps": 3, "limit": 60, "processes": 2}
    (work / "settings.json").write_text(json.dumps({**plan, "overrides": [], "seeds": 3}))
    sys_argv, sys.argv = sys.argv, ["write", str(work), str(work / "docs")]
    write.main()
    sys.argv = sys_argv
    return work / "docs"


def test_the_page_follows_the_figures(page: Path) -> None:
    text = (page / "claims.md").read_text()
    rows = {
        cells[0]: cells[-1]
        for line in text.splitlines()
        if len(cells := [cell.strip() for cell in line.strip("|").split("|")]) == 5
    }
    assert rows["tuning, held-out"] == rows["tuning, held-in"] == "**holds**"
    assert rows["balancing, held-out"] == "**undecided**"
    assert rows["instructions over plain inputs, held-out"] == "**does not hold**"
    assert rows["start for okvqa, tuned on"] == "**holds**"
    assert not any("scienceqa" in title for title in rows)  # no run of it
    assert "- **does not hold** (1): instructions over plain inputs, held-out" in text
    assert "on none; undecided on 0 of 2 sets." in text
    assert "16 runs, 3 seeds, 9 steps" in text
    assert "8 minutes of runs, 2 at a time" in text


def test_the_plots_are_written_beside_it(page: Path) -> None:
    text = (page / "claims.md").read_text()
    for name in ("claims.svg", "claims_conditions.svg"):
        assert f"]({name})" in text
        assert (page / name).read_text().rstrip().endswith("</svg>")


class Runner:
    """A stand-in for the processes: each writes the file that marks a job as finished."""

    plan: Plan
    begun: list[str]
    fails: str | None

    def __init__(self, command: list[str], **how: Any) -> None:
        name = command[command.index("--job") + 1]
        self.begun.append(name)
        self.returncode = int(name == self.fails)
        assert how["env"]["OMP_NUM_THREADS"]
        if not self.returncode:
            (self.plan.work / name / measure.DONE).write_text('{"seconds": 1}')

    def poll(self) -> int:
        return self.returncode

    def terminate(self) -> None: ...

    def wait(self) -> int:
        return self.returncode


def test_an_interrupted_session_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = Plan(tmp_path, seeds=2)
    Runner.plan, Runner.begun, Runner.fails = plan, [], "no_balancing/seed1"
    monkeypatch.setattr(measure.subprocess, "Popen", Runner)
    with pytest.raises(SystemExit, match=r"no_balancing/seed1 failed; see .*log\.txt"):
        measure.do_all(plan, 1, [])
    begun = set(Runner.begun)
    Runner.fails, Runner.begun = None, []
    measure.do_all(plan, 2, [])
    everything = {job.name for job in plan.jobs()}
    assert set(Runner.begun) == everything - (begun - {"no_balancing/seed1"})
    Runner.begun = []
    measure.do_all(plan, 2, [])
    assert Runner.begun == []


def test_other_settings_are_refused(tmp_path: Path) -> None:
    plan = Plan(tmp_path, seeds=1)
    job: Job = plan.jobs()[0]
    (tmp_path / job.name).mkdir(parents=True)
    recipe = measure.recipe_of(plan, job)
    (tmp_path / job.name / "recipe.yaml").write_text(recipe.to_yaml())
    assert measure.recipe_of(plan, job) == recipe
    longer = replace(plan, steps=plan.steps + 1)
    with pytest.raises(ValueError, match=r"training.steps: 150 -> 151.*another work folder"):
        measure.recipe_of(longer, longer.jobs()[0])
