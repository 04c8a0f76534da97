"""PostgreSQL: for workers of several hosts. One connection writes, a few others read."""

import asyncio
import ssl
from collections.abc import Coroutine
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

import asyncpg
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from worker.errors import ConfigurationError
from worker.stores.backend import Contended, T, Unreachable, Work

READERS = 4
CONNECT_S = 5.0
ANSWER_S = 10.0
"""How long a statement may take before its connection is given up."""

# Locks of a worker that fell silent in the middle of a transaction hold up the others for no longer.
_SERVER = {"idle_in_transaction_session_timeout": "5000", "lock_timeout": "5000"}

_CONTENDED = {"40001", "40P01", "55P03"}  # serialization_failure, deadlock_detected, lock_not_available
_READ_ONLY = "25006"  # a standby answers, as after a change of roles
_UNREACHABLE = {"08", "28", "3D", "53", "57", "58"}  # connection, login, database, resources, operator, system

# Parameters of libpq that asyncpg would hand on to the server, which refuses them. Nothing is lost without these.
_OF_LIBPQ = {"client_encoding", "fallback_application_name", "load_balance_hosts", "sslcompression", "sslsni"}
_OF_LIBPQ |= {"keepalives", "keepalives_idle", "keepalives_interval", "keepalives_count", "tcp_user_timeout"}
_DEMANDS = {"channel_binding", "gssencmode", "require_auth"}
_NO_DEMAND = {"", "disable", "prefer"}


class Postgres:
    """`Backend` over SQLAlchemy's asyncpg dialect."""

    def __init__(self, url: str) -> None:
        dsn, arguments = arguments_of(url)

        async def connect() -> asyncpg.Connection:
            try:
                return await asyncpg.connect(dsn, command_timeout=ANSWER_S, server_settings=_SERVER, **arguments)
            except Exception as error:  # noqa: BLE001 - whatever it is, there is no connection
                quotes = type(error) is ValueError  # the address, and with it the password
                raise Unreachable("no address" if quotes else str(error) or "no answer in time") from None

        def engine(connections: int, isolation: str) -> AsyncEngine:
            return create_async_engine(
                "postgresql+asyncpg://",
                async_creator=connect,
                isolation_level=isolation,
                pool_size=connections,
                max_overflow=0,
                pool_timeout=ANSWER_S,
                hide_parameters=True,  # they hold tokens, and errors are logged
            )

        self._writer = engine(1, "READ COMMITTED")
        self._readers = engine(READERS, "REPEATABLE READ")
        self._running: set[asyncio.Task[Any]] = set()

    async def write(self, work: Work[T]) -> T:
        """See `Backend`, here and below."""
        return await self._to_the_end(_twice(self._writer, work))

    async def read(self, work: Work[T]) -> T:
        """Over another connection."""
        return await self._to_the_end(_twice(self._readers, work))

    async def close(self) -> None:
        """What is under way ends first, as long as the server answers."""
        if self._running:
            await asyncio.wait(self._running, timeout=CONNECT_S)
            for task in self._running:
                task.cancel()
        for engine in (self._writer, self._readers):
            try:
                async with asyncio.timeout(CONNECT_S):
                    await engine.dispose()
            except TimeoutError:
                await engine.dispose(close=False)

    async def _to_the_end(self, running: Coroutine[Any, Any, T]) -> T:
        """SQLAlchemy throws away a connection whose user is cancelled."""
        task = asyncio.create_task(running)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return await asyncio.shield(task)


async def _twice(engine: AsyncEngine, work: Work[T]) -> T:
    """A server that was started anew answers over a new connection, and only there."""
    try:
        return await _once(engine, work)
    except Unreachable:
        return await _once(engine, work)


async def _once(engine: AsyncEngine, work: Work[T]) -> T:
    try:
        async with engine.connect() as connection:
            try:
                return await connection.run_sync(_transact, work)
            except OSError:
                await connection.invalidate()
                raise
    except (sa.exc.SQLAlchemyError, OSError) as error:
        raise _meaning(error) from None


def _transact(connection: sa.Connection, work: Work[T]) -> T:
    with connection.begin():
        return work(connection)


def _meaning(error: Exception) -> Exception:
    if isinstance(error, OSError | sa.exc.TimeoutError):
        return Unreachable(str(error) or "no answer in time")
    if not isinstance(error, sa.exc.DBAPIError):
        return error
    code = getattr(error.orig, "sqlstate", None) or ""
    if code in _CONTENDED:
        return Contended(str(error.orig))
    gone = error.connection_invalidated or isinstance(error, sa.exc.InterfaceError)
    if gone or code == _READ_ONLY or code[:2] in _UNREACHABLE:
        return Unreachable(str(error.orig))
    return error


def arguments_of(url: str) -> tuple[str, dict[str, Any]]:
    """What `asyncpg.connect` takes for an address as libpq knows it.

    Raises:
        ConfigurationError: it asks for something that asyncpg cannot do; the text does not repeat it.
    """
    address, _, query = url.partition("?")
    given = dict(parse_qsl(query, keep_blank_values=True))
    arguments: dict[str, Any] = {"timeout": _seconds(given.pop("connect_timeout", ""))}
    for name in _OF_LIBPQ & given.keys():
        del given[name]
    for name in _DEMANDS & given.keys():
        if given.pop(name) not in _NO_DEMAND:
            raise ConfigurationError(f"STORE_URL: {name} is not supported; leave it out, and use sslmode=verify-full")
    if given.get("sslrootcert") == "system":
        del given["sslrootcert"]
        given.pop("sslmode", None)  # libpq demands verify-full with it
        arguments["ssl"] = ssl.create_default_context()
    _demand_address(address)
    return f"{address}?{urlencode(given)}" if given else address, arguments


def _seconds(text: str) -> float:
    return float(text) if text.isdecimal() and int(text) else CONNECT_S


def _demand_address(address: str) -> None:
    # asyncpg's own errors would quote it, and with it what stands there of a password.
    hosts = urlsplit(address).netloc.rpartition("@")[2].split(",")
    ports = [host.rpartition("]")[2].partition(":")[2] for host in hosts]
    if not all(port.isdecimal() for port in ports if port):
        raise ConfigurationError(
            "STORE_URL: no port number where one should stand; write / : @ # % in a password as %2F %3A %40 %23 %25"
        )
