"""The server: OpenAI's client, its limits, and that nothing leaks."""

import asyncio
import base64
import contextlib
import http.server
import json
import socket
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from fastapi import HTTPException
from PIL import Image
from pydantic import ValidationError

from instructblip.cli import main as cli
from instructblip.data import tokens
from instructblip.data.templates import Dialogue, Rendered
from instructblip.evaluation.calibration import Calibration, CandidateMap
from instructblip.inference.chat import instruction_of
from instructblip.inference.engine import Engine
from instructblip.serving import bodies, connections, incoming
from instructblip.serving.api import create_app
from instructblip.serving.batching import Batcher, Job, QueueFull, TooLate
from instructblip.serving.bodies import parse
from instructblip.serving.completions import read_messages, stream_events
from instructblip.serving.config import ServeConfig
from instructblip.serving.schema import ChatRequest, RankRequest
from tests.conftest import TestClient, body, data_url, greedy_engine, running
from tests.data.test_cost import many_scans

CHAT = "/v1/chat/completions"
TEXT = "what is red?"


@pytest.fixture(scope="module")
def engine(model_folder: Path) -> Engine:
    """A second copy, whose answers are compared with those of the server."""
    return greedy_engine(model_folder)


@pytest.fixture(scope="module")
def client(model_folder: Path, blip2_folder: Path) -> Iterator[TestClient]:
    engines = {"tuned": greedy_engine(model_folder), "blip2": greedy_engine(blip2_folder)}
    config = ServeConfig(
        max_body_bytes=300_000, max_picture_bytes=100_000, max_pixels=20_000, max_tokens=16
    )
    with TestClient(create_app(engines, config), raise_server_exceptions=False) as client:
        yield client


def ask(client: TestClient, request: dict[str, Any]) -> str:
    response = client.post(CHAT, json=request)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


def error_of(response: Any, status: int) -> str:
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    assert response.json()["error"]["type"]
    return response.json()["error"]["message"]


def test_the_openai_client_gets_answers(
    model_folder: Path, engine: Engine, png: list[Path]
) -> None:
    with running(create_app({"tuned": greedy_engine(model_folder)})) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0)
        assert [model.id for model in client.models.list()] == ["tuned"]
        talkative = max(png, key=lambda p: len(engine.answer(p, TEXT, max_new_tokens=40)))
        messages: Any = body(talkative)["messages"]
        whole = client.chat.completions.create(model="tuned", messages=messages)
        expected = engine.answer(talkative, TEXT)
        assert whole.choices[0].message.content == expected
        assert whole.choices[0].finish_reason in ("stop", "length")
        assert whole.usage is not None
        assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
        pieces = list(
            client.chat.completions.create(
                model="tuned",
                messages=messages,
                max_tokens=40,
                stream=True,
                stream_options={"include_usage": True},
            )
        )
        texts = [c.choices[0].delta.content or "" for c in pieces if c.choices]
        assert "".join(texts) == engine.answer(talkative, TEXT, max_new_tokens=40)
        assert len([piece for piece in texts if piece]) > 1
        assert pieces[-1].usage is not None
        with pytest.raises(openai.NotFoundError, match="no model of that name; there are tuned"):
            client.chat.completions.create(model="gpt", messages=messages)


NEUTRAL: dict[str, Any] = {
    "n": 1,
    "frequency_penalty": 0,
    "presence_penalty": 0.0,
    "logit_bias": {},
    "logprobs": False,
    "response_format": {"type": "text"},
    "modalities": ["text"],
    "tools": [],
    "tool_choice": "none",
    "parallel_tool_calls": True,
    "store": False,
    "metadata": {},
    "service_tier": "auto",
    "seed": 7,
    "stop": None,
    "user": "me",
    "stream_options": None,
}
"""What clients that fill in OpenAI's defaults send."""


def test_the_defaults_of_openai_change_nothing(
    model_folder: Path, engine: Engine, png: list[Path]
) -> None:
    with running(create_app({"tuned": greedy_engine(model_folder)})) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0)
        messages: Any = body(png[0])["messages"]
        for settings in (NEUTRAL, dict.fromkeys(NEUTRAL)):
            more: Any = settings
            reply = client.chat.completions.create(model="tuned", messages=messages, **more)
            assert reply.choices[0].message.content == engine.answer(png[0], TEXT)


@pytest.mark.parametrize(
    ("field", "value", "neutral"),
    [
        ("n", 2, "1"),
        ("frequency_penalty", 0.5, "0"),
        ("presence_penalty", -1, "0"),
        ("logit_bias", {"5": 1}, "{}"),
        ("response_format", {"type": "json_object"}, '{"type": "text"}'),
        ("tools", [{"type": "function"}], "[]"),
        ("tool_choice", "required", '"none" or "auto"'),
    ],
)
def test_what_the_server_does_not_have_is_refused(
    client: TestClient, png: list[Path], field: str, value: Any, neutral: str
) -> None:
    message = error_of(client.post(CHAT, json=body(png[0], **{field: value})), 422)
    expected = f"{field}: this server has no such setting; leave it out, or send {neutral}"
    assert message == expected


def test_the_likelihood_of_an_answer_about_other_images(
    model_folder: Path, engine: Engine, png: list[Path]
) -> None:
    image, *others = png
    app = create_app({"tuned": greedy_engine(model_folder)}, others=others)
    expected = engine.answer(image, TEXT, details=True, blind=others)
    with TestClient(app) as client:
        answer = client.post(CHAT, json=body(image, logprobs=True)).json()
        known = answer["choices"][0]["logprobs"]
        assert answer["choices"][0]["message"]["content"] == expected.text
        assert known["log_likelihood"] == pytest.approx(expected.log_prob, abs=1e-4)
        assert known["blind_log_likelihood"] == pytest.approx(expected.blind_log_prob, abs=1e-4)
        assert known["blind_log_likelihood"] != pytest.approx(known["log_likelihood"], abs=1e-3)
        assert client.post(CHAT, json=body(image)).json()["choices"][0]["logprobs"] is None


