"""What is written in one transaction, and whether it has been."""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert  # SQLite has learnt its ON CONFLICT from there

from worker.stores.backend import T
from worker.stores.tables import writers

Item = TypeVar("Item")
Together = Callable[[sa.Connection, Sequence[Item]], Sequence[T]]
"""Does for all items what was asked for; returns as many results."""


@dataclass(eq=False, slots=True)
class Job:
    """`place`: where in a transaction. A `patient` one waits until the store takes it, unless the fault is its own."""

    write: Together[Any, Any]
    item: Any
    place: str
    alone: bool
    patient: bool
    done: asyncio.Future[Any]
    dropped: bool = False


class Transaction:
    """What is written together, and whether it has been: the answer to a commit may be lost with the connection.

    Called again, it does nothing if its number stands already; the results are those of then.
    """

    def __init__(self, writer: str, number: int, jobs: Sequence[Job]) -> None:
        self._mark = _MARK.values(writer=writer, number=number)
        self._jobs = jobs
        self._results: dict[Job, Any] = {}

    def open(self) -> list[Job]:
        """What is still to be written."""
        return [job for job in self._jobs if not (job.dropped or job.done.done())]

    def finish(self, results: Mapping[Job, Any]) -> None:
        """It is committed."""
        for job, result in results.items():
            if not job.done.done():
                job.done.set_result(result)

    def __call__(self, connection: sa.Connection) -> Mapping[Job, Any]:
        """Write, and return the results. Waits for a try before, if the server has not given that up yet."""
        if connection.execute(self._mark.values(touched=time.time())).first() is None:
            return self._results
        groups: dict[Together[Any, Any], list[Job]] = {}
        for job in self.open():
            groups.setdefault(job.write, []).append(job)
        self._results = {}
        for write, jobs in sorted(groups.items(), key=lambda group: group[1][0].place):
            results = write(connection, [job.item for job in jobs])
            self._results |= zip(jobs, results, strict=True)
        return self._results


_NEW = insert(writers)
_MARK = _NEW.on_conflict_do_update(
    index_elements=["writer"],
    set_={"number": _NEW.excluded.number, "touched": _NEW.excluded.touched},
    where=writers.c.number < _NEW.excluded.number,
).returning(writers.c.number)
