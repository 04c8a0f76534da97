"""One connection to the broker that comes back: backoff with jitter, the reason told once per loss."""

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable, Iterator
from typing import Never
from urllib.parse import urlsplit

import structlog
from aio_pika.abc import AbstractConnection
from aio_pika.connection import Connection, make_url
from aio_pika.exceptions import CONNECTION_EXCEPTIONS, AMQPConnectionError, ChannelInvalidStateError
from aiormq.exceptions import ChannelAccessRefused, InvalidFrameError

from worker.amqp import lenient
from worker.errors import ConfigurationError, LinkLost
from worker.ops import logs

_log = structlog.stdlib.get_logger(__name__)

CONNECT_TIMEOUT_S = 10.0
FIRST_PAUSE_S = 0.2
LONGEST_PAUSE_S = 10.0
_AT_ONCE_S = 0.1
_PORTS = {"amqp": 5672, "amqps": 5671}

LOSSES = (*CONNECTION_EXCEPTIONS, LinkLost, TimeoutError)
"""What it may mean that the broker went away: among them the RuntimeError of a channel that is closed already."""


async def connect(url: str, *, name: str, heartbeat_s: int) -> AbstractConnection:
    """Open one connection, shown to the broker's operator under `name`.

    Raises:
        AMQPError, OSError, TimeoutError: there is none to be had.
    """
    lenient.install()
    url_with_heartbeat = make_url(url, heartbeat=heartbeat_s)
    connection = Connection(url_with_heartbeat, client_properties={"connection_name": name})
    try:
        await connection.connect(timeout=CONNECT_TIMEOUT_S)
    except BaseException:
        # As `aio_pika.connect`, which leaves this to the garbage collector: that may run when the loop is closed.
        await connection.close()
        raise
    return connection


@contextlib.contextmanager
def named_losses() -> Iterator[None]:
    """Makes LinkLost of what aiormq raises where a connection dies in an unlucky moment.

    That is a bare Exception, or a cancellation that nobody asked for.
    """
    try:
        yield
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        raise LinkLost("the connection went away meanwhile") from None
    except Exception as error:
        if type(error) is not Exception:
            raise
        raise LinkLost("the connection went away meanwhile") from None


class Loss:
    """How a session learns that its connection, or something on it, is lost: whoever notices first says `of` what."""

    def __init__(self, connection: AbstractConnection) -> None:
        self._what: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        connection.close_callbacks.add(lambda _, error: self.of(f"connection closed: {error}"))

    def of(self, what: str) -> None:
        """That is lost."""
        if not self._what.done():
            self._what.set_result(what)

    async def wait(self) -> Never:
        """Return only by raising.

        Raises:
            LinkLost: as soon as anything is lost.
        """
        raise LinkLost(await self._what)


class Link:
    """Runs `session` over one connection after the other, each life of it until it raises one of `LOSSES`."""

    def __init__(self, url: str, *, name: str, heartbeat_s: int) -> None:
        self._url = url
        self._name = name
        self._heartbeat_s = heartbeat_s

    async def run(self, session: Callable[[AbstractConnection], Awaitable[None]]) -> None:
        """Until cancelled, or until `session` raises anything that is no loss, or returns."""
        pause_s = FIRST_PAUSE_S
        while True:
            loop = asyncio.get_running_loop()
            begun = loop.time()
            try:
                with named_losses():
                    connection = await connect(self._url, name=self._name, heartbeat_s=self._heartbeat_s)
                    try:
                        return await session(connection)
                    finally:
                        await _close(connection)
            except LOSSES as error:
                if loop.time() - begun > LONGEST_PAUSE_S:
                    pause_s = FIRST_PAUSE_S
                wait_s = pause_s * random.uniform(0.5, 1.0)  # noqa: S311 - spreads reconnections, guards nothing
                _log.warning(
                    logs.BROKER_LOST,
                    link=self._name,
                    broker=where(self._url),
                    error=_told(error),
                    again_in_s=round(wait_s, 2),
                )
                await asyncio.sleep(wait_s)
                pause_s = min(pause_s * 2, LONGEST_PAUSE_S)


class Connected:
    """`async with`: one connection for one errand of a person.

    Raises:
        ConfigurationError: there is none to be had, or its user may not do that.
        LinkLost: it went away meanwhile.
    """

    def __init__(self, url: str, *, heartbeat_s: int) -> None:
        self._url = url
        self._heartbeat_s = heartbeat_s
        self._connection: AbstractConnection | None = None

    async def __aenter__(self) -> AbstractConnection:
        """Connect."""
        try:
            self._connection = await connect(self._url, name="avatar-worker", heartbeat_s=self._heartbeat_s)
        except LOSSES as error:
            raise ConfigurationError(f"AMQP_URL: no broker at {where(self._url)}: {_told(error)}") from None
        return self._connection

    async def __aexit__(self, _: object, error: BaseException | None, __: object) -> None:
        """Close."""
        assert self._connection is not None
        await _close(self._connection)
        if isinstance(error, ChannelAccessRefused):
            raise ConfigurationError(f"AMQP_URL: {_told(error)}") from None
        if isinstance(error, AMQPConnectionError | ConnectionError | ChannelInvalidStateError):
            raise LinkLost(f"the connection to {where(self._url)} went away; try again") from error


def where(url: str) -> str:
    """Host, port and virtual host, without the password."""
    parts = urlsplit(url)
    return f"{parts.hostname}:{parts.port or _PORTS[parts.scheme]}{parts.path or '/'}"


async def is_blocked(connection: AbstractConnection) -> bool:
    """Whether the broker has said that it takes nothing for now, since it is short of memory or disk space.

    It says so to a connection that publishes, and reads nothing from that any more, acknowledgements neither.
    aiormq keeps this to itself, but for what waits until it is over.
    """
    if connection.transport is None:
        return False
    waiting = asyncio.ensure_future(connection.transport.ready())
    await asyncio.wait({waiting}, timeout=_AT_ONCE_S)
    return waiting.cancel()


async def _close(connection: AbstractConnection) -> None:
    # It may be lost already; then there is nobody left to say goodbye to.
    with contextlib.suppress(*LOSSES):
        await asyncio.wait_for(connection.close(), CONNECT_TIMEOUT_S)


def _told(error: BaseException) -> str:
    text = str(error) or type(error).__name__
    if isinstance(error, ChannelAccessRefused):
        text += " (it needs more permissions: `doctor` says which)"
    elif "ACCESS_REFUSED" in text:
        text += " (check user and password in AMQP_URL; guest may only connect from this machine)"
    elif isinstance(error, InvalidFrameError) and "OpenOk" in text:
        # What was expected; aiormq keeps to itself what the broker said instead.
        text = (
            "it refuses the virtual host in AMQP_URL: there is none of that name, or this user may not use it"
            " (rabbitmqctl list_permissions -p VHOST)"
        )
    return text
