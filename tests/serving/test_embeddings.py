"""Embeddings over HTTP: those of the engine, in OpenAI's form, and what is refused."""

import base64
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
import torch

from instructblip.inference.engine import Engine
from instructblip.serving.api import create_app
from tests.conftest import TestClient, data_url, greedy_engine
from tests.testing import add_heads

EMBEDDINGS = "/v1/embeddings"
TEXTS = ["a red cat", "what is blue?"]


@pytest.fixture(scope="module")
def engine(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = tmp_path_factory.mktemp("searched") / "model"
    shutil.copytree(model_folder, folder)
    return greedy_engine(add_heads(folder))


@pytest.fixture(scope="module")
def client(engine: Engine, blip2_folder: Path) -> Iterator[TestClient]:
    engines = {"tuned": engine, "blip2": greedy_engine(blip2_folder)}
    with TestClient(create_app(engines), raise_server_exceptions=False) as client:
        yield client


def test_the_models_say_which_of_them_embeds(client: TestClient) -> None:
    models = client.get("/v1/models").json()["data"]
    assert {model["id"]: model["embeds"] for model in models} == {"tuned": True, "blip2": False}


def picture(path: Path) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(path)}}


def test_openais_client_gets_the_embeddings_of_texts(client: TestClient, engine: Engine) -> None:
    expected = engine.embed(texts=TEXTS)
    theirs = openai.OpenAI(
        base_url="http://localhost/v1", api_key="any", max_retries=0, http_client=client
    )
    found = theirs.embeddings.create(model="tuned", input=TEXTS)  # which it asks for as base64
    vectors = torch.tensor([each.embedding for each in found.data])
    assert (vectors - expected).abs().max() < 1e-5
    assert [each.index for each in found.data] == [0, 1]
    assert found.usage.prompt_tokens == int(engine.embedder.ids(TEXTS)[1].sum())
    one = client.post(EMBEDDINGS, json={"input": TEXTS[1]}).json()
    assert one["object"] == "list"
    assert one["data"][0]["embedding"] == pytest.approx(expected[1].tolist(), abs=1e-5)


def test_an_image_has_a_vector_of_each_query(
    client: TestClient, engine: Engine, png: list[Path]
) -> None:
    request = {"input": [TEXTS[0], picture(png[0]), {"type": "text", "text": "blue"}]}
    text, image, other = client.post(EMBEDDINGS, json=request).json()["data"]
    assert [each["index"] for each in (text, image, other)] == [0, 1, 2]
    assert image["embedding"] is None
    assert text["embeddings"] is None
    vectors, expected = torch.tensor(image["embeddings"]), engine.embed(images=png[0])[0]
    assert vectors.shape == expected.shape == (3, 8)
    assert (vectors - expected).abs().max() < 1e-5
    best = max(float(query @ torch.tensor(other["embedding"])) for query in vectors)
    assert best == pytest.approx(float((expected @ engine.embed(texts="blue")[0]).max()), abs=1e-5)
    packed = client.post(EMBEDDINGS, json={**request, "encoding_format": "base64"}).json()
    rows = [base64.b64decode(row) for row in packed["data"][1]["embeddings"]]
    assert np.allclose([np.frombuffer(row, "<f4") for row in rows], expected, atol=1e-5)
    mean = client.post(EMBEDDINGS, json={**request, "pooling": "mean"}).json()["data"][1]
    assert mean["embeddings"] is None
    pooled = torch.nn.functional.normalize(expected.mean(0), dim=0)
    assert mean["embedding"] == pytest.approx(pooled.tolist(), abs=1e-5)


def test_an_instruction_changes_the_embedding_of_an_image(
    client: TestClient, engine: Engine, png: list[Path]
) -> None:
    request = {"input": [picture(png[0]), picture(png[1])], "instruction": "what is red?"}
    reply = client.post(EMBEDDINGS, json=request).json()
    found = torch.tensor([each["embeddings"] for each in reply["data"]])
    expected = engine.embed(images=png[:2], instruction="what is red?")
    assert (found - expected).abs().max() < 1e-5
    assert (expected - engine.embed(images=png[:2])).abs().max() > 1e-3
    read = int(engine.embedder.ids(["what is red?"])[1].sum())
    assert reply["usage"] == {"prompt_tokens": 2 * read, "total_tokens": 2 * read}


@pytest.mark.parametrize(
    ("request_", "status", "message"),
    [
        ({"input": "a", "model": "blip2"}, 400, "this model has no retrieval heads: `instructblip"),
        ({"input": "a", "dimensions": 64}, 422, "dimensions: this server has no such setting; "),
        ({"input": ["a", " "]}, 400, "input: a text is empty"),
        ({"input": []}, 422, "at least 1 item"),
        ({"input": [[1, 2]]}, 422, "Input should be a text, or a part"),
        ({"input": 7}, 422, "Input should be a text or a list"),
        ({"input": ["a"] * 257}, 413, "257 texts; at most 256"),
        ({"input": ["a" * 16_000] * 3}, 413, "texts of 48000 characters in all; at most 32000"),
        ({"input": "a", "instruction": "what?"}, 400, "instruction: it is read with images"),
        ({"input": "a", "encoding_format": "int8"}, 422, "encoding_format"),
        (
            {"input": [{"type": "image_url", "image_url": {"url": "data:,"}}] * 9},
            413,
            "input: 9 images; at most 8",
        ),
    ],
)
def test_what_is_refused(
    client: TestClient, request_: dict[str, Any], status: int, message: str
) -> None:
    response = client.post(EMBEDDINGS, json=request_)
    assert response.status_code == status, response.text
    error = response.json()["error"]["message"]
    assert message in error
    assert "/" not in error, "no path"
