"""Sessions in SQL. A row goes through these states; whoever changes it says from which.

    waiting    stands in line for a slot, for as long as its lease runs
    creating   claimed: the API's create is called, or was when its worker died
    ready, ending, lost    see `ports.HeldState`

Slots are counted under one lock, and every claim waits for it. `since` is the place in the line; who comes later has a
later one, whatever the clock of its worker says. `last_used` of a claim is when it was made. `reason` of one that waits
or is claimed, if the API has had no room:

    no_room    for it, or for one in front: nobody behind it creates a session
    next       but since then for another: nobody behind it does before it has tried
"""

import json
from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert

from schemas.events import EndReason
from worker.core.model import Session, Viewer
from worker.ports import Held, HeldState, Refusal, Slots
from worker.stores.database import Database
from worker.stores.tables import conversations, facts, ghosts, sessions

_PLACE = "sessions"
_WAITING, _CREATING = "waiting", "creating"
_NO_ROOM, _NEXT = "no_room", "next"
_LOST_KEPT_S = 86_400.0
_NEXT_S = 1e-6
_FOUND = (HeldState.READY, HeldState.ENDING, HeldState.LOST)
_ALIVE = (_CREATING, HeldState.READY, HeldState.ENDING)
"""What takes a slot."""
_FIRST = sa.and_(
    sa.or_(sessions.c.reason == _NO_ROOM, sa.and_(sessions.c.reason == _NEXT, sessions.c.state == _WAITING)),
    sessions.c.lease_until >= sa.bindparam("now"),
    sessions.c.conversation_id != sa.bindparam("conversation_id"),
)
_LINE = sa.select(sa.func.max(sessions.c.since), sa.func.min(sa.case((_FIRST, sessions.c.since)))).where(
    sessions.c.state.in_((_WAITING, _CREATING))
)
"""The last place of all who stand in line or may come back to it, and the first that others have to wait for."""

