"""Which maps of an answer are true? Pointing game, curves and random weights, on Scenes.

    python -m runs.trust.explain measure OUT MODEL... [--each 3] [--curves 10]
    python -m runs.trust.explain dense OUT [MODEL] --each 8
    python -m runs.trust.explain write OUT

MODEL are models tuned with several seeds. Each is asked new questions of its own, ``--each`` of
every kind, about new images in which several things are; only answers that are right count. The
method that is shown is the best one on other questions to the first model ("choose"). `write` makes
docs/explain.md and the figures that ship with the package.
"""

import argparse
import json
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, get_args

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.stats import spearmanr
from torch import Tensor

from instructblip.core.files import replacing, write_json
from instructblip.inference.engine import Engine
from instructblip.model.explain import Method
from instructblip.scenes.dense import BY_LOOK, BY_PLACE, render_dense, sample_dense
from instructblip.scenes.dense import GRID as DENSE_GRID
from instructblip.scenes.questions import HELD_IN_KINDS, QUESTIONS, Question
from instructblip.scenes.world import render, sample_scene
from runs.claims.judge import Estimate, estimate

METHODS: tuple[Method, ...] = get_args(Method)
PROMPT = "Question: {} Short answer:"
PROMPTS = {
    "science": "Context: {context} Question: {question} Short answer:",
    "statement": 'Based on the image, is this statement true or false? "{question}" Answer:',
}
SCENES: dict[str, dict[str, Any]] = {
    "word": {"shapes": (1, 2), "words": 1},
    "digit": {"shapes": (1, 2), "digits": 1},
    "word at": {"shapes": (0, 1), "words": 2},
}
"""What is in the images of some kinds; else two or three shapes."""
KINDS = tuple(kind for kind in QUESTIONS if kind not in ("count", "label"))
"""Those whose answer is read from some of the things, and not from all of them."""
STEPS = 16
"""Points of a deletion or insertion curve, besides the first."""


@dataclass(frozen=True)
class Asked:
    """A question, its image, and where in the image the things are that it asks about."""

    kind: str
    instruction: str
    answer: str
    image: Image.Image
    region: np.ndarray  # bool [S, S], the bounding boxes
    share: float  # of the things of the image


def boxes(image: Image.Image, cells: Iterable[tuple[int, int]], grid: int) -> np.ndarray:
    """Bounding boxes of what is not background in some cells of the grid of a world."""
    pixels = np.asarray(image).astype(int)
    side = len(pixels) / grid
    background = np.median(pixels.reshape(-1, 3), 0)
    drawn = np.abs(pixels - background).sum(-1) > 60
    region = np.zeros_like(drawn)
    for row, column in cells:
        top, left = round(row * side), round(column * side)
        there = drawn[top : round((row + 1) * side), left : round((column + 1) * side)]
        rows, columns = np.flatnonzero(there.any(1)), np.flatnonzero(there.any(0))
        region[top + rows[0] : top + rows[-1] + 1, left + columns[0] : left + columns[-1] + 1] = (
            True
        )
    return region


def ask_scenes(name: str, each: int) -> list[Asked]:
    """``each`` new questions of every kind, those that training shows and others."""
    found = []
    for kind in KINDS:
        rng, number = random.Random(f"explain {name} {kind}"), 0
        while number < each:
            settings = {"shapes": (2, 3), "test_digits": True, **SCENES.get(kind, {})}
            scene = sample_scene(rng, **settings)
            question = QUESTIONS[kind](scene, rng)
            if question is None or not question.cells:
                continue
            image, things = render(scene), len(scene.things)
            found.append(_asked(question, image, things, 3))
            number += 1
    return found


def _asked(question: Question, image: Image.Image, things: int, grid: int) -> Asked:
    prompt = PROMPTS.get(question.kind, PROMPT.replace("{}", "{question}"))
    return Asked(
        question.kind,
        prompt.format(question=question.text, context=question.context),
        question.answer,
        image,
        boxes(image, question.cells, grid),
        len(question.cells) / things,
    )


