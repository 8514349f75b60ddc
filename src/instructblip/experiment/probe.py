"""What the frozen image encoder knows of the picture world without a language model."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.linear_model import RidgeClassifier

from instructblip.data.reading.images import load_image
from instructblip.evaluation.result import Result, make_result
from instructblip.evaluation.scoring import scorer_of
from instructblip.inference.engine import Engine
from instructblip.scenes.pictures.catalog import read_catalog, single
from instructblip.scenes.pictures.world import World

PROBED = {"known_names": "names", "photos": "names", "new_kinds": "kinds"}
"""Benchmark of the recipe ``quickstart_real`` -> which classifier answers it. The others ask about
several things on a page or about names that no image of training has."""

Features = np.ndarray
"""[n, V]: the mean feature of each image, standardised over the training images, of length 1."""


class Probe:
    """Linear classifiers on the mean feature of an image, fitted to the world's training images.

    Kinds by ridge regression; names, of which an image or two are known, by the nearest mean of a
    name. ``packages`` holds the images. Neither can say a name that training does not show.
    """

    def __init__(self, engine: Engine, packages: Path) -> None:
        world = World(read_catalog(packages))
        self.engine, self.names = engine, list(world.known_names)
        features = self._encode([single(picture) for picture in world.train])
        self.mean, self.deviation = features.mean(0), features.std(0) + 1e-6
        features = self._standardise(features)
        self.kinds = RidgeClassifier().fit(features, [picture.kind for picture in world.train])
        self.centres = np.zeros((len(self.names), features.shape[1]))
        for feature, picture in zip(features, world.train, strict=True):
            self.centres[self.names.index(picture.name)] += feature
        self.centres /= np.linalg.norm(self.centres, axis=1, keepdims=True)

    @torch.no_grad()
    def _encode(self, images: Sequence[Image.Image]) -> Features:
        pixels = (self.engine.images.transform(image)[None] for image in images)
        encode = self.engine.model.encode_image
        return torch.cat([encode(each).float().mean(1) for each in pixels]).numpy()

    def _standardise(self, features: Features) -> Features:
        scaled = (features - self.mean) / self.deviation
        return scaled / np.linalg.norm(scaled, axis=1, keepdims=True)

    def answer(self, result: Result) -> Result:
        """The score of the probe on the samples of ``result``, one of `PROBED`."""
        predictions, sample = [], scorer_of(result.metric).sample
        root = Path(result.image_root)
        features = self._encode([load_image(root / p["images"][0]) for p in result.predictions])
        features = self._standardise(features)
        if PROBED[result.benchmark] == "kinds":
            labels, scores = self.kinds.classes_.tolist(), self.kinds.decision_function(features)
        else:
            labels, scores = self.names, features @ self.centres.T
        for prediction, row in zip(result.predictions, scores, strict=True):
            scored = dict(zip(labels, row.tolist(), strict=True))
            answers = prediction.get("candidates", labels)
            best = max(answers, key=lambda answer: scored.get(answer, -np.inf))
            same = {**prediction, "prediction": best}
            if "candidates" in prediction:
                same["probabilities"] = [float(answer == best) for answer in answers]
            predictions.append({**same, "score": sample(same)})
        return make_result(result.settings, predictions, image_root=result.image_root)
