"""One SQL database, with group commit: what is asked for while one transaction runs goes together into the next.

A lease must not run out because two hundred conversations begin at once, nor their speech wait for as many commits.
"""

import asyncio
import random
import uuid
from collections import deque
from collections.abc import Callable, Collection, Sequence
from itertools import count
from typing import Any, Self

import sqlalchemy as sa
import structlog
from sqlalchemy.dialects.postgresql import ARRAY

from worker.errors import ConfigurationError
from worker.ops import logs
from worker.stores import schema
from worker.stores.backend import Backend, Contended, Locked, T, Unreachable, Work
from worker.stores.sqlite import Sqlite
from worker.stores.tables import facts
from worker.stores.transaction import Item, Job, Together, Transaction

_log = structlog.stdlib.get_logger(__name__)

PAUSE_S = 0.2
LONGEST_PAUSE_S = 5.0
PATIENCE_S = 5.0
BATCH = 1000
CONTENDED_S = 0.05
LOCKED_WAITS = 5
"""How often a start waits for `sqlite.BUSY_S` for a worker that holds the file, before it gives up."""


class Database:
    """Reads, and writes in the order in which they were asked for.

    `place` orders what is written in one transaction, by table and key: workers that lock the same rows do so in the
    same order. What locks rows in no such order is written `alone`.
    """

    def __init__(self, backend: Backend) -> None:
        self.on_failure: Callable[[], None] = lambda: None
        """Called whenever it could not be reached."""
        self._backend = backend
        self._name = uuid.uuid4().hex
        self._numbers = count(1)
        self._waiting: deque[Job] = deque()
        self._committing: asyncio.Task[None] | None = None
        self._outage: asyncio.Task[None] | None = None
        self._pause_s = PAUSE_S

    @classmethod
    async def open(cls, url: str) -> Self:
        """Open `sqlite:///FILE`, `sqlite://` or `postgresql://…`; the tables are made, or brought up to date.

        Raises:
            ConfigurationError: it cannot be used, or a newer version made it.
        """
        backend = await _backend(url)
        try:
            await _prepare(backend)
        except (Unreachable, sa.exc.DBAPIError) as error:
            await backend.close()
            raise ConfigurationError(f"STORE_URL: it cannot be used: {text_of(error)}") from None
        except BaseException:
            await backend.close()
            raise
        return cls(backend)

    async def close(self) -> None:
        """Close the connections, after what was asked for; where the store is out of reach, that is given up soon."""
        if self._committing is not None:
            await asyncio.wait([self._committing], timeout=LONGEST_PAUSE_S)
        for task in (self._committing, self._outage):
            if task is not None:
                task.cancel()
                await asyncio.wait([task])
        for job in self._waiting:
            job.done.cancel()
        await self._backend.close()

    async def fact(self, name: str) -> str:
        """Something written down when the database was made."""
        query = sa.select(facts.c.value).where(facts.c.name == name)
        return await self.read(lambda connection: str(connection.execute(query).scalar_one()))

    async def read(self, work: Work[T], *, patient: bool = False) -> T:
        """Look something up, beside whatever is written; `patient` waits out an outage.

        Raises:
            Unreachable: the store is out of reach.
        """
        while True:
            try:
                self._demand_reachable()
                return await self._backend.read(work)
            except Unreachable as error:
                if not patient:
                    self.on_failure()
                    raise
                await self._wait_out(error)

    async def write(self, work: Work[T], place: str, *, alone: bool = False) -> T:
        """Have it written, soon or not at all. What has begun is done also if the caller is cancelled.

        Raises:
            Unreachable: the store is out of reach, or too slow. It may have been written nevertheless.
        """
        self._demand_reachable()
        job = self._enqueue(lambda connection, _: [work(connection)], None, place, alone=alone, patient=False)
        if not (await asyncio.wait([job.done], timeout=PATIENCE_S))[0]:
            job.dropped = True
            self.on_failure()
            raise Unreachable("no answer in time")
        result: T = job.done.result()
        return result

    def ask(self, work: Work[T], place: str, *, alone: bool = False) -> asyncio.Future[T]:
        """Have it written, however long that takes; not to be cancelled."""
        return self._enqueue(lambda connection, _: [work(connection)], None, place, alone=alone, patient=True).done

    def ask_together(self, write: Together[Item, T], item: Item, place: str) -> asyncio.Future[T]:
        """As `ask`; all items of a transaction are handed to `write` at once, in their order."""
        return self._enqueue(write, item, place, alone=False, patient=True).done

    def _enqueue(self, write: Together[Any, Any], item: Any, place: str, *, alone: bool, patient: bool) -> Job:
        done: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        # Whoever asked may be gone by then.
        done.add_done_callback(lambda one: one.cancelled() or one.exception())
        job = Job(write, item, place, alone, patient, done)
        self._waiting.append(job)
        if self._committing is None:
            self._committing = asyncio.create_task(self._commit())
        return job

    async def _commit(self) -> None:
        batch: list[Job] = []
        try:
            while self._waiting:
                batch = self._next_batch()
                await self._settle(batch)
        finally:
            self._committing = None
            for job in batch:
                job.done.cancel()

    def _next_batch(self) -> list[Job]:
        batch = [self._waiting.popleft()]
        while self._waiting and len(batch) < BATCH and not (batch[0].alone or self._waiting[0].alone):
            batch.append(self._waiting.popleft())
        return batch

    async def _settle(self, jobs: Sequence[Job]) -> None:
        """Write them in one transaction, or, if something is wrong with one of them, in one each."""
        transaction = Transaction(self._name, next(self._numbers), jobs)
        while still := transaction.open():
            try:
                transaction.finish(await self._backend.write(transaction))
                self._pause_s = PAUSE_S
            except Contended:
                await asyncio.sleep(CONTENDED_S * random.random())  # noqa: S311 - it keeps two workers apart
            except Unreachable as error:
                for job in still:
                    if not job.patient:
                        job.done.set_exception(error)
                await self._wait_out(error)
            except Exception as error:  # noqa: BLE001 - whoever asked for it has it
                if len(still) > 1:
                    for job in still:
                        await self._settle([job])
                elif still[0].patient and not _is_its_own(error):
                    await self._pause(error)
                else:
                    still[0].done.set_exception(error)

    def _demand_reachable(self) -> None:
        if self._outage is not None:
            raise Unreachable("the store is out of reach")

    async def _wait_out(self, error: Exception) -> None:
        """Return when the store can be reached again. All wait together, and one looks."""
        if self._outage is None:
            self._outage = asyncio.create_task(self._look_out(error))
        await asyncio.shield(self._outage)

    async def _look_out(self, error: Exception) -> None:
        try:
            while True:
                await self._pause(error)
                try:
                    await self._backend.read(lambda connection: connection.execute(sa.select(1)).scalar_one())
                except Exception as still:  # noqa: BLE001 - whatever it is, it is not back
                    error = still
                else:
                    return
        finally:
            self._outage = None

    async def _pause(self, error: Exception) -> None:
        """Longer from time to time, until something is written again."""
        self.on_failure()
        _log.error(logs.STORE_FAILED, error=text_of(error), again_in_s=self._pause_s)
        await asyncio.sleep(self._pause_s)
        self._pause_s = min(self._pause_s * 2, LONGEST_PAUSE_S)


