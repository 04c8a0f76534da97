"""The ledger in SQL: what many lanes write in one transaction is looked up, judged and written together."""

import asyncio
import uuid
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import sqlalchemy as sa
import structlog
from sqlalchemy.dialects.postgresql import insert

from schemas.commands import Speak
from worker.core import undelivered
from worker.core.memory import NAMED, Changes, Ended, Memory, State, Turn, TurnState
from worker.core.model import Entry
from worker.core.outcome import merged
from worker.ops import logs
from worker.ports import Clock, Grant, HeldState
from worker.stores.backend import Contended, Unreachable
from worker.stores.database import Database, among, text_of
from worker.stores.documents import ended_of, ended_text, state_of, state_text
from worker.stores.tables import OPEN, commands, conversations, endings, partitions, sessions, turns, writers

_log = structlog.stdlib.get_logger(__name__)

PRUNE_ROWS = 500
"""Rows a transaction of `prune` deletes at most, so that speech does not wait for it."""

ENDED = sa.select(commands.c.message_id, commands.c.fingerprint, commands.c.touched, endings.c.event).join(
    endings, endings.c.ending_id == commands.c.ending_id
)
"""Commands with how they ended; `ended_of` reads a row of it."""

_PLACE = "ledger"

_Row = tuple[str, int | None]
"""What a write is judged by: the version of a conversation's row, and the number of its attempt without an outcome."""
_NO_ROW: _Row = ("", None)


@dataclass(slots=True)
class _Job:
    """One write: `epoch` None for what is written whoever owns the partition, `outcome` for the fate of an attempt."""

    conversation_id: str
    changes: Changes | None
    partition: int
    epoch: int | None
    outcome: bool
    session_id: str | None = None


