"""The attacks of benchmarks/attack_server.py that need no separate process: each is refused."""

from pathlib import Path

import pytest

from benchmarks.attack_server import BODIES, CHAT, INSIDE, JSON, chat
from instructblip.serving.api import create_app
from tests.conftest import TestClient, greedy_engine


def test_bodies_of_many_values_are_refused(model_folder: Path) -> None:
    with TestClient(create_app({"tuned": greedy_engine(model_folder)})) as client:
        statuses = {
            name: client.post(path, content=body(), headers={"Content-Type": JSON}).status_code
            for name, (path, body) in BODIES.items()
        }
        assert statuses.pop("spaces") == 200
        assert statuses == {
            "json-errors": 413,
            "json-small": 422,
            "json-large": 413,
            "json-keys": 413,
            "json-keys-small": 422,
        }
        long = chat("some words " * 300, 320)
        assert client.post(CHAT, content=long, headers={"Content-Type": JSON}).status_code == 413


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("name", INSIDE)
def test_a_model_that_fails(model_folder: Path, name: str) -> None:
    row, stopped = INSIDE[name](greedy_engine(model_folder))
    assert stopped, row
