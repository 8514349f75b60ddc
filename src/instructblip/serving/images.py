"""The route that draws: OpenAI's image generations, by the engines that have a decoder."""

import base64
import io
import time
from typing import Any

from fastapi import FastAPI, HTTPException
from PIL import Image
from starlette.concurrency import run_in_threadpool

from instructblip.serving.batching import Batcher, Job
from instructblip.serving.incoming import read_image
from instructblip.serving.schema import DrawnImage, ImageRequest, ImageResponse
from instructblip.serving.service import Service


def add_images(app: FastAPI, service: Service, guarded: dict[str, Any]) -> None:
    """Add ``/v1/images/generations``, and load the decoders: one that does not fit raises now."""
    for batcher in service.painters.values():
        batcher.engine.painter  # noqa: B018

    @app.post("/v1/images/generations", tags=["OpenAI"], **guarded)
    async def generate_images(body: ImageRequest) -> ImageResponse:
        """Draw images that follow the prompt, and the subject image if there is one."""
        deadline = service.deadline
        batcher = _choose(service, body.model)
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
            async with service.decoders:
                subject = await run_in_threadpool(read_image, body.image, service.config, "image")
        drawing = {
            "image": subject,
            "num_images": body.n or 1,
            "seed": body.seed,
            "steps": body.steps,
            "guidance": body.guidance,
            "image_guidance": body.image_guidance,
        }
        job = Job(pixels=(), instruction=body.prompt, drawing=drawing, deadline=deadline)
        service.submit(batcher, job)
        images: list[Image.Image] = await service.result(job)
        return ImageResponse(
            created=int(time.time()),
            data=[DrawnImage(b64_json=_encode(image, body.output_format)) for image in images],
            output_format=body.output_format,
            size=size,
        )


def _choose(service: Service, model: str | None) -> Batcher:
    """The model of that name, or the first that draws. Raises HTTPException."""
    if model is not None:
        service.choose(model)
    drawing = service.painters
    if not drawing or model not in (None, *drawing):
        known = f"; ask one of {', '.join(drawing)}" if drawing else " here"
        raise HTTPException(404, f"no decoder: this model does not draw{known}")
    return next(iter(drawing.values())) if model is None else drawing[model]


def _encode(image: Image.Image, kind: str) -> str:
    """Base64, lossless except for JPEG."""
    data = io.BytesIO()
    image.save(data, kind, quality=95, **({"lossless": True} if kind == "webp" else {}))
    return base64.b64encode(data.getvalue()).decode()