def ask_dense(each: int) -> list[Asked]:
    """``each`` new questions of every kind about the dense world, each about one of its things."""
    found = []
    for kind, ask in {**BY_PLACE, **BY_LOOK}.items():
        rng = random.Random(f"explain dense {kind}")
        for _ in range(each):
            scene = sample_dense(rng)
            question = ask(scene, rng.choice(scene.items), rng)
            assert question is not None
            image = render_dense(scene)
            found.append(_asked(question, image, len(scene.items), DENSE_GRID))
    return found


def answered_rightly(engine: Engine, asked: list[Asked]) -> list[Asked]:
    answers = engine.answer(
        [each.image for each in asked],
        [each.instruction for each in asked],
        num_beams=1,
        max_new_tokens=8,
    )
    return [each for each, answer in zip(asked, answers, strict=True) if answer == each.answer]


def in_pixels(weights: Tensor, side: int, mode: str) -> np.ndarray:
    """A map [G, G] as one of ``side`` x ``side`` pixels."""
    options = {"align_corners": False} if mode == "bicubic" else {}
    large = F.interpolate(weights[None, None].float(), size=(side, side), mode=mode, **options)
    return large[0, 0].numpy()


def judge(weights: Tensor, region: np.ndarray) -> dict[str, float]:
    """Whether the peak is in the region (``hit``), or in a place of the grid that touches it, and
    the share of the map that is in the region."""
    side = len(region)
    places = region.reshape(len(weights), side // len(weights), len(weights), -1).any((1, 3))
    row, column = divmod(int(in_pixels(weights, side, "bicubic").argmax()), side)
    spread = in_pixels(weights.clamp(min=0), side, "nearest")
    return {
        "hit": float(region[row, column]),
        "touch": float(places.flatten()[int(weights.argmax())]),
        "inside": float(spread[region].sum() / max(spread.sum(), 1e-12)),
    }


def curves(engine: Engine, asked: Asked, order: Tensor) -> dict[str, float]:
    """Mean log-probability of the answer in nats while the places of ``order`` [G*G], in this
    order, are covered (deletion) and shown (insertion)."""
    (pixels,) = engine.samples(asked.image, asked.instruction)[0].pixels or ()
    grid = round(len(order) ** 0.5)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order))
    steps = torch.arange(STEPS + 1) * len(order) // STEPS
    first = (rank[None] < steps[:, None]).view(-1, grid, grid)  # [STEPS+1, G, G]
    size = pixels.shape[-1] // grid
    first = first.repeat_interleave(size, 1).repeat_interleave(size, 2)[:, None]
    colour = pixels.flatten(1).median(1).values[:, None, None]
    found = {}
    for name, hidden in (("deletion", first), ("insertion", ~first)):
        shown = torch.where(hidden, colour, pixels)
        samples = [
            engine.sample((f"{name} {i}",), (each,), asked.instruction)
            for i, each in enumerate(shown)
        ]
        scores = engine.rank_samples(samples, [[asked.answer]] * len(samples))
        found[name] = fmean(score for (score,) in scores)
    return found


def explained(engine: Engine, asked: Asked) -> dict[str, Tensor]:
    return {
        method: engine.explain(asked.image, asked.instruction, asked.answer, method).whole
        for method in METHODS
    }


def alike(one: Tensor, other: Tensor) -> float:
    """The rank correlation of two maps; 0 where one is constant."""
    return float(np.nan_to_num(spearmanr(one.flatten(), other.flatten())[0]))


def randomised(engine: Engine) -> Callable[[], None]:
    """Draw the weights of the Q-Former anew; returns what puts the old ones back."""
    qformer = engine.model.qformer
    before = {name: value.clone() for name, value in qformer.state_dict().items()}
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        for parameter in qformer.parameters():
            if parameter.ndim > 1:  # as strong as before, in random order
                flat = parameter.flatten()
                parameter.copy_(flat[torch.randperm(len(flat))].view_as(parameter))
    return lambda: qformer.load_state_dict(before) and None


