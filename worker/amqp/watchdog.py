"""Proves that the worker's own links pass something on: a connection may stand for minutes after the network has gone.

Every few seconds a message goes through the publishing connection to a queue on the consuming one. Silence has both
rebuilt; if that does not help, the worker had better end and be started afresh.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Literal

import structlog
from aio_pika import Message
from aio_pika.abc import AbstractConnection, AbstractIncomingMessage

from worker.amqp.link import LOSSES, is_blocked, named_losses
from worker.errors import LinkLost, LinkSilent
from worker.ops import logs

_log = structlog.stdlib.get_logger(__name__)

EVERY_S = 5.0
SILENCE_S = 15.0
_CLOSE_S = 1.0

Session = Callable[[AbstractConnection], Awaitable[None]]
End = Literal["publishing", "consuming"]


class Watchdog:
    """Watches the links whose sessions it has wrapped. `ready` while what is published comes back.

    A link that is down is none of its business: that one comes back by itself, and says why it cannot. A broker that
    is out of memory or disk space says so, and is waited for.
    """

    def __init__(self, *, every_s: float = EVERY_S, silence_s: float = SILENCE_S) -> None:
        self.ready = asyncio.Event()
        self._every_s = every_s
        self._silence_s = silence_s
        self._standing: dict[End, AbstractConnection] = {}
        self._beats = 0
        # Something came back, or a link is another one.
        self._news = asyncio.Event()
        self._condemned = asyncio.Event()

    def publishing(self, session: Session) -> Session:
        """The session of the link that events are published through."""
        return partial(self._guard, "publishing", session)

    def consuming(self, session: Session) -> Session:
        """The session of the link that commands come through."""
        return partial(self._guard, "consuming", session)

    async def run(self) -> None:
        """Watch until cancelled.

        Raises:
            LinkSilent: rebuilding the links did not help.
        """
        rebuilt = False
        while True:
            publishing, consuming = await self._both()
            before = self._beats
            beating = asyncio.create_task(self._beat(publishing, consuming))
            try:
                silent = await self._listen(publishing, consuming)
            finally:
                self.ready.clear()
                beating.cancel()
                await asyncio.gather(beating, return_exceptions=True)
            rebuilt = rebuilt and self._beats == before
            if not silent:
                continue
            if rebuilt:
                text = f"the broker takes connections, but nothing came back for {self._silence_s:g} s, twice"
                raise LinkSilent(text)
            rebuilt = True
            _log.error(logs.LINKS_SILENT, silent_s=self._silence_s, hint="both connections are made anew")
            self._condemned.set()

    async def _guard(self, end: End, session: Session, connection: AbstractConnection) -> None:
        """Run the session, until it ends by itself or is condemned."""
        self._condemned.clear()
        self._standing[end] = connection
        self._news.set()
        running = asyncio.ensure_future(session(connection))
        condemned = asyncio.create_task(self._condemned.wait())
        try:
            await asyncio.wait({running, condemned}, return_when=asyncio.FIRST_COMPLETED)
            if not running.done():
                raise LinkLost(f"nothing came back for {self._silence_s:g} s")
            running.result()
        finally:
            del self._standing[end]
            self._news.set()
            running.cancel()
            condemned.cancel()
            await asyncio.gather(running, condemned, return_exceptions=True)

    async def _both(self) -> tuple[AbstractConnection, AbstractConnection]:
        while len(self._standing) < 2:
            self._news.clear()
            await self._news.wait()
        return self._standing["publishing"], self._standing["consuming"]

    async def _listen(self, publishing: AbstractConnection, consuming: AbstractConnection) -> bool:
        """Return when one of these links stands no more, or, and then True, when nothing comes back."""
        blocked = False
        while True:
            heard = self._beats
            self._news.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._silence_s):
                    await self._news.wait()
            if self._standing != {"publishing": publishing, "consuming": consuming}:
                return False
            if self._beats > heard:
                self.ready.set()
                if blocked:
                    blocked = False
                    _log.info(logs.BROKER_UNBLOCKED)
            elif not await is_blocked(publishing):
                return True
            else:
                self.ready.clear()
                if not blocked:
                    blocked = True
                    hint = (
                        "it is short of memory or disk space (rabbitmqctl status); nothing is lost, and it goes on then"
                    )
                    _log.error(logs.BROKER_BLOCKED, hint=hint)

    async def _beat(self, publishing: AbstractConnection, consuming: AbstractConnection) -> None:
        """Publish again and again; over new channels when one is lost."""
        while True:
            with contextlib.suppress(*LOSSES), named_losses():
                speaking = await publishing.channel(publisher_confirms=False)
                hearing = await consuming.channel(publisher_confirms=False)
                try:
                    queue = await hearing.declare_queue(exclusive=True)
                    await queue.consume(self._hear, no_ack=True)
                    while True:
                        await speaking.default_exchange.publish(Message(b""), queue.name)
                        await asyncio.sleep(self._every_s)
                finally:
                    for channel in (speaking, hearing):
                        with contextlib.suppress(*LOSSES), named_losses():
                            await asyncio.wait_for(channel.close(), _CLOSE_S)
            await asyncio.sleep(self._every_s)

    async def _hear(self, _: AbstractIncomingMessage) -> None:
        self._beats += 1
        self._news.set()
