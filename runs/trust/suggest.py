"""How many planted errors `instructblip suggest` finds on Scenes: `docs/howto/suggest.md`.

``python -m runs.trust.suggest WORK MODEL...`` writes a new world of Scenes for each model, whose
seed no model was tuned on, replaces 5 % of the answers of a thousand questions by another answer of
the same type of question, and counts how many of these are in the first tenth of the list.
``--folds 3`` tunes each model on the questions out of fold instead of taking it as it is, with the
settings given after it. The lines go to the standard output, and to ``WORK/results.jsonl``.
"""

import argparse
import json
import random
import shutil
import time
from collections import defaultdict
from pathlib import Path

from instructblip.core.files import write_text
from instructblip.data.sources import SOURCES
from instructblip.experiment.suggest import suggest
from instructblip.scenes.official import write_scenes

SEED = 7200
"""Of the first world; the models were tuned on that of seed 0."""
QUESTIONS, PLANTED = 1000, 50


def write_folder(root: Path, seed: int) -> set[str]:
    """Write a folder of questions of which some are labelled wrongly; returns the ids of these."""
    write_scenes(root / "world", seed=seed, scale=0.15, sets=("vqav2",))
    images = root / "world/vqav2/images"
    rng = random.Random(seed)
    examples = [e for e in SOURCES["vqav2"].read(root / "world/vqav2", "train")]
    examples = examples[:QUESTIONS]
    known = defaultdict(set)
    for example in examples:
        known[example.extra["question_type"]].add(example.answers[0])
    wrong = set(rng.sample(range(len(examples)), PLANTED))
    folder = root / "folder"
    folder.mkdir(exist_ok=True)
    lines, planted = [], set()
    for i, example in enumerate(examples):
        answer = example.answers[0]
        if i in wrong:
            answer = rng.choice(sorted(known[example.extra["question_type"]] - {answer}))
            planted.add(str(i))
        name = Path(example.images[0]).name
        if not (folder / name).exists():
            shutil.copyfile(images / example.images[0], folder / name)
        row = {"id": str(i), "file_name": name, "question": example.question, "answer": answer}
        lines.append(json.dumps(row) + "\n")
    write_text(folder / "metadata.jsonl", "".join(lines))
    return planted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--folds", type=int, default=0)
    parser.add_argument("--settings", nargs="*", default=[], help="settings of the tuning")
    given = parser.parse_args()
    for number, model in enumerate(given.models):
        seed, began = SEED + number, time.monotonic()
        planted = write_folder(given.work / str(seed), seed)
        lists = suggest(
            given.work / str(seed) / "folder",
            model,
            given.work / "out",
            given.folds,
            QUESTIONS // 10,
            given.settings,
        )
        if lists is None:
            return
        found = [each.example.id in planted for each in lists.wrong]
        line = {
            "model": model,
            "seed": seed,
            "folds": given.folds,
            "settings": given.settings,
            "first_tenth": sum(found) / PLANTED,
            "first_twentieth": sum(found[: len(found) // 2]) / PLANTED,
            "note": lists.notes[0],
            "seconds": round(time.monotonic() - began),
        }
        print(json.dumps(line), flush=True)
        with (given.work / "results.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
