"""Before a handler reads a byte: how many requests, how large, how slow. And it counts them all."""

import asyncio
import time
from typing import Any

from fastapi import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from instructblip.serving.config import ServeConfig
from instructblip.serving.metrics import Metrics

KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error"}
KINDS |= {429: "rate_limit_error", 500: "server_error", 504: "timeout_error"}


def error_body(status: int, message: str, param: str | None = None) -> dict[str, Any]:
    """OpenAI's form of an error."""
    kind = KINDS.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": None}}


class Guard:
    """ASGI middleware.

    Requests under way are at most those that can wait and run: memory is bounded by their number
    times the size of a body, which is refused as it comes in, whatever its header promised.
    """

    def __init__(self, app: ASGIApp, config: ServeConfig, metrics: Metrics) -> None:
        self.app, self.config, self.metrics = app, config, metrics
        self.under_way = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.monotonic(), 500
        costly = scope["path"].startswith("/v1/") and scope["method"] == "POST"

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self.under_way += costly
        try:
            refusal = self._refuse(scope, costly)
            app = self.app if refusal is None else refusal
            await app(scope, self._bounded(receive), noting)
        finally:
            self.under_way -= costly
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.request(route, status, time.monotonic() - began)

    def _refuse(self, scope: Scope, costly: bool) -> JSONResponse | None:
        config = self.config
        if costly and self.under_way > config.max_queue + 2 * config.max_batch:
            body = error_body(429, "too many requests wait; try again")
            return JSONResponse(body, 429, headers={"Retry-After": "1"})
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if not length.isdigit() or int(length[:20]) > config.max_body_bytes:
            return JSONResponse(error_body(413, self._too_large), 413)
        return None

    @property
    def _too_large(self) -> str:
        return f"the request is larger than {self.config.max_body_bytes} bytes"

    def _bounded(self, receive: Receive) -> Receive:
        """``receive`` that stops a body that is too large or too slow."""
        total, reading = 0, True
        deadline = time.monotonic() + self.config.timeout_s

        async def bounded() -> Message:
            nonlocal total, reading
            if not reading:  # waiting for the client to leave
                return await receive()
            try:
                async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, "the request came too slowly") from None
            total += len(message.get("body", b""))
            reading = bool(message.get("more_body", False))
            if total > self.config.max_body_bytes:
                raise HTTPException(413, self._too_large)
            return message

        return bounded
