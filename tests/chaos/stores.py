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
_AWAY_S = 60.0


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
    """It may be killed meanwhile; what it holds does not change while it is away."""

    _ever_kept = "SELECT CASE WHEN is_called THEN last_value ELSE 0 END FROM backlog_position_seq"

    def __init__(self, url: str) -> None:
        self.url = url
        self._connection: asyncpg.Connection | None = None
        self._asking = asyncio.Lock()

    async def rows(self, query: str) -> Sequence[Sequence[Any]]:
        async with self._asking, asyncio.timeout(_AWAY_S):
            while True:
                try:
                    if self._connection is None:
                        dsn, arguments = arguments_of(self.url)
                        self._connection = await asyncpg.connect(dsn, **arguments)
                    return await self._connection.fetch(query)  # type: ignore[no-any-return]
                except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
                    await self.close()
                    await asyncio.sleep(0.1)

    async def close(self) -> None:
        if self._connection is not None:
            self._connection.terminate()
            self._connection = None


@asynccontextmanager
async def opened(postgres: Postgres | None, folder: Path) -> AsyncIterator[Store]:
    """An empty store: a schema of that PostgreSQL, or a file."""
    if postgres is None:
        yield _Sqlite(folder / "ledger.db")
        return
    async with postgres.schema() as url:
        store = _Postgresql(url)
        try:
            yield store
        finally:
            await store.close()