class SqlLedger:
    """`ports.Ledger` in a `Database`."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock
        self._asked: dict[str, asyncio.Future[Grant]] = {}
        """The last write asked for, by conversation, until it is done."""

    async def recall(self, conversation_id: str) -> Memory:
        """See `ports.Ledger`, here and below."""
        if conversation_id in self._asked:
            await asyncio.wait([self._asked[conversation_id]])
        return await self._database.read(lambda connection: recalled(connection, conversation_id), patient=True)

    async def partition_of(self, conversation_id: str) -> int | None:
        """Read from the state."""
        query = sa.select(conversations.c.state).where(conversations.c.conversation_id == conversation_id)
        state = await self._database.read(lambda connection: connection.execute(query).scalar_one_or_none())
        return None if state is None else state_of(state).partition

    async def unclosed(self, before: float) -> list[tuple[int, str]]:
        """Each conversation once. Open turns have an index of their own: mostly it has nothing so old."""
        query = (
            sa.select(conversations.c.partition, conversations.c.conversation_id)
            .join(turns, turns.c.conversation_id == conversations.c.conversation_id)
            .where(OPEN, turns.c.touched < before, conversations.c.partition.is_not(None))
            .distinct()
        )
        return await self._database.read(
            lambda connection: [(row.partition, row.conversation_id) for row in connection.execute(query)]
        )

    async def known(self, conversation_id: str, message_ids: Sequence[str]) -> dict[str, Ended]:
        """One look-up for all."""
        return await self._database.read(
            lambda connection: _known(connection, conversation_id, message_ids), patient=True
        )

    def intend(
        self, conversation_id: str, changes: Changes | None, partition: int, epoch: int, session_id: str | None = None
    ) -> asyncio.Future[Grant]:
        """Granted while that epoch is the partition's newest, the conversation's row as it was, the session ready."""
        return self._ask(_Job(conversation_id, changes, partition, epoch, outcome=False, session_id=session_id))

    def record(self, conversation_id: str, changes: Changes, *, outcome: bool) -> asyncio.Future[Grant]:
        """Granted while the row is as it was; an outcome, while its attempt has none."""
        return self._ask(_Job(conversation_id, changes, -1, None, outcome))

    async def end(self, entry: Entry, ended: Ended) -> Ended:
        """The conversation's row is locked first, as for all that is written of it."""
        conversation_id = entry.command.conversation_id
        names = [entry.command.turn_id] if isinstance(entry.command, Speak) else []
        known_as = [] if entry.known_as is None else [entry.known_as]

        def work(connection: sa.Connection) -> Ended:
            connection.execute(_noted(conversation_id, ended.at))
            mine = sa.select(conversations).where(conversations.c.conversation_id == conversation_id)
            row = connection.execute(mine.with_for_update()).one()
            for stands in _known(connection, conversation_id, known_as).values():
                return stands
            known = _turns(connection, conversation_id, names)
            # Whoever serves the conversation must look again: it knows which commands have ended, and which turns.
            memory = Memory(state_of(row.state), known, version=row.version, writer=f"ended {uuid.uuid4().hex}")
            told = undelivered.note(memory, entry, ended)
            changes = memory.take_changes()
            if changes is not None:
                _put(connection, [(conversation_id, changes)], self._clock())
            return told

        return await asyncio.shield(self._database.ask(work, _PLACE, alone=True))

    async def raise_epoch(self, partition: int) -> int:
        """One statement; it waits for every intent that is being written under the epoch before."""
        first = insert(partitions).values(partition=partition, epoch=1)
        statement = first.on_conflict_do_update(
            index_elements=["partition"], set_={"epoch": partitions.c.epoch + 1}
        ).returning(partitions.c.epoch)
        raised = self._database.ask(
            lambda connection: int(connection.execute(statement).scalar_one()), _PLACE, alone=True
        )
        return await asyncio.shield(raised)

    async def prune(self, before: float) -> None:
        """A batch at a time; what an outage of the store leaves is for the next time."""
        try:
            for table in (commands, endings, turns, conversations, writers):
                statement = _deletion(table, before)
                full = True
                while full:
                    deleted = await self._database.write(
                        lambda connection, one=statement: connection.execute(one).rowcount,  # type: ignore[misc]
                        _PLACE,
                        alone=True,
                    )
                    full = deleted == PRUNE_ROWS
        except (Unreachable, sa.exc.DBAPIError) as error:
            _log.error(logs.STORE_FAILED, error=text_of(error))

    def _ask(self, job: _Job) -> asyncio.Future[Grant]:
        conversation_id = job.conversation_id
        asked = self._asked[conversation_id] = self._database.ask_together(self._write, job, _PLACE)

        def forget(done: asyncio.Future[Grant]) -> None:
            if self._asked.get(conversation_id) is done:
                del self._asked[conversation_id]

        asked.add_done_callback(forget)
        return asyncio.shield(asked)

    def _write(self, connection: sa.Connection, jobs: Sequence[_Job]) -> list[Grant]:
        """Locks the epochs against being raised, and then the conversations, each in order; judges; and writes."""
        numbers = {job.partition for job in jobs if job.epoch is not None}
        column = partitions.c.partition
        owned = sa.select(partitions).where(among(connection, column, numbers)).order_by(column)
        epochs = {row.partition: row.epoch for row in connection.execute(owned.with_for_update(read=True))}
        rows = _lock(connection, {job.conversation_id for job in jobs if job.changes})
        ready = _ready(connection, {job.conversation_id for job in jobs if job.session_id is not None})
        gathered = _Gathered(connection, rows.keys(), self._clock())
        granted = []
        for job in jobs:
            grant, changes = _judge(job, rows, epochs, ready), job.changes
            if grant is Grant.GRANTED and changes is not None:
                if changes.base != rows.get(job.conversation_id, _NO_ROW)[0]:
                    changes = gathered.over(job.conversation_id, changes)
                if changes is None:
                    grant = Grant.OUTDATED
                else:
                    gathered.add(job.conversation_id, changes)
                    rows[job.conversation_id] = (changes.version, _attempt(changes.state))
            granted.append(grant)
        gathered.write()
        return granted


