"""`ports.SessionStore`: what every store must do. Two handles on one store are two workers."""

import asyncio
import heapq
import sqlite3
import stat
from collections.abc import AsyncIterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import pytest

from schemas.events import EndReason
from tests.support.fakes import FakeClock
from worker.core.model import Session, Viewer
from worker.errors import ConfigurationError
from worker.ports import Grant, Held, HeldState, Refusal, SessionStore, Slots
from worker.stores.database import Database
from worker.stores.ledger import SqlLedger
from worker.stores.sessions import SqlSessions

FULL = Session(
    "s1", "secret-token", "ann", "v1", 1.25, attached=True, viewer=Viewer("https://whep/ü", {"credential": "c", "n": 1})
)
BARE = Session("s2", "t2")
SLOTS = Slots()


class OpenedSessions(SqlSessions):
    """A store with a database to itself."""

    @classmethod
    async def open(cls, url: str) -> Self:
        return cls(await Database.open(url))

    async def close(self) -> None:
        await self._database.close()


def held(conversation_id: str = "c1", session: Session = FULL, last_used: float = 100.0) -> Held:
    return Held(conversation_id, session, last_used)


@pytest.fixture
async def store(store_url: str) -> AsyncIterator[SessionStore]:
    one = await OpenedSessions.open(store_url)
    yield one
    await one.close()


@pytest.fixture
async def workers(shared_url: str) -> AsyncIterator[tuple[SessionStore, SessionStore]]:
    """Two handles on one store."""
    one, two = await asyncio.gather(*(OpenedSessions.open(shared_url) for _ in range(2)))
    yield one, two
    await one.close()
    await two.close()