_BEHIND = (
    sa.select(sessions.c.conversation_id)
    .where(sessions.c.state.in_((_WAITING, _CREATING)), sessions.c.reason == _NO_ROOM)
    .order_by(sessions.c.since)
    .limit(2)  # more than one, so that the line opens faster than it grows
    .with_for_update(skip_locked=True)
    .cte()
)
_OPEN = sa.update(sessions).where(sessions.c.conversation_id.in_(sa.select(_BEHIND))).values(reason=_NEXT)
"""The API has room again: the next few go, and one behind them."""


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
            .where(sessions.c.conversation_id == conversation_id, sessions.c.state.in_(_FOUND))
            .values(owner=owner, lease_until=until)
            .returning(*sessions.c)
        )
        found = await self._database.write(
            lambda connection: connection.execute(statement).one_or_none(), _place(conversation_id)
        )
        return None if found is None else _held(found)

    async def claim(
        self, conversation_id: str, owner: str, now: float, until: float, slots: Slots, *, paused: bool = False
    ) -> Held | Refusal | None:
        """Alone, since it locks the slots and then a row."""

        def work(connection: sa.Connection) -> Held | Refusal | None:
            return _claim(connection, conversation_id, owner=owner, now=now, until=until, slots=slots, paused=paused)

        return await self._database.write(work, _PLACE, alone=True)

    async def unclaim(
        self, conversation_id: str, owner: str, now: float, slots: Slots, *, ghost: bool, full: bool = False
    ) -> None:
        """Back into the line: `since` stays."""
        mine = _is_claim(conversation_id, owner, _CREATING)

        def work(connection: sa.Connection) -> None:
            # Any other trouble is its own, and no reason for others to wait.
            reason = _NO_ROOM if full else None
            wait = {"state": _WAITING, "lease_until": now + slots.patience_s, "reason": reason}
            found = connection.execute(sa.update(sessions).where(*mine).values(wait)).rowcount
            if found and ghost:
                _haunt(connection, conversation_id, now, now + slots.ghost_s)

        await self._database.write(work, _place(conversation_id))

    async def leave(self, conversation_id: str, owner: str) -> None:
        """Out of the line."""
        statement = sa.delete(sessions).where(*_is_claim(conversation_id, owner, _WAITING))
        await self._database.write(lambda connection: connection.execute(statement), _place(conversation_id))

    async def put(self, held: Held, owner: str, until: float) -> bool:
        """Insert or replace."""
        values = _values(held) | {"owner": owner, "lease_until": until}
        ours = sa.or_(sessions.c.owner == owner, sessions.c.session_id == held.session.session_id)
        none = sessions.c.state.in_((_WAITING, HeldState.LOST))
        statement = insert(sessions).values(values)
        statement = statement.on_conflict_do_update(
            index_elements=["conversation_id"],
            set_=values,
            where=None if held.session.attached else sa.or_(ours, none),
        )
        claim = sa.select(sa.exists().where(*_is_claim(held.conversation_id, owner, _CREATING)))

        def work(connection: sa.Connection) -> bool:
            created = connection.execute(claim).scalar_one()
            done = bool(connection.execute(statement).rowcount)
            if done and created:
                connection.execute(_OPEN)
            return done

        return await self._database.write(work, _place(held.conversation_id))

    async def pardon(self, owner: str) -> None:
        """The mark goes, the places stay."""
        waiting = sa.and_(sessions.c.owner == owner, sessions.c.state == _WAITING)
        statement = sa.update(sessions).where(waiting).values(reason=None)
        await self._database.write(lambda connection: connection.execute(statement), _PLACE, alone=True)

    async def renew(self, held: Mapping[str, Held], owner: str, until: float) -> set[str]:
        """All in one transaction, and in an order that all workers keep."""

        def work(connection: sa.Connection) -> set[str]:
            return {
                key for key, one in sorted(held.items()) if not connection.execute(_renewal(one, owner, until)).rowcount
            }

        return await self._database.write(work, _PLACE, alone=True) if held else set()

    async def adopt(self, owner: str, now: float, until: float, slots: Slots) -> list[Held]:
        """Looks before it locks: mostly there is nothing to adopt."""
        stale = sa.and_(sessions.c.lease_until < now, sessions.c.state != HeldState.LOST)
        query = sa.select(sa.exists().where(stale))
        if not await self._database.read(lambda connection: connection.execute(query).scalar_one()):
            return []
        return await self._database.write(
            lambda connection: _adopt(connection, owner, now, until, slots), _PLACE, alone=True
        )

    async def retire(self, held: Held, owner: str, reason: EndReason, unused_since: float | None = None) -> bool:
        """Whoever intends a call locks the conversation first, too."""
        statement = sa.update(sessions).where(*_is_held(held, owner), sessions.c.state == HeldState.READY)

        def work(connection: sa.Connection) -> bool:
            if unused_since is not None:
                mine = conversations.c.conversation_id == held.conversation_id
                touched = sa.select(conversations.c.touched).where(mine).with_for_update()
                if (connection.execute(touched).scalar_one_or_none() or 0.0) > unused_since:
                    return False
            return bool(connection.execute(statement.values(state=HeldState.ENDING, reason=reason)).rowcount)

        return await self._database.write(work, _PLACE, alone=True)

    async def lose(self, held: Held, owner: str, ghost_until: float | None = None) -> bool:
        """Compare and set."""
        lost = {"state": HeldState.LOST, "token": "", "viewer": None}
        return await self._let_go(sa.update(sessions).values(lost), held, owner, ghost_until)

    async def remove(self, held: Held, owner: str, ghost_until: float | None = None) -> bool:
        """Compare and delete."""
        return await self._let_go(sa.delete(sessions), held, owner, ghost_until)

    async def _let_go(self, how: sa.Update | sa.Delete, held: Held, owner: str, ghost_until: float | None) -> bool:
        statement = how.where(*_is_held(held, owner))

        def work(connection: sa.Connection) -> bool:
            found = bool(connection.execute(statement).rowcount)
            if found and ghost_until is not None:
                _haunt(connection, held.conversation_id, held.last_used, ghost_until)
            return found

        return await self._database.write(work, _place(held.conversation_id))

    async def release(self, owner: str) -> None:
        """The leases run out at once."""
        statement = sa.update(sessions).where(sessions.c.owner == owner).values(lease_until=0)
        await self._database.write(lambda connection: connection.execute(statement), _PLACE, alone=True)


