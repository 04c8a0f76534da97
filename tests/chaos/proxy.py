"""A TCP proxy between one worker and the broker, which can be cut and black-holed."""

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

_RESET_ON_CLOSE = struct.pack("ii", 1, 0)
_CHUNK = 65_536


class Proxy:
    """Forwards what connects to `port`, both ways, to `target`, a port on loopback."""

    def __init__(self, target: int) -> None:
        self.port = 0
        self._target = target
        self._forwarding = asyncio.Event()
        self._forwarding.set()
        self._links: list[tuple[asyncio.StreamWriter, asyncio.StreamWriter]] = []
        self._pumps: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Proxy"]:
        """Listen on a free port of loopback."""
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
            for task in self._pumps:
                task.cancel()
            await asyncio.gather(*self._pumps, return_exceptions=True)

    @property
    def links(self) -> int:
        """How many connections lead through it."""
        return len(self._links)

    def cut(self, number: int | None = None) -> None:
        """Reset one connection, on both sides, or all."""
        for link in self._links[:] if number is None else [self._links[number]]:
            for writer in link:
                _reset(writer)

    async def black_hole(self, seconds: float) -> None:
        """Swallow everything, new connections too, without closing anything; what was held back then goes on."""
        self._forwarding.clear()
        try:
            await asyncio.sleep(seconds)
        finally:
            self._forwarding.set()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self._forwarding.wait()
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            _reset(writer)
            return
        link = (writer, far_writer)
        self._links.append(link)
        for source, sink in ((reader, far_writer), (far_reader, writer)):
            task = asyncio.create_task(self._pump(source, sink, link))
            self._pumps.add(task)
            task.add_done_callback(self._pumps.discard)

    async def _pump(
        self,
        source: asyncio.StreamReader,
        sink: asyncio.StreamWriter,
        link: tuple[asyncio.StreamWriter, asyncio.StreamWriter],
    ) -> None:
        try:
            # RuntimeError: uvloop's word for a transport that the other pump, or a cut, has closed.
            with contextlib.suppress(OSError, RuntimeError):
                while data := await source.read(_CHUNK):
                    await self._forwarding.wait()
                    sink.write(data)
                    await sink.drain()
            await self._forwarding.wait()
        finally:
            if link in self._links:
                self._links.remove(link)
            sink.close()


def _reset(writer: asyncio.StreamWriter) -> None:
    sock = writer.get_extra_info("socket")
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
    writer.transport.abort()
