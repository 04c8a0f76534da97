"""`worker.stores.database` on each backend: group commit, faults of one among many, answers that are lost, outages."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

import pytest
import sqlalchemy as sa

from tests.contract.test_ledger import attempting, changes, outcome
from tests.support.fakes import FakeClock, until
from worker.core.memory import State
from worker.core.model import Session
from worker.ports import Grant, Held, Slots
from worker.stores import database as module
from worker.stores.backend import Contended, Unreachable, Work
from worker.stores.database import Database
from worker.stores.ledger import SqlLedger
from worker.stores.sessions import SqlSessions
from worker.stores.tables import facts

PLACE = "test"


@pytest.fixture
async def clock() -> FakeClock:
    return FakeClock(1000.0)


@pytest.fixture
async def database(store_url: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Database]:
    monkeypatch.setattr(module, "PAUSE_S", 0.01)
    one = await Database.open(store_url)
    yield one
    await one.close()


@pytest.fixture
async def two(shared_url: str) -> AsyncIterator[tuple[Database, Database]]:
    """Two workers on one store."""
    async with AsyncExitStack() as stack:
        both = [await Database.open(shared_url) for _ in range(2)]
        for one in both:
            stack.push_async_callback(one.close)
        yield both[0], both[1]


def put(name: str, value: str | None = "there") -> Work[str]:
    """Writes a fact; a value of None is refused by the database."""

    def work(connection: sa.Connection) -> str:
        connection.execute(sa.insert(facts).values(name=name, value=value))
        return name

    return work


async def names(database: Database) -> set[str]:
    query = sa.select(facts.c.name).where(facts.c.name.like("n%"))
    return set(await database.read(lambda connection: connection.execute(query).scalars().all()))


class Interposed:
    """A backend before which something happens: `before` and `after` are called with the count of the write."""

    def __init__(self, database: Database) -> None:
        self.writes = 0
        self.before: Callable[[int], None] = lambda _: None
        self.after: Callable[[int], None] = lambda _: None
        self._backend = database._backend
        database._backend = self

    async def write(self, work: Work[Any]) -> Any:
        self.writes += 1
        number = self.writes
        self.before(number)
        result = await self._backend.write(work)
        self.after(number)
        return result

    async def read(self, work: Work[Any]) -> Any:
        return await self._backend.read(work)

    async def close(self) -> None:
        await self._backend.close()


def raising(error: Exception, *numbers: int) -> Callable[[int], None]:
    def look(number: int) -> None:
        if number in numbers:
            raise error

    return look


class TestGroups:
    async def test_what_is_asked_for_meanwhile_goes_into_one_transaction(self, database: Database) -> None:
        backend = Interposed(database)
        wanted = {f"n{n}" for n in range(200)}
        assert set(await asyncio.gather(*(database.write(put(name), PLACE) for name in wanted))) == wanted
        assert await names(database) == wanted
        assert backend.writes <= 2

    async def test_a_transaction_is_bounded(self, database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "BATCH", 10)
        backend = Interposed(database)
        await asyncio.gather(*(database.write(put(f"n{n}"), PLACE) for n in range(95)))
        assert backend.writes == 10

    async def test_what_wants_to_be_alone_is(self, database: Database) -> None:
        backend = Interposed(database)
        await asyncio.gather(*(database.write(put(f"n{n}"), PLACE, alone=n == 2) for n in range(5)))
        assert backend.writes == 3

    async def test_it_is_carried_out_by_place_and_together(self, database: Database) -> None:
        seen: list[Any] = []

        def together(_: sa.Connection, items: Any) -> list[int]:
            seen.append(tuple(items))
            return [item * 10 for item in items]

        def note(name: str) -> Work[None]:
            return lambda _: seen.append(name)

        asked = [database.ask(note("late"), "c 2")]
        first = database.ask_together(together, 1, "b")
        asked.append(database.ask(note("later"), "c 1"))
        second = database.ask_together(together, 2, "b")
        asked.append(database.ask(note("early"), "a"))
        await asyncio.gather(*asked)
        assert (await first, await second) == (10, 20)
        assert seen == ["early", (1, 2), "later", "late"]


class TestFaults:
    async def test_one_among_others_fails_alone(self, database: Database) -> None:
        refused, bug = database.ask(put("n-", None), PLACE), database.ask(lambda _: 1 // 0, PLACE)
        others = [database.ask(put(f"n{n}"), PLACE) for n in range(5)]
        assert await asyncio.gather(*others) == [f"n{n}" for n in range(5)]
        with pytest.raises(sa.exc.IntegrityError):
            await refused
        with pytest.raises(ZeroDivisionError):
            await bug
        assert await names(database) == {f"n{n}" for n in range(5)}

    async def test_what_others_write_at_the_same_time_is_tried_again(self, database: Database) -> None:
        backend = Interposed(database)
        backend.before = raising(Contended("deadlock"), 1, 2, 3)
        await database.write(put("n1"), PLACE)
        assert (await names(database), backend.writes) == ({"n1"}, 4)


class TestOutages:
    async def test_who_is_patient_waits_and_who_is_not_fails(self, database: Database) -> None:
        backend = Interposed(database)
        backend.before = raising(Unreachable("gone"), 1, 2, 3)
        patient = database.ask(put("n1"), PLACE)
        with pytest.raises(Unreachable):
            await database.write(put("n2"), PLACE)
        with pytest.raises(Unreachable):
            await database.write(put("n3"), PLACE)
        assert await database.read(lambda _: "read", patient=True) == "read"
        assert await patient == "n1"
        assert await names(database) == {"n1"}

    async def test_a_lost_answer_to_a_commit_is_found_again(self, database: Database) -> None:
        backend = Interposed(database)
        backend.after = raising(Unreachable("reset by peer"), 1, 2)
        asked = [database.ask(put(f"n{n}"), PLACE) for n in range(3)]
        assert await asyncio.gather(*asked) == ["n0", "n1", "n2"], "though a second try would have been refused"
        assert backend.writes == 3
        assert await names(database) == {"n0", "n1", "n2"}

    async def test_a_lost_answer_to_an_intent_grants_it(self, database: Database, clock: FakeClock) -> None:
        ledger = SqlLedger(database, clock)
        epoch = await ledger.raise_epoch(0)
        backend = Interposed(database)
        backend.after = raising(Unreachable("reset by peer"), 1)
        asked = [ledger.intend("c1", attempting(0, 1), 0, epoch), ledger.record("c1", outcome(1, 1), outcome=True)]
        assert await asyncio.gather(*asked) == [Grant.GRANTED] * 2
        assert await ledger.raise_epoch(0) == epoch + 1

    async def test_a_store_that_hangs_is_not_waited_for(
        self, database: Database, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "PATIENCE_S", 0.05)
        hanging = asyncio.Event()
        write = database._backend.write

        async def hang(work: Work[Any]) -> Any:
            await hanging.wait()
            return await write(work)

        monkeypatch.setattr(database._backend, "write", hang)
        first = asyncio.create_task(database.write(put("n1"), PLACE))
        await asyncio.sleep(0)
        with pytest.raises(Unreachable):
            await database.write(put("n2"), PLACE)
        with pytest.raises(Unreachable):
            await first
        hanging.set()
        await database.ask(put("n3"), PLACE)
        assert await names(database) == {"n3"}, "what was given up is not written later"

    async def test_closing_gives_up_what_cannot_be_written(
        self, store_url: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "LONGEST_PAUSE_S", 0.05)
        database = await Database.open(store_url)
        Interposed(database).before = raising(Unreachable("gone"), *range(1000))
        failures: list[None] = []
        database.on_failure = lambda: failures.append(None)
        asked = [database.ask(put(f"n{n}"), PLACE, alone=True) for n in range(2)]
        await database.close()
        assert [one.cancelled() for one in asked] == [True, True]
        assert failures


class TestTwoWorkers:
    """No interleaving lets two workers have the same."""

    @pytest.mark.parametrize("known", [False, True], ids=["new", "known"])
    async def test_of_two_that_write_on_the_same_base_one_is_granted(
        self, two: tuple[Database, Database], clock: FakeClock, known: bool
    ) -> None:
        ledgers = [SqlLedger(one, clock) for one in two]
        ids = [f"c{n}" for n in range(60)]
        if known:
            await asyncio.gather(*(ledgers[0].record(one, changes(0), outcome=False) for one in ids))
        seed = random.randrange(1000)
        chance = random.Random(seed)

        async def write(ledger: SqlLedger) -> dict[str, Grant]:
            asked = {}
            for one in chance.sample(ids, len(ids)):
                base = changes(int(known), State(number=5))
                asked[one] = ledger.record(one, base, outcome=False)
                if chance.random() < 0.3:
                    await asyncio.sleep(0)
            return dict(zip(asked, await asyncio.gather(*asked.values()), strict=True))

        ours, theirs = await asyncio.gather(*map(write, ledgers))
        for one in ids:
            assert {ours[one], theirs[one]} == {Grant.GRANTED, Grant.OUTDATED}, f"{one}, seed {seed}"

    async def test_whatever_was_granted_under_an_epoch_is_seen_by_the_next(
        self, two: tuple[Database, Database], clock: FakeClock
    ) -> None:
        ours, theirs = (SqlLedger(one, clock) for one in two)
        ids = [f"c{n}" for n in range(300)]
        for round_ in range(5):
            epoch = await ours.raise_epoch(0)
            granted: set[str] = set()

            async def intend(conversation_id: str, epoch: int, granted: set[str]) -> None:
                base = (await ours.recall(conversation_id)).version
                change = replace(changes(0, State(number=epoch)), base=base, version=f"{epoch} {conversation_id}")
                if await ours.intend(conversation_id, change, 0, epoch) is Grant.GRANTED:
                    granted.add(conversation_id)

            intents = [asyncio.create_task(intend(one, epoch, granted)) for one in ids]
            await more_than(granted, 20 * round_)
            assert await theirs.raise_epoch(0) == epoch + 1
            seen = {one for one in ids if (await theirs.recall(one)).version == f"{epoch} {one}"}
            await asyncio.gather(*intents)
            assert granted == seen

    async def test_a_session_is_adopted_or_renewed(self, two: tuple[Database, Database]) -> None:
        ours, theirs = (SqlSessions(one) for one in two)
        held = {f"c{n}": Held(f"c{n}", Session(f"s{n}", "t"), 1.0) for n in range(50)}
        await asyncio.gather(*(ours.put(one, "w1", 10.0) for one in held.values()))
        for now in range(20, 120, 10):
            lost, adopted = await asyncio.gather(
                ours.renew(held, "w1", now + 5.0), theirs.adopt("w2", float(now), now + 5.0, Slots())
            )
            assert lost == {one.conversation_id for one in adopted}
            await asyncio.gather(*(ours.take(one, "w1", now + 5.0) for one in held))

    async def test_opposite_orders_do_not_lock_each_other_out(self, two: tuple[Database, Database]) -> None:
        ours, theirs = (SqlSessions(one) for one in two)
        held = {f"c{n:02}": Held(f"c{n:02}", Session(f"s{n}", "t"), 1.0) for n in range(40)}
        await asyncio.gather(*(ours.put(one, "w1", 10.0) for one in held.values()))
        async with asyncio.timeout(10):
            for _ in range(5):
                await asyncio.gather(
                    *(ours.take(one, "w1", 50.0) for one in held),
                    *(theirs.take(one, "w2", 50.0) for one in reversed(held)),
                    ours.renew(held, "w1", 60.0),
                    theirs.renew(dict(reversed(held.items())), "w2", 60.0),
                )


async def more_than(granted: set[str], some: int) -> None:
    await until(lambda: len(granted) > some)
