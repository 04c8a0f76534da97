"""Sessions in SQL."""

import json
from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.sqlite import insert

from worker.core.model import Session, Viewer
from worker.ports import Held
from worker.stores.database import Database, to_the_end
from worker.stores.tables import sessions


class SqlSessions:
    """`ports.SessionStore` in a `Database`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def identity(self) -> str:
        """See `ports.SessionStore`, here and below."""
        return await self._database.fact("store_id")

    @to_the_end
    async def take(self, conversation_id: str, owner: str, until: float) -> Held | None:
        """One statement, so that two takers cannot both win."""
        row = (
            sa.update(sessions)
            .where(sessions.c.conversation_id == conversation_id)
            .values(owner=owner, lease_until=until)
            .returning(*sessions.c)
        )
        async with self._database.writing() as connection:
            found = (await connection.execute(row)).one_or_none()
        return None if found is None else _held(found)

    @to_the_end
    async def put(self, held: Held, owner: str, until: float) -> None:
        """Insert or replace."""
        values = _values(held) | {"owner": owner, "lease_until": until}
        statement = insert(sessions).values(values)
        statement = statement.on_conflict_do_update(index_elements=["conversation_id"], set_=values)
        async with self._database.writing() as connection:
            await connection.execute(statement)

    @to_the_end
    async def renew(self, held: Mapping[str, Held], owner: str, until: float) -> set[str]:
        """All in one transaction."""
        lost: set[str] = set()
        if not held:
            return lost
        async with self._database.writing() as connection:
            for conversation_id, one in held.items():
                result = await connection.execute(
                    sa.update(sessions)
                    .where(*_is_held(one, owner))
                    .values(lease_until=until, last_used=sa.func.max(sessions.c.last_used, one.last_used))
                )
                if result.rowcount == 0:
                    lost.add(conversation_id)
        return lost

    @to_the_end
    async def adopt(self, owner: str, now: float, until: float) -> list[Held]:
        """Looks before it locks: mostly there is nothing to adopt."""
        stale = sessions.c.lease_until < now
        async with self._database.reading() as connection:
            if (await connection.execute(sa.select(sa.exists().where(stale)))).scalar() == 0:
                return []
        statement = sa.update(sessions).where(stale).values(owner=owner, lease_until=until).returning(*sessions.c)
        async with self._database.writing() as connection:
            return [_held(row) for row in await connection.execute(statement)]

    @to_the_end
    async def remove(self, held: Held, owner: str) -> bool:
        """Compare and delete."""
        async with self._database.writing() as connection:
            result = await connection.execute(sa.delete(sessions).where(*_is_held(held, owner)))
        return bool(result.rowcount)

    @to_the_end
    async def release(self, owner: str) -> None:
        """The leases run out at once."""
        async with self._database.writing() as connection:
            await connection.execute(sa.update(sessions).where(sessions.c.owner == owner).values(lease_until=0))


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
