"""Images are decoded in other processes, which a deadline can end."""

import asyncio
import contextlib
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

from PIL import Image

from instructblip.data.reading.decode import Window
from instructblip.serving.decoder import BadImage, read_message, write_message

COUNT = 4
"""Processes, and so images that are decoded at a time: decoded ones are large."""


class Decoder:
    """A process that decodes one image at a time; it needs half a second to start."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            (sys.executable, "-m", "instructblip.serving.decoder"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # ^C is for the server, which ends it
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )

    def decode(self, data: bytes, max_pixels: int, where: str, window: Window) -> Image.Image:
        """The image as RGB. Raises BadImage, also if the process ends meanwhile."""
        requests, answers = self.process.stdin, self.process.stdout
        assert requests is not None
        assert answers is not None
        try:
            head = {"where": where, "window": window, "max_pixels": max_pixels}
            write_message(requests, head, data)
            head, pixels = read_message(answers, 3 * max_pixels)
            if "size" in head:
                return Image.frombytes("RGB", tuple(head["size"]), pixels)
            refusal = BadImage(str(head["refused"]), int(head["status"]))
        except (OSError, EOFError, ValueError, LookupError, TypeError):
            self.close()
            refusal = BadImage(f"{where}: its decoder has ended; send the image again", 503)
        raise refusal

    def close(self) -> None:
        """End the process, whatever it does."""
        self.process.kill()
        self.process.wait()


class Decoders:
    """At most ``COUNT`` decoders, which start when they are first used, or all by ``start``. The
    methods are those of one thread, that of the event loop."""

    def __init__(self) -> None:
        self._idle: list[Decoder] = []
        self._busy: set[Decoder] = set()
        self._threads = ThreadPoolExecutor(COUNT, "decoder")
        self._turn = asyncio.Semaphore(COUNT)

    def start(self) -> None:
        """Start all processes, and return once they can decode."""
        self._idle += [Decoder() for _ in range(COUNT - len(self._idle) - len(self._busy))]
        for decoder in self._idle:
            with contextlib.suppress(BadImage):
                decoder.decode(b"", 1, "", "auto")

    async def decode(
        self, data: bytes, max_pixels: int, where: str, window: Window, deadline: float
    ) -> Image.Image:
        """The image as RGB. Raises BadImage, and TimeoutError at ``deadline`` (of ``monotonic``).
        The process is ended if nobody waits for its image any more."""
        async with asyncio.timeout(max(0.0, deadline - time.monotonic())), self._turn:
            decoder = self._idle.pop() if self._idle else Decoder()
            self._busy.add(decoder)
            try:
                return await asyncio.get_running_loop().run_in_executor(
                    self._threads, decoder.decode, data, max_pixels, where, window
                )
            except asyncio.CancelledError:  # too late, or the client has left
                decoder.close()
                raise
            finally:
                self._busy.discard(decoder)
                ended = decoder.process.poll() is not None
                self._idle.append(Decoder() if ended else decoder)

    def close(self) -> None:
        """End all processes."""
        for decoder in (*self._idle, *self._busy):
            decoder.close()
        self._threads.shutdown(wait=False)
