"""The ledger in SQL, with group commit: what many lanes write while one transaction runs goes into the next."""

import asyncio
import json
import uuid
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import sqlalchemy as sa
import structlog
from sqlalchemy.dialects.sqlite import insert
from sqlalchemy.ext.asyncio import AsyncConnection

from schemas.events import EVENT_TYPES, Event
from worker.core.memory import Attempt, Changes, Ended, Memory, SentPart, State, Turn, TurnState
from worker.core.shaping import shaper
from worker.ops import logs
from worker.ports import Clock, Grant
from worker.stores.database import Database, to_the_end
from worker.stores.tables import commands, conversations, endings, partitions, turns

_log = structlog.stdlib.get_logger(__name__)

PAUSE_S = 0.2
LONGEST_PAUSE_S = 5.0
PRUNE_ROWS = 500
"""Rows a transaction of `prune` deletes at most, so that speech does not wait for it."""

ENDED = sa.select(commands.c.message_id, commands.c.fingerprint, commands.c.touched, endings.c.event).join(
    endings, endings.c.ending_id == commands.c.ending_id
)
"""Commands with how they ended; `ended_of` reads a row of it."""

_DATA_TYPES = {name: data for data, name in EVENT_TYPES.items()}

_Row = tuple[str, int | None]
"""What a write is judged by: the version of a conversation's row, and the number of its attempt without an outcome."""


@dataclass(slots=True)
class _Job:
    """One write: `epoch` None for what is written whoever owns the partition, `outcome` for the fate of an attempt."""

    conversation_id: str
    changes: Changes | None
    partition: int
    epoch: int | None
    outcome: bool
    done: asyncio.Future[Grant]


