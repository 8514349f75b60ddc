"""Limits number, size and slowness of requests before a handler reads a byte, and counts them."""

import asyncio
import hmac
import time
from typing import Any

from fastapi import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from instructblip.serving.config import ServeConfig
from instructblip.serving.service import Metrics, too_busy

KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error"}
KINDS |= {429: "rate_limit_error", 500: "server_error", 503: "server_error", 504: "timeout_error"}

SPARE = 8
"""Connections that are never in use at once, so that /healthz always gets one."""

NO_KEY = "give an API key as `Authorization: Bearer KEY`"


def knows_key(config: ServeConfig, key: str) -> bool:
    """Whether ``key`` is one of the server's, or the server has none."""
    known = [hmac.compare_digest(key.encode(), one.encode()) for one in config.api_keys]
    return any(known) or not config.api_keys


def error_body(status: int, message: str, param: str | None = None) -> dict[str, Any]:
    """OpenAI's form of an error."""
    kind = KINDS.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": None}}


class Guard:
    """ASGI middleware.

    It admits at most as many requests as can wait and run. A request counts once its body is
    complete, so that slow ones keep nobody out. Memory is bounded by that number times the maximum
    size of a body: it applies to all bodies together as they arrive, whatever their headers say.
    """

    def __init__(self, app: ASGIApp, config: ServeConfig, metrics: Metrics) -> None:
        self.app, self.config, self.metrics = app, config, metrics
        self.admitted = self.held_bytes = self.open = 0
        self.capacity = config.max_queue + 2 * config.max_batch
        self.too_large = f"the request is larger than {config.max_body_bytes} bytes"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status = time.monotonic(), 500
        self.open += 1
        costly = scope["path"].startswith("/v1/") and scope["method"] == "POST"
        size, complete, admitted = 0, False, False  # of the body

        async def receive_within_limits() -> Message:
            nonlocal size, complete, admitted
            if complete:  # waits for the client to disconnect
                return await receive()
            seconds_left = start + self.config.timeout_s - time.monotonic()
            try:
                async with asyncio.timeout(max(0.0, seconds_left)):
                    message = await receive()
            except TimeoutError:
                raise HTTPException(408, "the request came too slowly") from None
            length = len(message.get("body", b""))
            size += length
            self.held_bytes += length
            if size > self.config.max_body_bytes:
                raise HTTPException(413, self.too_large)
            if length and self.held_bytes > self.capacity * self.config.max_body_bytes:
                raise too_busy()
            complete = not message.get("more_body", False)
            if complete and costly and message["type"] == "http.request":
                admitted = True
                self.admitted += 1
                if self.admitted > self.capacity:
                    raise too_busy()
            return message

        async def send_noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            crowded = self.open > self.config.max_connections - SPARE
            if crowded and scope["path"] != "/healthz":
                message = error_body(503, "too many requests at once; try again")
                app = JSONResponse(message, 503, {"Connection": "close", "Retry-After": "1"})
            else:
                app = self._refusal(dict(scope["headers"]), costly) or self.app
            await app(scope, receive_within_limits, send_noting)
        finally:
            self.open -= 1
            self.held_bytes -= size
            self.admitted -= admitted
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.request(route, status, time.monotonic() - start)

    def _refusal(self, headers: dict[bytes, bytes], costly: bool) -> JSONResponse | None:
        """The response to a request that its headers alone refuse."""
        scheme, _, key = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
        if costly and not knows_key(self.config, key.strip() if scheme.lower() == "bearer" else ""):
            return JSONResponse(error_body(401, NO_KEY), 401)
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length[:20]) > self.config.max_body_bytes:
            return JSONResponse(error_body(413, self.too_large), 413)
        return None
