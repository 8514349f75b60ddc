"""The folder of one set: pictures, annotation files, and the scenes and questions they hold."""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from instructblip.scenes.questions import QUESTIONS, Question
from instructblip.scenes.world import (
    Scene,
    render,
    sample_scene,
)

ANNOTATOR_ERROR = 0.03  # ten people answer; now and then one is wrong


@dataclass(frozen=True)
class SetFolder:
    """Where a set is written and its random numbers."""

    root: Path
    split: str
    rng: random.Random

    def scene(self, **kinds: Any) -> Scene:
        return sample_scene(self.rng, test_digits=self.split != "train", **kinds)

    def picture(self, scene: Scene, name: str) -> str:
        """Draw ``scene`` below ``images/``; JPEG without chroma subsampling, or PNG."""
        path = self.root / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".jpg":
            render(scene).save(path, quality=95, subsampling=0)
        else:
            render(scene).save(path)
        return name

    def annotate(self, name: str, content: Any) -> None:
        path = self.root / "annotations" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".jsonl"):
            path.write_text("".join(json.dumps(record) + "\n" for record in content))
        else:
            path.write_text(json.dumps(content))

    def question(self, scene: Scene, kinds: tuple[str, ...]) -> Question | None:
        """A question of a random kind among those that fit the scene."""
        for kind in self.rng.sample(kinds, len(kinds)):
            if question := QUESTIONS[kind](scene, self.rng):
                return question
        return None

    def asked(
        self, number: int, kinds: tuple[str, ...], per_scene: int = 1, **scene: Any
    ) -> Iterator[tuple[int, Scene, list[Question]]]:
        """``number`` scenes with ``per_scene`` different questions each; the index counts up."""
        done = 0
        while done < number:
            world = self.scene(**scene)
            found = [self.question(world, kinds) for _ in range(3 * per_scene)]
            unique = {q.text: q for q in found if q}
            if len(unique) >= per_scene:
                yield done, world, list(unique.values())[:per_scene]
                done += 1

    def ten_answers(self, question: Question) -> list[str]:
        """What ten people answer."""
        return [
            self.rng.choice(question.others)
            if self.rng.random() < ANNOTATOR_ERROR
            else question.answer
            for _ in range(10)
        ]