def test_log_probabilities_are_those_of_the_engine(
    model_folder: Path, engine: Engine, png: list[Path]
) -> None:
    with running(create_app({"tuned": greedy_engine(model_folder)})) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="any", max_retries=0)
        talkative = max(png, key=lambda p: len(engine.answer(p, TEXT, max_new_tokens=40)))
        messages: Any = body(talkative)["messages"]
        expected = engine.answer(talkative, TEXT, details=True, max_new_tokens=40)
        asked: Any = {"model": "tuned", "messages": messages, "max_tokens": 40}
        asked |= {"logprobs": True, "top_logprobs": 3}
        choice = client.chat.completions.create(**asked).choices[0]
        assert choice.logprobs is not None
        assert choice.logprobs.content is not None
        content = choice.logprobs.content
        assert "".join(token.token for token in content) == choice.message.content
        length = len(expected.tokens) - (expected.finish_reason == "stop")
        given = [token.logprob for token in content]
        assert given == pytest.approx([t.log_prob for t in expected.tokens[:length]], abs=1e-4)
        whole: Any = choice.logprobs
        assert whole.log_likelihood == pytest.approx(expected.log_prob, abs=1e-4)
        assert whole.confidence is None
        assert whole.blind_log_likelihood is None
        for token in content:  # penalties change what is chosen, and no log-probability
            others = [other.logprob for other in token.top_logprobs]
            assert len(others) == 3
            assert sorted(others, reverse=True) == others
            assert others[0] >= token.logprob - 1e-5
        assert content[0].top_logprobs[0].logprob == pytest.approx(content[0].logprob, abs=1e-5)
        pieces = list(client.chat.completions.create(**asked, stream=True))
        last = pieces[-1].choices[0]
        assert last.finish_reason == choice.finish_reason
        assert last.logprobs is not None
        assert last.logprobs.content is not None
        streamed = [token.logprob for token in last.logprobs.content]
        assert streamed == pytest.approx(given, abs=1e-5)
        with pytest.raises(openai.UnprocessableEntityError, match="top_logprobs needs logprobs"):
            client.chat.completions.create(model="tuned", messages=messages, top_logprobs=3)
        assert choice.message.content is not None
        stop = choice.message.content[3:5]
        cut = client.chat.completions.create(**asked, stop=stop).choices[0]
        assert cut.logprobs is not None
        assert cut.logprobs.content is not None
        assert len(cut.logprobs.content) < len(content)


def test_a_seed_samples_the_same_answer_again(client: TestClient, png: list[Path]) -> None:
    def sampled(seed: int) -> str:
        return ask(client, body(png[0], temperature=2.0, seed=seed))

    assert sampled(1) == sampled(1)
    assert len({sampled(seed) for seed in range(6)}) > 1
    with ThreadPoolExecutor(4) as pool:  # beside others, with which it shares no batch
        others = [pool.submit(sampled, seed) for seed in (5, 1, 6, 1)]
        assert others[1].result() == others[3].result() == sampled(1)
    assert len({ask(client, body(png[0], temperature=2.0)) for _ in range(6)}) > 1


def test_stop_texts_end_an_answer(client: TestClient, engine: Engine, png: list[Path]) -> None:
    image = max(png, key=lambda p: len(engine.answer(p, TEXT, max_new_tokens=14)))
    whole = engine.answer(image, TEXT, max_new_tokens=14)
    assert len(whole) > 6
    late, early = whole[4:6], whole[2:4]
    usage = client.post(CHAT, json=body(image, TEXT, max_tokens=14)).json()["usage"]
    for stop in (early, [early], ["\N{SNOWMAN}", early], [late, early, late + "\N{SNOWMAN}"]):
        request = body(image, TEXT, max_tokens=14, stop=stop)
        answer = client.post(CHAT, json=request).json()
        reply, expected = answer["choices"][0], whole[: whole.index(early)]
        assert answer["usage"]["completion_tokens"] < usage["completion_tokens"]
        assert (reply["message"]["content"], reply["finish_reason"]) == (expected, "stop")
        lines = client.post(CHAT, json=request | {"stream": True}).text.split("\n\n")[:-2]
        deltas = [json.loads(line.removeprefix("data: "))["choices"][0] for line in lines]
        assert "".join(each["delta"].get("content", "") for each in deltas) == expected
        assert deltas[-1]["finish_reason"] == "stop"
    assert ask(client, body(image, TEXT, max_tokens=14, stop="\N{SNOWMAN}")) == whole
    for wrong in ("", ["a"] * 5, [""], 3):
        assert "stop" in error_of(client.post(CHAT, json=body(image, stop=wrong)), 422)


def test_a_stream_holds_back_what_may_become_a_stop_text() -> None:
    sent: list[str] = []
    job = Job(pixels=(), instruction="", stop=("abc", "b!"))
    job.listen(sent.append)
    for piece in ("x", "a", "b", "d", "ab"):
        job.send(piece)
    assert sent == ["x", "abd"]
    job.send("", last=True)
    assert sent == ["x", "abd", "ab"]
    job = Job(pixels=(), instruction="", stop=("abc", "b"))
    assert job.cut("xabc") == "xa"  # complete first


def test_settings_of_a_request(client: TestClient, engine: Engine, png: list[Path]) -> None:
    text = TEXT
    longer = ask(client, body(png[0], text, max_tokens=14))
    assert longer == engine.answer(png[0], text, max_new_tokens=14)
    beams = ask(client, body(png[1], text, num_beams=3, length_penalty=-1.0))
    assert beams == engine.answer(png[1], text, num_beams=3, length_penalty=-1.0)
    capped = client.post(CHAT, json=body(png[0], text, max_tokens=5000, min_tokens=16)).json()
    assert capped["usage"]["completion_tokens"] == 16
    assert capped["choices"][0]["finish_reason"] == "length"
    drawn = {ask(client, body(png[0], text, temperature=2.0)) for _ in range(6)}
    assert len(drawn) > 1
    assert ask(client, body(png[0], text, model="blip2")) != ask(client, body(png[0], text))


def test_turns_and_several_images(client: TestClient, engine: Engine, png: list[Path]) -> None:
    first = body(png[0], "what?")["messages"][0]
    second = body(png[1], "and red?")["messages"][0]
    messages = [
        {"role": "system", "content": "Be short."},
        first,
        {"role": "assistant", "content": "cat"},
        second,
    ]
    asked = "Be short. " + instruction_of("and red?\n<image>", [("what?", "cat")]).prompt
    assert ask(client, {"messages": messages}) == engine.answer([[png[0], png[1]]], asked)[0]
    assert "last one must be of the user" in error_of(
        client.post(CHAT, json={"messages": messages[:-1]}), 400
    )


def test_a_chat_model_reads_the_messages_of_a_request() -> None:
    request = ChatRequest.model_validate(
        {
            "messages": [
                {"role": "developer", "content": "Be short."},
                {"role": "user", "content": "What?\n<image>"},
                {"role": "assistant", "content": "A cat."},
                {"role": "user", "content": "Red?"},
            ]
        }
    )
    instruction, _ = read_messages(request.messages)
    assert instruction.dialogue == Dialogue("Red?", (("What?", "A cat."),), "Be short.")


