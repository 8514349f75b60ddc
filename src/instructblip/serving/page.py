"""The page: one HTML file, its script and its style, in English and Chinese.

It uses the server as any client does (chat completions, ranking, explanations, images), so that the
limits of the server are its limits, and keeps nothing on the server's disk.
"""

import json
import random
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import yaml
from fastapi import FastAPI
from fastapi.responses import FileResponse, RedirectResponse, Response
from PIL import Image

from instructblip.core.pages import data_url
from instructblip.inference.engine import Engine
from instructblip.inference.explain import measured
from instructblip.recipe.load import read_values
from instructblip.recipe.schema import RECIPE_FILE
from instructblip.scenes.dense import render_dense, sample_dense
from instructblip.scenes.world import render, sample_scene
from instructblip.serving.service import Service

PATH = "/page"
_TEXTS = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
EN = {key: english for key, (english, _) in _TEXTS["labels"].items()}
ZH = {key: chinese for key, (_, chinese) in _TEXTS["labels"].items()}
STATIC = Path(__file__).with_name("static")
SHARED = ("client.js", "page.css")
"""Files of ``STATIC`` that other pages use too."""
FRESH = {"Cache-Control": "no-cache"}


def add_page(app: FastAPI) -> FastAPI:
    """Add the page at ``/page`` to an application of ``create_app``; ``/`` leads there."""
    content = json.dumps(page_content(app.state.service), ensure_ascii=False)
    app.state.front = PATH

    @app.get("/", include_in_schema=False)
    async def front() -> RedirectResponse:
        return RedirectResponse(PATH)

    @app.get(PATH + "/page.json", include_in_schema=False)
    async def texts() -> Response:
        return Response(content, media_type="application/json", headers=FRESH)

    names = {"": "index.html"} | {f"/{name}": name for name in (*SHARED, "page.js")}
    add_files(app, {PATH + path: STATIC / name for path, name in names.items()})
    return app


def add_files(app: FastAPI, files: Mapping[str, Path]) -> None:
    """Add a route for each of the files of a page, by path."""
    for path, file in files.items():
        app.get(path, include_in_schema=False)(_sender(file))


def _sender(file: Path) -> Callable[[], Awaitable[FileResponse]]:
    async def send() -> FileResponse:
        return FileResponse(file, headers=FRESH)

    return send


def page_content(service: Service) -> dict[str, Any]:
    """The texts in both languages, and the examples and instructions that fit the first model."""
    name, batcher = next(iter(service.batchers.items()))
    world = world_of(service.titles.get(name, name), batcher.engine)
    examples = [
        {"image": data_url(_draw(world, seed)), "instruction": text, "candidates": candidates}
        for seed, text, candidates in _TEXTS["worlds"].get(world, {"examples": []})["examples"]
    ]
    return {
        "labels": _TEXTS["labels"],
        "examples": examples,
        "instructions": [*_TEXTS["instructions"], *(one["instruction"] for one in examples[1:])],
        "drawings": _TEXTS["drawings"],
        "measured": measured(),
    }


def world_of(title: str, engine: Engine) -> str | None:
    """The world whose images a model reads: that of a model in the package, or of the one that
    tuning on published sets started from; None for your data, and where it is not known."""
    if title in _TEXTS["worlds"]:
        return title
    file = None if engine.model.assets is None else engine.model.assets / RECIPE_FILE
    if file is None or not file.is_file():
        return None
    recipe = read_values(file)  # of any version
    data, model = (_section(recipe, name) for name in ("data", "model"))
    custom = any(_section(data, "sets", name).get("format") for name in _section(data, "sets"))
    start = model.get("start")
    return start if isinstance(start, str) and not custom else None


def _section(values: dict[str, Any], *names: str) -> dict[str, Any]:
    """A section of a recipe, empty if it has none."""
    for name in names:
        inner = values.get(name)
        values = inner if isinstance(inner, dict) else {}
    return values


def _draw(world: str | None, seed: int) -> Image.Image:
    rng = random.Random(seed)
    return render_dense(sample_dense(rng)) if world == "dense" else render(sample_scene(rng), 256)
