"""A TCP proxy in front of the broker, which can lose connections as networks do."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from urllib.parse import urlsplit

from worker.local.broker.base import free_port


class Proxy:
    """Passes on what comes, in both directions, until `cut`. `url` leads through it.

    While not `passing` nothing goes through, and nobody is told: a black hole. While not `answering` the broker hears
    everything and is not heard. `forged` is applied to what goes to the broker; it must keep the length.
    """

    def __init__(self, url: str, forged: Callable[[bytes], bytes] = bytes) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None
        assert parts.port is not None
        self.port = free_port()
        self.url = url.replace(f"{parts.hostname}:{parts.port}", f"127.0.0.1:{self.port}")
        self._target = parts.hostname, parts.port
        self.passing = asyncio.Event()
        self.passing.set()
        self.answering = asyncio.Event()
        self.answering.set()
        self._forged = forged
        self._writers: set[asyncio.StreamWriter] = set()

    def cut(self) -> None:
        """Reset all connections, on both sides and without a goodbye; new ones may come."""
        for writer in self._writers:
            writer.transport.abort()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(*self._target)
        pair = {writer, back}
        self._writers |= pair
        try:
            await asyncio.gather(
                self._pass_on(reader, back, forged=self._forged), self._pass_on(there, writer, self.answering)
            )
        finally:
            self._writers -= pair
            for one in pair:
                one.transport.abort()

    async def _pass_on(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        *gates: asyncio.Event,
        forged: Callable[[bytes], bytes] = bytes,
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                for gate in (self.passing, *gates):
                    await gate.wait()
                writer.write(forged(data))
                await writer.drain()
            writer.transport.abort()


@asynccontextmanager
async def proxied(url: str, forged: Callable[[bytes], bytes] = bytes) -> AsyncIterator[Proxy]:
    """A proxy to the broker at `url`."""
    proxy = Proxy(url, forged)
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", proxy.port)
    try:
        yield proxy
    finally:
        server.close()
        proxy.cut()
