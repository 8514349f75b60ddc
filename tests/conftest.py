"""A tiny random model behind a real server on a free port, and pictures for it."""

import base64
import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import uvicorn
from fastapi import testclient

from instructblip.inference.engine import Engine
from instructblip.model.instructblip import InstructBlip
from instructblip.text_to_image.model import TextToImage
from instructblip.text_to_image.pretrained import FOLDER, save_addition
from tests.testing import write_model, write_picture
from tests.text_to_image.conftest import CONFIG


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("served"), "instructblip")


@pytest.fixture(scope="session")
def blip2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("served_blip2"), "blip2")


def greedy_engine(folder: Path) -> Engine:
    decoding = {"num_beams": 1, "max_new_tokens": 8}
    return Engine.from_pretrained(folder, device="cpu", decoding=decoding)


@pytest.fixture(scope="session")
def png(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("png")
    return [write_picture(root / f"{i}.png", seed=i) for i in range(4)]


def data_url(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def body(path: Path, text: str = "what is red?", **more: Any) -> dict[str, Any]:
    content = [
        {"type": "text", "text": text},
        {"type": "image_url", "image_url": {"url": data_url(path)}},
    ]
    return {"messages": [{"role": "user", "content": content}], **more}


class TestClient(testclient.TestClient):
    """Reaches the application by a name that every server has."""

    __test__ = False

    def __init__(self, app: Any, base_url: str = "http://localhost", **options: Any) -> None:
        super().__init__(app, base_url, **options)


@contextlib.contextmanager
def running(app: Any, **options: Any) -> Iterator[str]:
    """The app behind uvicorn in a thread; yields its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    config = uvicorn.Config(app, port=port, log_level="warning", **options)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.02)
        assert thread.is_alive()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(timeout=20)
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def drawing_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory with an untrained decoder that draws 16 x 16 pixels."""
    folder = write_model(tmp_path_factory.mktemp("drawing"), "instructblip")
    torch.manual_seed(0)
    model = TextToImage(InstructBlip.from_pretrained(folder), CONFIG)
    torch.nn.init.normal_(model.decoder.patch_output.weight, std=0.1)
    save_addition(model, folder / FOLDER)
    return folder