class _Gathered:
    """What is to be written in a transaction: each table takes all of it at once."""

    def __init__(self, connection: sa.Connection, known: Iterable[str], now: float) -> None:
        self._connection = connection
        self._known = set(known)
        self._now = now
        self._waiting: list[tuple[str, Changes]] = []

    def add(self, conversation_id: str, changes: Changes) -> None:
        """To be written behind what was added before."""
        self._waiting.append((conversation_id, changes))

    def over(self, conversation_id: str, outcome: Changes) -> Changes | None:
        """An outcome as it changes what somebody else has written; None: what it would end has ended otherwise."""
        self.write()
        if _known(self._connection, conversation_id, list(outcome.ended)):
            return None
        mine = conversations.c.conversation_id == conversation_id
        state = self._connection.execute(sa.select(conversations.c.state).where(mine)).scalar_one()
        return merged(outcome, state_of(state), _turns(self._connection, conversation_id, outcome.turns.keys()))

    def write(self) -> None:
        """Write what has been added."""
        waiting, self._waiting = self._waiting, []
        fresh = {conversation_id for conversation_id, _ in waiting} - self._known
        _claim(self._connection, fresh, self._now)
        self._known |= fresh
        _put(self._connection, waiting, self._now)


def recalled(connection: sa.Connection, conversation_id: str) -> Memory:
    """What is known of the conversation."""
    writer = uuid.uuid4().hex
    state = sa.select(conversations).where(conversations.c.conversation_id == conversation_id)
    row = connection.execute(state).one_or_none()
    if row is None:
        return Memory(writer=writer)
    names = sa.select(commands.c.message_id).where(commands.c.conversation_id == conversation_id).limit(NAMED + 1)
    ended = connection.execute(names).scalars().all()
    elsewhere = ended if len(ended) <= NAMED else None
    known = _turns(connection, conversation_id)
    return Memory(state_of(row.state), known, elsewhere=elsewhere, version=row.version, writer=writer)


def _turns(connection: sa.Connection, conversation_id: str, names: Collection[str] | None = None) -> dict[str, Turn]:
    """The conversation's turns, all or some."""
    query = sa.select(turns).where(turns.c.conversation_id == conversation_id)
    if names is not None:
        query = query.where(among(connection, turns.c.turn_id, names))
    return {
        one.turn_id: Turn(TurnState(one.state), one.pieces, one.text_length, one.touched, one.replay)
        for one in connection.execute(query)
    }


def _lock(connection: sa.Connection, conversation_ids: Collection[str]) -> dict[str, _Row]:
    columns = (conversations.c.conversation_id, conversations.c.version, conversations.c.attempt)
    query = sa.select(*columns).where(among(connection, columns[0], conversation_ids)).order_by(columns[0])
    return {row.conversation_id: (row.version, row.attempt) for row in connection.execute(query.with_for_update())}


def _claim(connection: sa.Connection, conversation_ids: Collection[str], now: float) -> None:
    """Make rows where there were none to lock.

    Raises:
        Contended: another worker has made one of them meanwhile.
    """
    if not conversation_ids:
        return
    statement = insert(conversations).on_conflict_do_nothing().returning(conversations.c.conversation_id)
    made = connection.execute(statement, [_note(one, now) for one in sorted(conversation_ids)]).all()
    if len(made) < len(conversation_ids):
        raise Contended


def _ready(connection: sa.Connection, conversation_ids: Collection[str]) -> dict[str, str]:
    """The sessions that may be called, by conversation. Who retires an idle one locks the conversation first, too."""
    column = sessions.c.conversation_id
    query = sa.select(column, sessions.c.session_id).where(
        among(connection, column, conversation_ids), sessions.c.state == HeldState.READY
    )
    return {row.conversation_id: row.session_id for row in connection.execute(query)} if conversation_ids else {}