def _claim(
    connection: sa.Connection,
    conversation_id: str,
    *,
    owner: str,
    now: float,
    until: float,
    slots: Slots,
    paused: bool,
) -> Held | Refusal | None:
    connection.execute(sa.select(facts.c.value).where(facts.c.name == "store_id").with_for_update())
    connection.execute(sa.delete(ghosts).where(ghosts.c.until <= now))
    mine = sessions.c.conversation_id == conversation_id
    row = connection.execute(sa.select(sessions).where(mine).with_for_update()).one_or_none()
    since = reason = None
    if row is not None:
        match row.state:
            case HeldState.READY:
                connection.execute(sa.update(sessions).where(mine).values(owner=owner, lease_until=until))
                return _held(row)
            case HeldState.ENDING:
                return Refusal.BUSY
            # Nobody creates two for one conversation at a time: one under our own name is what a process before left.
            case "creating" if row.owner != owner and row.lease_until >= now:
                return Refusal.BUSY
            case "creating":
                _haunt(connection, conversation_id, row.last_used, row.last_used + slots.ghost_s)
            case "waiting" if row.lease_until >= now:
                since, reason = row.since, row.reason
    last, first = connection.execute(_LINE, {"conversation_id": conversation_id, "now": now}).one()
    if since is None:
        since = now if last is None else max(now, last + _NEXT_S)
    refusal = Refusal.QUEUED if paused else None
    if first is not None and first < since:
        refusal, reason = Refusal.QUEUED, reason or _NO_ROOM
    elif slots.limit and _taken(connection, conversation_id, since, now) >= slots.limit:
        refusal = Refusal.FULL
    values = {
        "conversation_id": conversation_id,
        "session_id": "",
        "token": "",
        "attached": False,
        "last_used": now,
        "owner": owner,
        "lease_until": until if refusal is None else now + slots.patience_s,
        "state": _CREATING if refusal is None else _WAITING,
        "since": since,
        "reason": reason,
    }
    claim = insert(sessions).values(values).on_conflict_do_update(index_elements=["conversation_id"], set_=values)
    connection.execute(claim)
    return refusal


def _taken(connection: sa.Connection, conversation_id: str, since: float, now: float) -> int:
    """Slots in use, and those that others get first."""
    other = sessions.c.conversation_id != conversation_id
    in_line = sa.and_(sessions.c.state == _WAITING, sessions.c.lease_until >= now, sessions.c.since < since)
    alive = sa.or_(sessions.c.state.in_(_ALIVE), in_line)
    rows = connection.execute(sa.select(sa.func.count()).select_from(sessions).where(other, alive)).scalar_one()
    return int(rows + connection.execute(sa.select(sa.func.count()).select_from(ghosts)).scalar_one())


def _adopt(connection: sa.Connection, owner: str, now: float, until: float, slots: Slots) -> list[Held]:
    stale = sessions.c.lease_until < now
    connection.execute(sa.delete(sessions).where(stale, sessions.c.state == _WAITING))
    forgotten = sa.and_(sessions.c.state == HeldState.LOST, sessions.c.last_used < now - _LOST_KEPT_S)
    connection.execute(sa.delete(sessions).where(forgotten))
    cut = sa.delete(sessions).where(stale, sessions.c.state == _CREATING).returning(*sessions.c)
    for row in connection.execute(cut).all():
        _haunt(connection, row.conversation_id, row.last_used, row.last_used + slots.ghost_s)
    # Whoever holds a row just now takes it, renews it or adopts it.
    adoptable = sessions.c.state.in_((HeldState.READY, HeldState.ENDING))
    free = sa.select(sessions.c.conversation_id).where(stale, adoptable).with_for_update(skip_locked=True).cte()
    statement = (
        sa.update(sessions)
        .where(sessions.c.conversation_id.in_(sa.select(free)))
        .values(owner=owner, lease_until=until)
        .returning(*sessions.c)
    )
    return [_held(row) for row in connection.execute(statement).all()]


def _haunt(connection: sa.Connection, conversation_id: str, since: float, until: float) -> None:
    ghost = insert(ghosts).values(conversation_id=conversation_id, since=since, until=until)
    connection.execute(ghost.on_conflict_do_nothing())


def _is_claim(conversation_id: str, owner: str, state: str) -> tuple[sa.ColumnElement[bool], ...]:
    return sessions.c.conversation_id == conversation_id, sessions.c.owner == owner, sessions.c.state == state


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
        "state": held.state,
        "reason": held.reason,
        "renew_at": session.renew_at,
        "expires_at": session.expires_at,
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
        renew_at=row.renew_at,
        expires_at=row.expires_at,
    )
    reason = EndReason(row.reason) if row.reason else None
    return Held(row.conversation_id, session, row.last_used, HeldState(row.state), reason)
