"""Refuses requests by their headers, and limits their number, size and slowness, before a handler
reads a byte; counts them."""

import asyncio
import hmac
import ipaddress
import time
from typing import Any
from urllib.parse import urlsplit

from fastapi import HTTPException
from starlette.datastructures import MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from instructblip.serving.config import ServeConfig
from instructblip.serving.service import Metrics, too_busy

KINDS = {401: "authentication_error", 403: "permission_error", 404: "not_found_error"}
KINDS |= {421: "permission_error"}
KINDS |= {429: "rate_limit_error", 500: "server_error", 503: "server_error", 504: "timeout_error"}

SPARE = 8
"""Connections that are never in use at once, so that /healthz always gets one."""

NO_KEY = "give an API key as `Authorization: Bearer KEY`"
WRONG_KEY_S = 0.1
"""Seconds between two answers to wrong keys, whoever gives them; right ones do not wait."""
MOST_WRONG = 32
"""Wrong keys that wait for their answer; those beyond get 429."""

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; connect-src 'self'; script-src 'self'; "
    "style-src 'self'; img-src 'self' data: blob:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
"""Of every response: the page runs its own files only, in no frame, and nothing else is a page."""


def knows_key(config: ServeConfig, key: str) -> bool:
    """Whether ``key`` is one of the server's, or the server has none."""
    known = [hmac.compare_digest(key.encode(), one.encode()) for one in config.api_keys]
    return any(known) or not config.api_keys


def is_known_host(config: ServeConfig, host: str) -> bool:
    """Whether a Host header or the host of a URL is this machine's, an address, or a name that the
    server was given. A page elsewhere cannot make a browser send an address: its name is there."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return False
    if name in ("localhost", *config.allowed_hosts) or name.endswith(".localhost"):
        return True
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def is_own_origin(config: ServeConfig, origin: str, host: str) -> bool:
    """Whether a page at ``origin`` is this server's. A proxy may have changed ``host``, but shows
    the page under a name that the server was given, at the usual port."""
    try:
        name = urlsplit(origin).netloc.lower()
    except ValueError:
        return False
    return name == host.lower() or name in config.allowed_hosts


def error_body(status: int, message: str, param: str | None = None) -> dict[str, Any]:
    """OpenAI's form of an error."""
    kind = KINDS.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": None}}


class Guard:
    """ASGI middleware.

    It admits at most as many requests as can wait and run. A request counts once its body is
    complete, so that slow ones keep nobody out. Memory is bounded by that number times the maximum
    size of a body: it applies to all bodies together as they arrive, whatever their headers say.
    A request whose client leaves is cancelled, whatever it waits for.
    """

    def __init__(self, app: ASGIApp, config: ServeConfig, metrics: Metrics) -> None:
        self.app, self.config, self.metrics = app, config, metrics
        self.admitted = self.held_bytes = self.open = self.wrong = 0
        self.next_wrong = 0.0
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
        handling, watching, ended, left = asyncio.current_task(), None, False, False

        async def watch() -> None:
            nonlocal left
            while (await receive())["type"] != "http.disconnect":
                pass
            if not ended and handling is not None:
                left = True
                handling.cancel()

        async def receive_within_limits() -> Message:
            nonlocal size, complete, admitted, watching
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
                watching = asyncio.create_task(watch())
            return message

        async def send_noting(message: Message) -> None:
            nonlocal status, ended
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message).update(HEADERS)
            ended = message["type"] == "http.response.body" and not message.get("more_body")
            await send(message)

        try:
            crowded = self.open > self.config.max_connections - SPARE
            if crowded and scope["path"] != "/healthz":
                message = error_body(503, "too many requests at once; try again")
                app = JSONResponse(message, 503, {"Connection": "close", "Retry-After": "1"})
            else:
                app = await self._refusal(scope, dict(scope["headers"])) or self.app
            await app(scope, receive_within_limits, send_noting)
        except asyncio.CancelledError:
            if not left:
                raise
            status = 499  # nginx's, for metrics: the client gets none
        finally:
            if watching is not None:
                watching.cancel()
            self.open -= 1
            self.held_bytes -= size
            self.admitted -= admitted
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.request(route, status, time.monotonic() - start)

    async def _refusal(self, scope: Scope, headers: dict[bytes, bytes]) -> JSONResponse | None:
        """The response to a request that its headers alone refuse."""
        host, origin, given, length = (
            headers.get(name, b"").decode("latin-1").strip()
            for name in (b"host", b"origin", b"authorization", b"content-length")
        )
        changes = scope["method"] not in ("GET", "HEAD", "OPTIONS")
        if host and not is_known_host(self.config, host):
            return _refuse(421, f"this server does not go by the name {host[:100]}", _ALLOW)
        if changes and origin and not is_own_origin(self.config, origin, host):
            return _refuse(403, f"a page of {origin[:100]} may not use this server", _ALLOW)
        guarded = scope["path"].startswith("/v1/") or scope["path"] == "/metrics"
        scheme, _, key = given.partition(" ")
        if guarded and not knows_key(
            self.config, key.strip() if scheme.lower() == "bearer" else ""
        ):
            return await self._wrong_key() if given else _refuse(401, NO_KEY)
        if length and (not length.isdigit() or int(length[:20]) > self.config.max_body_bytes):
            return _refuse(413, self.too_large)
        return None

    async def _wrong_key(self) -> JSONResponse:
        """401 in its turn, so that few keys can be tried in a second."""
        if self.wrong >= MOST_WRONG:
            return _refuse(429, "too many wrong keys", "try again later")
        now = time.monotonic()
        self.next_wrong = max(now, self.next_wrong) + WRONG_KEY_S
        self.wrong += 1
        try:
            await asyncio.sleep(self.next_wrong - now)
        finally:
            self.wrong -= 1
        return _refuse(401, NO_KEY)


_ALLOW = "its owner can allow it with --allow-host NAME"


def _refuse(status: int, *parts: str) -> JSONResponse:
    return JSONResponse(error_body(status, "; ".join(parts)), status)
