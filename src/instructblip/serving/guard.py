"""Limits number, size and slowness of requests before a handler reads a byte, and counts them."""

import asyncio
import hmac
import time
from typing import Any

from fastapi import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from instructblip.serving.config import ServeConfig
from instructblip.serving.metrics import Metrics
from instructblip.serving.service import too_busy

KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error"}
KINDS |= {429: "rate_limit_error", 500: "server_error", 504: "timeout_error"}

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
        self.admitted = self.held_bytes = 0
        self.capacity = config.max_queue + 2 * config.max_batch

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status = time.monotonic(), 500
        body = _Body(self, receive, scope["path"].startswith("/v1/") and scope["method"] == "POST")

        async def send_noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            refusal = self._refuse(scope, body.costly)
            app = self.app if refusal is None else refusal
            await app(scope, body.receive, send_noting)
        finally:
            body.close()
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.request(route, status, time.monotonic() - start)

    def _refuse(self, scope: Scope, costly: bool) -> JSONResponse | None:
        """The response to a request that its headers alone refuse."""
        headers = dict(scope["headers"])
        scheme, _, key = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
        if costly and not knows_key(self.config, key.strip() if scheme.lower() == "bearer" else ""):
            return JSONResponse(error_body(401, NO_KEY), 401)
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length[:20]) > self.config.max_body_bytes:
            return JSONResponse(error_body(413, self.too_large), 413)
        return None

    def hold(self, size: int) -> bool:
        """Count bytes of a body; whether all bodies together are within the bound."""
        self.held_bytes += size
        return not size or self.held_bytes <= self.capacity * self.config.max_body_bytes

    def admit(self) -> bool:
        """Count a complete request; whether there is room for it."""
        self.admitted += 1
        return self.admitted <= self.capacity

    def release(self, size: int, admitted: bool) -> None:
        """Undo ``hold`` and ``admit``."""
        self.held_bytes -= size
        self.admitted -= admitted

    @property
    def too_large(self) -> str:
        return f"the request is larger than {self.config.max_body_bytes} bytes"


class _Body:
    """A request's body as it arrives: stopped when it is too large, too slow or one too many."""

    def __init__(self, guard: Guard, receive: Receive, costly: bool) -> None:
        self.guard, self.costly, self._receive = guard, costly, receive
        self.deadline = time.monotonic() + guard.config.timeout_s
        self.size, self.complete, self.counted = 0, False, False

    async def receive(self) -> Message:
        """The next message. Raises HTTPException when a limit is exceeded."""
        if self.complete:  # waits for the client to disconnect
            return await self._receive()
        try:
            async with asyncio.timeout(max(0.0, self.deadline - time.monotonic())):
                message = await self._receive()
        except TimeoutError:
            raise HTTPException(408, "the request came too slowly") from None
        size = len(message.get("body", b""))
        self.size += size
        within_bound = self.guard.hold(size)
        if self.size > self.guard.config.max_body_bytes:
            raise HTTPException(413, self.guard.too_large)
        if not within_bound:
            raise too_busy()
        self.complete = not message.get("more_body", False)
        if self.complete and self.costly and message["type"] == "http.request":
            self.counted = True
            if not self.guard.admit():
                raise too_busy()
        return message

    def close(self) -> None:
        """Give back the memory and the place of a request that is over."""
        self.guard.release(self.size, self.counted)
