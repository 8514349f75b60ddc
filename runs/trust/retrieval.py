"""How well heads that are trained beside the starter retrieve Scenes: `docs/howto/search.md`.

``python -m runs.trust.retrieval WORK`` writes 10,000 images with captions and the 200 of the
benchmark (another scale draws other scenes: none is in both), trains the recipe `retrieval_scenes`
with each seed (order of the captions, start of the heads), evaluates, and prints the scores of both
directions with their mean. A run that was interrupted resumes.
"""

import argparse
import subprocess
import sys
from pathlib import Path
from statistics import fmean, stdev

from scipy import stats

from instructblip.evaluation.result import Result
from instructblip.evaluation.scoring import scorer_of

SEEDS = 5


def instructblip(arguments: list[str]) -> None:
    """Run a command. Raises CalledProcessError if it fails."""
    subprocess.run([sys.executable, "-m", "instructblip", *arguments], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--start", default="starter")
    given = parser.parse_args()
    captions, benchmark = given.work / "captions", given.work / "scenes"
    sets = ["--sets", "coco_caption"]
    instructblip(["scenes", str(captions), "--scale", "5", *sets])
    instructblip(["scenes", str(benchmark), *sets])
    results = []
    for seed in range(SEEDS):
        run, out = given.work / f"seed{seed}", given.work / f"result{seed}"
        settings = [f"data.root={captions}", f"data.seed={seed}", f"training.seed={seed}"]
        command = ["pretrain", "retrieval_scenes", "--stage", "retrieval", "--out", str(run)]
        resume = ["--resume"] if run.is_dir() else []
        instructblip([*command, *resume, f"model.start={given.start}", *settings])
        asked = ["--benchmarks", "scenes_retrieval", "--out", str(out)]
        instructblip(["evaluate", str(run), *asked, f"data.root={benchmark}"])
        results.append(Result.load(out / "scenes_retrieval").predictions)
    for metric in ("text_to_image_recall equal_texts", "image_to_text_recall"):
        scores = [scorer_of(metric).score(predictions, "python") for predictions in results]
        recalls = {"r@1": [score.value for score in scores]}
        recalls |= {name: [score.others[name] for score in scores] for name in scores[0].others}
        for name, values in recalls.items():
            half = float(stats.t.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5
            mean, each = fmean(values), ", ".join(f"{value:.1f}" for value in values)
            print(f"{metric} {name}: {mean:.1f} [{mean - half:.1f}, {mean + half:.1f}] of {each}")


if __name__ == "__main__":
    main()