def measure(engine: Engine, asked: list[Asked], num_curves: int = 0) -> list[dict[str, Any]]:
    """What `judge` and `curves` find for each question that the model answers rightly."""
    right = answered_rightly(engine, asked)
    chosen = set(random.Random(0).sample(range(len(right)), min(num_curves, len(right))))
    records = []
    for number, each in enumerate(right):
        maps = explained(engine, each)
        record: dict[str, Any] = {
            "kind": each.kind,
            "chance": float(each.region.mean()),
            "thing": each.share,
            "methods": {name: judge(weights, each.region) for name, weights in maps.items()},
        }
        if number in chosen:
            orders = {
                name: weights.flatten().argsort(descending=True) for name, weights in maps.items()
            }
            torch.manual_seed(number)
            orders["random"] = torch.randperm(len(orders["attention"]))
            record["curves"] = {name: curves(engine, each, o) for name, o in orders.items()}
            restore = randomised(engine)
            other = explained(engine, each)
            restore()
            record["randomised"] = {
                name: float(
                    np.nan_to_num(spearmanr(maps[name].flatten(), other[name].flatten())[0])
                )
                for name in METHODS
            }
        records.append(record)
    return records


# --- the page -------------------------------------------------------------------------------------

PAGE = Path("docs/explain.md")
SHIPPED = Path("src/instructblip/inference/explain.json")
Records = list[dict[str, Any]]


def percent(seeds: list[Records], value: Callable[[dict[str, Any]], float]) -> Estimate:
    """100 times the mean of ``value`` over the questions of a seed, over seeds."""
    return estimate([100 * fmean(map(value, records)) for records in seeds])


def shown(figure: Estimate) -> str:
    return f"{figure.mean:.1f} [{figure.low:.1f}, {figure.high:.1f}]"


def table(head: str, rows: Iterable[tuple[str, Iterable[str]]]) -> str:
    count = head.count("|") - 2
    lines = [head, "|---|" + "---:|" * count]
    return "\n".join([*lines, *(f"| {name} | {' | '.join(cells)} |" for name, cells in rows)])


