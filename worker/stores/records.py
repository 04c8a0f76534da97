"""What the store knows of a conversation, for a person to read. Never a token, never what was said."""

from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa

from worker.core.memory import Ended, Memory
from worker.errors import ConfigurationError
from worker.stores.backend import Unreachable
from worker.stores.database import Database
from worker.stores.documents import ended_of
from worker.stores.ledger import ENDED, recalled
from worker.stores.sqlite import IN_MEMORY
from worker.stores.tables import backlog, commands, conversations, partitions, sessions

LAST_ENDS = 10


@dataclass(frozen=True, slots=True)
class KnownSession:
    """A session and who holds it. Times are epoch seconds; `lease_until` 0: let go of."""

    session_id: str
    state: str
    avatar_id: str | None
    voice_id: str | None
    attached: bool
    owner: str
    lease_until: float
    last_used: float


@dataclass(frozen=True, slots=True)
class Dossier:
    """What there is of one conversation.

    `epochs` are those of all partitions, by number. `kept`: how many commands of it the store keeps. `ends` are the
    latest, newest first, by what the command is known as, of `ended` in all.
    """

    memory: Memory
    touched: float | None
    session: KnownSession | None
    epochs: dict[int, int]
    kept: int
    ended: int
    ends: list[tuple[str, Ended]]


def demand_store(url: str) -> None:
    """Where there is no store, opening it would make one.

    Raises:
        ConfigurationError: there is none, or it is another process's memory.
    """
    if url == IN_MEMORY:
        raise ConfigurationError("STORE_URL: a store in memory is known to its worker alone")
    path = Path(url.removeprefix("sqlite:///"))
    if url.startswith("sqlite:///") and not path.exists():
        raise ConfigurationError(f"STORE_URL: there is no store at {path}; name the one that the workers use")


async def collect(database: Database, conversation_id: str) -> Dossier:
    """Look it all up.

    Raises:
        ConfigurationError: the store is out of reach.
    """
    try:
        return await database.read(lambda connection: _collect(connection, conversation_id))
    except Unreachable as error:
        raise ConfigurationError(f"STORE_URL: it cannot be reached: {error}") from None


def _collect(connection: sa.Connection, conversation_id: str) -> Dossier:
    mine = commands.c.conversation_id == conversation_id
    latest = ENDED.where(mine).order_by(commands.c.touched.desc()).limit(LAST_ENDS)
    row = sa.select(conversations.c.touched).where(conversations.c.conversation_id == conversation_id)
    held = sa.select(sessions).where(sessions.c.conversation_id == conversation_id)
    session = connection.execute(held).one_or_none()
    return Dossier(
        memory=recalled(connection, conversation_id),
        touched=connection.execute(row).scalar_one_or_none(),
        session=None if session is None else _session(session),
        epochs={row.partition: row.epoch for row in connection.execute(sa.select(partitions))},
        kept=_count(connection, backlog.c.conversation_id == conversation_id),
        ended=_count(connection, mine),
        ends=[(row.message_id, ended_of(row)) for row in connection.execute(latest)],
    )


def _count(connection: sa.Connection, which: sa.ColumnElement[bool]) -> int:
    return connection.execute(sa.select(sa.func.count()).where(which)).scalar_one()


def _session(row: sa.Row[tuple[object, ...]]) -> KnownSession:
    return KnownSession(
        session_id=row.session_id,
        state=row.state,
        avatar_id=row.avatar_id,
        voice_id=row.voice_id,
        attached=row.attached,
        owner=row.owner,
        lease_until=row.lease_until,
        last_used=row.last_used,
    )