async def _prepare(backend: Backend) -> None:
    """Make the tables, or bring them up to date; a file that another worker has locked is waited for."""
    for _ in range(LOCKED_WAITS):
        try:
            await backend.write(schema.prepare)
        except Locked as error:
            _log.error(logs.STORE_FAILED, error=str(error), hint="a worker stands still while it writes")
        else:
            return
    await backend.write(schema.prepare)


async def _backend(url: str) -> Backend:
    if url.startswith("sqlite://"):
        return await Sqlite.open(url)
    try:
        from worker.stores.postgres import Postgres  # noqa: PLC0415 - SQLite does without the extra
    except ModuleNotFoundError as missing:
        raise ConfigurationError(
            f"STORE_URL: PostgreSQL needs the package {missing.name}: pip install 'avatar-worker[postgres]'"
        ) from None
    return Postgres(url)


def _is_its_own(error: Exception) -> bool:
    """Whether the fault is with what was asked for: waiting would not help."""
    if not isinstance(error, sa.exc.DBAPIError):
        return True
    sqlstate = getattr(error.orig, "sqlstate", None) or ""
    return isinstance(error, sa.exc.DataError | sa.exc.IntegrityError) or sqlstate[:2] in ("22", "23")


def text_of(error: Exception) -> str:
    """What went wrong, without the parameters, which hold tokens and what was said."""
    return str(error.orig if isinstance(error, sa.exc.DBAPIError) else error)


def among(connection: sa.Connection, column: sa.ColumnElement[Any], values: Collection[Any]) -> sa.ColumnElement[bool]:
    """Whether the column has one of these values: in PostgreSQL one parameter, however many there are."""
    if connection.dialect.name == "postgresql":
        return column == sa.any_(sa.literal(list(values), ARRAY(column.type)))
    return column.in_(values)
