"""The studio as an application: the server of the models, and routes of one folder beside it."""

import asyncio
import errno
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Literal

import yaml
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool

from instructblip.core.pages import title_of
from instructblip.data.custom.folder import LEAST_IMAGES
from instructblip.data.templates import TEMPLATES_ZH
from instructblip.evaluation.verdict import TEXTS
from instructblip.experiment.tune import CHOSEN, MEASURES, UNSEEN
from instructblip.inference.engine import Engine
from instructblip.serving.api import create_app
from instructblip.serving.config import ServeConfig
from instructblip.serving.decoder import BadImage
from instructblip.serving.guard import error_body
from instructblip.serving.page import FRESH, SHARED, add_files
from instructblip.studio.findings import Finding, find
from instructblip.studio.pictures import Pictures, is_shown
from instructblip.studio.project import Annotation, Conflict, Project
from instructblip.studio.runs import Runs

PATH = "/studio"
API = "/v1/studio"
STATIC = Path(__file__).with_name("static")
CHINESE = yaml.safe_load((STATIC / "chinese.yaml").read_text(encoding="utf-8"))
FACTS = {**TEXTS, "chosen": CHOSEN, "unseen": UNSEEN}
LABELS: dict[str, tuple[str, str]] = yaml.safe_load(
    (STATIC / "labels.yaml").read_text(encoding="utf-8")
) | {f"fact_{key}": (text, CHINESE["facts"][key]) for key, text in FACTS.items()}
"""English and Chinese of every text of the page."""
WORTHWHILE = 20
"""Answers from which tuning can be expected to help."""
_FULL = (errno.ENOSPC, errno.EDQUOT)
_WATCH_S = 1.0


class RowBody(BaseModel):
    """Texts of a row; without an id of a new one, whose version is empty."""

    model_config = ConfigDict(extra="forbid")

    image: str = Field(max_length=4096)
    question: str = Field("", max_length=16_000)
    answer: str = Field("", max_length=16_000)
    id: str = Field("", max_length=1000)
    version: str = Field("", max_length=64)


class TuneBody(BaseModel):
    model_config = ConfigDict(extra="forbid")

    resume: bool = False
    anyway: bool = False


class Studio:
    """What the routes share: the project, its images, its runs, and the server of the models."""

    def __init__(self, app: FastAPI, project: Project, runs: Runs) -> None:
        self.project, self.runs = project, runs
        self.service = app.state.service
        self.pictures = Pictures(project, self.service)
        self._found: tuple[Any, list[Finding]] | None = None
        self.scanning = True
        self._loaded: Path | None = None
        self._failed: Path | None = None

    async def watch(self) -> None:
        """Read new images, and load a model once it is tuned, until the server ends."""
        while True:
            names = await run_in_threadpool(self.project.images)
            self.scanning = await self.pictures.look(names)
            if not self.scanning:
                await self._load_tuned()
                await asyncio.sleep(_WATCH_S)

    async def _load_tuned(self) -> None:
        run = await run_in_threadpool(lambda: self.runs.finished)
        if run is None or run in (self._loaded, self._failed):
            return
        try:
            engine = await run_in_threadpool(Engine.from_pretrained, run / "run")
        except (ValueError, OSError) as error:  # shown where the run is
            self._failed = run
            print(f"{run} cannot be loaded: {error}", flush=True)
            return
        self.service.put("tuned", engine, title_of(run))
        self._loaded = run

    @property
    def current(self) -> str:
        """The model that makes suggestions: the tuned one if it is better than the start."""
        results = self.runs.results() if self._loaded else None
        better = results is not None and results["outcome"] in ("better", "unclear")
        return "tuned" if better else "start"

    def describe(self) -> dict[str, Any]:
        """The folder as the page shows it."""
        project = self.project
        names, rows = project.images(), project.annotations()
        looks, unreadable = self.pictures.looks(names)
        key = (tuple(names), tuple((r.id, r.version) for r in rows), len(looks), tuple(unreadable))
        if self._found is None or self._found[0] != key:
            tokens = self.service.batchers["start"].engine.tokens
            found = find(project, rows, names, looks, unreadable, tokens)
            self._found = key, found
        findings = self._found[1]
        shown: dict[str, list[Annotation]] = {name: [] for name in names}
        for row in rows:
            shown.setdefault(row.images[0], []).append(row)
        bad = {f.row for f in findings if f.bad} | {""}
        answered = [row for row in rows if row.text("answer")]
        usable = {name for row in answered if row.id not in bad for name in row.images}
        splits = {name: project.split_of(name, mine) for name, mine in shown.items()}
        return {
            "folder": str(project.root),
            "images": [
                {
                    "name": name,
                    "shown": is_shown(name),
                    "split": splits[name],
                    "rows": [row_json(row) for row in mine],
                }
                for name, mine in shown.items()
            ],
            "findings": [finding._asdict() for finding in findings],
            "answers": len(answered),
            "usable": len(usable),
            "usable_by_split": dict(Counter(splits[name] for name in usable if splits.get(name))),
            "is_split": any(splits.values()),
            "least": LEAST_IMAGES,
            "worthwhile": WORTHWHILE,
            "scanning": self.scanning,
            "models": dict(self.service.titles),
            "current": self.current,
        }


def row_json(row: Annotation) -> dict[str, Any]:
    """A row as the page shows it."""
    choices = row.data.get(row.column("choices"))
    return {
        "id": row.id,
        "version": row.version,
        "images": list(row.images),
        "question": row.text("question"),
        "answer": row.text("answer"),
        "choices": [str(c) for c in choices] if isinstance(choices, list) else [],
    }


