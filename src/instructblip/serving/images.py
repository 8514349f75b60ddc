"""The route that draws: OpenAI's image generations, answered by the engines that hold a decoder."""

import base64
import io
import time
from typing import Any

from fastapi import FastAPI, HTTPException
from PIL import Image
from starlette.concurrency import run_in_threadpool

from instructblip.serving.batching import Batcher, Job
from instructblip.serving.incoming import read_picture
from instructblip.serving.schema import (
    DrawnImage,
    ImageRequest,
    ImageResponse,
)
from instructblip.serving.service import Service


def add_images(app: FastAPI, service: Service, guarded: dict[str, Any]) -> None:
    """Add ``/v1/images/generations``; the decoders are loaded, so that a misfit is told now."""
    for batcher in service.painters.values():
        batcher.engine.painter  # noqa: B018

    @app.post("/v1/images/generations", tags=["OpenAI"], **guarded)
    async def generate_images(body: ImageRequest) -> ImageResponse:
        """Draw what the prompt says, on its own or about a picture."""
        arrived = time.monotonic()
        batcher = _choose(service, body.model)
        painter = batcher.engine.painter
        size = f"{painter.model.decoder.image_size}x{painter.model.decoder.image_size}"
        if body.size not in (None, "auto", size):
            raise HTTPException(400, f"size: this model draws {size}; ask for that or for auto")
        try:
            painter.check(body.prompt)
        except ValueError as error:
            raise HTTPException(400, f"prompt: {error}") from None
        job = Job(
            pixels=(),
            instruction=body.prompt,
            drawing={
                "image": await _subject(service, body.image),
                "num_images": body.n or 1,
                "seed": body.seed,
                "steps": body.steps,
                "guidance": body.guidance,
                "image_guidance": body.image_guidance,
            },
            deadline=arrived + service.config.timeout_s,
        )
        service.submit(batcher, job)
        pictures: list[Image.Image] = await service.result(job)
        return ImageResponse(
            created=int(time.time()),
            data=[DrawnImage(b64_json=encode(p, body.output_format)) for p in pictures],
            output_format=body.output_format,
            size=size,
        )


def _choose(service: Service, model: str | None) -> Batcher:
    """The model asked for, or the first that draws."""
    if model is not None:
        service.choose(model)
    drawing = service.painters
    if not drawing or model not in (None, *drawing):
        known = f"; ask one of {', '.join(drawing)}" if drawing else " here"
        raise HTTPException(404, f"no decoder: this model does not draw{known}")
    return next(iter(drawing.values())) if model is None else drawing[model]


async def _subject(service: Service, url: str | None) -> Image.Image | None:
    if url is None:
        return None
    async with service.decoders:
        return await run_in_threadpool(read_picture, url, service.config, "image")


def encode(picture: Image.Image, kind: str) -> str:
    """A picture as base64; without loss but for JPEG."""
    data = io.BytesIO()
    picture.save(data, kind, quality=95, **({"lossless": True} if kind == "webp" else {}))
    return base64.b64encode(data.getvalue()).decode()