def write(out: Path) -> None:
    """docs/explain.md, and the figures that ship with the package."""
    chosen = json.loads((out / "choose.json").read_text())
    files = sorted(out.glob("seed*.json"))
    found = [json.loads(file.read_text()) for file in files]
    seeds: list[Records] = [each["right"] for each in found]
    first = {m: 100 * fmean(r["methods"][m]["hit"] for r in chosen["right"]) for m in METHODS}
    best = max(METHODS, key=lambda m: first[m])

    def judged(method: str, what: str, some: list[Records] = seeds) -> Estimate:
        return percent(some, lambda r: r["methods"][method][what])

    chance, thing = (percent(seeds, lambda r, key=key: r[key]) for key in ("chance", "thing"))
    pointing = [(m, [shown(judged(m, w)) for w in ("hit", "touch", "inside")]) for m in METHODS]
    pointing.append(("a random point", [shown(chance), "", shown(chance)]))
    pointing.append(("a random thing of the image", [shown(thing), "", ""]))
    curved = [[r for r in records if "curves" in r] for records in seeds]

    def curve(method: str, what: str) -> str:
        return shown(estimate([fmean(r["curves"][method][what] for r in c) for c in curved]))

    def random_weights(method: str) -> str:
        if method == "random":
            return ""
        figure = estimate([fmean(r["randomised"][method] for r in c) for c in curved])
        return f"{figure.mean:.2f} [{figure.low:.2f}, {figure.high:.2f}]"

    curve_rows = [
        (m, [curve(m, "deletion"), curve(m, "insertion"), random_weights(m)])
        for m in (*METHODS, "random")
    ]
    held_in = [[r for r in records if r["kind"] in HELD_IN_KINDS] for records in seeds]
    held_out = [[r for r in records if r["kind"] not in HELD_IN_KINDS] for records in seeds]
    by_role = [
        (name, [str(sum(map(len, some))), *(shown(judged(m, "hit", some)) for m in METHODS)])
        for name, some in (("held-in kinds", held_in), ("held-out kinds", held_out))
    ]
    everything = [r for records in seeds for r in records]
    kinds = []
    for kind in KINDS:
        of_kind = [r for r in everything if r["kind"] == kind]
        if of_kind:
            hits = [100 * fmean(r["methods"][m]["hit"] for r in of_kind) for m in METHODS]
            kinds.append((kind, [str(len(of_kind)), *(f"{hit:.0f}" for hit in hits)]))
    methods = " | ".join(METHODS)
    fields = {
        "models": len(seeds),
        "asked": sum(each["asked"] for each in found),
        "right": len(everything),
        "curved": sum(map(len, curved)),
        "best": best,
        "score": shown(judged(best, "hit")),
        "attention": shown(judged("attention", "hit")),
        "chance": shown(chance),
        "first": ", ".join(f"{m} {first[m]:.1f}" for m in METHODS),
        "chosen": len(chosen["right"]),
        "pointing": table("| method | peak in the box | its place touches it | inside |", pointing),
        "curves": table("| order | deletion | insertion | random weights |", curve_rows),
        "roles": table(f"| | questions | {methods} |", by_role),
        "kinds": table(f"| kind | questions | {methods} |", kinds),
        "dense": dense_section(out / "dense.json"),
    }
    template = Path(__file__).with_suffix(".md").read_text()
    with replacing(PAGE) as file:
        file.write_text(template.format(**fields))
    figure = judged(best, "hit")
    shipped = {
        "method": best,
        "right": round(figure.mean, 1),
        "interval": [round(figure.low, 1), round(figure.high, 1)],
        "chance": round(chance.mean, 1),
        "attention": round(judged("attention", "hit").mean, 1),
    }
    write_json(SHIPPED, shipped)
    print(shipped)


def dense_section(file: Path) -> str:
    """Of a single model, so without an interval over seeds."""
    if not file.is_file():
        return "Not measured."
    found = json.loads(file.read_text())
    right = found["right"]
    rows = [
        (m, [f"{100 * fmean(r['methods'][m][w] for r in right):.1f}" for w in ("hit", "inside")])
        for m in METHODS
    ]
    rows.append(("a random point", [f"{100 * fmean(r['chance'] for r in right):.1f}", ""]))
    rows.append(("a random thing", [f"{100 * fmean(r['thing'] for r in right):.1f}", ""]))
    head = table("| method | peak in the box | inside |", rows)
    return f"{len(right)} of {found['asked']} questions are answered rightly.\n\n{head}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("step", choices=("measure", "dense", "write"))
    parser.add_argument("out", type=Path)
    parser.add_argument("models", nargs="*")
    parser.add_argument("--each", type=int, default=3, help="questions of each kind")
    parser.add_argument("--curves", type=int, default=10, help="questions with curves")
    args = parser.parse_args()
    if args.step == "dense":
        model = (args.models or ["dense"])[0]
        engine = Engine.from_pretrained(model, instruction_aware=True, batch_size=34)
        asked = ask_dense(args.each)
        write_json(args.out / "dense.json", {"asked": len(asked), "right": measure(engine, asked)})
    elif args.step == "measure":
        jobs = [("choose", args.models[0], 0)]
        jobs += [(f"seed {i}", model, args.curves) for i, model in enumerate(args.models)]
        for name, model, num_curves in jobs:
            file = args.out / f"{name.replace(' ', '')}.json"
            if not file.is_file():
                asked = ask_scenes(name, args.each)
                engine = Engine.from_pretrained(model, batch_size=34)
                right = measure(engine, asked, num_curves)
                write_json(file, {"asked": len(asked), "right": right})
                hits = {m: fmean(r["methods"][m]["hit"] for r in right) for m in METHODS}
                print(name, len(right), hits, flush=True)
    else:
        write(args.out)


if __name__ == "__main__":
    main()
