"""The page: one HTML file, its script and its style, in English and Chinese.

It uses the server as any client does (chat completions, ranking, explanations, images), so that the
limits of the server are its limits, and keeps nothing on the server's disk.
"""

import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from fastapi import FastAPI
from fastapi.responses import FileResponse, RedirectResponse, Response

from instructblip.core.pages import STYLE
from instructblip.inference.explain import measured
from instructblip.recipe.world import examples_of, world_of
from instructblip.serving.service import Service

PATH = "/page"
_TEXTS = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
EN = {key: english for key, (english, _) in _TEXTS["labels"].items()}
ZH = {key: chinese for key, (_, chinese) in _TEXTS["labels"].items()}
STATIC = Path(__file__).with_name("static")
SHARED = {"client.js": STATIC / "client.js", "page.css": STYLE}
"""Files that other pages use too, by name."""
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

    files = {"": STATIC / "index.html", "/page.js": STATIC / "page.js"}
    files |= {f"/{name}": file for name, file in SHARED.items()}
    add_files(app, {PATH + path: file for path, file in files.items()})
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
    world = world_of(service.titles.get(name, name), batcher.engine.model.assets)
    examples = [asdict(example) for example in examples_of(world)]
    return {
        "labels": _TEXTS["labels"],
        "examples": examples,
        "instructions": [*_TEXTS["instructions"], *(one["instruction"] for one in examples[1:])],
        "drawings": _TEXTS["drawings"],
        "measured": measured(),
    }