def test_parts_keep_the_order_of_texts_and_images(
    client: TestClient, engine: Engine, png: list[Path]
) -> None:
    def request(*parts: str | Path) -> dict[str, Any]:
        content = [
            {"type": "text", "text": part}
            if isinstance(part, str)
            else {"type": "image_url", "image_url": {"url": data_url(part)}}
            for part in parts
        ]
        return {"messages": [{"role": "user", "content": content}], "max_tokens": 12}

    def answer(text: str, *images: Path) -> str:
        return engine.answer([list(images)], text, max_new_tokens=12)[0]

    first, second = png[:2]
    mixed = ask(client, request("is", first, "red or", second, "?"))
    assert mixed == answer("is\n<image>\nred or\n<image>\n?", first, second)
    assert mixed != answer("is\nred or\n?", first, second)
    assert ask(client, request("is", second, "red or", first, "?")) != mixed
    # Marks of the text instead of the parts, and images that are all in front or all behind.
    written = request(first, second, "is <image> red or <image>?")
    assert ask(client, written) == answer("is <image> red or <image>?", first, second)
    front = answer("what is red?", first)
    assert ask(client, request(first, "what is red?")) == front
    assert ask(client, request("what is red?", first)) == front
    many = client.post(CHAT, json=request(first, "is <image> red or <image>?"))
    assert "2 <image> and there are 1 images" in error_of(many, 400)
    ranked = {"images": [data_url(first)], "candidates": ["a"], "instruction": "<image><image>"}
    assert "there are 1 images" in error_of(client.post("/v1/rank", json=ranked), 400)


def test_lost_prompt_tokens_are_reported(
    client: TestClient, engine: Engine, png: list[Path]
) -> None:
    most = engine.tokens.max_prompt
    for text, lost in (("a", 0), (" ".join("a" * (most + 7)), None)):
        if lost is None:
            lost = engine.tokens.prompt_length(text) - most
            assert lost > 5
        response = client.post(CHAT, json=body(png[0], text, max_tokens=3))
        assert response.status_code == 200, response.text
        assert response.json()["usage"]["prompt_tokens_lost"] == lost
        request = {"images": [url_of(png[0].read_bytes())], "candidates": ["a", "b"]}
        ranked = client.post("/v1/rank", json={**request, "instruction": text}).json()
        assert ranked["prompt_tokens_lost"] == lost


def test_explain(client: TestClient, engine: Engine, png: list[Path]) -> None:
    request = {"images": [data_url(png[0])], "instruction": TEXT, "answer": "red cat"}
    reply = client.post("/v1/explain", json=request).json()
    expected = engine.explain(png[0], TEXT, "red cat")
    assert (reply["answer"], reply["words"]) == ("red cat", ["red", "cat"])
    assert reply["log_likelihoods"] == pytest.approx(expected.scores, abs=1e-4)
    (image,) = reply["images"]
    assert np.asarray(image["words"]) == pytest.approx(expected.maps.numpy(), abs=1e-5)
    assert np.asarray(image["whole"]) == pytest.approx(expected.whole.numpy(), abs=1e-5)
    own = client.post("/v1/explain", json={**request, "answer": None, "method": "gradient"}).json()
    assert own["answer"] == engine.answer(png[0], TEXT)
    assert own["method"] == "gradient"
    video = {**request, "images": [data_url(path) for path in png[:2]]}
    assert len(client.post("/v1/explain", json=video).json()["images"]) == 2
    empty = client.post("/v1/explain", json={**request, "answer": " "})
    assert "give the answer to explain" in error_of(empty, 400)
    wrong = client.post("/v1/explain", json={**request, "method": "guess"})
    assert "method" in error_of(wrong, 422)


def test_an_explanation_stops_when_nobody_waits(engine: Engine, png: list[Path]) -> None:
    passes = []

    def on_pass() -> None:
        passes.append(1)
        if len(passes) == 2:
            raise InterruptedError

    text = Rendered(TEXT, TEXT, "red")
    with pytest.raises(InterruptedError):
        engine.explain_sample(engine.samples(png[0], [text])[0], "occlusion", on_pass)
    assert len(passes) == 2


def test_rank(client: TestClient, engine: Engine, png: list[Path]) -> None:
    candidates = ["red", "blue", "red cat"]
    request = {"images": [data_url(png[0])], "instruction": "what?", "candidates": candidates}
    ranked = client.post("/v1/rank", json=request).json()
    expected = engine.rank(png[0], "what?", candidates)
    scores = [c["log_likelihood"] for c in ranked["candidates"]]
    assert scores == pytest.approx(expected, abs=1e-4)
    assert sum(c["probability"] for c in ranked["candidates"]) == pytest.approx(1)
    assert ranked["best"] == candidates[scores.index(max(scores))]
    assert not ranked["calibrated"]
    refused = client.post("/v1/rank", json={**request, "coverage": 0.9})
    assert "coverage: this model has no calibration of candidates" in error_of(refused, 400)
    many = client.post("/v1/rank", json={**request, "candidates": ["a"] * 300})
    assert "300 candidates; at most 256" in error_of(many, 413)
    long = client.post("/v1/rank", json={**request, "candidates": ["a" * 1000] * 33})
    assert "33000 characters in all; at most 32000" in error_of(long, 413)


def test_a_calibrated_model_ranks_in_sets(model_folder: Path, png: list[Path]) -> None:
    plain = greedy_engine(model_folder)
    fitted = CandidateMap(
        samples=100, temperature=9.0, misfits=(0.9,) * 95 + (9.0,) * 5, abstain_below=None
    )
    known = Calibration(model="any", sets={"toy val": 100}, candidates=fitted)
    engine = Engine(plain.model, plain.tokens, plain.images, plain.decoding, calibration=known)
    names = ["red", "blue", "red cat"]
    request = {"images": [data_url(png[0])], "instruction": "what?", "candidates": names}
    expected = engine.rank(png[0], "what?", names, details=True)
    with TestClient(create_app({"tuned": engine})) as client:
        for coverage in (0.9, 0.99):
            answer = client.post("/v1/rank", json={**request, "coverage": coverage}).json()
            assert answer["calibrated"]
            chances = [c["probability"] for c in answer["candidates"]]
            assert chances == pytest.approx([c.probability for c in expected], abs=1e-5)
            assert answer["answer_set"] == engine.answer_set(png[0], "what?", names, coverage)
        assert client.post("/v1/rank", json=request).json()["answer_set"] is None
        by_mean = {**request, "coverage": 0.9, "normalization": "mean"}
        assert "coverage: it needs the sum" in error_of(client.post("/v1/rank", json=by_mean), 400)
        wrong = client.post("/v1/rank", json={**request, "coverage": 1.0})
        assert "coverage" in error_of(wrong, 422)


