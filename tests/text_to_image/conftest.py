"""A tiny InstructBLIP directory and a text-to-image model around it."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from instructblip.data.images import ImageTransform
from instructblip.data.tokens import Tokens
from instructblip.model.instructblip import InstructBlip
from instructblip.text_to_image.batches import DrawLoader
from instructblip.text_to_image.config import (
    ConditionerConfig,
    NativeConfig,
    TextToImageConfig,
)
from instructblip.text_to_image.model import TextToImage
from instructblip.text_to_image.sample import Painter
from instructblip.text_to_image.tasks import SceneDrawings, SubjectDrawings
from tests.testing import write_model

CONFIG = TextToImageConfig(
    conditioner=ConditionerConfig(num_queries=3, num_layers=1, width=16, num_heads=2),
    decoder=NativeConfig(
        image_size=16, patch_size=4, width=16, num_layers=2, num_heads=2, condition_width=16
    ),
)


class Renderer(Painter):
    """Returns ``images``, or without them the target of each example."""

    def __init__(self, images: list[Image.Image] | None = None) -> None:
        self.images = images

    def draw_examples(self, examples, generator, **settings) -> list[Image.Image]:
        return self.images or [each.target() for each in examples]


@pytest.fixture(scope="session")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"), "instructblip")


@pytest.fixture
def model(directory: Path) -> TextToImage:
    blip = InstructBlip.from_pretrained(directory)
    torch.manual_seed(0)
    model = TextToImage(blip, CONFIG)
    with torch.no_grad():  # parts that start at zero take part
        model.decoder.patch_output.weight.normal_(std=0.1)
        for layer in model.conditioner.connector.layers:
            layer.convolution.weight.normal_(std=0.2)
    return model


@pytest.fixture
def painter(model: TextToImage, directory: Path) -> Painter:
    tokens, transform = Tokens.from_pretrained(directory), ImageTransform.from_pretrained(directory)
    return Painter(model, tokens, transform)


@pytest.fixture
def loader(painter: Painter) -> DrawLoader:
    sets = {"scenes": SceneDrawings(), "subjects": SubjectDrawings()}
    return DrawLoader(sets, {}, painter.tokens, painter.transform, 16, batch_size=6)


@pytest.fixture(autouse=True)
def _no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("instructblip.training.log.draw_curves", lambda lines, path: None)
