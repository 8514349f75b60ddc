"""What headers alone refuse: names of other machines, pages elsewhere, wrong keys."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from instructblip.serving import guard
from instructblip.serving.api import create_app
from instructblip.serving.config import ServeConfig
from instructblip.serving.page import add_page
from tests.conftest import TestClient, body, greedy_engine
from tests.serving.test_api import CHAT


@pytest.fixture(scope="module")
def client(model_folder: Path) -> Iterator[TestClient]:
    config = ServeConfig(allowed_hosts=("ask.school.example",))
    with TestClient(add_page(create_app({"a": greedy_engine(model_folder)}, config))) as client:
        yield client


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("localhost:8000", 200),
        ("app.localhost:8000", 200),
        ("127.0.0.1:8000", 200),
        ("192.168.1.7", 200),
        ("[::1]:8000", 200),
        ("ASK.school.example:8000", 200),
        ("school.example", 421),
        ("rebound.example:8000", 421),
        ("localhost.rebound.example", 421),
        ("127.0.0.1.rebound.example", 421),
        ("localhost@rebound.example", 421),
        ("[::1", 421),
        ("a" * 5000, 421),
    ],
)
def test_other_names_are_refused(client: TestClient, host: str, status: int) -> None:
    for path in ("/healthz", "/page", "/v1/models", "/absent"):
        answer = client.get(path, headers={"Host": host})
        assert answer.status_code == (404 if (status, path) == (200, "/absent") else status)
        if status != 200:
            assert "--allow-host NAME" in answer.json()["error"]["message"]
            assert len(answer.text) < 500


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        (None, 200),
        ("http://localhost", 200),
        ("https://ask.school.example", 200),
        ("http://localhost:3000", 403),
        ("https://ask.school.example:8443", 403),
        ("http://elsewhere.example", 403),
        ("null", 403),
        ("http://[", 403),
    ],
)
def test_pages_elsewhere_may_not_ask(
    client: TestClient, png: list[Path], origin: str | None, status: int
) -> None:
    headers = {} if origin is None else {"Origin": origin}
    answer = client.post(CHAT, json=body(png[0]), headers=headers)
    assert answer.status_code == status
    assert "access-control-allow-origin" not in answer.headers
    assert client.get("/healthz", headers=headers).status_code == 200
    preflight = client.options(CHAT, headers={**headers, "Access-Control-Request-Method": "POST"})
    assert preflight.status_code == 405


def test_every_response_has_the_headers_of_a_safe_page(client: TestClient) -> None:
    refused = client.post(CHAT, json={}), client.get("/healthz", headers={"Host": "b.example"})
    for answer in (client.get("/page"), client.get("/v1/models"), *refused):
        for name, value in guard.HEADERS.items():
            assert answer.headers[name] == value
        assert "set-cookie" not in answer.headers
    policy = guard.HEADERS["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy


def test_keys_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []

    def compare(*both: bytes) -> bool:
        compared.append(both)
        return both[0] == both[1]

    monkeypatch.setattr(guard.hmac, "compare_digest", compare)
    config = ServeConfig(api_keys=("first", "second", "third"))
    assert guard.knows_key(config, "first")
    assert len(compared) == 3, "all of them, wherever the right one is"


def test_wrong_keys_wait_and_right_ones_do_not(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guard, "MOST_WRONG", 3)
    monkeypatch.setattr(guard, "WRONG_KEY_S", 1.0)
    config = ServeConfig(api_keys=("right",))
    app: Any = create_app({"a": greedy_engine(model_folder)}, config)
    with TestClient(app) as client, ThreadPoolExecutor(8) as pool:

        def get(key: str) -> tuple[int, float]:
            began = time.monotonic()
            answer = client.get("/v1/models", headers={"Authorization": f"Bearer {key}"})
            return answer.status_code, time.monotonic() - began

        guesses = [pool.submit(get, f"guess {number}") for number in range(8)]
        right = get("right")
        results = [guess.result() for guess in guesses]
        waited = sorted(seconds for status, seconds in results if status == 401)
        assert right[0] == 200
        assert len(waited) == 3
        assert sum(status == 429 for status, _ in results) == 5
        assert waited[2] > 2.5, "one after the other"
        assert right[1] < waited[0]
        assert get("right")[0] == 200
        assert client.get("/v1/models").status_code == 401, "at once: no key was tried"
