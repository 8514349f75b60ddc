"""The same question gets the same answer from the command line, from Python and over HTTP."""

import json
from pathlib import Path
from typing import Any

import pytest

import instructblip
from instructblip.cli import main as cli
from instructblip.core.terminal import escape
from instructblip.serving.api import create_app
from tests.conftest import TestClient, body
from tests.testing import QUESTION, write_model

# The command line's name of a setting -> that of HTTP, where it is another.
OVER_HTTP = {"max_new_tokens": "max_tokens", "min_new_tokens": "min_tokens"}


@pytest.fixture(scope="module", params=["stored", "nothing stored"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_model(tmp_path_factory.mktemp("same"), "instructblip")
    file = folder / "generation_config.json"
    stored = json.loads(file.read_text())
    if request.param == "nothing stored":
        stored = {"eos_token_id": stored["eos_token_id"]}
    file.write_text(json.dumps(stored))
    return folder


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_beams": 3, "max_new_tokens": 12, "length_penalty": -1.0},
        {"num_beams": 1, "max_new_tokens": 9, "min_new_tokens": 9, "repetition_penalty": 1.0},
        {"temperature": 0.0, "max_new_tokens": 6},
    ],
)
def test_all_three_give_one_answer(
    folder: Path, png: list[Path], settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    engine = instructblip.load(folder, device="cpu")
    expected = engine.answer(png[0], QUESTION, **settings)

    options = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    command = ["answer", "--model", str(folder), "--image", str(png[0]), "--instruction", QUESTION]
    with pytest.raises(SystemExit) as stop:
        cli.main([*command, *options])
    assert not stop.value.code
    assert capsys.readouterr().out == escape(expected) + "\n"

    given = {OVER_HTTP.get(name, name): value for name, value in settings.items()}
    with TestClient(create_app({"tuned": engine})) as client:
        reply = client.post("/v1/chat/completions", json=body(png[0], QUESTION, **given))
    assert reply.json()["choices"][0]["message"]["content"] == expected


def test_a_quantized_model_gives_one_answer(
    folder: Path, png: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"num_beams": 1, "max_new_tokens": 9, "min_new_tokens": 9}
    expected = instructblip.load(folder, quantize="nf4").answer(png[0], QUESTION, **settings)
    assert expected != instructblip.load(folder).answer(png[0], QUESTION, **settings)
    options = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    command = ["answer", "--model", str(folder), "--image", str(png[0]), "--instruction", QUESTION]
    with pytest.raises(SystemExit):
        cli.main([*command, *options, "--quantize", "nf4"])
    assert capsys.readouterr().out == escape(expected) + "\n"


def test_all_three_refuse_the_same(folder: Path, png: list[Path]) -> None:
    engine = instructblip.load(folder, device="cpu")
    command = ["answer", "--image", str(png[0]), "--instruction", QUESTION, "--debug"]
    with TestClient(create_app({"tuned": engine})) as client:
        for name, value in (
            ("num_beams", 101),
            ("repetition_penalty", 11.0),
            ("length_penalty", -11.0),
            ("top_p", 1.5),
            ("temperature", 3.0),
        ):
            with pytest.raises(ValueError, match=name):
                engine.answer(png[0], QUESTION, **{name: value})
            with pytest.raises(ValueError, match=name):
                cli.main([*command, f"--{name.replace('_', '-')}={value}"])
            reply = client.post(
                "/v1/chat/completions", json=body(png[0], QUESTION, **{name: value})
            )
            assert reply.status_code == 422
            assert name in reply.json()["error"]["message"]
        more = client.post("/v1/chat/completions", json=body(png[0], QUESTION, num_beams=9))
        assert more.status_code == 422
        assert "num_beams: 9 beams; this server allows 8" in more.json()["error"]["message"]