def test_health_metrics_and_description(client: TestClient, png: list[Path]) -> None:
    assert client.get("/healthz").json() == {
        "status": "ok",
        "models": ["tuned", "blip2"],
        "waiting": 0,
    }
    ask(client, body(png[0]))
    text = client.get("/metrics").text
    assert f'instructblip_requests_total{{route="{CHAT}",status="200"}}' in text
    assert "instructblip_batch_size_bucket" in text
    client.get("/secret/path")
    assert "secret" not in client.get("/metrics").text
    assert client.get("/docs").status_code == 404, "its page would need a network"
    paths = client.get("/openapi.json").json()["paths"]
    assert {CHAT, "/v1/rank", "/healthz", "/metrics", "/v1/models"} <= set(paths)


def png_of(width: int, height: int) -> bytes:
    """A PNG whose header states any size, with no pixels behind it."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def url_of(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def bad_images(png: Path) -> list[tuple[str, int, str]]:
    whole = png.read_bytes()
    svg = b'<svg xmlns="http://www.w3.org/2000/svg"/>'
    return [
        ("file:///etc/passwd", 400, "expected data:image"),
        ("http://example.com/a.png", 400, "expected data:image"),
        ("https://example.com/a.png", 403, "not fetched from there"),
        ("https://user@[::1]:99999/", 400, "not a URL"),
        ("data:image/png;base64", 400, "begins with data:image/...;base64,"),
        ("data:image/png;base64,!!!", 400, "not base64"),
        ("data:image/png;base64,", 400, "not an image"),
        ("data:image/png,%89PNG", 400, "begins with data:image/...;base64,"),
        (url_of(svg), 400, "not an image"),
        (url_of(whole[: len(whole) // 2]), 400, "damaged or cut off"),
        (url_of(png_of(60_000, 60_000)), 413, "more than 20000 pixels"),
        (url_of(png_of(200, 200)), 413, "more than 20000 pixels"),
        (url_of(png_of(0, 4)), 400, ""),
        (url_of(b"\x00" * 110_000), 413, "more than 100000 bytes"),
        (url_of(many_scans(91)), 400, "101 scans; expected at most 100; save the image again"),
    ]


def test_bad_images_are_refused_by_place(client: TestClient, png: list[Path]) -> None:
    for url, status, message in bad_images(png[0]):
        request = body(png[0])
        request["messages"][0]["content"][1]["image_url"]["url"] = url
        text = error_of(client.post(CHAT, json=request), status)
        assert message in text
        assert text.startswith("messages, image 1: "), text
    nine = {"images": [data_url(png[0])] * 9, "instruction": "a", "candidates": ["a"]}
    assert "9 images; at most 8" in error_of(client.post("/v1/rank", json=nine), 413)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"messages": []}',
        b'{"messages": [{"role": "user", "content": "x", "name": 3}]}',
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
        b'{"messages": [{"role": "user", "content": "x"}], "\\ud800": 1}',
        b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": 1e400}',
        b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": ' + b"9" * 5000 + b"}",
        b"[" * 100_000,
        b"\xff\xfe\x00",
    ],
)
def test_malformed_bodies(client: TestClient, content: bytes) -> None:
    response = client.post(CHAT, content=content, headers={"content-type": "application/json"})
    assert response.status_code in (400, 422), response.text
    assert "/" not in response.json()["error"]["message"], "a path"


def test_unknown_fields_and_missing_parts(client: TestClient, png: list[Path]) -> None:
    unknown = error_of(client.post(CHAT, json=body(png[0], top_k=3)), 422)
    assert unknown == "top_k: this server does not know the field; leave it out"
    only = {"messages": [{"role": "user", "content": "what?"}]}
    assert "no image" in error_of(client.post(CHAT, json=only), 400)
    assert "no text" in error_of(client.post(CHAT, json=body(png[0], " ")), 400)
    assert "min_tokens" in error_of(client.post(CHAT, json=body(png[0], min_tokens=99)), 400)
    error_of(client.get("/nowhere"), 404)
    error_of(client.get(CHAT), 405)


@pytest.mark.parametrize(
    ("part", "place"),
    [
        ({"type": "image_url", "image_url": "data:,"}, "parts.0.image_url.image_url: Input should"),
        ({"type": "image_url", "image_url": {"url": "a", "detail": "best"}}, "image_url.detail"),
        ({"type": "picture"}, "parts.0: Input tag 'picture' found"),
        ({"text": "a"}, "parts.0: Unable to extract tag"),
        ({"type": "text", "text": "a" * 16_001}, "parts.0.text.text: String should have at most"),
        ("a", "content.parts.0: Input should be"),
    ],
)
def test_an_error_in_a_part_names_the_part(client: TestClient, part: Any, place: str) -> None:
    request = {"messages": [{"role": "user", "content": [part]}]}
    assert place in error_of(client.post(CHAT, json=request), 422)
    for content, message in ((None, "a text or a list of parts"), ("a" * 16_001, "at most 16000")):
        request = {"messages": [{"role": "user", "content": content}]}
        assert message in error_of(client.post(CHAT, json=request), 422)


def test_the_smallest_temperatures_search(client: TestClient, png: list[Path]) -> None:
    assert ask(client, body(png[0], temperature=1e-300)) == ask(client, body(png[0], temperature=0))
    ask(client, body(png[0], temperature=1e-3))


def test_large_bodies_stop_at_the_limit_whatever_their_header_says(client: TestClient) -> None:
    assert "larger than 300000" in error_of(client.post(CHAT, content=b"x" * 300_001), 413)
    pulled, sent = 0, []

    async def receive() -> Any:
        nonlocal pulled
        pulled += 1
        return {"type": "http.request", "body": b" " * 10_000, "more_body": True}

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(client.app(scope_of(CHAT), receive, send))  # type: ignore[arg-type]
    assert sent[0]["status"] == 413
    assert pulled == 31
    long = scope_of(CHAT, (b"content-length", b"9999999"))
    asyncio.run(client.app(long, receive, send))  # type: ignore[arg-type]
    assert pulled == 31, "a body whose header states that it is too large is not read at all"
    assert sent[2]["status"] == 413


def scope_of(path: str, *headers: tuple[bytes, bytes]) -> dict[str, Any]:
    """What a server hands to the application for a POST."""
    scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode()}
    kind = (b"content-type", b"application/json")
    return {**scope, "query_string": b"", "headers": [kind, *headers]}


def test_api_keys(model_folder: Path, png: list[Path]) -> None:
    config = ServeConfig(api_keys=("first", "second"))
    assert "first" not in repr(config)
    with TestClient(create_app({"tuned": greedy_engine(model_folder)}, config)) as client:
        for headers in ({}, {"Authorization": "Bearer third"}, {"Authorization": "Basic first"}):
            assert client.post(CHAT, json=body(png[0]), headers=headers).status_code == 401
            assert client.get("/metrics", headers=headers).status_code == 401
        good = {"Authorization": "Bearer second"}
        assert client.post(CHAT, json=body(png[0]), headers=good).status_code == 200
        assert client.get("/healthz").status_code == 200


class Slow:
    """An engine that needs whole batches, and generates tokens until ``free`` is set."""

    def __init__(self, engine: Engine) -> None:
        self.__dict__.update(engine=engine, free=threading.Event(), sizes=[], can_join=False)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def respond(self, samples: Any, decoding: Any, on_tokens: Any) -> Any:
        self.sizes.append(len(samples))
        while not self.free.wait(0.02):
            on_tokens([5] * len(samples))
        return self.engine.respond(samples, decoding)


def jobs_of(engine: Engine, png: list[Path], **more: Any) -> list[Job]:
    transform = engine.images.transform
    return [
        Job(pixels=(transform(Image.open(p).convert("RGB")),), instruction="what?", **more)
        for p in png
    ]


def wait_for(condition: Any) -> None:
    until = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def test_waiting_jobs_run_together_and_a_full_queue_refuses(
    engine: Engine, png: list[Path]
) -> None:
    slow: Any = Slow(engine)
    batcher = Batcher(slow, max_batch=3, max_queue=4)
    first, *others = [batcher.submit(job) for job in jobs_of(engine, png)[:1]]
    wait_for(lambda: slow.sizes == [1])
    waiting = jobs_of(engine, [*png])
    others = [batcher.submit(job) for job in waiting]
    with pytest.raises(QueueFull):
        batcher.submit(jobs_of(engine, png)[0])
    slow.free.set()
    expected = engine.answer(png, "what?")
    assert [future.result(10).text for future in others] == expected
    assert first.result(10).text == expected[0]
    assert slow.sizes == [1, 3, 1]
    batcher.close()
    with pytest.raises(QueueFull):
        batcher.submit(jobs_of(engine, png)[0])


def test_waiting_and_running_jobs_time_out(engine: Engine, png: list[Path]) -> None:
    slow: Any = Slow(engine)
    batcher = Batcher(slow, max_batch=1)
    runs, waits, stays = jobs_of(engine, png[:3])
    runs.deadline = waits.deadline = time.monotonic() + 0.2
    for job in (runs, waits, stays):
        batcher.submit(job)
    with pytest.raises(TooLate):
        runs.future.result(10)
    with pytest.raises(TooLate):
        waits.future.result(10)
    slow.free.set()
    assert stays.future.result(10).text == engine.answer(png[2], "what?")
    batcher.close()


def test_ranking_stops_when_nobody_waits(engine: Engine, png: list[Path]) -> None:
    begun = []

    class Counting(Slow):
        def rank_samples(self, *arguments: Any) -> Any:
            *given, on_chunk = arguments

            def late() -> None:
                begun.append(1)
                job.leave()
                on_chunk()

            return self.engine.rank_samples(*given, late)

    counting: Any = Counting(engine)
    batcher = Batcher(counting)
    (job,) = jobs_of(engine, png[:1], candidates=tuple(f"{i}" + " word" * 50 for i in range(90)))
    with pytest.raises(TooLate):
        batcher.submit(job).result(10)
    assert begun == [1]
    batcher.close()


def test_a_request_that_fails_does_not_spoil_its_batch(engine: Engine, png: list[Path]) -> None:
    class Broken(Slow):
        def respond(self, samples: Any, decoding: Any, on_tokens: Any) -> Any:
            if any(sample.prompt_ids == bad for sample in samples):
                raise RuntimeError("out of memory")
            return super().respond(samples, decoding, on_tokens)

    bad = engine.tokens.prompt("bad")
    broken: Any = Broken(engine)
    batcher = Batcher(broken, max_batch=8)
    batcher.submit(jobs_of(engine, png[:1])[0])
    wait_for(lambda: broken.sizes)
    jobs = jobs_of(engine, png)
    jobs[1].instruction = "bad"
    futures = [batcher.submit(job) for job in jobs]
    broken.free.set()
    with pytest.raises(RuntimeError):
        futures[1].result(10)
    assert futures[2].result(10).text == engine.answer(png[2], "what?")
    batcher.close()


def test_429_and_504_over_http(engine: Engine, model_folder: Path, png: list[Path]) -> None:
    slow: Any = Slow(greedy_engine(model_folder))
    config = ServeConfig(max_batch=1, max_queue=1, timeout_s=1.0)
    app = create_app({"tuned": slow}, config)
    app.state.service.decoders.start()
    with TestClient(app) as client, ThreadPoolExecutor(6) as pool:
        sent = [pool.submit(client.post, CHAT, json=body(png[0]))]
        wait_for(lambda: slow.sizes)  # it runs; of the others one waits
        sent += [pool.submit(client.post, CHAT, json=body(png[0])) for _ in range(5)]
        codes = sorted(future.result().status_code for future in sent)
        assert codes == [429, 429, 429, 429, 504, 504]
        stream = client.post(CHAT, json=body(png[0], stream=True)).text
        assert "took too long" in stream
        assert stream.endswith("data: [DONE]\n\n")
        slow.free.set()
        assert ask(client, body(png[0])) == engine.answer(png[0], TEXT)
        refused = [f.result() for f in sent if f.result().status_code == 429]
        assert refused[0].headers["retry-after"] == "1"


def test_a_client_that_leaves_frees_the_model(model_folder: Path, png: list[Path]) -> None:
    slow: Any = Slow(greedy_engine(model_folder))
    with running(create_app({"tuned": slow})) as address, ThreadPoolExecutor(1) as pool:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(address + CHAT, json=body(png[0]), timeout=3)
        second = pool.submit(httpx.post, address + CHAT, json=body(png[1]), timeout=30)
        wait_for(lambda: slow.sizes == [1, 1])
        slow.free.set()
        assert second.result().status_code == 200
        assert 'route="/v1/chat/completions",status="499"' in httpx.get(f"{address}/metrics").text


def test_a_stream_reports_a_timeout_while_the_client_reads(engine: Engine, png: list[Path]) -> None:
    (job,) = jobs_of(engine, png[:1], deadline=time.monotonic() + 0.2)

    async def read() -> list[str]:
        service: Any = None  # used for the answer only, which never comes
        events = []
        async for event in stream_events(service, "tuned", job, ChatRequest(**body(png[0]))):
            if len(events) == 1:
                await asyncio.sleep(0.4)
            events.append(event)
            job.send("more")
        return events

    events = asyncio.run(read())
    assert "took too long" in events[-2]
    assert events[-1] == "data: [DONE]\n\n"
    assert job.gone


def test_unexpected_errors_reveal_nothing(model_folder: Path, png: list[Path]) -> None:
    engine: Any = Slow(greedy_engine(model_folder))
    engine.__dict__["respond"] = lambda *_args, **_kwargs: 1 / 0
    app = create_app({"tuned": engine})
    with TestClient(app, raise_server_exceptions=False) as client:
        assert error_of(client.post(CHAT, json=body(png[0])), 500) == "internal error"
        assert "internal error" in client.post(CHAT, json=body(png[0], stream=True)).text


def test_shutdown_finishes_admitted_requests(
    engine: Engine, model_folder: Path, png: list[Path]
) -> None:
    slow: Any = Slow(greedy_engine(model_folder))
    with ThreadPoolExecutor(1) as pool:
        with running(create_app({"tuned": slow})) as address:
            sent = pool.submit(httpx.post, address + CHAT, json=body(png[0]), timeout=20)
            wait_for(lambda: slow.sizes)
            threading.Timer(0.5, slow.free.set).start()
        answer = sent.result()
    assert answer.json()["choices"][0]["message"]["content"] == engine.answer(png[0], TEXT)


def test_slow_bodies_are_cut_off(model_folder: Path) -> None:
    app = create_app({"tuned": greedy_engine(model_folder)}, ServeConfig(timeout_s=0.3))
    sent: list[Any] = []

    async def receive() -> Any:
        await asyncio.sleep(30)

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(app(scope_of(CHAT), receive, send))  # type: ignore[arg-type]
    assert sent[0]["status"] == 408


def test_slow_bodies_keep_nobody_out(model_folder: Path, png: list[Path]) -> None:
    config = ServeConfig(max_batch=1, max_queue=1, timeout_s=20)
    app = create_app({"tuned": greedy_engine(model_folder)}, config)

    async def slow() -> None:
        given = [{"type": "http.request", "body": b"{", "more_body": True}]

        async def receive() -> Any:
            return given.pop() if given else await asyncio.sleep(30)

        await app(scope_of(CHAT), receive, receive)  # type: ignore[arg-type]

    async def ask() -> Any:
        others = [asyncio.create_task(slow()) for _ in range(9)]
        await asyncio.sleep(0.05)
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            answer = await client.post(CHAT, json=body(png[0]))
        for other in others:
            other.cancel()
        return answer

    assert asyncio.run(ask()).status_code == 200


def test_without_a_key_no_body_is_read(model_folder: Path) -> None:
    config = ServeConfig(api_keys=("first",))
    app = create_app({"tuned": greedy_engine(model_folder)}, config)
    sent: list[Any] = []

    async def receive() -> Any:
        raise AssertionError("read")

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(app(scope_of(CHAT), receive, send))  # type: ignore[arg-type]
    assert sent[0]["status"] == 401


PRIVATE = """127.0.0.1 10.1.2.3 169.254.169.254 192.168.0.1 0.0.0.0 224.0.0.1 100.64.0.1
::1 fd00::1 fe80::1%1 ::ffff:127.0.0.1 ::127.0.0.1 ::a00:1 64:ff9b::7f00:1 64:ff9b:1::7f00:1
2002:7f00:1:: 2002:a00:1:: fec0::1 2001:0:7f00:1::1 2001:db8::1 ff02::1"""


@pytest.mark.parametrize("address", PRIVATE.split())
def test_no_private_address_is_fetched(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    def resolve(*_args: Any, **_kwargs: Any) -> Any:
        public = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("93.184.215.14", 443))
        return [public, (socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 443))]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    with pytest.raises(OSError, match="not a public address"):
        incoming.public_address("pictures.example", 443)
    config = ServeConfig(image_hosts=("pictures.example",))
    with pytest.raises(incoming.BadImage, match="could not be fetched"):
        incoming.fetch("https://pictures.example/a.png", config, "here")


@pytest.mark.parametrize(
    "address", ["93.184.215.14", "2606:2800:21f::1", "64:ff9b::5db8:d70e", "::ffff:93.184.215.14"]
)
def test_public_addresses_are_fetched(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_a, **_k: [(0, 0, 0, "", (address, 443))])
    assert incoming.public_address("pictures.example", 443) == address


def test_images_of_a_listed_host_are_fetched(
    monkeypatch: pytest.MonkeyPatch, png: list[Path]
) -> None:
    content = png[0].read_bytes()
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append((self.path, self.headers["Host"]))
            moved = self.path == "/moved"
            self.send_response(302 if moved else 200)
            self.send_header("Location", "http://127.0.0.1/")
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_args: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    local = server.server_address
    # the checked connection is replaced: there is neither a network nor a certificate here
    connect = lambda *_args: socket.create_connection((local[0], local[1]))  # noqa: E731
    monkeypatch.setattr(incoming, "connect", connect)
    monkeypatch.setattr(incoming, "encrypt", lambda plain, _host: plain)
    config = ServeConfig(image_hosts=("pictures.example",), max_picture_bytes=len(content))
    data = incoming.read_url("https://pictures.example/a.png?b=1", config, "here")
    assert data == content
    assert asked == [("/a.png?b=1", "pictures.example")]
    with pytest.raises(incoming.BadImage, match="answered 302"):
        incoming.fetch("https://pictures.example/moved", config, "here")
    small = ServeConfig(image_hosts=("pictures.example",), max_picture_bytes=100)
    with pytest.raises(incoming.BadImage, match="more than 100 bytes"):
        incoming.fetch("https://pictures.example/a.png", small, "here")
    for url in ("https://other.example/", "https://a@pictures.example/", "https://127.0.0.1/"):
        with pytest.raises(incoming.BadImage, match="not fetched from there"):
            incoming.fetch(url, config, "here")
    server.shutdown()


SLOW = {
    "header": b"HTTP/1.1 200 OK\r\nX-Slow: ",
    "body": b"HTTP/1.1 200 OK\r\nContent-Length: 999999\r\n\r\n",
    "body without length": b"HTTP/1.1 200 OK\r\n\r\n",
    "chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nFFFF\r\n",
    "nothing": b"",
    "TLS": b"\x16\x03\x03\x40\x00\x02",
}


@pytest.mark.parametrize("what", SLOW)
def test_a_host_that_sends_byte_by_byte_is_left_at_the_deadline(
    monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Also in the middle of the handshake of TLS."""
    listening = socket.create_server(("127.0.0.1", 0))
    ended = threading.Event()

    def drip() -> None:
        peer, _ = listening.accept()
        with peer, contextlib.suppress(OSError):
            peer.sendall(SLOW[what])
            while not ended.wait(0.05):
                peer.sendall(b"a")

    threading.Thread(target=drip, daemon=True).start()
    address = listening.getsockname()
    monkeypatch.setattr(incoming, "public_address", lambda *_args: address[0])
    if what != "TLS":
        monkeypatch.setattr(incoming, "encrypt", lambda plain, _host: plain)
    config = ServeConfig(image_hosts=("pictures.example",), timeout_s=1.0)
    caught: list[Exception] = []

    def fetch() -> None:
        try:
            incoming.fetch(f"https://pictures.example:{address[1]}/a.png", config, "here")
        except incoming.BadImage as error:
            caught.append(error)

    thread = threading.Thread(target=fetch, daemon=True)
    thread.start()
    thread.join(20)
    ended.set()
    listening.close()
    assert not thread.is_alive(), "the fetch continues"
    assert "too slow" in str(caught[0])


