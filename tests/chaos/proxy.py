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
        self._writers: set[asyncio.StreamWriter] = set()
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

    def cut(self) -> int:
        """Reset every connection, on both sides; returns how many sides there were."""
        for writer in self._writers:
            _reset(writer)
        return len(self._writers)

    async def black_hole(self, seconds: float) -> None:
        """Swallow everything, new connections too, without closing anything; what was held back then goes on."""
        self._forwarding.clear()
        try:
            await asyncio.sleep(seconds)
        finally:
            self._forwarding.set()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            await self._forwarding.wait()
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            self._writers.discard(writer)
            _reset(writer)
            return
        self._writers.add(far_writer)
        for source, sink in ((reader, far_writer), (far_reader, writer)):
            task = asyncio.create_task(self._pump(source, sink))
            self._pumps.add(task)
            task.add_done_callback(self._pumps.discard)

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        try:
            # RuntimeError: uvloop's word for a transport that the other pump, or a cut, has closed.
            with contextlib.suppress(OSError, RuntimeError):
                while data := await source.read(_CHUNK):
                    await self._forwarding.wait()
                    sink.write(data)
                    await sink.drain()
            await self._forwarding.wait()
        finally:
            self._writers.discard(sink)
            sink.close()


def _reset(writer: asyncio.StreamWriter) -> None:
    sock = writer.get_extra_info("socket")
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
    writer.transport.abort()