class TestEveryStore:
    @pytest.mark.parametrize("session", [FULL, BARE], ids=["full", "bare"])
    async def test_what_is_put_is_taken_as_it_was(self, store: SessionStore, session: Session) -> None:
        await store.put(held(session=session), "w1", 200.0)
        assert await store.take("c1", "w1", 200.0) == held(session=session)

    async def test_there_is_nothing_to_take(self, store: SessionStore) -> None:
        await store.put(held(), "w1", 200.0)
        assert await store.take("c2", "w1", 200.0) is None

    async def test_a_conversation_has_one_session(self, store: SessionStore) -> None:
        await store.put(held(), "w1", 200.0)
        await store.put(held(session=BARE, last_used=150.0), "w1", 200.0)
        assert await store.take("c1", "w1", 200.0) == held(session=BARE, last_used=150.0)

    async def test_whoever_takes_holds(self, store: SessionStore) -> None:
        await store.put(held(), "w1", 200.0)
        assert await store.take("c1", "w2", 300.0) == held()
        assert await store.renew({"c1": held()}, "w1", 400.0) == {"c1"}
        assert await store.adopt("w3", 299.0, 500.0, SLOTS) == []
        assert await store.adopt("w3", 301.0, 500.0, SLOTS) == [held()]

    async def test_renewing_extends_the_lease_and_notes_the_last_use(self, store: SessionStore) -> None:
        await store.put(held("c1"), "w1", 200.0)
        await store.put(held("c2", BARE), "w1", 200.0)
        used = {"c1": held("c1", last_used=180.0), "c2": held("c2", BARE)}
        assert await store.renew(used, "w1", 400.0) == set()
        assert await store.adopt("w2", 399.0, 500.0, SLOTS) == []
        assert {one.conversation_id: one.last_used for one in await store.adopt("w2", 401.0, 500.0, SLOTS)} == {
            "c1": 180.0,
            "c2": 100.0,
        }

    async def test_a_last_use_never_goes_back(self, store: SessionStore) -> None:
        await store.put(held(last_used=180.0), "w1", 200.0)
        await store.renew({"c1": held(last_used=100.0)}, "w1", 200.0)
        assert await store.take("c1", "w1", 200.0) == held(last_used=180.0)

    async def test_renewing_nothing(self, store: SessionStore) -> None:
        assert await store.renew({}, "w1", 200.0) == set()

    async def test_renewing_what_ended_or_was_replaced_tells_so(self, store: SessionStore) -> None:
        await store.put(held("replaced", BARE), "w1", 200.0)
        mine = {"replaced": held("replaced"), "ended": held("ended")}
        assert await store.renew(mine, "w1", 300.0) == {"replaced", "ended"}
        assert await store.take("ended", "w1", 200.0) is None

    async def test_only_leases_that_have_run_out_are_adopted_and_once(self, store: SessionStore) -> None:
        await store.put(held("c1"), "w1", 200.0)
        await store.put(held("c2"), "w1", 300.0)
        assert await store.adopt("w2", 200.0, 400.0, SLOTS) == []
        assert await store.adopt("w2", 250.0, 400.0, SLOTS) == [held("c1")]
        assert await store.adopt("w3", 250.0, 400.0, SLOTS) == []

    async def test_removing_compares_owner_and_session(self, store: SessionStore) -> None:
        await store.put(held(), "w1", 200.0)
        assert not await store.remove(held(), "w2")
        assert not await store.remove(held(session=BARE), "w1")
        assert await store.take("c1", "w1", 200.0) == held()
        assert await store.remove(held(last_used=1.0), "w1")
        assert await store.take("c1", "w1", 200.0) is None
        assert not await store.remove(held(), "w1")

    async def test_what_is_released_may_be_adopted_at_once_and_only_that(self, store: SessionStore) -> None:
        await store.put(held("c1"), "w1", 200.0)
        await store.put(held("c2"), "w2", 200.0)
        await store.release("w1")
        assert await store.adopt("w3", 100.0, 300.0, SLOTS) == [held("c1")]

    async def test_ids_are_text_whatever_they_look_like(self, store: SessionStore) -> None:
        for name in ("007", "7", "1e3", "a'b;--", "c" * 128):
            await store.put(held(name, replace(BARE, session_id=name)), "w1", 200.0)
        for name in ("007", "7", "1e3", "a'b;--", "c" * 128):
            found = await store.take(name, "w1", 200.0)
            assert found is not None
            assert found.session.session_id == name

    async def test_words_of_others_are_kept_whatever_they_hold(self, store: SessionStore) -> None:
        session = replace(BARE, avatar_id="a\0b\x1b0\x1be", voice_id="\x1b", token="'; \\0 \0\0")
        await store.put(held(session=session), "w1", 200.0)
        assert await store.take("c1", "w1", 200.0) == held(session=session)

    async def test_many_at_once(self, store: SessionStore) -> None:
        async def life(n: int) -> bool:
            mine = held(f"c{n}", replace(BARE, session_id=f"s{n}"))
            await store.put(mine, "w1", 200.0)
            await store.adopt("w2", 100.0, 300.0, SLOTS)
            await store.renew({f"c{n}": mine}, "w1", 250.0)
            return await store.take(f"c{n}", "w1", 200.0) == mine and await store.remove(mine, "w1")

        assert all(await asyncio.gather(*(life(n) for n in range(40))))
        assert await store.adopt("w3", 1000.0, 2000.0, SLOTS) == []

    async def test_a_caller_that_is_cancelled_leaves_it_usable(self, store: SessionStore) -> None:
        tasks = [asyncio.create_task(store.put(held(f"c{n}"), "w1", 200.0)) for n in range(20)]
        for rounds, task in enumerate(tasks):
            for _ in range(rounds):
                await asyncio.sleep(0)
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await store.put(held("after"), "w1", 200.0)
        assert await store.take("after", "w1", 200.0) == held("after")

    async def test_two_hundred_that_begin_at_once_take_few_transactions(
        self, store: SessionStore, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert isinstance(store, SqlSessions)
        backend, commits = store._database._backend, 0
        write = backend.write

        async def counted(work: Any) -> Any:
            nonlocal commits
            commits += 1
            return await write(work)

        monkeypatch.setattr(backend, "write", counted)

        async def begin(n: int) -> Held | None:
            assert await store.take(f"c{n}", "w1", 200.0) is None
            await store.put(held(f"c{n}"), "w1", 200.0)
            return await store.take(f"c{n}", "w1", 300.0)

        begun = await asyncio.gather(*(begin(n) for n in range(200)))
        assert begun == [held(f"c{n}") for n in range(200)]
        assert commits < 20, "for 600 writes"

    async def test_what_cannot_be_written_spoils_nothing_beside_it(self, store: SessionStore) -> None:
        nameless = held("nameless", replace(BARE, session_id=None))  # type: ignore[arg-type]
        puts = [store.put(one, "w1", 200.0) for one in (held("c1"), nameless, held("c2"))]
        done = await asyncio.gather(*puts, return_exceptions=True)
        assert [type(one).__name__ for one in done] == ["bool", "IntegrityError", "bool"]
        assert await store.take("c1", "w1", 200.0) == held("c1")
        assert await store.take("c2", "w1", 200.0) == held("c2")

    async def test_it_keeps_its_identity(self, store: SessionStore) -> None:
        assert await store.identity() == await store.identity() != ""


class TestShared:
    async def test_what_one_worker_puts_another_takes(self, workers: tuple[SessionStore, SessionStore]) -> None:
        one, two = workers
        await one.put(held(), "w1", 200.0)
        assert await two.take("c1", "w2", 300.0) == held()
        assert await one.renew({"c1": held()}, "w1", 300.0) == {"c1"}

    async def test_two_adopt_each_session_once(self, workers: tuple[SessionStore, SessionStore]) -> None:
        for n in range(30):
            await workers[0].put(held(f"c{n}"), "dead", 100.0)
        adopted = await asyncio.gather(
            *(store.adopt(f"w{n}", 200.0, 300.0, SLOTS) for n, store in enumerate(workers * 3))
        )
        assert sorted(one.conversation_id for some in adopted for one in some) == sorted(f"c{n}" for n in range(30))

    async def test_both_write_at_the_same_time(self, workers: tuple[SessionStore, SessionStore]) -> None:
        await asyncio.gather(
            *(store.put(held(f"c{n}-{i}"), f"w{i}", 100.0) for i, store in enumerate(workers) for n in range(50))
        )
        assert len(await workers[0].adopt("w3", 200.0, 300.0, SLOTS)) == 100

    async def test_a_fleet_may_start_all_at_once(self, shared_url: str) -> None:
        stores = await asyncio.gather(*(OpenedSessions.open(shared_url) for _ in range(16)))
        assert len({await store.identity() for store in stores}) == 1
        for store in stores:
            await store.close()

    async def test_they_share_an_identity(self, workers: tuple[SessionStore, SessionStore]) -> None:
        one, two = workers
        assert await one.identity() == await two.identity()

    async def test_another_file_has_another(self, workers: tuple[SessionStore, SessionStore], tmp_path: Path) -> None:
        other = await OpenedSessions.open(f"sqlite:///{tmp_path}/other.db")
        assert await other.identity() != await workers[0].identity()
        await other.close()


class TestFile:
    async def test_it_outlives_the_worker(self, tmp_path: Path) -> None:
        url = f"sqlite:///{tmp_path}/store.db"
        before = await OpenedSessions.open(url)
        await before.put(held(), "w1", 200.0)
        identity = await before.identity()
        await before.close()
        after = await OpenedSessions.open(url)
        assert await after.take("c1", "w2", 300.0) == held()
        assert await after.identity() == identity
        await after.close()

    async def test_only_its_owner_may_read_it(self, tmp_path: Path) -> None:
        one = await OpenedSessions.open(f"sqlite:///{tmp_path}/store.db")
        await one.put(held(), "w1", 200.0)
        modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
        await one.close()
        assert "store.db" in modes
        assert set(modes.values()) == {0o600}, modes

    @pytest.mark.parametrize("name", ["no/such/folder/store.db", ""])
    async def test_a_place_that_cannot_be_used(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(ConfigurationError, match="STORE_URL"):
            await OpenedSessions.open(f"sqlite:///{tmp_path}/{name}")

    async def test_a_file_that_is_something_else(self, tmp_path: Path) -> None:
        (tmp_path / "store.db").write_text("a letter to a friend " * 100)
        with pytest.raises(ConfigurationError, match="STORE_URL"):
            await OpenedSessions.open(f"sqlite:///{tmp_path}/store.db")

    async def test_a_file_of_a_newer_version(self, tmp_path: Path) -> None:
        url = f"sqlite:///{tmp_path}/store.db"
        await (await OpenedSessions.open(url)).close()
        with closing(sqlite3.connect(tmp_path / "store.db")) as connection:
            connection.execute("UPDATE facts SET value = '99' WHERE name = 'schema_version'")
            connection.commit()
        with pytest.raises(ConfigurationError, match="schema 99"):
            await OpenedSessions.open(url)

    async def test_an_error_tells_no_secret(self, tmp_path: Path) -> None:
        one = await OpenedSessions.open(f"sqlite:///{tmp_path}/store.db")
        with closing(sqlite3.connect(tmp_path / "store.db")) as connection:
            connection.execute("DROP TABLE sessions")
        with pytest.raises(Exception, match="no such table") as raised:
            await one.put(held(), "w1", 200.0)
        assert "secret-token" not in f"{raised.value} {raised.value!r}"
        await one.close()


async def test_memory_is_not_shared_but_called_the_same() -> None:
    one, two = await OpenedSessions.open("sqlite://"), await OpenedSessions.open("sqlite://")
    await one.put(held(), "w1", 200.0)
    assert await two.take("c1", "w1", 200.0) is None
    assert await one.identity() == await two.identity() == "memory"
    await one.close()
    await two.close()


def slots(limit: int = 0, **fields: float) -> Slots:
    return Slots(limit, **fields)


async def claimed(
    store: SessionStore, conversation_id: str, now: float = 100.0, limit: int = 0, by: str = "w1"
) -> object:
    return await store.claim(conversation_id, by, now, now + 6, slots(limit))


class TestClaims:
    """Before a session is created its row is claimed; what is cut in between is a ghost for a while."""

    async def test_one_claims_the_other_waits_and_finds_what_was_made(self, store: SessionStore) -> None:
        assert await claimed(store, "c1") is None
        assert await claimed(store, "c1", by="w2") is Refusal.BUSY
        assert await store.take("c1", "w2", 200.0) is None, "there is none yet"
        await store.put(held(), "w1", 200.0)
        assert await claimed(store, "c1", by="w2") == held()
        assert await store.renew({"c1": held()}, "w1", 300.0) == {"c1"}, "it is the other's now"

    async def test_ten_at_once_one_creates(self, store: SessionStore) -> None:
        found = await asyncio.gather(*(claimed(store, "c1", by=f"w{n}") for n in range(10)))
        assert sorted(map(str, found)) == ["None", *["busy"] * 9]

    async def test_a_claim_is_renewed_while_the_api_is_called(self, store: SessionStore) -> None:
        await claimed(store, "c1")
        under_way = Held("c1", Session("", ""), 0.0)
        assert await store.renew({"c1": under_way}, "w1", 300.0) == set()
        assert await claimed(store, "c1", now=299.0, by="w2") is Refusal.BUSY

    async def test_a_claim_whose_worker_died_is_another_s_and_its_ghost_keeps_a_slot(self, store: SessionStore) -> None:
        await claimed(store, "c1", limit=1)
        assert await claimed(store, "c1", now=107.0, limit=1, by="w2") is Refusal.FULL
        assert await claimed(store, "c1", now=159.0, limit=1, by="w2") is Refusal.FULL
        assert await claimed(store, "c1", now=161.0, limit=1, by="w2") is None

    async def test_a_worker_that_starts_again_under_its_name_needs_no_patience(self, store: SessionStore) -> None:
        await claimed(store, "c1", limit=2)
        assert await claimed(store, "c1", now=101.0, limit=2) is None
        assert await claimed(store, "c2", now=102.0, limit=2) is Refusal.FULL, "there may be two"

    async def test_adoption_makes_a_ghost_of_it(self, store: SessionStore) -> None:
        await claimed(store, "c1", limit=1)
        assert await store.adopt("w2", 110.0, 116.0, SLOTS) == []
        assert await claimed(store, "c2", now=111.0, limit=1) is Refusal.FULL
        assert await claimed(store, "c2", now=161.0, limit=1) is None

    @pytest.mark.parametrize("ghost", [False, True])
    async def test_what_was_not_created_is_given_back(self, store: SessionStore, ghost: bool) -> None:
        await claimed(store, "c1", limit=2)
        await store.unclaim("c1", "w1", 100.0, slots(2), ghost=ghost)
        assert await claimed(store, "c2", now=103.0, limit=2) is None
        assert await claimed(store, "c3", now=103.0, limit=2) is (Refusal.FULL if ghost else None)

    async def test_the_ghost_is_as_old_as_the_claim_however_long_it_stood_in_line(self, store: SessionStore) -> None:
        await store.put(held("taken"), "w1", 200.0)
        await claimed(store, "c1", now=100.0, limit=1)
        await store.remove(held("taken"), "w1")
        assert await claimed(store, "c1", now=101.9, limit=1) is None
        await store.adopt("w2", 110.0, 116.0, SLOTS)
        assert await claimed(store, "c2", now=161.5, limit=1) is Refusal.FULL
        assert await claimed(store, "c2", now=162.0, limit=1) is None

    async def test_what_comes_too_late_does_not_replace_another_s(self, store: SessionStore) -> None:
        await claimed(store, "c1")
        assert await claimed(store, "c1", now=107.0, by="w2") is None
        assert not await store.put(held(session=BARE), "w1", 200.0), "the other is creating one"
        assert await store.put(held(), "w2", 200.0)
        assert not await store.put(held(session=BARE), "w1", 200.0)
        assert await store.put(replace(held(), last_used=150.0), "w1", 200.0), "the same session"
        assert await store.put(held(session=replace(FULL, session_id="theirs")), "w2", 200.0), "it was attached"
        assert (await store.take("c1", "w3", 200.0)) == held(session=replace(FULL, session_id="theirs"))

    async def test_a_place_in_the_line_or_a_lost_one_is_no_session(self, store: SessionStore) -> None:
        await claimed(store, "c1", limit=1, by="w2")
        await store.put(held("c2", BARE), "w2", 200.0)
        await claimed(store, "c3", limit=2, by="w2")
        await store.lose(held("c2", BARE), "w2")
        for name in ("c2", "c3"):
            assert await store.put(held(name, replace(BARE, session_id="new")), "w1", 200.0)

    async def test_only_one_s_own_claim_is_given_back(self, store: SessionStore) -> None:
        await claimed(store, "c1")
        await store.unclaim("c1", "w2", 100.0, SLOTS, ghost=True)
        assert await claimed(store, "c1", by="w2") is Refusal.BUSY


class TestSlots:
    async def test_all_states_that_may_be_alive_count(self, store: SessionStore) -> None:
        await store.put(held("ready"), "w1", 200.0)
        await store.put(held("ending"), "w1", 200.0)
        await store.retire(held("ending"), "w1", EndReason.IDLE)
        await store.put(held("lost"), "w1", 200.0)
        assert await store.lose(held("lost"), "w1")
        await claimed(store, "creating")
        assert await claimed(store, "c1", limit=3) is Refusal.FULL
        assert await claimed(store, "c1", limit=4) is None

    @pytest.mark.parametrize("limit", [1, 5])
    async def test_never_more_whoever_asks(self, store: SessionStore, limit: int) -> None:
        asked = (claimed(store, f"c{n}", limit=limit, by=f"w{n % 3}") for n in range(20))
        assert (await asyncio.gather(*asked)).count(None) == limit

    async def test_in_order_of_arrival(self, store: SessionStore) -> None:
        await store.put(held("taken"), "w1", 200.0)
        for n in range(3):
            assert await claimed(store, f"c{n}", now=100.0 + n / 10, limit=1) is Refusal.FULL
        await store.remove(held("taken"), "w1")
        assert await claimed(store, "c2", now=101.0, limit=1) is Refusal.FULL
        assert await claimed(store, "c1", now=101.0, limit=1) is Refusal.FULL
        assert await claimed(store, "c0", now=101.0, limit=1) is None

    async def test_whatever_the_clocks_of_the_workers_say(self, store: SessionStore) -> None:
        await store.put(held("taken"), "w1", 200.0)
        assert await claimed(store, "c0", now=101.0, limit=1, by="ahead") is Refusal.FULL
        assert await claimed(store, "c1", now=100.0, limit=1, by="behind") is Refusal.FULL
        await store.remove(held("taken"), "w1")
        assert await claimed(store, "c1", now=100.5, limit=1, by="behind") is Refusal.FULL
        assert await claimed(store, "c0", now=101.5, limit=1, by="ahead") is None

    async def test_a_create_that_was_not_taken_goes_back_to_the_place_it_had(self, store: SessionStore) -> None:
        await store.put(held("taken"), "w1", 200.0)
        for n in range(2):
            assert await claimed(store, f"c{n}", now=100.0 + n, limit=1) is Refusal.FULL
        await store.remove(held("taken"), "w1")
        assert await claimed(store, "c0", now=101.5, limit=1) is None
        await store.unclaim("c0", "w1", 102.0, slots(1), ghost=False)
        assert await claimed(store, "c1", now=102.5, limit=1) is Refusal.FULL
        assert await claimed(store, "c0", now=102.5, limit=1) is None

    async def test_a_place_is_kept_for_whoever_says_so(self, store: SessionStore) -> None:
        await claimed(store, "c0", limit=1)
        await store.unclaim("c0", "w1", 100.0, slots(1), ghost=False)
        waiting = Held("c0", Session("", ""), 0.0)
        assert await store.renew({"c0": waiting}, "w1", 130.0) == set()
        assert await claimed(store, "c1", now=129.0, limit=1) is Refusal.FULL
        await store.leave("c0", "w2")
        assert await claimed(store, "c1", now=129.0, limit=1) is Refusal.FULL, "it is not theirs to give up"
        await store.leave("c0", "w1")
        assert await claimed(store, "c1", now=129.0, limit=1) is None

    async def test_nobody_leaves_the_line_with_a_session(self, store: SessionStore) -> None:
        await store.put(held(), "w1", 200.0)
        await claimed(store, "c2")
        for name in ("c1", "c2"):
            await store.leave(name, "w1")
        assert await claimed(store, "c3", limit=2) is Refusal.FULL

    async def test_who_has_left_the_line_holds_nobody_up(self, store: SessionStore) -> None:
        await store.put(held("taken"), "w1", 200.0)
        await claimed(store, "c0", limit=1)
        await store.remove(held("taken"), "w1")
        assert await claimed(store, "c1", now=101.0, limit=1) is Refusal.FULL
        assert await claimed(store, "c1", now=102.5, limit=1) is None

    async def test_one_that_could_not_be_ended_keeps_its_slot_for_a_while(self, store: SessionStore) -> None:
        await store.put(held(), "w1", 200.0)
        assert await store.remove(held(), "w1", 160.0)
        assert await claimed(store, "c2", now=159.0, limit=1) is Refusal.FULL
        assert await claimed(store, "c2", now=160.5, limit=1) is None


class TestNoRoomAtTheApi:
    """It has refused to create one (429): whoever wants one stands in line, whether or not we have a limit."""

    async def refuse(self, store: SessionStore, name: str, now: float = 100.0) -> None:
        await store.unclaim(name, "w1", now, SLOTS, ghost=False, full=True)

    async def line(self, store: SessionStore, *names: str, now: float = 100.0) -> None:
        """The first was refused; the others have come later."""
        assert await claimed(store, names[0], now=now) is None
        await self.refuse(store, names[0], now)
        for name in names[1:]:
            assert await claimed(store, name, now=now, by="w2") is Refusal.QUEUED

    async def test_before_that_all_go_at_once(self, store: SessionStore) -> None:
        found = await asyncio.gather(*(claimed(store, f"c{n}") for n in range(20)))
        assert found == [None] * 20

    async def test_as_long_as_it_has_none_only_the_first_asks(self, store: SessionStore) -> None:
        await self.line(store, "c0", "c1", "c2")
        for now in (101.0, 102.0):
            assert await claimed(store, "c0", now=now) is None
            for later in ("c1", "c2"):
                assert await claimed(store, later, now=now) is Refusal.QUEUED, "the first is trying"
            await self.refuse(store, "c0", now)

    async def test_once_it_has_some_the_next_few_ask_in_order_of_arrival(self, store: SessionStore) -> None:
        await self.line(store, *(f"c{n}" for n in range(7)))
        assert await claimed(store, "c0", now=101.0) is None
        await store.put(held("c0"), "w1", 200.0)
        for number in (1, 2, 3):
            for later in range(number + 1, 7):
                assert await claimed(store, f"c{later}", now=101.0) is Refusal.QUEUED
            assert await claimed(store, f"c{number}", now=101.0) is None
        assert await claimed(store, "c4", now=101.0) is Refusal.QUEUED
        await self.refuse(store, "c2", 101.0)
        await store.put(held("c1"), "w1", 200.0)
        assert await claimed(store, "c4", now=101.0) is Refusal.QUEUED, "it has had no room for the second"
        assert await claimed(store, "c2", now=101.0) is None
        await store.put(held("c2"), "w1", 200.0)
        await store.put(held("c3"), "w1", 200.0)
        assert [await claimed(store, f"c{n}", now=101.0) for n in range(4, 9)] == [None] * 5, "there is no line"

    async def test_a_stray_refusal_slows_a_fleet_for_a_moment_only(self, store: SessionStore) -> None:
        """Three come each second, a create takes 0.7 s; who stands in line asks every 0.5 s, for 10 s at most."""
        coming = [(100.0 + n / 3, n, f"c{n}", "comes") for n in range(60)]
        born = {name: now for now, _, name, _ in coming}
        gone: list[str] = []
        while coming:
            now, number, name, what = heapq.heappop(coming)
            if what == "created":
                await store.put(held(name), "w1", 1000.0)
            elif now > born[name] + 10:
                gone.append(name)
            elif await claimed(store, name, now=now) is None and (number or now > 101):
                heapq.heappush(coming, (now + 0.7, number, name, "created"))
            else:
                if not number and now <= 101:
                    await self.refuse(store, name, now)
                heapq.heappush(coming, (now + 0.5, number, name, "asks"))
        assert gone == []

    async def test_a_worker_that_cannot_ask_holds_nobody_up(self, store: SessionStore) -> None:
        await self.line(store, "c0", "c1")
        await store.pardon("w2")
        assert await claimed(store, "c1", now=101.0, by="w2") is Refusal.QUEUED
        await store.pardon("w1")
        assert await claimed(store, "c1", now=101.0, by="w2") is None

    async def test_those_that_were_refused_at_the_same_time_too(self, store: SessionStore) -> None:
        names = ["c0", "c1", "c2"]
        for name in names:
            assert await claimed(store, name) is None
        for name in reversed(names):
            await self.refuse(store, name)
        found = [await claimed(store, name, now=101.0) for name in reversed(names)]
        assert found == [Refusal.QUEUED, Refusal.QUEUED, None]

    async def test_whatever_the_clocks_of_the_workers_say(self, store: SessionStore) -> None:
        assert await claimed(store, "c0", now=101.0) is None
        await self.refuse(store, "c0", 101.0)
        assert await claimed(store, "c1", now=100.0, by="behind") is Refusal.QUEUED
        assert await claimed(store, "c0", now=101.5) is None
        assert await claimed(store, "c1", now=100.5, by="behind") is Refusal.QUEUED

    async def test_one_that_is_refused_again_keeps_its_place(self, store: SessionStore) -> None:
        await self.line(store, "c0", "c1")
        for now in (101.0, 102.0, 103.0):
            assert await claimed(store, "c0", now=now) is None
            await self.refuse(store, "c0", now)
            assert await claimed(store, "c1", now=now) is Refusal.QUEUED

    @pytest.mark.parametrize("ghost", [False, True])
    async def test_any_other_trouble_is_one_s_own(self, store: SessionStore, ghost: bool) -> None:
        await self.line(store, "c0", "c1")
        assert await claimed(store, "c0", now=101.0) is None
        await store.unclaim("c0", "w1", 101.0, SLOTS, ghost=ghost)
        assert await claimed(store, "c1", now=101.0) is None

    async def test_whoever_has_left_holds_nobody_up(self, store: SessionStore) -> None:
        await self.line(store, "c0", "c1", "c2")
        await store.leave("c0", "w1")
        assert await claimed(store, "c2", now=101.0, by="w2") is Refusal.QUEUED
        assert await claimed(store, "c1", now=101.0, by="w2") is None

    async def test_nor_one_whose_worker_died_in_the_line(self, store: SessionStore) -> None:
        await self.line(store, "c0", "c1")
        assert await claimed(store, "c1", now=101.9) is Refusal.QUEUED
        assert await claimed(store, "c1", now=102.1) is None

    async def test_nor_one_whose_worker_died_trying(self, store: SessionStore) -> None:
        await self.line(store, "c0", "c1")
        assert await claimed(store, "c0", now=101.0) is None
        assert await claimed(store, "c1", now=106.9) is Refusal.QUEUED
        assert await claimed(store, "c1", now=107.1) is None

    async def test_a_place_is_kept_for_whoever_says_so(self, store: SessionStore) -> None:
        await self.line(store, "c0", "c1")
        assert await store.renew({"c0": Held("c0", Session("", ""), 0.0)}, "w1", 130.0) == set()
        assert await claimed(store, "c1", now=129.0, by="w2") is Refusal.QUEUED
        assert await claimed(store, "c0", now=129.0) is None

    async def test_another_worker_that_serves_it_now_has_its_place(self, store: SessionStore) -> None:
        await self.line(store, "c0", "c1")
        assert await claimed(store, "c0", now=101.0, by="w3") is None
        assert await claimed(store, "c1", now=101.0, by="w2") is Refusal.QUEUED

    async def test_a_limit_counts_as_well(self, store: SessionStore) -> None:
        await store.put(held("taken"), "w1", 200.0)
        await self.line(store, "c0", "c1")
        assert await claimed(store, "c0", now=101.0, limit=1) is Refusal.FULL
        assert await claimed(store, "c1", now=101.0, limit=5, by="w2") is Refusal.QUEUED
        assert await claimed(store, "c0", now=101.0, limit=5) is None


class TestPaused:
    """The API has asked this worker to leave it alone: a claim only takes a place in the line."""

    async def claimed(self, store: SessionStore, name: str, now: float = 100.0) -> object:
        return await store.claim(name, "w1", now, now + 6, SLOTS, paused=True)

    async def test_it_may_not_create(self, store: SessionStore) -> None:
        assert await self.claimed(store, "c0") is Refusal.QUEUED
        assert await self.claimed(store, "c0", now=101.0) is Refusal.QUEUED
        assert await claimed(store, "c0", now=102.0) is None

    async def test_its_place_is_the_one_it_took(self, store: SessionStore) -> None:
        await claimed(store, "c0")
        await store.unclaim("c0", "w1", 100.0, SLOTS, ghost=False, full=True)
        assert await self.claimed(store, "c1") is Refusal.QUEUED
        assert await claimed(store, "c2", by="w2") is Refusal.QUEUED
        await store.leave("c0", "w1")
        assert await claimed(store, "c2", now=101.0, by="w2") is Refusal.QUEUED
        assert await claimed(store, "c1", now=101.0) is None

    async def test_where_the_api_had_room_for_all_it_holds_nobody_up(self, store: SessionStore) -> None:
        assert await self.claimed(store, "c0") is Refusal.QUEUED
        assert await claimed(store, "c1", by="w2") is None

    async def test_a_session_that_there_is_is_told(self, store: SessionStore) -> None:
        await store.put(held(), "w2", 200.0)
        assert await self.claimed(store, "c1") == held()


class TestEnding:
    async def test_only_a_ready_one_of_one_s_own_is_retired(self, store: SessionStore) -> None:
        await store.put(held(), "w1", 200.0)
        assert not await store.retire(held(), "w2", EndReason.IDLE)
        assert not await store.retire(held(session=BARE), "w1", EndReason.IDLE)
        assert await store.retire(held(), "w1", EndReason.IDLE)
        assert not await store.retire(held(), "w1", EndReason.REQUESTED)
        found = await store.take("c1", "w2", 300.0)
        assert found is not None
        assert (found.state, found.reason) == (HeldState.ENDING, EndReason.IDLE)
        assert await claimed(store, "c1", by="w2") is Refusal.BUSY, "one at a time"

    async def test_one_that_is_being_ended_is_adopted_to_be_ended(self, store: SessionStore) -> None:
        await store.put(held(), "w1", 200.0)
        await store.retire(held(), "w1", EndReason.IDLE)
        (found,) = await store.adopt("w2", 201.0, 300.0, SLOTS)
        assert (found.state, found.reason) == (HeldState.ENDING, EndReason.IDLE)
        assert await store.remove(found, "w2")

    async def test_a_lost_one_is_remembered_without_its_token(self, store: SessionStore) -> None:
        await store.put(held(), "w1", 200.0)
        assert not await store.lose(held(), "w2")
        assert await store.lose(held(), "w1")
        found = await store.take("c1", "w2", 300.0)
        assert found is not None
        assert (found.state, found.session.avatar_id, found.session.voice_id) == (HeldState.LOST, "ann", "v1")
        assert (found.session.token, found.session.viewer) == ("", None)
        assert await store.adopt("w3", 1000.0, 2000.0, SLOTS) == [], "there is nothing to keep alive"
        assert await claimed(store, "c1") is None


class TestIntents:
    """No call that was intended meets a session that ends, and none is intended on one that does."""

    async def intend(self, database: Database, clock: FakeClock, session_id: str | None) -> Grant:
        ledger = SqlLedger(database, clock)
        epoch = await ledger.raise_epoch(0)
        memory = await ledger.recall("c1")
        memory.update(busy_until=clock())
        return await ledger.intend("c1", memory.take_changes(), 0, epoch, session_id)

    async def test_a_call_demands_its_session_to_be_ready(self) -> None:
        database, clock = await Database.open("sqlite://"), FakeClock(100.0)
        store = SqlSessions(database)
        assert await self.intend(database, clock, "s1") is Grant.OUTDATED
        await store.put(held(), "w1", 200.0)
        assert await self.intend(database, clock, "other") is Grant.OUTDATED
        assert await self.intend(database, clock, "s1") is Grant.GRANTED
        await store.retire(held(), "w1", EndReason.IDLE)
        assert await self.intend(database, clock, "s1") is Grant.OUTDATED
        assert await self.intend(database, clock, None) is Grant.GRANTED
        await database.close()

    async def test_one_that_was_used_is_not_idle(self) -> None:
        database, clock = await Database.open("sqlite://"), FakeClock(100.0)
        store = SqlSessions(database)
        await store.put(held(), "w1", 200.0)
        await self.intend(database, clock, "s1")
        assert not await store.retire(held(), "w1", EndReason.IDLE, unused_since=99.0)
        assert await store.retire(held(), "w1", EndReason.IDLE, unused_since=100.0)
        await database.close()
