"""What the run reads from the fleet's store: what is being said, and what the durable inbox holds."""

import asyncio
import json
import sqlite3
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import asyncpg

from tests.support.postgres import Postgres
from worker.stores.postgres import arguments_of

SQLITE = "sqlite"
POSTGRESQL = "postgresql"
KINDS = (SQLITE, POSTGRESQL)


@dataclass(frozen=True, slots=True)
class Intent:
    """A piece whose outcome nobody has recorded. `owner`: who holds the conversation's session."""

    conversation: str
    text: str
    owner: str
    begun: float


class Store(Protocol):
    """One of them. `url` is the workers' `STORE_URL`."""

    url: str
    _ever_kept: str

    async def rows(self, query: str) -> Sequence[Sequence[Any]]:
        """Run a query."""
        ...


async def intents(store: Store) -> list[Intent]:
    """Every piece that is being said."""
    query = (
        "SELECT conversation_id, owner, conversations.state FROM conversations "
        "LEFT JOIN sessions USING (conversation_id)"
    )
    found = []
    for conversation, owner, state in await store.rows(query):
        attempt = json.loads(state)["attempt"]
        if attempt is not None:
            found.append(Intent(conversation, attempt["text"], owner or "", attempt["begun"]))
    return found


async def kept(store: Store) -> tuple[int, int]:
    """How many commands were ever kept in the durable inbox, and how many are."""
    ever, now = await store.rows(store._ever_kept), await store.rows("SELECT count(*) FROM backlog")
    return (ever[0][0] if ever else 0), now[0][0]


class _Sqlite:
    _ever_kept = "SELECT seq FROM sqlite_sequence WHERE name = 'backlog'"

    def __init__(self, path: Path) -> None:
        self.url = f"sqlite:///{path}"
        self._path = path

    async def rows(self, query: str) -> Sequence[Sequence[Any]]:
        with closing(sqlite3.connect(f"file:{self._path}?mode=ro", uri=True, timeout=5)) as connection:
            return connection.execute(query).fetchall()


class _Postgresql:
    _ever_kept = "SELECT CASE WHEN is_called THEN last_value ELSE 0 END FROM backlog_position_seq"

    def __init__(self, url: str, connection: "asyncpg.Connection") -> None:
        self.url = url
        self._connection = connection
        self._asking = asyncio.Lock()

    async def rows(self, query: str) -> Sequence[Sequence[Any]]:
        async with self._asking:
            return await self._connection.fetch(query)  # type: ignore[no-any-return]


@asynccontextmanager
async def opened(postgres: Postgres | None, folder: Path) -> AsyncIterator[Store]:
    """An empty store: a schema of that PostgreSQL, or a file."""
    if postgres is None:
        yield _Sqlite(folder / "ledger.db")
        return
    async with postgres.schema() as url:
        dsn, arguments = arguments_of(url)
        connection = await asyncpg.connect(dsn, **arguments)
        try:
            yield _Postgresql(url, connection)
        finally:
            await connection.close()
