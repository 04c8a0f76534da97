"""`ports.BacklogStore`: what every durable inbox must do. Two on one database are two workers."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.support.fakes import FakeClock
from worker.ports import Grant, Kept
from worker.stores.backlog import SqlBacklog
from worker.stores.database import Database
from worker.stores.ledger import SqlLedger


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    database = await Database.open(f"sqlite:///{tmp_path / 'store.db'}")
    yield database
    await database.close()


@pytest.fixture
def backlog(database: Database) -> SqlBacklog:
    return SqlBacklog(database)


@pytest.fixture
def ledger(database: Database) -> SqlLedger:
    return SqlLedger(database, FakeClock())


def kept(*numbers: int) -> list[Kept]:
    return [Kept(f"row {number}", f"m{number}\x00", f'{{"number": {number}}}') for number in numbers]


async def test_commands_are_kept_in_order(backlog: SqlBacklog, ledger: SqlLedger) -> None:
    epoch = await ledger.raise_epoch(3)
    assert await backlog.keep("c1", kept(5, 1), 3, epoch) is Grant.GRANTED
    assert await backlog.keep("c2", kept(2), 3, epoch) is Grant.GRANTED
    assert await backlog.keep("c1", kept(4, 3), 3, epoch) is Grant.GRANTED
    assert await backlog.kept("c1", 3) == kept(5, 1, 4, 3)
    assert sorted(await backlog.conversations()) == [(3, "c1"), (3, "c2")]


async def test_what_is_settled_is_gone_and_its_place_is_not_taken(backlog: SqlBacklog, ledger: SqlLedger) -> None:
    epoch = await ledger.raise_epoch(0)
    await backlog.keep("c", kept(1, 2, 3), 0, epoch)
    for key in ("row 3", "row 1", "never heard of"):
        backlog.let_go(key)
    await backlog.keep("c", kept(4), 0, epoch)
    assert await backlog.kept("c", 0) == kept(2, 4)
    for key in ("row 2", "row 4"):
        backlog.let_go(key)
    await backlog.keep("d", [], 0, epoch)
    assert await backlog.conversations() == []


@pytest.mark.parametrize("partition", [0, 1])
async def test_only_the_owner_of_the_partition_keeps(backlog: SqlBacklog, ledger: SqlLedger, partition: int) -> None:
    """Partition 1 was never owned."""
    epoch = await ledger.raise_epoch(0)
    newer = await ledger.raise_epoch(0)
    assert await backlog.keep("c", kept(1), partition, epoch) is Grant.REFUSED
    assert await backlog.kept("c", partition) == []
    assert await backlog.keep("c", kept(1), 0, newer) is Grant.GRANTED


async def test_what_one_worker_kept_another_finds(database: Database, ledger: SqlLedger) -> None:
    await SqlBacklog(database).keep("c", kept(1), 0, await ledger.raise_epoch(0))
    assert await SqlBacklog(database).kept("c", 0) == kept(1)