def _judge(job: _Job, rows: Mapping[str, _Row], epochs: Mapping[int, int], ready: Mapping[str, str]) -> Grant:
    """Whether the job may be written where these rows stand."""
    if job.epoch is not None and epochs.get(job.partition) != job.epoch:
        return Grant.REFUSED
    if job.session_id is not None and ready.get(job.conversation_id) != job.session_id:
        return Grant.OUTDATED
    if job.changes is None:
        return Grant.GRANTED
    version, attempt = rows.get(job.conversation_id, _NO_ROW)
    mine = job.changes.state.number == attempt if job.outcome else job.changes.base == version
    return Grant.GRANTED if mine else Grant.OUTDATED


def _attempt(state: State) -> int | None:
    return state.number if state.attempt else None


def _put(connection: sa.Connection, written: Iterable[tuple[str, Changes]], now: float) -> None:
    rows: dict[sa.Table, list[Mapping[str, Any]]] = {conversations: [], turns: [], endings: [], commands: []}
    for conversation_id, changes in written:
        rows[conversations].append(
            {
                "conversation_id": conversation_id,
                "version": changes.version,
                "attempt": _attempt(changes.state),
                "partition": changes.state.partition,
                "state": state_text(changes.state),
                "touched": now,
            }
        )
        rows[turns] += [
            {"conversation_id": conversation_id, "turn_id": turn_id} | asdict(turn)
            for turn_id, turn in changes.turns.items()
        ]
        for table, row in _ended_rows(conversation_id, changes.ended):
            rows[table].append(row)
    for table, statement in _STATEMENTS.items():
        if rows[table]:
            connection.execute(statement, rows[table])


def _noted(conversation_id: str, now: float) -> sa.Insert:
    """A row of the conversation, if there is none: a lane that finds none looks nothing up."""
    return insert(conversations).values(_note(conversation_id, now)).on_conflict_do_nothing()


def _note(conversation_id: str, now: float) -> dict[str, Any]:
    return {"conversation_id": conversation_id, "version": "noted", "state": state_text(State()), "touched": now}


def _deletion(table: sa.Table, before: float) -> sa.Delete:
    """Of rows that nobody is writing just now."""
    key = list(table.primary_key.columns)
    stale = sa.select(*key).where(table.c.touched < before).limit(PRUNE_ROWS).with_for_update(skip_locked=True)
    # PostgreSQL may run a subquery again and again, but no CTE; SQLite's driver counts no rows if one stands in front.
    return sa.delete(table).where(sa.tuple_(*key).in_(sa.select(stale.cte(nesting=True))))


def _ended_rows(conversation_id: str, all_: Mapping[str, Ended]) -> Iterator[tuple[sa.Table, Mapping[str, Any]]]:
    """One row for each command, and one for each ending that commands share: a piece ends dozens of them."""
    known: dict[int, str] = {}
    for message_id, ended in all_.items():
        ending_id = known.get(id(ended.event))
        if ending_id is None:
            ending_id = known[id(ended.event)] = ended.event.id("")
            yield endings, {"ending_id": ending_id, "event": ended_text(ended), "touched": ended.at}
        command = {"conversation_id": conversation_id, "message_id": message_id, "fingerprint": ended.fingerprint}
        yield commands, command | {"ending_id": ending_id, "touched": ended.at}


def _known(connection: sa.Connection, conversation_id: str, message_ids: Sequence[str]) -> dict[str, Ended]:
    wanted = sa.and_(
        commands.c.conversation_id == conversation_id, among(connection, commands.c.message_id, message_ids)
    )
    found = connection.execute(ENDED.where(wanted))
    return {row.message_id: ended_of(row) for row in found}


def _upsert(table: sa.Table) -> Any:
    statement = insert(table)
    key = list(table.primary_key.columns)
    others = {column.name: statement.excluded[column.name] for column in table.columns if column not in key}
    return statement.on_conflict_do_update(index_elements=key, set_=others)


_STATEMENTS: dict[sa.Table, Any] = {
    conversations: _upsert(conversations),
    turns: _upsert(turns),
    endings: insert(endings).on_conflict_do_nothing(),
    commands: insert(commands).on_conflict_do_nothing(),
}
