"""A server of the Model Context Protocol on stdin and stdout, whose tools are commands.

Each call runs in a process that prints into a file, so that nothing but the protocol reaches
stdout, a command that fails or crashes is a result like any other, and a run saves its step even
when the server is gone.
"""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any, BinaryIO

import anyio
import mcp_types as types
from mcp.server.lowlevel import Server
from mcp.server.stdio import stdio_server
from mcp.shared.exceptions import MCPError

from instructblip.core.version import __version__

MOST_BYTES = 1 << 16
"""Of each stream of a command, from its end, in a result."""
POLL_S = 0.1

Report = Callable[[float, float | None, str | None], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Tool:
    """A command as a client sees it. ``words`` turns a call's arguments into those of the command
    line, and raises ValueError or OSError, whose message the client reads, for a mistake."""

    name: str
    description: str
    schema: dict[str, Any]
    words: Callable[[Mapping[str, Any]], list[str]]


def run_server(tools: Sequence[Tool], instructions: str) -> None:
    """Serve until the client closes stdin. Commands run in the working directory; those that run at
    the end get SIGTERM, after which a training saves its step."""
    sys.stdout = getattr(sys.stdout, "stream", sys.stdout)  # JSON is escaped already
    children = Children()
    for name in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(name, children.stop)
    anyio.run(_serve, {tool.name: tool for tool in tools}, children, instructions)


async def _serve(tools: Mapping[str, Tool], children: "Children", instructions: str) -> None:
    async def list_tools(_context: Any, _params: Any) -> types.ListToolsResult:
        listed = [
            types.Tool(name=name, description=tool.description, input_schema=tool.schema)
            for name, tool in tools.items()
        ]
        return types.ListToolsResult(tools=listed)

    async def call_tool(context: Any, params: types.CallToolRequestParams) -> types.CallToolResult:
        if params.name not in tools:
            known = ", ".join(tools)
            message = f"no tool {params.name[:80]!r}: expected one of {known}"
            raise MCPError(types.INVALID_PARAMS, message)
        try:
            words = tools[params.name].words(params.arguments or {})
        except (ValueError, OSError) as error:
            return _result([str(error)], failed=True)
        return await children.run(words, context.session.report_progress)

    server = Server(
        "instructblip",
        version=__version__,
        instructions=instructions,
        on_list_tools=list_tools,
        on_call_tool=call_tool,
    )
    async with stdio_server() as (incoming, outgoing):
        await server.run(incoming, outgoing, server.create_initialization_options())


class Children:
    """The commands that are running."""

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[bytes]] = set()

    async def run(self, words: Sequence[str], report: Report) -> types.CallToolResult:
        """What a command prints, stdout before stderr. Each line of stdout is reported as progress.
        When the call is cancelled, the command gets SIGTERM and is waited for."""
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:
            child = subprocess.Popen(
                [sys.executable, "-u", "-m", "instructblip", *words],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=errors,
                start_new_session=True,  # a client that ends the server's group lets it save
            )
            self._running.add(child)
            try:
                await _follow(child, out, report)
            finally:
                if child.poll() is None:
                    child.terminate()
                    with anyio.CancelScope(shield=True):
                        while child.poll() is None:
                            await anyio.sleep(POLL_S)
                self._running.discard(child)
            return _result([_tail(out), _tail(errors)], failed=child.returncode != 0)

    def stop(self, number: int, _frame: FrameType | None) -> None:
        """A signal handler that ends the commands, and then the server as the signal does."""
        for child in self._running:
            child.terminate()
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)


async def _follow(child: subprocess.Popen[bytes], out: BinaryIO, report: Report) -> None:
    """Report each line that a command prints, until it ends."""
    offset = count = 0
    ended = False
    while not ended:
        ended = child.poll() is not None  # before reading, so that the last lines are read
        new = os.pread(out.fileno(), MOST_BYTES, offset)  # the offset of the file is the child's
        whole = new[: new.rfind(b"\n") + 1]
        offset += len(whole)
        for line in whole.decode(errors="replace").splitlines():
            count += 1
            await report(count, None, line)
        await anyio.sleep(POLL_S)


def _tail(file: BinaryIO) -> str:
    start = max(0, os.fstat(file.fileno()).st_size - MOST_BYTES)
    text = os.pread(file.fileno(), MOST_BYTES, start).decode(errors="replace")
    return f"... {text}" if start else text


def _result(texts: Sequence[str], failed: bool) -> types.CallToolResult:
    content = (types.TextContent(type="text", text=text) for text in texts if text)
    return types.CallToolResult(content=[*content], is_error=failed)
