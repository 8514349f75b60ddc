"""The JSON of requests: bounded before it is parsed, and parsed off the event loop."""

import itertools
import json
import re
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import HTTPException
from fastapi.routing import APIRoute
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response

from instructblip.serving.config import ServeConfig

_DATA_URL = re.compile(rb'"data:[^"]*"')
"""In JSON this begins inside a string or at its start, so it never holds other values."""


def parse(body: bytes, config: ServeConfig) -> Any:
    """The value of a body. Raises HTTPException 413 if it is large without its images: many small
    values take far more memory and time than their bytes. ValueError if it is no JSON."""
    if len(body) > config.max_json_bytes:
        urls = itertools.islice(_DATA_URL.finditer(body), config.max_pictures)
        if len(body) - sum(len(url[0]) for url in urls) > config.max_json_bytes:
            raise HTTPException(
                413,
                f"the request is larger than {config.max_json_bytes} bytes without the data URLs "
                f"of {config.max_pictures} images",
            )
    return json.loads(body)


class _Bounded(Request):
    async def json(self) -> Any:
        config = self.app.state.service.config
        return await run_in_threadpool(parse, await self.body(), config)


class BodyRoute(APIRoute):
    """A route whose body is read by ``parse``."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_bounded(request: Request) -> Response:
            return await handle(_Bounded(request.scope, request.receive))

        return handle_bounded
