"""Images are decoded in processes that a deadline, or a client that leaves, ends."""

import asyncio
import io
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from benchmarks.attack_server import RANK, sleepy_decoders
from instructblip.data.reading.decode import MAX_SIDE, decode_image
from instructblip.serving import decoder
from instructblip.serving.api import create_app
from instructblip.serving.config import ServeConfig
from instructblip.serving.decoder import BadImage, read_message
from instructblip.serving.decoders import COUNT, Decoders
from tests.conftest import TestClient, body, greedy_engine, running
from tests.serving.test_api import CHAT, wait_for


@pytest.fixture
def sleepy() -> Iterator[dict[str, Any]]:
    """A request whose image is never decoded."""
    with sleepy_decoders() as request:
        yield request


def busy(app: Any) -> list[subprocess.Popen[bytes]]:
    return [one.process for one in app.state.service.decoders._busy]


def test_a_decoder_that_never_ends_is_ended_at_the_deadline(
    model_folder: Path, png: list[Path], sleepy: dict[str, Any]
) -> None:
    app = create_app({"a": greedy_engine(model_folder)}, ServeConfig(timeout_s=3))
    app.state.service.decoders.start()
    with TestClient(app) as client:
        answers = []
        for _ in range(COUNT + 1):
            began = time.monotonic()
            answers.append(client.post(RANK, json=sleepy))
            assert time.monotonic() - began < 6
            if len(answers) == 1:
                assert client.post(CHAT, json=body(png[0])).status_code == 200, "at once"
        assert {answer.status_code for answer in answers} == {504}
        assert answers[0].json()["error"]["message"] == "no answer within 3 s"


def test_a_client_that_leaves_frees_its_decoder(
    model_folder: Path, png: list[Path], sleepy: dict[str, Any]
) -> None:
    app = create_app({"a": greedy_engine(model_folder)})
    with running(app) as address:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(address + RANK, json=sleepy, timeout=1)
        (process,) = busy(app) or [None]
        wait_for(lambda: not busy(app))
        assert process is None or process.poll() is not None
        assert httpx.post(address + CHAT, json=body(png[0]), timeout=30).status_code == 200


def test_a_decoder_that_is_killed_is_replaced(
    model_folder: Path, png: list[Path], sleepy: dict[str, Any]
) -> None:
    app = create_app({"a": greedy_engine(model_folder)})
    with TestClient(app) as client:

        def kill() -> None:
            wait_for(lambda: busy(app))
            busy(app)[0].kill()

        thread = threading.Thread(target=kill)
        thread.start()
        answer = client.post(RANK, json=sleepy)
        thread.join()
        assert answer.status_code == 503
        assert "its decoder has ended" in answer.json()["error"]["message"]
        assert client.post(CHAT, json=body(png[0])).status_code == 200
        processes = [one.process for one in app.state.service.decoders._idle]
    assert all(process.poll() is not None for process in processes), "they end with the server"


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 4), np.uint8)
    made = {}
    for name, mode in (("PNG", "RGBA"), ("BMP", "L"), ("JPEG", "CMYK"), ("GIF", "P")):
        file = io.BytesIO()
        Image.fromarray(pixels).convert("RGB").convert(mode).save(file, name)
        made[name] = file.getvalue()
    file = io.BytesIO()
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 9).save(file, "PNG")
    return {**made, "deep": file.getvalue()}


def test_the_pixels_are_those_of_the_same_file_elsewhere(files: dict[str, bytes]) -> None:
    async def decode() -> None:
        decoders = Decoders()
        for name, data in files.items():
            for window in ("auto", "full", (10.0, 700.0)):
                got = await decoders.decode(data, 10_000, "a", window, time.monotonic() + 60)
                assert got.tobytes() == decode_image(data, "a", window).tobytes(), name
        for data, status in ((b"no image", 400), (files["PNG"][:-2000], 400)):
            with pytest.raises(BadImage) as refused:
                await decoders.decode(data, 10_000, "a", "auto", time.monotonic() + 60)
            assert refused.value.status == status
        with pytest.raises(BadImage, match="more than 1000 pixels"):
            await decoders.decode(files["PNG"], 1000, "a", "auto", time.monotonic() + 60)
        long = io.BytesIO()
        Image.new("1", (1, MAX_SIDE + 1)).save(long, "PNG")
        with pytest.raises(BadImage, match="more than 65536 pixels a side"):
            await decoders.decode(long.getvalue(), 1 << 20, "a", "auto", time.monotonic() + 60)
        assert len(decoders._idle) == 1, "one process did it all"
        decoders.close()

    asyncio.run(decode())


def test_what_a_hostile_decoder_may_answer() -> None:
    for answer in (
        b"",
        b"[]\n",
        b'{"bytes": -1}\n',
        b'{"bytes": 99}\n',
        b'{"bytes": 5}\nab',
        b"{\n",
    ):
        with pytest.raises((EOFError, ValueError, LookupError, TypeError)):
            read_message(io.BytesIO(answer), 10)


def test_the_process_does_without_torch() -> None:
    code = f"import sys, {decoder.__name__}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
