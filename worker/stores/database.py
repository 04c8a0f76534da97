"""One SQL database: SQLite for the workers of one host, a file they share or memory. The tables stand in `tables`."""

import asyncio
import contextlib
import functools
import os
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, ParamSpec, Self, TypeVar

import sqlalchemy as sa
from sqlalchemy.dialects.sqlite import insert
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import StaticPool

from worker.errors import ConfigurationError
from worker.stores import tables

SCHEMA_VERSION = "1"
IN_MEMORY = "sqlite://"
_WAL_PAUSES_S = (0.05,) * 100


_P = ParamSpec("_P")
_T = TypeVar("_T")


def to_the_end(method: Callable[_P, Coroutine[Any, Any, _T]]) -> Callable[_P, Coroutine[Any, Any, _T]]:
    """What is begun is done, also if its caller is cancelled.

    SQLAlchemy throws away a connection that was in use then, and a store in memory with it.
    """

    @functools.wraps(method)
    async def shielded(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        return await asyncio.shield(method(*args, **kwargs))

    return shielded


class Database:
    """An engine, and one writer at a time. The file holds tokens: only its owner may read it."""

    def __init__(self, engine: AsyncEngine, *, in_memory: bool) -> None:
        self._engine = engine
        self._in_memory = in_memory
        self._turn = asyncio.Lock()

    @classmethod
    async def open(cls, url: str) -> Self:
        """Open `sqlite:///FILE` or `sqlite://`, made if it is not there.

        Raises:
            ConfigurationError: the file cannot be used, or a newer version made it.
        """
        engine = _engine(url)
        database = cls(engine, in_memory=url == IN_MEMORY)
        try:
            await database._log_ahead()
            async with database.writing() as connection:
                await connection.run_sync(tables.metadata.create_all)
                await connection.execute(_add_fact("schema_version", SCHEMA_VERSION))
                await connection.execute(_add_fact("store_id", "memory" if url == IN_MEMORY else uuid.uuid4().hex))
            version = await database.fact("schema_version")
        except sa.exc.DBAPIError as error:
            await engine.dispose()
            raise ConfigurationError(f"STORE_URL: the file cannot be used: {error.orig}") from None
        if version != SCHEMA_VERSION:
            await engine.dispose()
            raise ConfigurationError(f"STORE_URL: made by another version (schema {version}, wanted {SCHEMA_VERSION})")
        return database

    async def close(self) -> None:
        """Close the connections, after what has been begun."""
        async with self._turn:
            await self._engine.dispose()

    async def _log_ahead(self) -> None:
        """Readers do not hold up writers then. Noted in the file, so that mostly there is nothing to do."""
        for pause_s in (*_WAL_PAUSES_S, None):
            try:
                async with self._engine.connect() as connection:
                    await connection.exec_driver_sql("PRAGMA journal_mode=WAL")
            except sa.exc.OperationalError as error:
                # For this alone SQLite does not wait its turn, and a fleet starts all at once.
                if pause_s is None or "locked" not in str(error.orig):
                    raise
                await asyncio.sleep(pause_s)
            else:
                return

    async def fact(self, name: str) -> str:
        """Something written down when the database was made."""
        async with self.reading() as connection:
            result = await connection.execute(sa.select(tables.facts.c.value).where(tables.facts.c.name == name))
            return str(result.scalar_one())

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[AsyncConnection]:
        """A connection to read with."""
        # In memory all share one connection, and giving it back undoes what is half written.
        turn = self._turn if self._in_memory else contextlib.nullcontext()
        async with turn, self._engine.connect() as connection:
            yield connection

    @asynccontextmanager
    async def writing(self) -> AsyncIterator[AsyncConnection]:
        """A transaction; the only one of this process, and in SQLite of all processes."""
        async with self._turn, self._engine.connect() as connection:
            # A transaction that reads before it writes would fail at once if another worker writes meanwhile.
            await connection.exec_driver_sql("BEGIN IMMEDIATE")
            try:
                yield connection
            except BaseException:
                await connection.exec_driver_sql("ROLLBACK")
                raise
            await connection.exec_driver_sql("COMMIT")


def _engine(url: str) -> AsyncEngine:
    driver_url = url.replace("sqlite://", "sqlite+aiosqlite://", 1)
    # Parameters hold tokens, and errors are logged.
    options: dict[str, Any] = {
        "connect_args": {"timeout": 30},
        "isolation_level": "AUTOCOMMIT",
        "hide_parameters": True,
    }
    if url == IN_MEMORY:
        return create_async_engine(driver_url, poolclass=StaticPool, **options)
    path = Path(url.removeprefix("sqlite:///"))
    try:
        # As SQLite will, but with an error that says what is wrong.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    except OSError as error:
        raise ConfigurationError(f"STORE_URL: {path} cannot be written: {error.strerror}") from None
    engine = create_async_engine(driver_url, **options)

    @sa.event.listens_for(engine.sync_engine, "connect")
    def prepare(connection: Any, _record: object) -> None:
        cursor = connection.cursor()
        cursor.execute("PRAGMA synchronous=FULL")
        cursor.close()

    return engine


def _add_fact(name: str, value: str) -> sa.Insert:
    return insert(tables.facts).values(name=name, value=value).on_conflict_do_nothing()
