"""The store in SQL, through SQLAlchemy Core: SQLite for the workers of one host, a file they share or memory."""

import asyncio
import functools
import json
import os
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import sqlalchemy as sa
from sqlalchemy.dialects.sqlite import insert
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import StaticPool

from worker.core.model import Session, Viewer
from worker.errors import ConfigurationError
from worker.ports import Held

SCHEMA_VERSION = "1"
_WAL_PAUSES_S = (0.05,) * 100
IN_MEMORY = "sqlite://"

_metadata = sa.MetaData()
_facts = sa.Table(
    "facts",
    _metadata,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("value", sa.Text, nullable=False),
)
_sessions = sa.Table(
    "sessions",
    _metadata,
    sa.Column("conversation_id", sa.Text, primary_key=True),
    sa.Column("session_id", sa.Text, nullable=False),
    sa.Column("token", sa.Text, nullable=False),
    sa.Column("avatar_id", sa.Text),
    sa.Column("voice_id", sa.Text),
    sa.Column("voice_speed", sa.Float),
    sa.Column("attached", sa.Boolean, nullable=False),
    sa.Column("viewer", sa.Text),
    sa.Column("last_used", sa.Float, nullable=False),
    sa.Column("owner", sa.Text, nullable=False),
    sa.Column("lease_until", sa.Float, nullable=False, index=True),
)


_P = ParamSpec("_P")
_T = TypeVar("_T")


def _to_the_end(method: Callable[_P, Coroutine[Any, Any, _T]]) -> Callable[_P, Coroutine[Any, Any, _T]]:
    """What is begun is done, also if its caller is cancelled.

    SQLAlchemy throws away a connection that was in use then, and a store in memory with it.
    """

    @functools.wraps(method)
    async def shielded(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        return await asyncio.shield(method(*args, **kwargs))

    return shielded


class SqlStore:
    """`ports.SessionStore` over an SQLAlchemy engine. The file holds tokens: only its owner may read it."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        # Readers take turns too: in memory all share one connection, and giving it back undoes what is half written.
        self._turn = asyncio.Lock()

    @classmethod
    async def open(cls, url: str) -> "SqlStore":
        """Open `sqlite:///FILE` or `sqlite://`, made if it is not there.

        Raises:
            ConfigurationError: the file cannot be used, or a newer version made it.
        """
        engine = _engine(url)
        store = cls(engine)
        try:
            await store._log_ahead()
            async with store._writing() as connection:
                await connection.run_sync(_metadata.create_all)
                await connection.execute(_add_fact("schema_version", SCHEMA_VERSION))
                await connection.execute(_add_fact("store_id", "memory" if url == IN_MEMORY else uuid.uuid4().hex))
            version = await store._fact("schema_version")
        except sa.exc.DBAPIError as error:
            await engine.dispose()
            raise ConfigurationError(f"STORE_URL: the file cannot be used: {error.orig}") from None
        if version != SCHEMA_VERSION:
            await engine.dispose()
            raise ConfigurationError(f"STORE_URL: made by another version (schema {version}, wanted {SCHEMA_VERSION})")
        return store

    async def identity(self) -> str:
        """See `ports.SessionStore`, here and below."""
        return await self._fact("store_id")

    @_to_the_end
    async def take(self, conversation_id: str, owner: str, until: float) -> Held | None:
        """One statement, so that two takers cannot both win."""
        row = (
            sa.update(_sessions)
            .where(_sessions.c.conversation_id == conversation_id)
            .values(owner=owner, lease_until=until)
            .returning(*_sessions.c)
        )
        async with self._writing() as connection:
            found = (await connection.execute(row)).one_or_none()
        return None if found is None else _held(found)

    @_to_the_end
    async def put(self, held: Held, owner: str, until: float) -> None:
        """Insert or replace."""
        values = _values(held) | {"owner": owner, "lease_until": until}
        statement = insert(_sessions).values(values)
        statement = statement.on_conflict_do_update(index_elements=["conversation_id"], set_=values)
        async with self._writing() as connection:
            await connection.execute(statement)

    @_to_the_end
    async def renew(self, held: Mapping[str, Held], owner: str, until: float) -> set[str]:
        """All in one transaction."""
        lost: set[str] = set()
        if not held:
            return lost
        async with self._writing() as connection:
            for conversation_id, one in held.items():
                result = await connection.execute(
                    sa.update(_sessions)
                    .where(*_is_held(one, owner))
                    .values(lease_until=until, last_used=sa.func.max(_sessions.c.last_used, one.last_used))
                )
                if result.rowcount == 0:
                    lost.add(conversation_id)
        return lost

    @_to_the_end
    async def adopt(self, owner: str, now: float, until: float) -> list[Held]:
        """Looks before it locks: mostly there is nothing to adopt."""
        stale = _sessions.c.lease_until < now
        async with self._turn, self._engine.connect() as connection:
            if (await connection.execute(sa.select(sa.exists().where(stale)))).scalar() == 0:
                return []
        statement = sa.update(_sessions).where(stale).values(owner=owner, lease_until=until).returning(*_sessions.c)
        async with self._writing() as connection:
            return [_held(row) for row in await connection.execute(statement)]

    @_to_the_end
    async def remove(self, held: Held, owner: str) -> bool:
        """Compare and delete."""
        async with self._writing() as connection:
            result = await connection.execute(sa.delete(_sessions).where(*_is_held(held, owner)))
        return bool(result.rowcount)

    @_to_the_end
    async def release(self, owner: str) -> None:
        """The leases run out at once."""
        async with self._writing() as connection:
            await connection.execute(sa.update(_sessions).where(_sessions.c.owner == owner).values(lease_until=0))

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

    async def _fact(self, name: str) -> str:
        async with self._turn, self._engine.connect() as connection:
            result = await connection.execute(sa.select(_facts.c.value).where(_facts.c.name == name))
            return str(result.scalar_one())

    @asynccontextmanager
    async def _writing(self) -> AsyncIterator[AsyncConnection]:
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
    return insert(_facts).values(name=name, value=value).on_conflict_do_nothing()


def _is_held(held: Held, owner: str) -> tuple[sa.ColumnElement[bool], ...]:
    return (
        _sessions.c.conversation_id == held.conversation_id,
        _sessions.c.session_id == held.session.session_id,
        _sessions.c.owner == owner,
    )


def _values(held: Held) -> dict[str, Any]:
    session = held.session
    viewer = session.viewer
    return {
        "conversation_id": held.conversation_id,
        "session_id": session.session_id,
        "token": session.token,
        "avatar_id": session.avatar_id,
        "voice_id": session.voice_id,
        "voice_speed": session.voice_speed,
        "attached": session.attached,
        "viewer": None if viewer is None else json.dumps({"whepUrl": viewer.whep_url, "turn": viewer.turn}),
        "last_used": held.last_used,
    }


def _held(row: Any) -> Held:
    viewer = json.loads(row.viewer) if row.viewer else None
    session = Session(
        session_id=row.session_id,
        token=row.token,
        avatar_id=row.avatar_id,
        voice_id=row.voice_id,
        voice_speed=row.voice_speed,
        attached=row.attached,
        viewer=Viewer(viewer["whepUrl"], viewer["turn"]) if viewer else None,
    )
    return Held(row.conversation_id, session, row.last_used)
