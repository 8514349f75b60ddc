"""A short run of benchmarks/fuzz_server.py: no 5xx, no leak, and the watch can fail."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.fuzz_server import Watch, fuzz_bodies, fuzz_schema
from instructblip.serving.api import create_app
from tests.conftest import TestClient, greedy_engine


@pytest.fixture(scope="module")
def client(model_folder: Path) -> Iterator[TestClient]:
    app = create_app({"tuned": greedy_engine(model_folder)})
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


def test_requests_drawn_from_the_description(client: TestClient) -> None:
    watch = Watch()
    fuzz_schema(client, 40, watch, seed=1)
    assert not watch.problems
    assert watch.codes.total() > 40
    assert len(watch.codes) > 1


def test_good_requests_with_something_broken(client: TestClient) -> None:
    watch = Watch()
    fuzz_bodies(client, 150, watch, seed=2)
    assert not watch.problems
    assert {200, 400, 413, 422} <= set(watch.codes)


def test_the_watch_sees(client: TestClient) -> None:
    watch = Watch()
    watch.see("a", 500, "")
    watch.see("b", 400, "no file /tmp/secret.txt")
    watch.see("c", 400, "fine")
    assert len(watch.problems) == 2
