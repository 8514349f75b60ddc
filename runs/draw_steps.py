"""How many steps of the recipe `draw` fit into some minutes on this machine.

    python runs/draw_steps.py MINUTES [A.B=C ...]

Times steps of the mixture as it is at the end, and leaves a twelfth for validation and saving.
"""

import sys
import time

from instructblip.experiment.build import build
from instructblip.experiment.draw import Drawing
from instructblip.recipe.load import load_recipe
from instructblip.training.optim import make_optimizer

TIMED = 8


def main() -> None:
    minutes, overrides = float(sys.argv[1]), sys.argv[2:]
    recipe = load_recipe("draw", overrides)
    assert recipe.drawing is not None
    latest = max(entry.start for entry in recipe.drawing.sets.values())
    run = build(recipe, Drawing())
    model = run.model
    optimizer = make_optimizer(model, recipe.training)
    batches = run.batches.iterate(latest)
    for step in range(TIMED + 2):
        if step == 2:  # the first ones are slower
            began = time.monotonic()
        for batch in next(batches):
            model.loss(batch).loss_sum.backward()
        optimizer.step()
        optimizer.zero_grad()
    seconds = (time.monotonic() - began) / TIMED
    print(f"{seconds:.3f} s a step", file=sys.stderr)
    print(max(500, int(minutes * 60 * 11 / 12 / seconds)))


if __name__ == "__main__":
    main()
