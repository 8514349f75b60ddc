"""The server as an ASGI application: chat completions, embeddings, images, ranking, metrics.

``instructblip serve`` runs what ``create_app`` returns. One ``Batcher`` per model answers; handlers
only validate, decode images and wait.
"""

import base64
import io
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import torch.nn.functional as F
from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi.security import HTTPBearer
from PIL import Image
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException as StarletteHTTPException
from torch import Tensor

from instructblip.core.version import __version__
from instructblip.data.templates import Rendered
from instructblip.evaluation.scoring import probabilities
from instructblip.inference.engine import Engine
from instructblip.inference.explain import Explanation
from instructblip.inference.inputs import ImageInput
from instructblip.serving.batching import Answer, Embeddings, Job
from instructblip.serving.bodies import BodyRoute
from instructblip.serving.completions import chat_job, response_of, stream_events
from instructblip.serving.config import ServeConfig
from instructblip.serving.decoder import BadImage
from instructblip.serving.guard import HEADERS, Guard, error_body
from instructblip.serving.schema import (
    ChatRequest,
    ChatResponse,
    DrawnImage,
    Embedded,
    EmbeddingRequest,
    EmbeddingResponse,
    EmbeddingUsage,
    ErrorBody,
    ExplainedImage,
    ExplainRequest,
    ExplainResponse,
    Health,
    ImagePart,
    ImageRequest,
    ImageResponse,
    LookRequest,
    LookResponse,
    ModelCard,
    ModelList,
    RankedCandidate,
    RankRequest,
    RankResponse,
    TextPart,
    Vector,
)
from instructblip.serving.service import Service

STATUS = {
    400: "bad image or message",
    401: "no valid API key",
    403: "host or origin not allowed",
    404: "no such model",
    408: "the request came too slowly",
    413: "too large",
    421: "not a name of this server",
    422: "not a valid request",
    429: "too busy",
    503: "too many requests at once",
    504: "took too long",
}


def create_app(
    engines: Mapping[str, Engine],
    config: ServeConfig | None = None,
    titles: Mapping[str, str] | None = None,
    others: Sequence[ImageInput] = (),
) -> FastAPI:
    """The ASGI application. ``engines`` by the name that requests choose; the first is the default.
    ``titles`` are what people call them, by the same name. ``others`` are images for the blind
    likelihood of an answer (``Engine.answer``).

    The application becomes the only user of each engine.
    """
    config = config or ServeConfig()
    service = Service(engines, config, titles, others)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        yield
        service.decoders.close()
        for batcher in service.batchers.values():
            await run_in_threadpool(batcher.close)

    app = FastAPI(
        title="instructblip",
        version=__version__,
        summary="Images and instructions in, answers out.",
        lifespan=lifespan,
        docs_url=None,  # their pages load scripts from elsewhere
        redoc_url=None,
    )
    app.state.service = service
    app.state.front = "/v1"
    app.router.route_class = BodyRoute
    app.add_middleware(Guard, config=config, metrics=service.metrics)
    _add_errors(app)
    guarded = _guarded()
    _add_routes(app, service, guarded)
    _add_rank(app, service, guarded)
    _add_reasons(app, service, guarded)
    _add_embedding(app, service, guarded)
    _add_drawing(app, service, guarded)
    return app


def _guarded() -> dict[str, Any]:
    """Options of the routes for which ``Guard`` asks for an API key, if the server has any."""
    errors = {status: {"model": ErrorBody, "description": text} for status, text in STATUS.items()}
    bearer = HTTPBearer(auto_error=False)  # for the description of the interface
    return {"dependencies": [Depends(bearer)], "responses": errors}


