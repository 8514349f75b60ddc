"""Train the starter's decoder on Scenes, in the package's own loop, and say what it can draw.

    python runs/starter/train_draw.py OUT --starter DIR --steps 8000 [--resume]

One object comes first: the share of prompts with two rises after a quarter of the steps. ``best``
and ``last`` in OUT are directories that draw; ``--install`` puts what they add into the starter.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch

from instructblip.batch import Batch
from instructblip.data.images import ImageTransform
from instructblip.data.tokens import Tokens
from instructblip.model.instructblip import InstructBlip
from instructblip.model.pretrained import model_directory
from instructblip.text_to_image.batches import DrawLoader
from instructblip.text_to_image.config import ConditionerConfig, NativeConfig, TextToImageConfig
from instructblip.text_to_image.measure import KINDS, fresh_prompts, measure
from instructblip.text_to_image.model import TextToImage
from instructblip.text_to_image.pretrained import FOLDER, save_addition, save_pretrained
from instructblip.text_to_image.sample import Painter
from instructblip.text_to_image.tasks import SceneDrawings, SubjectDrawings
from instructblip.training.config import TrainingConfig
from instructblip.training.train import train

FIRST = {"one": 1.0, "two": 0.2, "subject": 0.3}
THEN = {"one": 0.6, "two": 1.0, "subject": 0.5}


class Course:
    """One object first, then the whole mixture from step ``turn`` on."""

    def __init__(self, first: DrawLoader, then: DrawLoader, turn: int) -> None:
        self.first, self.then, self.turn = first, then, turn

    def iterate(self, step: int) -> Iterator[Batch]:
        while True:
            yield (self.first if step < self.turn else self.then).batch(step)
            step += 1


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--starter", default="starter", help="an InstructBLIP or BLIP-2 directory")
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--validate-every", type=int, default=1000)
    parser.add_argument("--prompts", type=int, default=48, help="of each kind, in a validation")
    parser.add_argument("--train-qformer", action="store_true", help="the Q-Former learns as well")
    parser.add_argument("--decoder", nargs="*", default=[], metavar="KEY=VALUE")
    parser.add_argument("--conditioner", nargs="*", default=[], metavar="KEY=VALUE")
    parser.add_argument("--optimizer", default="muon")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--install", type=Path, help="put the result into this directory")
    args = parser.parse_args()
    run(args)


def settings(pairs: list[str]) -> dict[str, str]:
    return dict(pair.split("=", 1) for pair in pairs)  # pydantic reads the numbers


def run(args: argparse.Namespace) -> None:
    torch.manual_seed(0)
    directory = model_directory(args.starter)
    blip = InstructBlip.from_pretrained(directory, instruction_aware=True)
    config = TextToImageConfig(
        conditioner=ConditionerConfig.model_validate(settings(args.conditioner)),
        decoder=NativeConfig.model_validate(settings(args.decoder)),
    )
    model = TextToImage(blip, config)
    choice = ("drawing", "qformer") if args.train_qformer else ("drawing",)
    model.set_trainable(choice)
    sizes = {n: sum(p.numel() for p in m.parameters()) for n, m in model.named_children()}
    print(f"parameters: {sizes}", flush=True)
    painter = Painter(
        model, Tokens.from_pretrained(directory), ImageTransform.from_pretrained(directory)
    )
    sets = {
        "one": SceneDrawings((1, 1)), "two": SceneDrawings((2, 2)), "subject": SubjectDrawings()
    }  # fmt: skip
    loaders = [
        DrawLoader(
            sets, weights, painter.tokens, painter.transform, model.decoder.image_size,  # type: ignore
            batch_size=args.batch_size,
        )
        for weights in (FIRST, THEN)
    ]  # fmt: skip
    training = TrainingConfig(
        trainable=choice,
        steps=args.steps,
        batch_size=args.batch_size,
        optimizer=args.optimizer,
        learning_rate=args.rate,
        warmup_steps=min(100, args.steps // 10),
        betas=(0.9, 0.98),
        weight_decay=0.01,
        precision="fp32",
        device="cpu",
        validate_every=args.validate_every,
        save_every=200,
        keep_last=1,
        log_every=50,
    )

    def validate(_model: TextToImage) -> dict[str, float]:
        scores = {}
        for kind in KINDS:
            figures, pictures, _ = measure(painter, fresh_prompts(kind, args.prompts))
            scores[kind] = figures.objects
            print(f"{kind}: {figures}", flush=True)
            for index, picture in enumerate(pictures[:8]):
                folder = args.out / "drawn"
                folder.mkdir(parents=True, exist_ok=True)
                picture.save(folder / f"{kind}_{index}.png")
        return {"score": sum(scores.values()) / len(scores), **scores}

    train(
        model,
        Course(*loaders, turn=args.steps // 4),
        validate,
        training,
        args.out,
        resume=args.resume,
        export=lambda path: save_pretrained(model, path),
        notes={"arguments.json": json.dumps(vars(args), default=str, indent=1)},
    )
    if args.install:
        save_addition(model, args.install / FOLDER, torch.float16)


if __name__ == "__main__":
    main()
