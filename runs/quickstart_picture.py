"""Draw docs/quickstart.png: pictures, instructions and both models' answers after a quickstart.

    python runs/quickstart_picture.py out/quickstart docs/quickstart.png
    python runs/quickstart_picture.py out/quickstart-real docs/quickstart-real.png --real

Eight samples, taken in the order of the files: of each benchmark the first that the two models
answer differently, whoever is right. With ``--real`` the first ones whatever the answers, since
tuning changes few of them, and a benchmark that is named again shows its next; they show Fluent
emoji alone, whose licence is MIT.
"""

import argparse
import textwrap
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from instructblip.data.reading.images import load_image
from instructblip.evaluation.result import Result

SETS = tuple(
    f"scenes_{name}"
    for name in ("vqav2", "okvqa", "ocrvqa", "nocaps", "gqa", "vsr", "iconqa", "scienceqa")
)
REAL = ("known_names",) * 3 + ("places",) * 3 + ("true_or_false", "left_or_right")
RIGHT, WRONG, INK, FAINT = "#1a7f4b", "#c0392b", "#1f2328", "#6b7280"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("quickstart", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--real", action="store_true")
    args = parser.parse_args()
    figure, places = plt.subplots(2, 4, figsize=(13, 8.6))
    sets = REAL if args.real else SETS
    for i, (name, place) in enumerate(zip(sets, places.flat, strict=True)):
        folders = [args.quickstart / "results" / model / name for model in MODELS]
        draw(place, [Result.load(folder) for folder in folders], sets[:i].count(name), args.real)
    figure.subplots_adjust(left=0.01, right=0.99, top=0.89, bottom=0.09, wspace=0.15, hspace=0.62)
    figure.savefig(args.picture, dpi=80 if args.real else 110)


MODELS = {"blip2": "BLIP-2", "instructblip": "InstructBLIP"}


def draw(place: Axes, results: list[Result], number: int, alike: bool) -> None:
    """One picture with its instruction above and an answer of each model below."""
    pairs = list(zip(*(r.predictions for r in results), strict=True))
    apart = [p for p in pairs if p[0]["prediction"] != p[1]["prediction"]]
    pair = (pairs if alike else apart or pairs)[number]
    image = load_image(pair[0]["images"][0], Path(results[0].image_root))
    place.imshow(image, interpolation="lanczos")
    place.set_xticks([])
    place.set_yticks([])
    for side in place.spines.values():
        side.set_edgecolor("#d0d7de")
    first = results[0]
    unseen = "  (task type never tuned on)" if first.unseen_type else ""
    own = first.role == "own"
    role = first.benchmark.replace("_", " ") if own else first.role.replace("_", "-")
    prompt = textwrap.shorten(pair[0]["prompt"], 120)
    place.set_title(f"{role}{unseen}", fontsize=8, color=FAINT, loc="left", pad=46)
    place.text(
        0, 1.03, textwrap.fill(prompt, 48), transform=place.transAxes, fontsize=8.5, color=INK
    )
    caption = results[0].metric == "rouge_l"  # neither right nor wrong
    height = -0.05
    for model, sample in zip(MODELS.values(), pair, strict=True):
        score = sample["score"]
        if caption:
            mark, colour = f"ROUGE-L {100 * score:.0f}", INK
        else:
            mark, colour = ("✓", RIGHT) if score >= 0.5 else ("✗", WRONG)
        answer = textwrap.fill(f"{mark} {model}: {sample['prediction']}", 46, max_lines=2)
        place.text(
            0,
            height,
            answer,
            transform=place.transAxes,
            fontsize=9,
            color=colour,
            va="top",
        )
        height -= 0.08 * (1 + answer.count("\n"))


if __name__ == "__main__":
    main()