def _add_routes(app: FastAPI, service: Service, guarded: dict[str, Any]) -> None:
    """Health and metrics; models and chat completions, as OpenAI has them."""

    unhealthy: Any = {503: {"model": ErrorBody, "description": "a model cannot answer"}}

    @app.get("/healthz", tags=["operation"], responses=unhealthy)
    async def healthz() -> Health:
        """Whether the server answers: 503 once a model cannot."""
        if service.dead:
            raise HTTPException(503, f"cannot answer: {', '.join(service.dead)}")
        return Health(models=list(service.batchers), waiting=service.waiting)

    @app.get("/metrics", tags=["operation"], response_class=Response, **guarded)
    async def metrics() -> Response:
        """Counters in the text format of Prometheus."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models", tags=["OpenAI"], **guarded)
    async def models() -> ModelList:
        """The models that requests can choose."""
        cards = [
            ModelCard(
                id=name,
                created=service.created,
                title=service.titles.get(name, name),
                draws=name in service.painters,
                embeds=batcher.engine.can_embed,
                queries=batcher.engine.model.config.num_query_tokens,
            )
            for name, batcher in service.batchers.items()
        ]
        return ModelList(data=cards)

    @app.post("/v1/chat/completions", tags=["OpenAI"], response_model=ChatResponse, **guarded)
    async def chat_completions(body: ChatRequest) -> Any:
        """Answer the last message about the images of all messages."""
        name, batcher = service.choose(body.model)
        job = await chat_job(service, body, batcher.engine)
        if body.stream:
            events = stream_events(service, name, job, body)
            service.submit(batcher, job)
            return StreamingResponse(events, media_type="text/event-stream")
        service.submit(batcher, job)
        answer: Answer = await service.result(job)
        service.metrics.tokens.inc(answer.tokens)
        return response_of(name, answer, job)


def _add_rank(app: FastAPI, service: Service, guarded: dict[str, Any]) -> None:
    """Candidates, ranked."""

    @app.post("/v1/rank", tags=["ranking"], **guarded)
    async def rank(body: RankRequest) -> RankResponse:
        """Log-likelihoods of the candidates as the answer, end token included."""
        deadline = service.deadline
        name, batcher = service.choose(body.model)
        engine = batcher.engine
        by_sum = body.normalization == "sum"
        fitted = engine.calibration.candidates if engine.calibration and by_sum else None
        if body.coverage is not None and fitted is None:
            why = "this model has no calibration of candidates" if by_sum else "it needs the sum"
            raise HTTPException(400, f"coverage: {why}; leave it out")
        service.check_candidates(body.candidates)
        service.check_length(len(body.instruction), "instruction")
        service.check_marks(body.instruction, len(body.images), "instruction")
        job = Job(
            pixels=await service.pixels(body.images, batcher.engine, "images", deadline),
            instruction=body.instruction,
            candidates=tuple(body.candidates),
            normalization=body.normalization,
            deadline=deadline,
        )
        service.submit(batcher, job)
        scores: list[float] = await service.result(job)
        chances = probabilities(scores) if fitted is None else fitted.probabilities(scores)
        rows = zip(body.candidates, scores, chances, strict=True)
        ranked = [
            RankedCandidate(text=text, log_likelihood=score, probability=probability)
            for text, score, probability in rows
        ]
        best = max(ranked, key=lambda candidate: candidate.log_likelihood)
        chosen = None
        if fitted is not None and body.coverage is not None:
            chosen = [body.candidates[i] for i in fitted.answer_set(scores, body.coverage)]
        return RankResponse(
            model=name,
            best=best.text,
            candidates=ranked,
            calibrated=fitted is not None,
            answer_set=chosen,
            prompt_tokens_lost=engine.lost_tokens(body.instruction),
        )


def _add_reasons(app: FastAPI, service: Service, guarded: dict[str, Any]) -> None:
    """Where an answer comes from: maps of its words, and the attention of the queries."""

    @app.post("/v1/explain", tags=["explaining"], **guarded)
    async def explain(body: ExplainRequest) -> ExplainResponse:
        """Which part of each image the words of an answer come from."""
        deadline = service.deadline
        name, batcher = service.choose(body.model)
        answer = body.answer
        service.check_length(len(body.instruction) + len(answer or ""), "instruction and answer")
        service.check_marks(body.instruction, len(body.images), "instruction")
        engine = batcher.engine
        pixels, seen = await service.pixels_and_boxes(body.images, engine, "images", deadline)
        if answer is None:
            decoding = engine.decoding
            most = min(decoding.max_new_tokens, service.config.max_tokens)
            job = Job(
                pixels=pixels,
                instruction=body.instruction,
                decoding=decoding.override(max_new_tokens=most),
                deadline=deadline,
            )
            service.submit(batcher, job)
            answer = (await service.result(job)).text
        text = Rendered(body.instruction, body.instruction, answer)
        job = Job(pixels=pixels, instruction=text, explain=body.method, deadline=deadline)
        service.submit(batcher, job)
        try:
            explained: list[Explanation] = await service.result(job)
        except ValueError as error:  # the answer is empty
            raise HTTPException(400, str(error)) from None
        first = explained[0]
        return ExplainResponse(
            model=name,
            method=first.method,
            answer=first.answer,
            words=list(first.words),
            log_likelihoods=list(first.scores),
            seen=seen,
            images=[
                ExplainedImage(whole=each.whole.tolist(), words=each.maps.tolist())
                for each in explained
            ],
        )

    @app.post("/v1/look", tags=["attention"], **guarded)
    async def look(body: LookRequest) -> LookResponse:
        """Where each query token looks under the instruction."""
        deadline = service.deadline
        name, batcher = service.choose(body.model)
        service.check_length(len(body.instruction), "instruction")
        service.check_marks(body.instruction, len(body.images), "instruction")
        engine = batcher.engine
        pixels, seen = await service.pixels_and_boxes(body.images, engine, "images", deadline)
        job = Job(pixels=pixels, instruction=body.instruction, look=True, deadline=deadline)
        service.submit(batcher, job)
        weights: Tensor = await service.result(job)
        attention = weights.double().round(decimals=6).tolist()
        return LookResponse(model=name, seen=seen, attention=attention)


def _add_embedding(app: FastAPI, service: Service, guarded: dict[str, Any]) -> None:
    """OpenAI's embeddings."""

    @app.post("/v1/embeddings", tags=["OpenAI"], **guarded)
    async def embeddings(body: EmbeddingRequest) -> EmbeddingResponse:
        """Vectors that compare images and texts by their cosines."""
        deadline = service.deadline
        name, batcher = service.choose(body.model)
        if not batcher.engine.can_embed:
            raise HTTPException(
                400,
                "this model has no retrieval heads: `instructblip pretrain retrieval_scenes "
                "--stage retrieval model.start=MODEL` trains them",
            )
        items, instruction = body.items, body.instruction or ""
        texts = tuple(item.text for item in items if isinstance(item, TextPart))
        urls = [item.image_url.url for item in items if isinstance(item, ImagePart)]
        if not all(text.strip() for text in texts):
            raise HTTPException(400, "input: a text is empty; send the words to embed")
        if body.instruction is not None and not (urls and instruction.strip()):
            raise HTTPException(
                400, "instruction: it is read with images and is not empty; leave it out"
            )
        service.check_candidates(texts, "texts")
        service.check_length(len(instruction), "instruction")
        job = Job(
            pixels=await service.pixels(urls, batcher.engine, "input", deadline),
            instruction=instruction,
            texts=texts,
            deadline=deadline,
        )
        service.submit(batcher, job)
        found: Embeddings = await service.result(job)
        images, rows = (iter(() if v is None else v) for v in (found.images, found.texts))
        data = []
        for index, item in enumerate(items):
            if isinstance(item, TextPart):
                one = Embedded(index=index, embedding=_vector(next(rows), body))
            elif body.pooling == "mean":
                mean = F.normalize(next(images).mean(0), dim=0)
                one = Embedded(index=index, embedding=_vector(mean, body))
            else:
                queries = [_vector(query, body) for query in next(images)]
                one = Embedded(index=index, embeddings=queries)
            data.append(one)
        usage = EmbeddingUsage(prompt_tokens=found.tokens, total_tokens=found.tokens)
        return EmbeddingResponse(data=data, model=name, usage=usage)