class SqlLedger:
    """`ports.Ledger` in a `Database`. Writes only while `run` runs."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock
        self._jobs: deque[_Job] = deque()
        self._wake = asyncio.Event()
        self._stopping = False

    async def run(self) -> None:
        """Write what is asked for, until cancelled; what was asked for before that is written."""
        writing = asyncio.create_task(self._write_on())
        try:
            # What is being written must not be asked for again: it would look like another's.
            await asyncio.shield(writing)
        finally:
            self._stopping = True
            self._wake.set()
            await asyncio.wait([writing], timeout=LONGEST_PAUSE_S)
            writing.cancel()

    async def _write_on(self) -> None:
        while not self._stopping:
            await self._wake.wait()
            await self._flush()

    async def recall(self, conversation_id: str) -> Memory:
        """See `ports.Ledger`, here and below."""
        asked = [job.done for job in self._jobs if job.conversation_id == conversation_id]
        if asked:
            await asyncio.wait(asked)
        return await self._recall(conversation_id)

    @to_the_end
    async def _recall(self, conversation_id: str) -> Memory:
        async with self._database.reading() as connection:
            one = sa.select(conversations).where(conversations.c.conversation_id == conversation_id)
            row = (await connection.execute(one)).one_or_none()
            if row is None:
                return Memory(writer=uuid.uuid4().hex)
            found = await connection.execute(sa.select(turns).where(turns.c.conversation_id == conversation_id))
            known = {
                one.turn_id: Turn(TurnState(one.state), one.pieces, one.text_length, one.touched, one.replay)
                for one in found
            }
        return Memory(_state(row.state), known, version=row.version, writer=uuid.uuid4().hex)

    @to_the_end
    async def partition_of(self, conversation_id: str) -> int | None:
        """Read from the state."""
        query = sa.select(conversations.c.state).where(conversations.c.conversation_id == conversation_id)
        async with self._database.reading() as connection:
            state = (await connection.execute(query)).scalar_one_or_none()
        return None if state is None else _state(state).partition

    @to_the_end
    async def known(self, conversation_id: str, message_ids: Sequence[str]) -> dict[str, Ended]:
        """One look-up for all."""
        async with self._database.reading() as connection:
            return await _known(connection, conversation_id, message_ids)

    def intend(
        self, conversation_id: str, changes: Changes | None, partition: int, epoch: int
    ) -> asyncio.Future[Grant]:
        """Granted while that epoch is the partition's newest, and the conversation's row as it was."""
        return self._ask(_Job(conversation_id, changes, partition, epoch, outcome=False, done=_future()))

    def record(self, conversation_id: str, changes: Changes, *, outcome: bool) -> asyncio.Future[Grant]:
        """Granted while the row is as it was; an outcome, while its attempt has none."""
        return self._ask(_Job(conversation_id, changes, -1, None, outcome, done=_future()))

    async def end(self, conversation_id: str, known_as: str, ended: Ended) -> Ended:
        """In one transaction; tries until the store takes it."""
        pause_s = PAUSE_S
        while True:
            try:
                return await self._end(conversation_id, known_as, ended)
            except sa.exc.DBAPIError as error:
                _log.error(logs.STORE_FAILED, error=str(error.orig), again_in_s=pause_s)
            await asyncio.sleep(pause_s)
            pause_s = min(pause_s * 2, LONGEST_PAUSE_S)

    @to_the_end
    async def _end(self, conversation_id: str, known_as: str, ended: Ended) -> Ended:
        async with self._database.writing() as connection:
            stands = (await _known(connection, conversation_id, [known_as])).get(known_as)
            if stands is None:
                await connection.execute(_noted(conversation_id, ended.at))
                for table, row in _ended_rows(conversation_id, known_as, ended):
                    await connection.execute(_STATEMENTS[table], [row])
            return stands or ended

    @to_the_end
    async def raise_epoch(self, partition: int) -> int:
        """One statement."""
        first = insert(partitions).values(partition=partition, epoch=1)
        statement = first.on_conflict_do_update(
            index_elements=["partition"], set_={"epoch": partitions.c.epoch + 1}
        ).returning(partitions.c.epoch)
        async with self._database.writing() as connection:
            return int((await connection.execute(statement)).scalar_one())

    @to_the_end
    async def prune(self, before: float) -> None:
        """A batch at a time; what an outage of the store leaves is for the next time."""
        try:
            await self._prune(before)
        except sa.exc.DBAPIError as error:
            _log.error(logs.STORE_FAILED, error=str(error.orig))

    async def _prune(self, before: float) -> None:
        for table in (commands, endings, turns, conversations):
            key = list(table.primary_key.columns)
            stale = sa.select(*key).where(table.c.touched < before).limit(PRUNE_ROWS)
            full = True
            while full:
                async with self._database.writing() as connection:
                    result = await connection.execute(sa.delete(table).where(sa.tuple_(*key).in_(stale)))
                    full = result.rowcount == PRUNE_ROWS

    def _ask(self, job: _Job) -> asyncio.Future[Grant]:
        self._jobs.append(job)
        self._wake.set()
        return job.done

    async def _flush(self) -> None:
        """Write all there is in one transaction; try until the store takes it."""
        pause_s = PAUSE_S
        while self._jobs:
            batch = list(self._jobs)
            try:
                granted = await self._write(batch)
            except sa.exc.DBAPIError as error:
                _log.error(logs.STORE_FAILED, error=str(error.orig), again_in_s=pause_s)
                await asyncio.sleep(pause_s)
                pause_s = min(pause_s * 2, LONGEST_PAUSE_S)
                continue
            pause_s = PAUSE_S
            for job, grant in zip(batch, granted, strict=True):
                self._jobs.popleft()
                if not job.done.done():
                    job.done.set_result(grant)
        self._wake.clear()

    @to_the_end
    async def _write(self, batch: Sequence[_Job]) -> list[Grant]:
        async with self._database.writing() as connection:
            epochs = {row.partition: row.epoch for row in await connection.execute(sa.select(partitions))}
            columns = (conversations.c.conversation_id, conversations.c.version, conversations.c.attempt)
            ids = {job.conversation_id for job in batch}
            found = await connection.execute(sa.select(*columns).where(columns[0].in_(ids)))
            rows = {row.conversation_id: (row.version, row.attempt) for row in found}
            granted = [_judge(job, rows, epochs) for job in batch]
            wanted = [job for job, grant in zip(batch, granted, strict=True) if grant is Grant.GRANTED and job.changes]
            await _put(connection, rows, wanted, self._clock())
        return granted


def _judge(job: _Job, rows: dict[str, _Row], epochs: Mapping[int, int]) -> Grant:
    """Whether the job may be written after those before it, whose effect on `rows` is noted."""
    if job.epoch is not None and epochs.get(job.partition) != job.epoch:
        return Grant.REFUSED
    if job.changes is None:
        return Grant.GRANTED
    version, attempt = rows.get(job.conversation_id, ("", None))
    state = job.changes.state
    mine = state.number == attempt if job.outcome else job.changes.base == version
    if not mine:
        return Grant.OUTDATED
    rows[job.conversation_id] = (job.changes.version, state.number if state.attempt else None)
    return Grant.GRANTED


async def _put(connection: AsyncConnection, written: Mapping[str, _Row], jobs: Iterable[_Job], now: float) -> None:
    rows: dict[sa.Table, list[Mapping[str, Any]]] = {conversations: [], turns: [], endings: [], commands: []}
    for job in jobs:
        changes, conversation_id = job.changes, job.conversation_id
        assert changes is not None
        version, attempt = written[conversation_id]
        rows[conversations].append(
            {
                "conversation_id": conversation_id,
                "version": version,
                "attempt": attempt,
                "state": _state_text(changes.state),
                "touched": now,
            }
        )
        rows[turns] += [
            {"conversation_id": conversation_id, "turn_id": turn_id} | asdict(turn)
            for turn_id, turn in changes.turns.items()
        ]
        for message_id, ended in changes.ended.items():
            for table, row in _ended_rows(conversation_id, message_id, ended):
                rows[table].append(row)
    for table, statement in _STATEMENTS.items():
        if rows[table]:
            await connection.execute(statement, rows[table])


def _noted(conversation_id: str, now: float) -> sa.Insert:
    """A row of the conversation, if there is none: a lane that finds none looks nothing up."""
    row = {"conversation_id": conversation_id, "version": "noted", "state": _state_text(State()), "touched": now}
    return insert(conversations).values(row).on_conflict_do_nothing()


def _ended_rows(conversation_id: str, message_id: str, ended: Ended) -> Iterator[tuple[sa.Table, Mapping[str, Any]]]:
    ending_id = ended.event.id("")
    yield endings, {"ending_id": ending_id, "event": _text(ended), "touched": ended.at}
    command = {"conversation_id": conversation_id, "message_id": message_id, "fingerprint": ended.fingerprint}
    yield commands, command | {"ending_id": ending_id, "touched": ended.at}


async def _known(connection: AsyncConnection, conversation_id: str, message_ids: Sequence[str]) -> dict[str, Ended]:
    wanted = sa.and_(commands.c.conversation_id == conversation_id, commands.c.message_id.in_(message_ids))
    found = await connection.execute(ENDED.where(wanted))
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


def _text(ended: Ended) -> str:
    return json.dumps([[_row(event) for event in events] for events in (ended.before, (ended.event,), ended.after)])


def _row(event: Event) -> list[Any]:
    data = event.data.model_dump(mode="json", by_alias=True, exclude_none=True)
    return [event.type, event.conversation_id, event.key, event.traceparent, data]


def ended_of(row: Any) -> Ended:
    """How a command ended, from a row of `ENDED`."""
    before, (event,), after = (tuple(map(_event, rows)) for rows in json.loads(row.event))
    return Ended(row.fingerprint, event, row.touched, before, after)


def _event(row: Sequence[Any]) -> Event:
    event_type, conversation_id, key, traceparent, data = row
    return Event(conversation_id, _DATA_TYPES[event_type].model_validate(data), key, traceparent)


def _future() -> asyncio.Future[Grant]:
    return asyncio.get_running_loop().create_future()


def _state_text(state: State) -> str:
    document = asdict(replace(state, untold=())) | {"untold": [_row(event) for event in state.untold]}
    return json.dumps(document, default=sorted)


def _state(text: str) -> State:
    document = json.loads(text)
    attempt = document.pop("attempt")
    if attempt is not None:
        parts = tuple(SentPart(**part) for part in attempt.pop("parts"))
        shapes = attempt.pop("shapes", None)
        attempt = Attempt(parts=parts, shapes=shapes and shaper.State(*shapes), **attempt)
    heard_last, doubtful = frozenset(document.pop("heard_last")), frozenset(document.pop("doubtful"))
    untold = tuple(map(_event, document.pop("untold")))
    numbers = document.get("numbers", {}).items()
    document["numbers"] = {turn: tuple((first, last) for first, last in ranges) for turn, ranges in numbers}
    document["shapes"] = {turn: shaper.State(*shape) for turn, shape in document.get("shapes", {}).items()}
    return State(attempt=attempt, heard_last=heard_last, doubtful=doubtful, untold=untold, **document)
