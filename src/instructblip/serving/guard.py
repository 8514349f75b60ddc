"""Before a handler reads a byte: how many requests, how large, how slow. And it counts them all."""

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
    """Whether ``key`` is one of the server's, or it has none."""
    known = [hmac.compare_digest(key.encode(), one.encode()) for one in config.api_keys]
    return any(known) or not config.api_keys


def error_body(status: int, message: str, param: str | None = None) -> dict[str, Any]:
    """OpenAI's form of an error."""
    kind = KINDS.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": None}}


class Guard:
    """ASGI middleware.

    Requests under way are at most those that can wait and run; a request counts once its body is
    in, so that slow ones keep nobody out. Memory is bounded by that number times the size of a
    body: all bodies together are held to it as they come in, whatever their headers promised.
    """

    def __init__(self, app: ASGIApp, config: ServeConfig, metrics: Metrics) -> None:
        self.app, self.config, self.metrics = app, config, metrics
        self.under_way = self.held = 0
        self.most = config.max_queue + 2 * config.max_batch

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began, status = time.monotonic(), 500
        body = _Body(self, receive, scope["path"].startswith("/v1/") and scope["method"] == "POST")

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            refusal = self._refuse(scope, body.costly)
            app = self.app if refusal is None else refusal
            await app(scope, body.receive, noting)
        finally:
            body.forget()
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.request(route, status, time.monotonic() - began)

    def _refuse(self, scope: Scope, costly: bool) -> JSONResponse | None:
        """What the headers alone are refused for."""
        headers = dict(scope["headers"])
        scheme, _, key = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
        if costly and not knows_key(self.config, key.strip() if scheme.lower() == "bearer" else ""):
            return JSONResponse(error_body(401, NO_KEY), 401)
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length[:20]) > self.config.max_body_bytes:
            return JSONResponse(error_body(413, self.too_large), 413)
        return None

    @property
    def too_large(self) -> str:
        return f"the request is larger than {self.config.max_body_bytes} bytes"


class _Body:
    """A request's body as it comes in: stopped where it is too large, too slow or one too many."""

    def __init__(self, guard: Guard, receive: Receive, costly: bool) -> None:
        self.guard, self.costly, self._receive = guard, costly, receive
        self.deadline = time.monotonic() + guard.config.timeout_s
        self.size, self.whole, self.counted = 0, False, False

    async def receive(self) -> Message:
        """The next message; HTTPException where a limit is passed."""
        if self.whole:  # waiting for the client to leave
            return await self._receive()
        try:
            async with asyncio.timeout(max(0.0, self.deadline - time.monotonic())):
                message = await self._receive()
        except TimeoutError:
            raise HTTPException(408, "the request came too slowly") from None
        self._count(len(message.get("body", b"")))
        self.whole = not message.get("more_body", False)
        if self.whole and self.costly and message["type"] == "http.request":
            self.counted = True
            self.guard.under_way += 1
            if self.guard.under_way > self.guard.most:
                raise too_busy()
        return message

    def _count(self, size: int) -> None:
        guard = self.guard
        self.size += size
        guard.held += size
        if self.size > guard.config.max_body_bytes:
            raise HTTPException(413, guard.too_large)
        if size and guard.held > guard.most * guard.config.max_body_bytes:
            raise too_busy()

    def forget(self) -> None:
        """The request is over."""
        self.guard.held -= self.size
        self.guard.under_way -= self.counted