def test_a_name_that_is_not_resolved_is_left_at_the_deadline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ended = threading.Event()

    def resolve(*_args: Any, **_kwargs: Any) -> Any:
        ended.wait(20)
        raise OSError

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    config = ServeConfig(image_hosts=("pictures.example",), timeout_s=0.2)
    with pytest.raises(incoming.BadImage, match="too slow"):
        incoming.fetch("https://pictures.example/a.png", config, "here")
    assert not ended.is_set()
    ended.set()


def test_the_command_passes_its_options_to_the_server(
    model_folder: Path,
    blip2_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    ran: list[tuple[Any, dict[str, Any]]] = []
    run = lambda app, host, port: ran.append((app, {"host": host, "port": port}))  # noqa: E731
    monkeypatch.setattr(connections, "run_server", run)
    keys = tmp_path / "keys.txt"
    first, second = "first-key-of-a-server", "second-key-of-a-server"
    keys.write_text(f"\ufeff{first}\n\n{second}\n", encoding="utf-8")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    options = f"--port {port} --max-queue 5 --max-batch 2 --timeout 9 --image-host A.example"
    options += " --no-page --allow-host Ask.Example"
    models = ["--model", str(model_folder), "--before", str(blip2_folder)]
    with pytest.raises(SystemExit) as stop:
        cli.main(["serve", *models, "--api-keys", str(keys), *options.split(), "--debug"])
    assert not stop.value.code
    ((app, settings),) = ran
    assert settings == {"host": "127.0.0.1", "port": port}
    assert connections.Server(app).config.timeout_graceful_shutdown == 8
    service = app.state.service
    assert list(service.batchers) == ["instructblip", "blip2"]
    assert not service.batchers["blip2"].engine.model.config.instruction_aware
    config = service.config
    assert (config.max_queue, config.max_batch, config.timeout_s) == (5, 2, 9.0)
    assert (config.api_keys, config.image_hosts) == ((first, second), ("a.example",))
    assert config.allowed_hosts == ("ask.example",)
    assert not [route for route in app.routes if getattr(route, "path", "") == "/page"]
    assert list(service.titles.values()) == [model_folder.name, blip2_folder.name]
    assert app.state.front == "/v1"
    with pytest.raises(SystemExit):
        cli.main(["serve", "--model", str(model_folder), "--host", "0.0.0.0", "--port", str(port)])
    assert ran[1][0].state.front == "/page"
    assert socket.gethostname().lower() in ran[1][0].state.service.config.allowed_hosts
    front = TestClient(ran[1][0]).get("/", follow_redirects=False)
    assert (front.status_code, front.headers["location"]) == (307, "/page")
    keys.write_text(" \n")
    with pytest.raises(ValueError, match=r"keys\.txt holds no keys; expected one a line"):
        cli.main(["serve", "--api-keys", str(keys), "--debug"])
    keys.write_text("long-enough-for-a-key\nbiology\n")
    with pytest.raises(ValueError, match="a key of 7 characters, which can be guessed"):
        cli.main(["serve", "--api-keys", str(keys), "--debug"])


def test_a_port_in_use_is_refused_before_the_model_loads(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(SystemExit, match="2"):
            cli.main(["serve", "--model", "absent", "--port", str(port)])
    printed = capsys.readouterr().err
    assert f"127.0.0.1:{port} cannot be listened on: Address already in use" in printed
    assert "choose another with --port" in printed
    assert printed.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--max-batch 0", "--max-batch: Input should be greater than 0; got 0"),
        ("--timeout nan", "--timeout: Input should be a finite number; got nan"),
        ("--timeout inf", "--timeout: Input should be a finite number; got inf"),
        ("--port 99999", "Invalid value for '--port'"),
    ],
)
def test_wrong_options_are_one_line(
    capsys: pytest.CaptureFixture[str], options: str, message: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(["serve", *options.split()])
    printed = capsys.readouterr().err
    assert message in printed
    assert "http" not in printed


def test_stream_is_sse(client: TestClient, png: list[Path]) -> None:
    lines = client.post(CHAT, json=body(png[0], stream=True)).text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert events[-1]["choices"][0]["finish_reason"] in ("stop", "length")
    assert len({event["id"] for event in events}) == 1


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"images": [0] * 200}, "images.0: Input should be a valid string"),
        ({"images": ["a"] * 65}, "images: List should have at most 64"),
        ({"candidates": [""] * 200}, "images: Field required"),
        ({f"key{n}": 0 for n in range(200)}, "key0: this server does not know the field"),
    ],
)
def test_a_request_of_many_errors_is_refused_at_the_first(
    client: TestClient, request_: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValidationError) as refused:
        RankRequest(**request_)
    assert len(refused.value.errors()) <= 4, "one for each field"
    assert message in error_of(client.post("/v1/rank", json=request_), 422)