def _vector(values: Tensor, body: EmbeddingRequest) -> Vector:
    if body.encoding_format == "base64":
        return base64.b64encode(values.numpy().astype("<f4").tobytes()).decode()
    return values.tolist()


def _add_drawing(app: FastAPI, service: Service, guarded: dict[str, Any]) -> None:
    """OpenAI's image generations. Loads the decoders: one that does not fit raises now."""
    for batcher in service.painters.values():
        batcher.engine.painter  # noqa: B018

    @app.post("/v1/images/generations", tags=["OpenAI"], **guarded)
    async def generate_images(body: ImageRequest) -> ImageResponse:
        """Draw images that follow the prompt, and the subject image if there is one."""
        deadline = service.deadline
        batcher = service.choose_painter(body.model)
        painter = batcher.engine.painter
        size = f"{painter.model.decoder.image_size}x{painter.model.decoder.image_size}"
        if body.size not in (None, "auto", size):
            raise HTTPException(400, f"size: this model draws {size}; ask for that or for auto")
        try:
            painter.check(body.prompt)
        except ValueError as error:
            raise HTTPException(400, f"prompt: {error}") from None
        subject = None
        if body.image is not None:
            subject = await service.read_image(body.image, "image", deadline)
        drawing = body.model_dump(include={"seed", "steps", "guidance", "image_guidance"})
        drawing |= {"image": subject, "num_images": body.n or 1}
        job = Job(pixels=(), instruction=body.prompt, drawing=drawing, deadline=deadline)
        service.submit(batcher, job)
        images: list[Image.Image] = await service.result(job)
        return ImageResponse(
            created=int(time.time()),
            data=[DrawnImage(b64_json=_encode(image, body.output_format)) for image in images],
            output_format=body.output_format,
            size=size,
        )


def _encode(image: Image.Image, form: str) -> str:
    """Base64, lossless except for JPEG."""
    data = io.BytesIO()
    image.save(data, form, quality=95, **({"lossless": True} if form == "webp" else {}))
    return base64.b64encode(data.getvalue()).decode()


def _add_errors(app: FastAPI) -> None:
    """Every error in OpenAI's form; none reveals a path, a value or a trace."""

    @app.exception_handler(StarletteHTTPException)
    async def http(_request: Request, error: StarletteHTTPException) -> JSONResponse:
        body = error_body(error.status_code, str(error.detail))
        return JSONResponse(body, error.status_code, headers=error.headers)

    @app.exception_handler(BadImage)
    async def image(_request: Request, error: BadImage) -> JSONResponse:
        return JSONResponse(error_body(error.status, str(error)), error.status)

    @app.exception_handler(RequestValidationError)
    async def invalid(_request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        places = [place for place in first["loc"] if place != "body"]
        if first["type"] == "unknown_field":
            places.append(first["ctx"]["field"])
        where = ".".join(str(place)[:40] for place in places)[:200]
        message = f"{where or 'body'}: {first['msg'].removeprefix('Value error, ')}"[:500]
        return JSONResponse(error_body(422, message, where or None), 422)

    @app.exception_handler(Exception)
    async def unexpected(_request: Request, _error: Exception) -> JSONResponse:
        return JSONResponse(error_body(500, "internal error"), 500, HEADERS)