def create_studio(
    project: Project, engine: Engine, start: str, runs: Runs, config: ServeConfig
) -> FastAPI:
    """The application of a project. ``engine`` is the model ``start``; once one is tuned, the
    server has it as ``tuned``. The key of ``config`` is the token of the page."""
    app = create_app({"start": engine}, config, {"start": title_of(start)})
    studio = Studio(app, project, runs)
    token = config.api_keys[0] if config.api_keys else ""
    app.state.front = f"{PATH}#token={token}"
    inner = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[Any]:
        async with inner(app) as state:
            watching = asyncio.create_task(studio.watch())
            yield state
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)

    app.router.lifespan_context = lifespan
    _add_page(app)
    _add_errors(app)
    _add_folder(app, studio)
    _add_runs(app, studio)
    return app


def _add_page(app: FastAPI) -> None:
    content = {
        "labels": LABELS,
        "messages": CHINESE["messages"],
        "prompts": {
            "en": {task: prompt for task, (_, prompt, _, _) in MEASURES.items()},
            "zh": {task: TEMPLATES_ZH[task][0] for task in MEASURES},
        },
    }

    @app.get(PATH + "/studio.json", include_in_schema=False)
    async def texts() -> JSONResponse:
        return JSONResponse(content, headers=FRESH)

    names = {"": "index.html", "/studio.js": "studio.js", "/studio.css": "studio.css"}
    files = {PATH + path: STATIC / name for path, name in names.items()}
    add_files(app, files | {f"{PATH}/{name}": file for name, file in SHARED.items()})


def _add_errors(app: FastAPI) -> None:
    """What the routes of the folder raise, in plain words."""

    @app.exception_handler(Conflict)
    async def conflict(_request: Request, error: Conflict) -> JSONResponse:
        row = None if error.current is None else row_json(error.current)
        return JSONResponse({**error_body(409, str(error)), "row": row}, 409)

    @app.exception_handler(ValueError)
    async def refused(_request: Request, error: ValueError) -> JSONResponse:
        return JSONResponse(error_body(400, str(error)[:1000]), 400)

    @app.exception_handler(FileNotFoundError)
    async def missing(_request: Request, error: FileNotFoundError) -> JSONResponse:
        return JSONResponse(error_body(404, str(error.strerror or error)[:300]), 404)

    @app.exception_handler(OSError)
    async def unwritten(_request: Request, error: OSError) -> JSONResponse:
        if error.errno in _FULL:
            message = "the disk is full: nothing was changed; free some space, and try again"
            return JSONResponse(error_body(507, message), 507)
        return JSONResponse(error_body(500, f"the folder: {error.strerror}"), 500)


def _add_folder(app: FastAPI, studio: Studio) -> None:
    """Images and rows."""
    project, pictures = studio.project, studio.pictures

    @app.get(API, include_in_schema=False)
    async def describe() -> JSONResponse:
        return JSONResponse(await run_in_threadpool(studio.describe))

    @app.get(API + "/picture", include_in_schema=False)
    async def picture(name: str, size: Literal["small", "large", "file"] = "small") -> Response:
        if size == "file":
            data = await run_in_threadpool(pictures.read, name)
            return Response(data, media_type="application/octet-stream")
        return Response(await pictures.view(name, size), media_type="image/jpeg")

    @app.post(API + "/picture", include_in_schema=False)
    async def add(name: str, request: Request) -> dict[str, Any]:
        data = await request.body()
        limit = studio.service.config.max_picture_bytes
        if len(data) > limit:
            raise ValueError(f"larger than {limit >> 20} MB")
        try:
            await pictures.decode(data, "picture")
        except BadImage as error:
            raise BadImage(str(error).removeprefix("picture: "), error.status) from None
        stored, new = await run_in_threadpool(project.add_image, name, data)
        return {"name": stored, "new": new}

    @app.post(API + "/row", include_in_schema=False)
    async def save(body: RowBody) -> dict[str, Any]:
        row = await run_in_threadpool(project.save, **body.model_dump())
        return {"row": None if row is None else row_json(row)}


def _add_runs(app: FastAPI, studio: Studio) -> None:
    """Tuning, stopping, the state of a run, its results, and export."""
    runs = studio.runs

    @app.get(API + "/run", include_in_schema=False)
    async def state() -> JSONResponse:
        return JSONResponse(await run_in_threadpool(runs.state))

    @app.post(API + "/tune", include_in_schema=False)
    async def tune(body: TuneBody) -> JSONResponse:
        await run_in_threadpool(runs.tune, body.resume, body.anyway)
        return await state()

    @app.post(API + "/stop", include_in_schema=False)
    async def stop() -> JSONResponse:
        await run_in_threadpool(runs.stop)
        return await state()

    @app.post(API + "/export", include_in_schema=False)
    async def export() -> JSONResponse:
        await run_in_threadpool(runs.export)
        return await state()

    @app.get(API + "/results", include_in_schema=False)
    async def results() -> JSONResponse:
        return JSONResponse(await run_in_threadpool(runs.results))

    @app.get(API + "/report", include_in_schema=False)
    async def report() -> Response:
        run = await run_in_threadpool(lambda: runs.finished)
        if run is None:
            raise FileNotFoundError("no model is tuned yet")
        data = await run_in_threadpool((run / "report.html").read_bytes)
        return Response(data, media_type="application/octet-stream")
