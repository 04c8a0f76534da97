"""SQLite: one file for the workers of one host, or memory. One thread writes, another reads beside it."""

import asyncio
import contextlib
import os
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

import sqlalchemy as sa
from sqlalchemy.pool import StaticPool

from worker.errors import ConfigurationError
from worker.stores.backend import Locked, T, Unreachable, Work

IN_MEMORY = "sqlite://"
BUSY_S = 10.0
"""How long a write waits for another process."""

_WAL_PAUSES_S = (0.05,) * 100
_LOCKED = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}
# These, too, have nothing to do with what was asked for.
_OUT_OF_ORDER = {
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_READONLY,
}


class Sqlite:
    """`Backend` over SQLAlchemy's engine. The file holds tokens: only its owner may read it."""

    def __init__(self, url: str) -> None:
        self._engine = _engine(url)
        self._writer = ThreadPoolExecutor(1, "store writes")
        # All of a store in memory is one connection.
        self._reader = self._writer if url == IN_MEMORY else ThreadPoolExecutor(1, "store reads")

    @classmethod
    async def open(cls, url: str) -> Self:
        """Open `sqlite:///FILE` or `sqlite://`; the file is made if it is not there.

        Raises:
            ConfigurationError: the file cannot be used.
        """
        backend = cls(url)
        try:
            await asyncio.get_running_loop().run_in_executor(backend._writer, _log_ahead, backend._engine)
        except sa.exc.DBAPIError as error:
            await backend.close()
            raise ConfigurationError(f"STORE_URL: the file cannot be used: {error.orig}") from None
        return backend

    async def write(self, work: Work[T]) -> T:
        """See `Backend`, here and below."""
        return await asyncio.get_running_loop().run_in_executor(self._writer, _write, self._engine, work)

    async def read(self, work: Work[T]) -> T:
        """In a thread of its own: the log that is written ahead lets it."""
        return await asyncio.get_running_loop().run_in_executor(self._reader, _read, self._engine, work)

    async def close(self) -> None:
        """The last connection to be closed tidies up the file."""
        await asyncio.get_running_loop().run_in_executor(self._reader, lambda: None)
        await asyncio.get_running_loop().run_in_executor(self._writer, self._engine.dispose)
        self._reader.shutdown()
        self._writer.shutdown()


def _write(engine: sa.Engine, work: Work[T]) -> T:
    try:
        with engine.connect() as connection:
            # A transaction that reads before it writes would fail at once if another worker writes meanwhile.
            connection.exec_driver_sql("BEGIN IMMEDIATE")
            try:
                result = work(connection)
                connection.exec_driver_sql("COMMIT")
            except BaseException:
                with contextlib.suppress(sa.exc.OperationalError):  # SQLite may have done so itself
                    connection.exec_driver_sql("ROLLBACK")
                raise
            return result
    except sa.exc.OperationalError as error:
        raise _meaning(error) from None


def _read(engine: sa.Engine, work: Work[T]) -> T:
    try:
        with engine.connect() as connection:
            connection.exec_driver_sql("BEGIN")
            try:
                return work(connection)
            finally:
                connection.exec_driver_sql("ROLLBACK")
    except sa.exc.OperationalError as error:
        raise _meaning(error) from None


def _meaning(error: sa.exc.OperationalError) -> Exception:
    assert isinstance(error.orig, sqlite3.Error)
    code = error.orig.sqlite_errorcode & 0xFF
    if code in _LOCKED:
        return Locked(str(error.orig))
    return Unreachable(str(error.orig)) if code in _OUT_OF_ORDER else error


def _log_ahead(engine: sa.Engine) -> None:
    """Readers do not hold up writers then. Noted in the file, so that mostly there is nothing to do."""
    for pause_s in (*_WAL_PAUSES_S, None):
        try:
            with engine.connect() as connection:
                connection.exec_driver_sql("PRAGMA journal_mode=WAL")
        except sa.exc.OperationalError as error:
            # For this alone SQLite does not wait its turn, and a fleet starts all at once.
            if pause_s is None or "locked" not in str(error.orig):
                raise
            time.sleep(pause_s)
        else:
            return


def _engine(url: str) -> sa.Engine:
    options: dict[str, Any] = {
        "connect_args": {"timeout": BUSY_S, "check_same_thread": False},
        "isolation_level": "AUTOCOMMIT",
        "hide_parameters": True,  # they hold tokens, and errors are logged
    }
    if url == IN_MEMORY:
        return sa.create_engine(url, poolclass=StaticPool, **options)
    path = Path(url.removeprefix("sqlite:///"))
    try:
        # As SQLite will, but with an error that says what is wrong.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    except OSError as error:
        raise ConfigurationError(f"STORE_URL: {path} cannot be written: {error.strerror}") from None
    engine = sa.create_engine(url, **options)

    @sa.event.listens_for(engine, "connect")
    def prepare(connection: sqlite3.Connection, _record: object) -> None:
        connection.execute("PRAGMA synchronous=FULL")

    return engine