def test_only_images_make_a_body_large(png: list[Path]) -> None:
    config = ServeConfig(max_json_bytes=1000, max_pictures=2)
    url = "data:image/png;base64," + "A" * 2000
    for good in ({"images": [url]}, {"images": [url, url]}, {"a": "b" * 900}):
        assert parse(json.dumps(good).encode(), config) == good
        slashed = json.dumps(good).replace("/", "\\/").encode()
        assert parse(slashed, config) == good
    quoted = {"images": ['"data:'], "numbers": [0] * 1000}
    for bad in ({"images": [url] * 3}, {"a": [0] * 1000}, {"a": "b" * 1000}, quoted):
        with pytest.raises(HTTPException, match="larger than 1000 bytes without the data URLs"):
            parse(json.dumps(bad).encode(), config)
    with pytest.raises(HTTPException):
        parse(json.dumps({"images": [url]}).encode("utf-16"), config)


def test_json_is_parsed_off_the_event_loop(
    client: TestClient, png: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = []

    def noting(content: bytes, config: ServeConfig) -> Any:
        try:
            threads.append(asyncio.get_running_loop())
        except RuntimeError:
            threads.append(None)
        return parse(content, config)

    monkeypatch.setattr(bodies, "parse", noting)
    ask(client, body(png[0]))
    assert threads == [None]


def test_texts_are_limited_in_sum(client: TestClient, png: list[Path]) -> None:
    request = body(png[0])
    request["messages"][0]["content"] += [{"type": "text", "text": "a" * 11_000}] * 3
    message = error_of(client.post(CHAT, json=request), 413)
    assert message.startswith("messages: 33012 characters in all; at most 32000"), message


def test_a_long_text_is_cut_before_it_is_tokenized(
    engine: Engine, png: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    encode = tokens._encode

    def counting(tokenizer: Any, text: str) -> list[int]:
        seen.append(len(text))
        return encode(tokenizer, text)

    (job,) = jobs_of(engine, png[:1])
    text = "what is red? <image> a cat " * 1000 + "what?"
    with pytest.raises(ValueError, match="the text has 1000 <image> and there are 1 images"):
        engine.sample(("a",), job.pixels, text)
    text = "<image> first " + "what is red? a cat " * 1000 + "what?"
    whole = engine.tokens.tokenize(Rendered.of(text), 1)
    monkeypatch.setattr(tokens, "_encode", counting)
    sample = engine.sample(("a",), job.pixels, text)
    assert (sample.prompt_ids, sample.qformer_ids) == (whole.prompt_ids, whole.qformer_ids)
    assert sample.image_places == whole.image_places
    assert engine.lost_tokens(text) > 100
    assert max(seen) <= 64 * engine.tokens.max_prompt < len(text)


def test_the_end_of_a_dialogue_is_kept() -> None:
    history = tuple((f"<image>question {number}", "answer" * 5) for number in range(20))
    text = instruction_of("the last?", history, "a system text")
    assert text.last(10_000) is text
    last = text.last(300)
    assert last.prompt == text.prompt[-300:]
    assert last.dialogue is not None
    assert last.dialogue.question == "the last?", last.dialogue
    assert 0 < len(last.dialogue.history) < 5
    assert last.dialogue.num_marks == 20, "the marks move to the next question"
    assert last.dialogue.history[-1:] == history[-1:]
    assert text.last(5).turns.question == "last?"


class Failing(Slow):
    """An engine whose batches of several fail after 4 tokens."""

    def respond(self, samples: Any, decoding: Any, on_tokens: Any) -> Any:
        steps = 0

        def failing(tokens: list[int]) -> Any:
            nonlocal steps
            steps += 1
            if steps > 4 and len(samples) > 1:
                raise RuntimeError("out of memory")
            return on_tokens(tokens)

        return self.engine.respond(samples, decoding, failing)


def together(engine: Any, jobs: list[Job]) -> Batcher:
    """A batcher that runs ``jobs`` as one batch."""
    batcher = Batcher(engine)
    with batcher._changed:
        batcher._jobs += jobs
        batcher._changed.notify()
    return batcher


@pytest.mark.parametrize("sampled", [False, True])
def test_no_stream_repeats_text_when_its_batch_fails(
    engine: Engine, png: list[Path], sampled: bool
) -> None:
    sampling: dict[str, Any] = {"do_sample": True, "temperature": 2.0} if sampled else {}
    decoding = engine.decoding.override(max_new_tokens=12, min_new_tokens=12, **sampling)
    streams: list[list[str]] = [[] for _ in png]
    jobs = jobs_of(engine, png, decoding=decoding)
    for job, pieces in zip(jobs, streams, strict=True):
        job.listen(pieces.append)
    batcher = together(Failing(engine), jobs)
    for job, pieces in zip(jobs, streams, strict=True):
        error = job.future.exception(10)
        assert sum(map(len, pieces)) > 0
        if error is None:
            assert "".join(pieces) == job.future.result().text
        else:  # another answer was sampled, and is not joined to the text that was sent
            assert sampled
            assert "differs from the text that was sent" in str(error)
    assert sampled == any(job.future.exception() for job in jobs)
    batcher.close()


def test_only_the_job_that_fails_is_cancelled(engine: Engine, png: list[Path]) -> None:
    class Counting(Slow):
        def respond(self, samples: Any, decoding: Any, on_tokens: Any) -> Any:
            self.sizes.append(len(samples))
            return self.engine.respond(samples, decoding, on_tokens)

    def broken(_piece: str) -> None:
        raise RuntimeError("nobody listens")

    jobs = jobs_of(engine, [*png, *png])
    jobs[0].listen(broken)
    jobs[1].instruction = "<image>" * 5
    counting: Any = Counting(engine)
    batcher = together(counting, jobs)
    with pytest.raises(RuntimeError, match="nobody listens"):
        jobs[0].future.result(10)
    with pytest.raises(ValueError, match="the text has 5 <image>"):
        jobs[1].future.result(10)
    expected = engine.answer([*png, *png], "what?")
    assert [job.future.result(10).text for job in jobs[2:]] == expected[2:]
    assert counting.sizes == [len(jobs) - 1], "one batch, which did not run again"
    batcher.close()
