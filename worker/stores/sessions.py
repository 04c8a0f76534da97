"""Sessions in SQL."""

import json
from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert

from worker.core.model import Session, Viewer
from worker.ports import Held
from worker.stores.database import Database
from worker.stores.tables import sessions

_PLACE = "sessions"


class SqlSessions:
    """`ports.SessionStore` in a `Database`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def identity(self) -> str:
        """See `ports.SessionStore`, here and below."""
        return await self._database.fact("store_id")

    async def take(self, conversation_id: str, owner: str, until: float) -> Held | None:
        """One statement, so that two takers cannot both win."""
        statement = (
            sa.update(sessions)
            .where(sessions.c.conversation_id == conversation_id)
            .values(owner=owner, lease_until=until)
            .returning(*sessions.c)
        )
        found = await self._database.write(
            lambda connection: connection.execute(statement).one_or_none(), _place(conversation_id)
        )
        return None if found is None else _held(found)

    async def put(self, held: Held, owner: str, until: float) -> None:
        """Insert or replace."""
        values = _values(held) | {"owner": owner, "lease_until": until}
        statement = insert(sessions).values(values)
        statement = statement.on_conflict_do_update(index_elements=["conversation_id"], set_=values)
        await self._database.write(lambda connection: connection.execute(statement), _place(held.conversation_id))

    async def renew(self, held: Mapping[str, Held], owner: str, until: float) -> set[str]:
        """All in one transaction, and in an order that all workers keep."""

        def work(connection: sa.Connection) -> set[str]:
            return {
                key for key, one in sorted(held.items()) if not connection.execute(_renewal(one, owner, until)).rowcount
            }

        return await self._database.write(work, _PLACE, alone=True) if held else set()

    async def adopt(self, owner: str, now: float, until: float) -> list[Held]:
        """Looks before it locks: mostly there is nothing to adopt."""
        stale = sessions.c.lease_until < now
        query = sa.select(sa.exists().where(stale))
        if not await self._database.read(lambda connection: connection.execute(query).scalar_one()):
            return []
        # Whoever holds a row just now takes it, renews it or adopts it.
        free = sa.select(sessions.c.conversation_id).where(stale).with_for_update(skip_locked=True).cte()
        statement = (
            sa.update(sessions)
            .where(sessions.c.conversation_id.in_(sa.select(free)))
            .values(owner=owner, lease_until=until)
            .returning(*sessions.c)
        )
        rows = await self._database.write(lambda connection: connection.execute(statement).all(), _PLACE, alone=True)
        return [_held(row) for row in rows]

    async def remove(self, held: Held, owner: str) -> bool:
        """Compare and delete."""
        statement = sa.delete(sessions).where(*_is_held(held, owner))
        return await self._database.write(
            lambda connection: bool(connection.execute(statement).rowcount), _place(held.conversation_id)
        )

    async def release(self, owner: str) -> None:
        """The leases run out at once."""
        statement = sa.update(sessions).where(sessions.c.owner == owner).values(lease_until=0)
        await self._database.write(lambda connection: connection.execute(statement), _PLACE, alone=True)


def _place(conversation_id: str) -> str:
    return f"{_PLACE} {conversation_id}"


def _renewal(held: Held, owner: str, until: float) -> sa.Update:
    later = sa.case((sessions.c.last_used > held.last_used, sessions.c.last_used), else_=held.last_used)
    return sa.update(sessions).where(*_is_held(held, owner)).values(lease_until=until, last_used=later)


def _is_held(held: Held, owner: str) -> tuple[sa.ColumnElement[bool], ...]:
    return (
        sessions.c.conversation_id == held.conversation_id,
        sessions.c.session_id == held.session.session_id,
        sessions.c.owner == owner,
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
