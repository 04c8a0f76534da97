"""The store in SQL, through SQLAlchemy Core: SQLite for the workers of one host, a file they share or memory.

One thread does the work, and what comes up while it commits goes into its next transaction: a lease must not run out
because two hundred conversations begin at once.
"""

import asyncio
import json
import os
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.dialects.sqlite import insert
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


_T = TypeVar("_T")
Work = Callable[[sa.Connection], _T]


class SqlStore:
    """`ports.SessionStore` over an SQLAlchemy engine. The file holds tokens: only its owner may read it."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="store")
        self._waiting: list[tuple[Work[Any], asyncio.Future[Any]]] = []
        self._committing: asyncio.Task[None] | None = None

    @classmethod
    async def open(cls, url: str) -> "SqlStore":
        """Open `sqlite:///FILE` or `sqlite://`, made if it is not there.

        Raises:
            ConfigurationError: the file cannot be used, or a newer version made it.
        """
        store = cls(_engine(url))
        store_id = "memory" if url == IN_MEMORY else uuid.uuid4().hex

        def prepare(connection: sa.Connection) -> str:
            _metadata.create_all(connection)
            connection.execute(_add_fact("schema_version", SCHEMA_VERSION))
            connection.execute(_add_fact("store_id", store_id))
            return _fact(connection, "schema_version")

        try:
            await asyncio.get_running_loop().run_in_executor(store._thread, _log_ahead, store._engine)
            version = await store._do(prepare)
        except sa.exc.DBAPIError as error:
            await store.close()
            raise ConfigurationError(f"STORE_URL: the file cannot be used: {error.orig}") from None
        if version != SCHEMA_VERSION:
            await store.close()
            raise ConfigurationError(f"STORE_URL: made by another version (schema {version}, wanted {SCHEMA_VERSION})")
        return store

    async def identity(self) -> str:
        """See `ports.SessionStore`, here and below."""
        return await self._do(lambda connection: _fact(connection, "store_id"))

    async def take(self, conversation_id: str, owner: str, until: float) -> Held | None:
        """One statement, so that two takers cannot both win."""
        statement = (
            sa.update(_sessions)
            .where(_sessions.c.conversation_id == conversation_id)
            .values(owner=owner, lease_until=until)
            .returning(*_sessions.c)
        )
        found = await self._do(lambda connection: connection.execute(statement).one_or_none())
        return None if found is None else _held(found)

    async def put(self, held: Held, owner: str, until: float) -> None:
        """Insert or replace."""
        values = _values(held) | {"owner": owner, "lease_until": until}
        statement = insert(_sessions).values(values)
        statement = statement.on_conflict_do_update(index_elements=["conversation_id"], set_=values)
        await self._do(lambda connection: connection.execute(statement))

    async def renew(self, held: Mapping[str, Held], owner: str, until: float) -> set[str]:
        """All in one transaction."""

        def work(connection: sa.Connection) -> set[str]:
            return {key for key, one in held.items() if not connection.execute(_renewal(one, owner, until)).rowcount}

        return await self._do(work) if held else set()

    async def adopt(self, owner: str, now: float, until: float) -> list[Held]:
        """Whoever looks first has them."""
        stale = _sessions.c.lease_until < now
        statement = sa.update(_sessions).where(stale).values(owner=owner, lease_until=until).returning(*_sessions.c)
        return [_held(row) for row in await self._do(lambda connection: connection.execute(statement).all())]

    async def remove(self, held: Held, owner: str) -> bool:
        """Compare and delete."""
        statement = sa.delete(_sessions).where(*_is_held(held, owner))
        return bool(await self._do(lambda connection: connection.execute(statement).rowcount))

    async def release(self, owner: str) -> None:
        """The leases run out at once."""
        statement = sa.update(_sessions).where(_sessions.c.owner == owner).values(lease_until=0)
        await self._do(lambda connection: connection.execute(statement))

    async def close(self) -> None:
        """Close the connections, after what has been begun."""
        if self._committing is not None:
            await self._committing
        await asyncio.get_running_loop().run_in_executor(self._thread, self._engine.dispose)
        self._thread.shutdown()

    async def _do(self, work: Work[_T]) -> _T:
        """Have it done in the next transaction; it is done also if the caller is cancelled."""
        done: asyncio.Future[_T] = asyncio.get_running_loop().create_future()
        self._waiting.append((work, done))
        if self._committing is None:
            self._committing = asyncio.create_task(self._commit())
        return await done

    async def _commit(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting:
            batch, self._waiting = self._waiting, []
            try:
                results = await loop.run_in_executor(self._thread, _transact, self._engine, [work for work, _ in batch])
            except Exception as error:  # noqa: BLE001 - each caller has it
                outcomes: list[Any] = [error] * len(batch)
            else:
                outcomes = results
            for (_, done), outcome in zip(batch, outcomes, strict=True):
                if done.cancelled():
                    continue
                if isinstance(outcome, Exception):
                    done.set_exception(outcome)
                else:
                    done.set_result(outcome)
        self._committing = None


def _transact(engine: sa.Engine, batch: Sequence[Work[Any]]) -> list[Any]:
    with engine.connect() as connection:
        # A transaction that reads before it writes would fail at once if another worker writes meanwhile.
        connection.exec_driver_sql("BEGIN IMMEDIATE")
        try:
            results = [work(connection) for work in batch]
        except BaseException:
            connection.exec_driver_sql("ROLLBACK")
            raise
        connection.exec_driver_sql("COMMIT")
        return results


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


def _fact(connection: sa.Connection, name: str) -> str:
    return str(connection.execute(sa.select(_facts.c.value).where(_facts.c.name == name)).scalar_one())


def _renewal(held: Held, owner: str, until: float) -> sa.Update:
    last_used = sa.func.max(_sessions.c.last_used, held.last_used)
    return sa.update(_sessions).where(*_is_held(held, owner)).values(lease_until=until, last_used=last_used)


def _engine(url: str) -> sa.Engine:
    # Parameters hold tokens, and errors are logged.
    options: dict[str, Any] = {
        "connect_args": {"timeout": 30, "check_same_thread": False},
        "isolation_level": "AUTOCOMMIT",
        "hide_parameters": True,
        "poolclass": StaticPool,
    }
    if url == IN_MEMORY:
        return sa.create_engine(url, **options)
    path = Path(url.removeprefix("sqlite:///"))
    try:
        # As SQLite will, but with an error that says what is wrong.
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    except OSError as error:
        raise ConfigurationError(f"STORE_URL: {path} cannot be written: {error.strerror}") from None
    engine = sa.create_engine(url, **options)

    @sa.event.listens_for(engine, "connect")
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
