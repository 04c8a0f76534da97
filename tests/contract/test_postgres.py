"""What only PostgreSQL can do: lock rows, go away and come back, be named in many ways."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, TypeVar

import asyncpg
import pytest
import sqlalchemy as sa

from tests.contract.test_ledger import STATE, accepted, attempting, changes, contents, ended
from tests.contract.test_session_store import held
from tests.support.conversation import speak
from tests.support.fakes import FakeClock, until
from tests.support.postgres import OwnedPostgres, Postgres, own_postgres
from tests.support.proxy import proxied
from worker.core.memory import State
from worker.errors import ConfigurationError
from worker.ports import Grant
from worker.stores import database as module
from worker.stores import postgres as backend
from worker.stores.backend import Unreachable
from worker.stores.database import Database
from worker.stores.ledger import SqlLedger, _Job
from worker.stores.postgres import Postgres as Backend
from worker.stores.postgres import arguments_of
from worker.stores.sessions import SqlSessions

T = TypeVar("T")


@pytest.fixture
async def url(postgres: Postgres) -> AsyncIterator[str]:
    async with postgres.schema() as url:
        yield url


@pytest.fixture
async def workers(url: str) -> AsyncIterator[tuple[Database, Database]]:
    async with AsyncExitStack() as stack:
        both = [await Database.open(url) for _ in range(2)]
        for one in both:
            stack.push_async_callback(one.close)
        yield both[0], both[1]


@pytest.fixture
def ledgers(workers: tuple[Database, Database]) -> tuple[SqlLedger, SqlLedger]:
    ours, theirs = (SqlLedger(one, FakeClock(1000.0)) for one in workers)
    return ours, theirs


@asynccontextmanager
async def under_way(database: Database, write: Callable[[sa.Connection], T]) -> AsyncIterator[T]:
    """What a worker has written and not committed."""
    assert isinstance(database._backend, Backend)
    async with database._backend._writer.connect() as connection, connection.begin():
        yield await connection.run_sync(write)


async def waits(asked: Awaitable[Any], postgres: Postgres) -> "asyncio.Future[Any]":
    """It waits for a lock; returned to be awaited later."""
    asking = asyncio.ensure_future(asked)
    connection = await asyncpg.connect(postgres.url)
    try:
        async with asyncio.timeout(5):
            query = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
            while not await connection.fetchval(query):
                assert not asking.done(), "it did not wait"
    finally:
        await connection.close()
    return asking


def job(change: Any, epoch: int | None = None, *, outcome: bool = False) -> _Job:
    return _Job("c1", change, 0, epoch, outcome)


class TestLocks:
    async def test_an_epoch_is_raised_after_the_intents_under_way(
        self, workers: tuple[Database, Database], ledgers: tuple[SqlLedger, SqlLedger], postgres: Postgres
    ) -> None:
        ours, theirs = ledgers
        epoch = await ours.raise_epoch(0)
        intent = job(attempting(0, 1), epoch)
        async with under_way(workers[0], lambda connection: ours._write(connection, [intent])) as granted:
            assert granted == [Grant.GRANTED]
            raising = await waits(theirs.raise_epoch(0), postgres)
        assert await raising == epoch + 1
        assert (await theirs.recall("c1")).state.number == 1

    async def test_an_intent_waits_for_an_epoch_that_is_being_raised_and_is_refused(
        self, workers: tuple[Database, Database], ledgers: tuple[SqlLedger, SqlLedger], postgres: Postgres
    ) -> None:
        ours, theirs = ledgers
        epoch = await ours.raise_epoch(0)
        raise_ = sa.text("UPDATE partitions SET epoch = epoch + 1 WHERE partition = 0")
        async with under_way(workers[1], lambda connection: connection.execute(raise_)):
            intending = await waits(ours.intend("c1", attempting(0, 1), 0, epoch), postgres)
        assert await intending is Grant.REFUSED
        assert (await theirs.recall("c1")).version == ""

    @pytest.mark.parametrize("base", [0, 1], ids=["new", "known"])
    async def test_who_comes_second_is_outdated(
        self,
        workers: tuple[Database, Database],
        ledgers: tuple[SqlLedger, SqlLedger],
        postgres: Postgres,
        base: int,
    ) -> None:
        ours, theirs = ledgers
        for version in range(base):
            await ours.record("c1", changes(version), outcome=False)
        first = job(changes(base, STATE))
        async with under_way(workers[0], lambda connection: ours._write(connection, [first])):
            second = await waits(theirs.record("c1", changes(base, State(number=99)), outcome=False), postgres)
        assert await second is Grant.OUTDATED
        assert contents(await theirs.recall("c1")) == (STATE, {}, base + 1)

    async def test_a_command_ends_once_in_its_lane_or_beside_it(
        self, workers: tuple[Database, Database], ledgers: tuple[SqlLedger, SqlLedger], postgres: Postgres
    ) -> None:
        ours, theirs = ledgers
        stands, late = ended(accepted("m1")), ended(accepted("m1", key="late"))
        await ours.record("c1", changes(0), outcome=False)
        first = job(changes(1, ended={"m1": stands}))
        async with under_way(workers[0], lambda connection: ours._write(connection, [first])):
            second = await waits(theirs.end(speak("t1", "x", message_id="m1"), late), postgres)
        assert await second == stands

    async def test_what_is_being_pruned_by_one_is_left_to_it(
        self, workers: tuple[Database, Database], ledgers: tuple[SqlLedger, SqlLedger]
    ) -> None:
        ours, theirs = ledgers
        await ours.record("c1", changes(0), outcome=False)
        touch = job(changes(1, STATE))
        async with under_way(workers[0], lambda connection: ours._write(connection, [touch])):
            await theirs.prune(1e12)
        assert contents(await theirs.recall("c1")) == (STATE, {}, 2)

    async def test_of_a_lock_that_nobody_gives_back_the_server_disposes(
        self, workers: tuple[Database, Database], ledgers: tuple[SqlLedger, SqlLedger]
    ) -> None:
        ours, theirs = ledgers
        epoch = await ours.raise_epoch(0)
        shorter = sa.text("SET idle_in_transaction_session_timeout = 200")
        intent = job(attempting(0, 1), epoch)

        def silent(connection: sa.Connection) -> None:
            connection.execute(shorter)
            ours._write(connection, [intent])

        with pytest.raises(sa.exc.DBAPIError):
            async with under_way(workers[0], silent):
                assert await theirs.raise_epoch(0) == epoch + 1
        assert (await theirs.recall("c1")).version == ""


class TestSessions:
    async def test_an_adopted_session_is_not_removed(
        self, workers: tuple[Database, Database], postgres: Postgres
    ) -> None:
        ours, theirs = (SqlSessions(one) for one in workers)
        await ours.put(held(), "w1", 200.0)
        adopt = sa.text("UPDATE sessions SET owner = 'w2', lease_until = 900")
        async with under_way(workers[1], lambda connection: connection.execute(adopt)):
            removing = await waits(ours.remove(held(), "w1"), postgres)
        assert not await removing
        assert await theirs.take("c1", "w2", 900.0) == held()


@pytest.fixture(scope="module")
def owned() -> Iterator[OwnedPostgres]:
    """One that a test may kill."""
    with own_postgres() as one:
        yield one


class TestOutage:
    async def test_killed_and_started_again_it_has_all_that_was_granted(
        self, owned: OwnedPostgres, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(module, "PAUSE_S", 0.01)
        tries: list[Any] = []
        monkeypatch.setattr(module._log, "error", lambda _, **kwargs: tries.append(kwargs))
        async with owned.schema() as url:
            database = await Database.open(url)
            ledger, sessions = SqlLedger(database, FakeClock(1000.0)), SqlSessions(database)
            epoch = await ledger.raise_epoch(0)
            over = asyncio.Event()

            async def speak(conversation_id: str) -> int:
                memory, number = await ledger.recall(conversation_id), 0
                while not over.is_set():
                    number += 1
                    memory.update(number=number)
                    change = memory.take_changes()
                    assert change is not None
                    assert await ledger.intend(conversation_id, change, 0, epoch) is Grant.GRANTED
                return number

            speaking = [asyncio.create_task(speak(f"c{n}")) for n in range(50)]
            for _ in range(2):
                tries.clear()
                await asyncio.to_thread(owned.kill)
                await until(lambda: len(tries) > 1)
                with pytest.raises(Unreachable):
                    await sessions.put(held(), "w1", 200.0)
                await asyncio.to_thread(owned.start)
                while True:
                    try:
                        await sessions.put(held(), "w1", 200.0)
                    except Unreachable:
                        await asyncio.sleep(0.01)
                    else:
                        break
            over.set()
            said = await asyncio.gather(*speaking)
            assert [(await ledger.recall(f"c{n}")).state.number for n in range(50)] == said
            assert await sessions.take("c1", "w1", 200.0) == held()
            await database.close()

    async def test_a_restart_nobody_saw_costs_nobody_anything(self, owned: OwnedPostgres) -> None:
        async with owned.schema() as url:
            database = await Database.open(url)
            sessions = SqlSessions(database)
            await sessions.put(held(), "w1", 200.0)
            await asyncio.to_thread(owned.kill)
            await asyncio.to_thread(owned.start)
            assert await sessions.take("c1", "w1", 200.0) == held()
            assert await sessions.identity()
            await database.close()

    async def test_a_connection_that_is_cut_in_the_middle_is_replaced(self, url: str) -> None:
        async with proxied(url) as proxy:
            database = await Database.open(proxy.url)
            ledger = SqlLedger(database, FakeClock(1000.0))
            epoch = await ledger.raise_epoch(0)
            memory = await ledger.recall("c1")
            for number in range(1, 101):
                memory.update(number=number)
                change = memory.take_changes()
                intent = ledger.intend("c1", change, 0, epoch)
                if number % 10 == 0:
                    for _ in range(number // 5):
                        await asyncio.sleep(0)
                    proxy.cut()
                assert await intent is Grant.GRANTED
            assert (await ledger.recall("c1")).state.number == 100
            await database.close()

    async def test_a_black_hole_is_left_behind(self, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(backend, "ANSWER_S", 0.3)
        monkeypatch.setattr(backend, "CONNECT_S", 0.3)
        monkeypatch.setattr(module, "PATIENCE_S", 0.1)
        async with proxied(url) as proxy:
            database = await Database.open(proxy.url)
            ledger, sessions = SqlLedger(database, FakeClock(1000.0)), SqlSessions(database)
            epoch = await ledger.raise_epoch(0)
            proxy.passing.clear()
            intent = ledger.intend("c1", attempting(0, 1), 0, epoch)
            with pytest.raises(Unreachable):
                await sessions.put(held(), "w1", 200.0)
            await until(lambda: database._outage)
            recalled = asyncio.create_task(ledger.recall("c2"))
            with pytest.raises(Unreachable):
                await sessions.take("c1", "w1", 200.0)
            proxy.passing.set()
            assert await intent is Grant.GRANTED
            assert (await recalled).version == ""
            await database.close()

    async def test_closing_does_not_wait_for_a_black_hole(self, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(backend, "CONNECT_S", 0.2)
        monkeypatch.setattr(module, "LONGEST_PAUSE_S", 0.1)
        async with proxied(url) as proxy:
            database = await Database.open(proxy.url)
            ledger = SqlLedger(database, FakeClock(1000.0))
            await ledger.recall("c1")
            proxy.passing.clear()
            asked = ledger.record("c1", changes(0), outcome=False)
            async with asyncio.timeout(5):
                await database.close()
            assert asked.cancelled()


class TestStart:
    async def test_what_is_not_there_is_named_without_the_password(self, url: str) -> None:
        for wrong in (
            url.replace("127.0.0.1", "127.0.0.2").replace("?", "?connect_timeout=2&"),
            "postgresql://u:hush@127.0.0.1:9/d",
            "postgresql://u:hush@no.such.host.invalid/d",
            "postgresql://u:hush/1@127.0.0.1/d",
            "postgresql://u:hush@127.0.0.1/d?sslmode=hush",
        ):
            with pytest.raises(ConfigurationError, match="STORE_URL") as raised:
                await Database.open(wrong)
            assert "hush" not in str(raised.value).replace("sslmode=hush", "")

    async def test_a_wrong_password(self, url: str) -> None:
        user, _, rest = url.partition("@")
        with pytest.raises(ConfigurationError, match="password authentication failed") as raised:
            await Database.open(f"{user.rpartition(':')[0]}:hush@{rest}")
        assert "hush" not in str(raised.value)

    async def test_what_libpq_knows_and_asyncpg_does_not_is_no_obstacle(self, url: str) -> None:
        short = url.replace("postgresql://", "postgres://")
        more = "&sslmode=prefer&connect_timeout=3&keepalives=1&channel_binding=prefer&application_name=worker&sslsni=1"
        database = await Database.open(short + more)
        name = sa.text("SELECT current_setting('application_name')")
        assert await database.read(lambda connection: connection.execute(name).scalar_one()) == "worker"
        await database.close()


@pytest.mark.parametrize(
    ("query", "dsn", "arguments"),
    [
        ("", "", {"timeout": 5.0}),
        ("?connect_timeout=7", "", {"timeout": 7.0}),
        ("?connect_timeout=0", "", {"timeout": 5.0}),
        ("?sslmode=verify-full&sslrootcert=/ca.pem", "?sslmode=verify-full&sslrootcert=%2Fca.pem", {"timeout": 5.0}),
        ("?target_session_attrs=read-write&keepalives_idle=1", "?target_session_attrs=read-write", {"timeout": 5.0}),
        ("?gssencmode=disable&channel_binding=prefer&load_balance_hosts=random", "", {"timeout": 5.0}),
        ("?options=-csearch_path%3Da%20b", "?options=-csearch_path%3Da+b", {"timeout": 5.0}),
    ],
)
def test_an_address_in_libpqs_words(query: str, dsn: str, arguments: dict[str, Any]) -> None:
    address = "postgresql://u:p%40@h1:5432,h2/d"
    assert arguments_of(address + query) == (address + dsn, arguments)


def test_the_systems_certificates() -> None:
    dsn, arguments = arguments_of("postgresql://h/d?sslmode=verify-full&sslrootcert=system")
    assert dsn == "postgresql://h/d"
    assert arguments["ssl"].check_hostname


@pytest.mark.parametrize("demand", ["channel_binding=require", "gssencmode=require", "require_auth=scram-sha-256"])
def test_a_demand_that_cannot_be_met_is_not_dropped(demand: str) -> None:
    with pytest.raises(ConfigurationError, match=f"STORE_URL: {demand.partition('=')[0]}"):
        arguments_of(f"postgresql://h/d?{demand}")
