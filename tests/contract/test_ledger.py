"""`ports.Ledger`: what every ledger must do. Two on one database are two workers."""

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import pytest
import sqlalchemy as sa

from schemas.events import Event, SpeechAccepted, SpeechDiscarded, TurnCompleted, TurnFailed, TurnStarted
from tests.support.conversation import speak
from tests.support.fakes import FakeClock, until
from worker.core.memory import NAMED, Attempt, Changes, Ended, Memory, SentPart, State, Turn, TurnState
from worker.core.shaping.shaper import NEW_TURN
from worker.ports import Grant, Ledger
from worker.stores.backend import Unreachable
from worker.stores.database import Database
from worker.stores.ledger import PRUNE_ROWS, SqlLedger

ATTEMPT = Attempt(
    "t1",
    'Grüß "Gott" 😀\n',
    is_final=True,
    parts=(SentPart("m1", 7, 12, last=True), SentPart("m2", 0, 3, last=False)),
    begun=1_700_000_000.123456,
    count=3,
)
STATE = State(
    number=7,
    attempt=ATTEMPT,
    busy_until=1_700_000_002.5,
    spoken={"m2": 3},
    playing_until=1_700_000_009.25,
    heard_last=frozenset({"t1", "t0"}),
    silenced={"i1": {"t8": 2, "t9": 0}},
    doubtful=frozenset({"m0", "m9"}),
    untold=(Event("c1", TurnStarted(turn_id="t1"), "m1\n0", "00-trace-01"),),
)
TURNS = {
    "t1": Turn(TurnState.OPEN, 2, 40, 1_700_000_000.5),
    "t2": Turn(TurnState.INTERRUPTED, 0, 0, 1_700_000_001.5),
    "t3": Turn(TurnState.CLOSED, 1, 5, 1.0),
    "t4": Turn(TurnState.FAILED, 1, 5, 1.0),
    "t5": Turn(TurnState.EXPIRED, 1, 5, 1.0),
}


def accepted(*message_ids: str, conversation_id: str = "c1", key: str = "m1\n0") -> Event:
    data = SpeechAccepted(
        turn_id="t1",
        command_ids=message_ids,
        text="Grüß 😀",
        is_final=True,
        attempts=2,
        latency_ms=9,
        possible_duplicate=True,
    )
    return Event(conversation_id, data, key, "00-trace-01")


def ended(event: Event | None = None, **fields: Any) -> Ended:
    return Ended(b"\x00\xfffinger", event or accepted("m1"), 100.0, **fields)


def changes(
    version: int = 0,
    state: State | None = None,
    turns: dict[str, Turn] | None = None,
    ended: dict[str, Ended] | None = None,
    before: State | None = None,
) -> Changes:
    base, made = _version(version), _version(version + 1)
    return Changes(base, made, before or State(), state or State(), turns or {}, ended or {})


def _version(number: int) -> str:
    return str(number or "")


def attempting(version: int, number: int) -> Changes:
    return changes(version, replace(STATE, number=number))


def outcome(version: int, number: int, **fields: Any) -> Changes:
    return changes(version, State(number=number), before=replace(STATE, number=number), **fields)


class Open(Protocol):
    """How a test gets a worker's ledger; all of one test share a database."""

    def __call__(self) -> Awaitable[SqlLedger]: ...


@pytest.fixture
async def clock() -> FakeClock:
    return FakeClock(1000.0)


@pytest.fixture
async def open_(store_url: str, clock: FakeClock) -> AsyncIterator[Open]:
    async with AsyncExitStack() as stack:
        shared: list[Database] = []

        async def database() -> Database:
            if store_url == "sqlite://" and shared:
                return shared[0]
            one = await Database.open(store_url)
            stack.push_async_callback(one.close)
            shared.append(one)
            return one

        async def open_() -> SqlLedger:
            return SqlLedger(await database(), clock)

        yield open_


@pytest.fixture
async def ledger(open_: Open) -> Ledger:
    return await open_()


@pytest.fixture
async def other(open_: Open, ledger: Ledger) -> Ledger:
    """Another worker's."""
    return await open_()


def contents(memory: Memory) -> tuple[State, dict[str, Turn], int]:
    return memory.state, memory.turns, int(memory.version.removeprefix("over ") or 0)


class TestRecall:
    async def test_nothing_is_known_of_a_new_conversation(self, ledger: Ledger) -> None:
        memory = await ledger.recall("c1")
        assert contents(memory) == (State(), {}, 0)
        assert memory.version == ""
        assert await ledger.known("c1", ["m1"]) == {}

    async def test_every_field_comes_back_as_it_was(self, ledger: Ledger, other: Ledger) -> None:
        assert await ledger.record("c1", changes(0, STATE, TURNS), outcome=False) is Grant.GRANTED
        for one in (ledger, other):
            memory = await one.recall("c1")
            assert contents(memory) == (STATE, TURNS, 1)
            assert memory.version
            assert memory.take_changes() is None

    async def test_conversations_are_apart(self, ledger: Ledger) -> None:
        await ledger.record("c1", changes(0, STATE, TURNS, {"m1": ended()}), outcome=False)
        assert contents(await ledger.recall("c2")) == (State(), {}, 0)
        assert await ledger.known("c2", ["m1"]) == {}

    async def test_what_is_not_mentioned_stays_and_what_is_is_replaced(self, ledger: Ledger) -> None:
        await ledger.record("c1", changes(0, STATE, TURNS), outcome=False)
        closed = Turn(TurnState.CLOSED, 3, 50, 7.0)
        await ledger.record("c1", changes(1, State(number=8), {"t1": closed}), outcome=False)
        assert contents(await ledger.recall("c1")) == (State(number=8), TURNS | {"t1": closed}, 2)

    async def test_it_is_read_after_all_that_was_asked_for_before(self, ledger: Ledger) -> None:
        asked = [ledger.record("c1", changes(n, State(number=n)), outcome=False) for n in range(10)]
        assert contents(await ledger.recall("c1")) == (State(number=9), {}, 10)
        await asyncio.gather(*asked)

    async def test_a_memory_goes_on_where_it_was(self, ledger: Ledger) -> None:
        memory = await ledger.recall("c1")
        for n in range(3):
            memory.turn(f"t{n}", 1.0).pieces = n
            memory.update(number=n)
            assert await ledger.record("c1", taken(memory), outcome=False) is Grant.GRANTED
        again = await ledger.recall("c1")
        assert (again.state, again.turns, again.version) == (memory.state, memory.turns, memory.version)


class TestUnclosed:
    async def test_old_turns_that_are_open_with_where_they_come_from(self, ledger: Ledger, other: Ledger) -> None:
        old, young = Turn(touched=10.0), Turn(touched=20.0)
        closed = Turn(TurnState.CLOSED, touched=10.0)
        for conversation_id, partition, left in (
            ("old", 3, {"t1": old, "t2": old, "t3": young}),
            ("young", 3, {"t1": young}),
            ("closed", 3, {"t1": closed}),
            ("nowhere", None, {"t1": old}),
        ):
            written = changes(0, State(partition=partition), left)
            assert await ledger.record(conversation_id, written, outcome=False) is Grant.GRANTED
        assert await other.unclosed(10.0) == []
        assert await other.unclosed(15.0) == [(3, "old")]
        assert sorted(await other.unclosed(30.0)) == [(3, "old"), (3, "young")]
        await ledger.record("old", changes(1, State(partition=5), {"t1": closed}), outcome=False)
        assert await other.unclosed(15.0) == [(5, "old")]
        await ledger.record("old", changes(2, State(partition=5), {"t2": closed}), outcome=False)
        assert await other.unclosed(15.0) == []

    async def test_no_other_turn_is_looked_at(self, open_: Open, request: pytest.FixtureRequest) -> None:
        """It is asked every second, by every worker."""
        database, asked = (await open_())._database, []

        def note(_c: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
            if "turns.touched <" in statement:
                asked.append((statement, parameters))

        request.addfinalizer(lambda: sa.event.remove(sa.Engine, "after_cursor_execute", note))
        sa.event.listen(sa.Engine, "after_cursor_execute", note)
        await SqlLedger(database, FakeClock()).unclosed(15.0)
        ((statement, parameters),) = asked

        def plan(connection: sa.Connection) -> str:
            if connection.dialect.name == "sqlite":
                rows = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters)
            else:
                connection.exec_driver_sql("SET LOCAL enable_seqscan = off")
                rows = connection.exec_driver_sql(f"EXPLAIN {statement}", parameters)
            return "\n".join(str(row) for row in rows)

        assert "ix_turns_open" in await database.read(plan)


class TestKnown:
    async def test_how_a_command_ended_with_what_went_with_it(self, ledger: Ledger, other: Ledger) -> None:
        before = Event("c1", TurnStarted(turn_id="t1"), "m1", "00-trace-01")
        completed = TurnCompleted(turn_id="t1", pieces=1, text_length=7, final_sent=True)
        after = Event("c1", completed, "t1\nm1")
        one = ended(accepted("m1", "m2"), before=(before,), after=(after, before))
        assert await ledger.record("c1", changes(ended={"m1": one, "m2": one}), outcome=False) is Grant.GRANTED
        for reader in (ledger, other):
            assert await reader.known("c1", ["m1", "m2", "m3"]) == {"m1": one, "m2": one}
            assert await reader.known("c1", ["m2"]) == {"m2": one}
            assert await reader.known("c1", []) == {}

    async def test_a_command_ends_once(self, ledger: Ledger) -> None:
        first = ended()
        discarded = SpeechDiscarded(turn_id="t1", command_ids=("m1",), reason="expired")
        second = ended(Event("c1", discarded, "m1"))
        await ledger.record("c1", changes(0, ended={"m1": first}), outcome=False)
        await ledger.record("c1", changes(1, ended={"m1": second}), outcome=False)
        assert await ledger.known("c1", ["m1"]) == {"m1": first}

    async def test_the_same_id_in_another_conversation_is_another_command(self, ledger: Ledger) -> None:
        ours, theirs = ended(), ended(accepted("m1", conversation_id="c2"))
        await ledger.record("c1", changes(ended={"m1": ours}), outcome=False)
        await ledger.record("c2", changes(ended={"m1": theirs}), outcome=False)
        assert await ledger.known("c1", ["m1"]) == {"m1": ours}
        assert await ledger.known("c2", ["m1"]) == {"m1": theirs}

    async def test_ids_are_text_whatever_they_look_like(self, ledger: Ledger) -> None:
        names = ["007", "7", "1e3", "a'b;--", "%", "ü😀", "a\nb", "a\0b", "\\xff", "c" * 255]
        those = {name: ended(accepted(name, key=name)) for name in names}
        await ledger.record("c1", changes(ended=those), outcome=False)
        assert await ledger.known("c1", names) == those

    async def test_thousands_at_once(self, ledger: Ledger) -> None:
        those = {f"m{n}": ended(accepted(f"m{n}", key=f"{n}")) for n in range(5000)}
        await ledger.record("c1", changes(ended=those), outcome=False)
        assert len(await ledger.known("c1", list(those))) == 5000

    @pytest.mark.parametrize("count", [3, NAMED + 1])
    async def test_a_memory_knows_of_which_commands_it_has_to_ask(self, ledger: Ledger, count: int) -> None:
        those = {f"m{n}": ended(accepted(f"m{n}", key=f"{n}")) for n in range(count)}
        await ledger.record("c1", changes(ended=those), outcome=False)
        memory = await ledger.recall("c1")
        named = memory.to_look_up({"m0", "m2", "new"})
        assert named == ({"m0", "m2"} if count <= NAMED else {"m0", "m2", "new"})


class TestEndedBeside:
    """What the broker gave up ends without the lane of its conversation."""

    LOST = speak("t1", "x", message_id="m9")
    FAILED = Event("c1", TurnFailed(turn_id="t1", reason="dead_lettered"), "t1\nm9")

    def beside(self) -> Ended:
        return ended(accepted("m9", key="m9"), after=(self.FAILED,))

    async def test_whoever_recalled_before_must_look_again(self, ledger: Ledger) -> None:
        await ledger.record("c1", attempting(0, 1), outcome=False)
        assert await ledger.end(self.LOST, self.beside()) == self.beside()
        assert await ledger.record("c1", outcome(1, 1), outcome=True) is Grant.GRANTED, "it is a fact"
        assert await ledger.record("c1", changes(2, State(number=1)), outcome=False) is Grant.OUTDATED
        assert (await ledger.recall("c1")).to_look_up({"m9"}) == {"m9"}

    async def test_its_turn_has_failed_and_keeps_what_was_counted(self, ledger: Ledger) -> None:
        await ledger.record(
            "c1", changes(0, replace(STATE, shapes={"t1": NEW_TURN, "t7": NEW_TURN}), TURNS), outcome=False
        )
        await ledger.end(self.LOST, self.beside())
        memory = await ledger.recall("c1")
        assert memory.turns == TURNS | {"t1": Turn(TurnState.FAILED, 2, 40, 100.0)}
        assert memory.state == replace(STATE, shapes={"t7": NEW_TURN}), "whatever is under way is not its business"

    async def test_an_outcome_that_comes_then_does_not_open_it_again(self, ledger: Ledger) -> None:
        await ledger.record("c1", attempting(0, 1), outcome=False)
        await ledger.end(self.LOST, self.beside())
        said = outcome(1, 1, turns={"t1": Turn(TurnState.CLOSED, pieces=1)}, ended={"m1": ended()})
        assert await ledger.record("c1", said, outcome=True) is Grant.GRANTED
        assert (await ledger.recall("c1")).turns["t1"] == Turn(TurnState.FAILED, 1, touched=100.0)

    async def test_where_it_was_silent_its_end_is_told_alone(self, ledger: Ledger) -> None:
        await ledger.record("c1", changes(0, turns={"t1": Turn(TurnState.INTERRUPTED)}), outcome=False)
        alone = replace(self.beside(), after=())
        assert await ledger.end(self.LOST, self.beside()) == alone
        assert await ledger.known("c1", ["m9"]) == {"m9": alone}
        assert (await ledger.recall("c1")).turns["t1"].state is TurnState.INTERRUPTED

    async def test_it_ends_once_and_is_told_so_again(self, ledger: Ledger, other: Ledger) -> None:
        await ledger.end(self.LOST, self.beside())
        version = (await ledger.recall("c1")).version
        assert await other.end(self.LOST, self.beside()) == self.beside()
        assert (await ledger.recall("c1")).version == version

    async def test_without_an_id_its_turn_fails_all_the_same(self, ledger: Ledger) -> None:
        await ledger.end(speak("t1", "x", message_id=None), self.beside())
        memory = await ledger.recall("c1")
        assert memory.turns["t1"].state is TurnState.FAILED
        assert not memory.elsewhere


class TestEpochs:
    async def test_they_rise_for_all_and_by_partition(self, ledger: Ledger, other: Ledger) -> None:
        first = await ledger.raise_epoch(0)
        assert await other.raise_epoch(0) > first
        assert await ledger.raise_epoch(1) == first

    async def test_many_raised_at_once_differ(self, ledger: Ledger, other: Ledger) -> None:
        epochs = await asyncio.gather(*(one.raise_epoch(0) for one in (ledger, other) * 10))
        assert len(set(epochs)) == 20

    async def test_an_intent_of_the_owner_is_granted_and_written(self, ledger: Ledger) -> None:
        epoch = await ledger.raise_epoch(3)
        assert await ledger.intend("c1", attempting(0, 1), 3, epoch) is Grant.GRANTED
        assert (await ledger.recall("c1")).state == replace(STATE, number=1)

    async def test_after_another_has_raised_it_none_is_and_nothing_is_written(
        self, ledger: Ledger, other: Ledger
    ) -> None:
        epoch = await ledger.raise_epoch(0)
        await other.raise_epoch(0)
        assert await ledger.intend("c1", attempting(0, 1), 0, epoch) is Grant.REFUSED
        assert await ledger.intend("c1", None, 0, epoch) is Grant.REFUSED
        assert contents(await other.recall("c1")) == (State(), {}, 0)

    async def test_an_epoch_that_was_never_raised_is_nobodys(self, ledger: Ledger) -> None:
        assert await ledger.intend("c1", None, 0, 1) is Grant.REFUSED

    async def test_another_partitions_epoch_does_not_matter(self, ledger: Ledger, other: Ledger) -> None:
        epoch = await ledger.raise_epoch(0)
        await other.raise_epoch(1)
        await other.raise_epoch(1)
        assert await ledger.intend("c1", attempting(0, 1), 0, epoch) is Grant.GRANTED

    async def test_who_has_nothing_to_write_is_granted_too(self, ledger: Ledger) -> None:
        assert await ledger.intend("c1", None, 0, await ledger.raise_epoch(0)) is Grant.GRANTED

    async def test_what_is_refused_is_so_whatever_else_is_wrong(self, ledger: Ledger, other: Ledger) -> None:
        epoch = await ledger.raise_epoch(0)
        await other.raise_epoch(0)
        await other.record("c1", changes(0), outcome=False)
        assert await ledger.intend("c1", attempting(0, 1), 0, epoch) is Grant.REFUSED


class TestOutdated:
    async def test_when_another_has_written_nothing_is(self, ledger: Ledger, other: Ledger) -> None:
        epoch = await ledger.raise_epoch(0)
        await other.record("c1", changes(0, State(number=5), TURNS), outcome=False)
        mine = changes(0, STATE, {"t1": Turn(touched=9.0)}, {"m1": ended()})
        assert await ledger.intend("c1", mine, 0, epoch) is Grant.OUTDATED
        assert await ledger.record("c1", mine, outcome=False) is Grant.OUTDATED
        assert contents(await ledger.recall("c1")) == (State(number=5), TURNS, 1)
        assert await ledger.known("c1", ["m1"]) == {}

    async def test_what_follows_what_was_not_written_is_not_written_either(self, ledger: Ledger, other: Ledger) -> None:
        epoch = await ledger.raise_epoch(0)
        await other.record("c1", changes(0), outcome=False)
        memory = Memory(writer="w1")
        asked: list[Awaitable[Grant]] = []
        for n in range(3):
            memory.update(number=n)
            asked.append(ledger.record("c1", taken(memory), outcome=False))
        memory.update(number=9)
        asked.append(ledger.intend("c1", taken(memory), 0, epoch))
        assert await asyncio.gather(*asked) == [Grant.OUTDATED] * 4
        assert (await ledger.recall("c1")).state == State()

    async def test_another_conversation_does_not_matter(self, ledger: Ledger, other: Ledger) -> None:
        await other.record("c2", changes(0), outcome=False)
        assert await ledger.record("c1", changes(0), outcome=False) is Grant.GRANTED


class TestOutcomes:
    @pytest.fixture
    async def begun(self, ledger: Ledger) -> None:
        """The intent of a first attempt is written."""
        epoch = await ledger.raise_epoch(0)
        assert await ledger.intend("c1", attempting(0, 1), 0, epoch) is Grant.GRANTED

    @pytest.mark.usefixtures("begun")
    async def test_it_is_written_though_the_partition_is_anothers(self, ledger: Ledger, other: Ledger) -> None:
        await other.raise_epoch(0)
        fact = outcome(1, 1, turns=TURNS, ended={"m1": ended()})
        assert await ledger.record("c1", fact, outcome=True) is Grant.GRANTED
        assert contents(await other.recall("c1")) == (State(number=1), TURNS, 2)
        assert await other.known("c1", ["m1"]) == {"m1": ended()}

    @pytest.mark.usefixtures("begun")
    async def test_and_though_another_has_written_something_else(self, ledger: Ledger, other: Ledger) -> None:
        heir = await other.recall("c1")
        heir.turn("t7", 5.0).state = TurnState.INTERRUPTED
        await other.record("c1", taken(heir), outcome=False)
        assert await ledger.record("c1", outcome(1, 1, turns=TURNS), outcome=True) is Grant.GRANTED
        memory = await other.recall("c1")
        assert (memory.state.attempt, memory.state.silenced) == (None, STATE.silenced)
        assert memory.turns == TURNS | {"t7": Turn(TurnState.INTERRUPTED, touched=5.0)}

    @pytest.mark.usefixtures("begun")
    async def test_what_another_has_written_stands(self, ledger: Ledger, other: Ledger) -> None:
        heir = await other.recall("c1")
        heir.update(fences={"i2": 7.0}, busy_until=1e10)
        heir.turn("t1", 5.0).state = TurnState.FAILED
        heirs = taken(heir)
        late = Turn(TurnState.CLOSED, pieces=3, text_length=9, touched=4.0)
        asked = [
            ledger.record("c1", heirs, outcome=False),
            ledger.record("c1", outcome(1, 1, turns={"t1": late}), outcome=True),
        ]
        assert await asyncio.gather(*asked) == [Grant.GRANTED] * 2
        memory = await other.recall("c1")
        assert (memory.state.attempt, memory.state.fences, memory.state.busy_until) == (None, {"i2": 7.0}, 1e10)
        assert memory.turns["t1"] == replace(late, state=TurnState.FAILED, touched=5.0)
        heir.update(playing_until=1.0)
        assert await other.record("c1", taken(heir), outcome=False) is Grant.OUTDATED, "it has to look again"

    @pytest.mark.usefixtures("begun")
    async def test_not_when_a_command_of_it_has_ended_beside_it(self, ledger: Ledger, other: Ledger) -> None:
        discarded = Event("c1", SpeechDiscarded(turn_id="t1", command_ids=("m1",), reason="interrupted"), "m1")
        beside = Changes("1", "beside", STATE, replace(STATE, number=1), {}, {"m1": ended(discarded)})
        assert await other.record("c1", beside, outcome=False) is Grant.GRANTED
        assert await ledger.record("c1", outcome(1, 1, ended={"m1": ended()}), outcome=True) is Grant.OUTDATED
        assert (await ledger.recall("c1")).version == "beside"

    @pytest.mark.usefixtures("begun")
    async def test_the_other_is_outdated_by_it(self, ledger: Ledger, other: Ledger) -> None:
        epoch = await other.raise_epoch(0)
        heir = await other.recall("c1")
        await ledger.record("c1", outcome(1, 1), outcome=True)
        heir.update(number=2)
        assert await other.intend("c1", taken(heir), 0, epoch) is Grant.OUTDATED

    @pytest.mark.usefixtures("begun")
    async def test_not_when_another_has_tried_again(self, ledger: Ledger, other: Ledger) -> None:
        epoch = await other.raise_epoch(0)
        assert await other.intend("c1", attempting(1, 2), 0, epoch) is Grant.GRANTED
        late = outcome(1, 1, turns=TURNS, ended={"m1": ended()})
        assert await ledger.record("c1", late, outcome=True) is Grant.OUTDATED
        assert contents(await ledger.recall("c1")) == (replace(STATE, number=2), {}, 2)
        assert await ledger.known("c1", ["m1"]) == {}
        assert await other.record("c1", outcome(2, 2), outcome=True) is Grant.GRANTED

    @pytest.mark.usefixtures("begun")
    async def test_not_when_another_has_decided_without_it(self, ledger: Ledger, other: Ledger) -> None:
        discarded = Event("c1", SpeechDiscarded(turn_id="t1", command_ids=("m1",), reason="interrupted"), "m1")
        decided = changes(1, State(number=1), ended={"m1": ended(discarded)})
        assert await other.record("c1", decided, outcome=False) is Grant.GRANTED
        late = outcome(1, 1, ended={"m1": ended()})
        assert await ledger.record("c1", late, outcome=True) is Grant.OUTDATED
        assert await ledger.known("c1", ["m1"]) == {"m1": ended(discarded)}

    @pytest.mark.usefixtures("begun")
    async def test_an_attempt_in_doubt_still_has_none(self, ledger: Ledger) -> None:
        assert await ledger.record("c1", attempting(1, 1), outcome=True) is Grant.GRANTED
        assert await ledger.record("c1", outcome(2, 1), outcome=True) is Grant.GRANTED
        assert await ledger.record("c1", outcome(3, 1), outcome=True) is Grant.OUTDATED


def taken(memory: Memory) -> Changes:
    written = memory.take_changes()
    assert written is not None
    return written


class TestOrder:
    async def test_writes_take_effect_as_they_were_asked_for_however_they_are_awaited(self, ledger: Ledger) -> None:
        epoch = await ledger.raise_epoch(0)
        asked: list[Awaitable[Grant]] = []
        for n in range(0, 60, 3):
            asked.append(ledger.record("c1", changes(n, State(playing_until=n)), outcome=False))
            asked.append(ledger.intend("c1", attempting(n + 1, n + 1), 0, epoch))
            asked.append(ledger.record("c1", outcome(n + 2, n + 1), outcome=True))
        assert await asyncio.gather(*reversed(asked)) == [Grant.GRANTED] * 60
        assert contents(await ledger.recall("c1")) == (State(number=58), {}, 60)

    async def test_they_need_not_be_awaited(self, ledger: Ledger, other: Ledger) -> None:
        ledger.record("c1", changes(0, STATE), outcome=False)
        assert (await ledger.recall("c1")).state == STATE
        assert (await other.recall("c1")).state == STATE

    async def test_a_caller_that_is_cancelled_takes_nothing_back(self, ledger: Ledger) -> None:
        async def ask(n: int) -> None:
            await ledger.record("c1", changes(n, State(number=n)), outcome=False)

        tasks = [asyncio.create_task(ask(n)) for n in range(20)]
        await asyncio.sleep(0)
        for task in tasks[::2]:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert contents(await ledger.recall("c1")) == (State(number=19), {}, 20)


class TestGroupCommit:
    async def test_what_comes_while_one_is_written_goes_into_the_next(
        self, open_: Open, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        ledger = await open_()
        epoch = await ledger.raise_epoch(0)
        commits = 0
        write = ledger._database._backend.write

        async def counted(work: Any) -> Any:
            nonlocal commits
            commits += 1
            return await write(work)

        monkeypatch.setattr(ledger._database._backend, "write", counted)

        async def says(conversation_id: str) -> None:
            for n in range(0, 10, 2):
                intent = ledger.intend(conversation_id, attempting(n, n // 2 + 1), 0, epoch)
                assert await intent is Grant.GRANTED
                assert await ledger.record(conversation_id, outcome(n + 1, n // 2 + 1), outcome=True) is Grant.GRANTED

        await asyncio.gather(*(says(f"c{n}") for n in range(200)))
        assert commits < 100, "for 2000 writes"

    async def test_one_that_is_not_granted_spoils_no_other(self, ledger: Ledger, other: Ledger) -> None:
        await other.record("outdated", changes(0), outcome=False)
        asked = [
            ledger.record("c1", changes(0, STATE), outcome=False),
            ledger.intend("c2", attempting(0, 1), 0, 99),
            ledger.record("outdated", changes(0, STATE), outcome=False),
            ledger.record("c3", changes(0, STATE), outcome=False),
        ]
        granted = [Grant.GRANTED, Grant.REFUSED, Grant.OUTDATED, Grant.GRANTED]
        assert await asyncio.gather(*asked) == granted
        assert (await ledger.recall("c3")).state == STATE


class TestOutage:
    async def test_writes_wait_it_out_in_order(self, open_: Open, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("worker.stores.database.PAUSE_S", 0.001)
        ledger = await open_()
        backend = ledger._database._backend
        write, failures = backend.write, iter(range(5))

        async def failing(work: Any) -> Any:
            for _ in failures:
                raise Unreachable("out of reach")
            return await write(work)

        monkeypatch.setattr(backend, "write", failing)
        asked = [ledger.record("c1", changes(n, State(number=n)), outcome=False) for n in range(5)]
        assert await asyncio.gather(*asked) == [Grant.GRANTED] * 5
        assert next(failures, None) is None
        assert (await ledger.recall("c1")).state == State(number=4)

    async def test_what_is_asked_for_is_written_when_it_closes(self, tmp_path: Path, clock: FakeClock) -> None:
        url = f"sqlite:///{tmp_path}/ledger.db"
        database = await Database.open(url)
        ledger = SqlLedger(database, clock)
        asked = [ledger.record("c1", changes(n, STATE), outcome=False) for n in range(2)]
        await database.close()
        assert await asyncio.gather(*asked) == [Grant.GRANTED] * 2
        database = await Database.open(url)
        assert contents(await SqlLedger(database, clock).recall("c1")) == (STATE, {}, 2)
        await database.close()


class TestPrune:
    async def test_what_is_old_goes_and_what_is_young_stays(self, ledger: Ledger, clock: FakeClock) -> None:
        old = replace(ended(), at=10.0)
        young = replace(ended(accepted("m2", key="m2\n0")), at=900.0)
        turns = {"old": Turn(touched=10.0), "young": Turn(touched=900.0)}
        await ledger.record("c1", changes(0, STATE, turns, {"m1": old, "m2": young}), outcome=False)
        clock.now = 20.0
        await ledger.record("c2", changes(0, STATE), outcome=False)
        await ledger.prune(500.0)
        assert contents(await ledger.recall("c1")) == (STATE, {"young": turns["young"]}, 1)
        assert await ledger.known("c1", ["m1", "m2"]) == {"m2": young}
        assert contents(await ledger.recall("c2")) == (State(), {}, 0)

    async def test_a_lane_whose_conversation_was_forgotten_looks_again(self, ledger: Ledger, clock: FakeClock) -> None:
        await ledger.record("c1", changes(0), outcome=False)
        await ledger.prune(clock.now + 1)
        assert await ledger.record("c1", changes(1), outcome=False) is Grant.OUTDATED
        assert await ledger.record("c1", changes(0), outcome=False) is Grant.GRANTED

    async def test_epochs_stay(self, ledger: Ledger) -> None:
        epoch = await ledger.raise_epoch(0)
        await ledger.prune(1e12)
        assert await ledger.intend("c1", attempting(0, 1), 0, epoch) is Grant.GRANTED

    async def test_a_batch_at_a_time_with_speech_in_between(self, open_: Open, request: pytest.FixtureRequest) -> None:
        ledger = await open_()
        rows = 3 * PRUNE_ROWS + 1
        those = {f"m{n}": replace(ended(accepted(f"m{n}", key=f"{n}")), at=1.0) for n in range(rows)}
        turns = {f"t{n}": Turn(touched=1.0) for n in range(rows)}
        await ledger.record("c1", changes(0, STATE, turns, those), outcome=False)
        deleted: list[int] = []

        def note(_c: Any, cursor: Any, statement: str, *_: Any) -> None:
            if statement.startswith("DELETE"):
                deleted.append(cursor.rowcount)

        request.addfinalizer(lambda: sa.event.remove(sa.Engine, "after_cursor_execute", note))
        sa.event.listen(sa.Engine, "after_cursor_execute", note)
        pruning = asyncio.create_task(ledger.prune(500.0))
        await until(lambda: deleted)
        assert await ledger.record("c2", changes(0, STATE), outcome=False) is Grant.GRANTED
        assert not pruning.done()
        await pruning
        assert max(deleted) == PRUNE_ROWS
        assert sum(deleted) == 3 * rows
        assert (await ledger.recall("c1")).turns == {}
        assert await ledger.known("c1", list(those)) == {}

    async def test_an_outage_leaves_it_for_the_next_time(self, open_: Open, monkeypatch: pytest.MonkeyPatch) -> None:
        ledger = await open_()
        await ledger.record("c1", changes(0, STATE), outcome=False)

        async def failing(_: object) -> None:
            raise Unreachable("out of reach")

        with monkeypatch.context() as outage:
            outage.setattr(ledger._database._backend, "write", failing)
            await ledger.prune(1e12)
        assert (await ledger.recall("c1")).state == STATE
        await ledger.prune(1e12)
        assert (await ledger.recall("c1")).state == State()

    async def test_nothing_to_forget(self, ledger: Ledger) -> None:
        await ledger.prune(1e12)


class TestFile:
    @pytest.fixture
    async def reopened(self, tmp_path: Path, clock: FakeClock) -> AsyncIterator[Callable[[], Awaitable[SqlLedger]]]:
        """Stops the worker before, and starts another."""
        stacks: list[AsyncExitStack] = []

        async def stop() -> None:
            if stacks:
                await stacks.pop().aclose()

        async def reopened() -> SqlLedger:
            await stop()
            stack = AsyncExitStack()
            stacks.append(stack)
            database = await Database.open(f"sqlite:///{tmp_path}/ledger.db")
            stack.push_async_callback(database.close)
            return SqlLedger(database, clock)

        yield reopened
        await stop()

    async def test_it_outlives_the_worker(self, reopened: Callable[[], Awaitable[SqlLedger]]) -> None:
        ledger = await reopened()
        epoch = await ledger.raise_epoch(0)
        await ledger.intend("c1", changes(0, STATE, TURNS, {"m0": ended()}), 0, epoch)
        ledger = await reopened()
        assert contents(await ledger.recall("c1")) == (STATE, TURNS, 1)
        assert await ledger.known("c1", ["m0"]) == {"m0": ended()}
        assert await ledger.intend("c1", None, 0, epoch) is Grant.GRANTED
        assert await ledger.raise_epoch(0) == epoch + 1
        assert await ledger.record("c1", outcome(1, 7), outcome=True) is Grant.GRANTED

    async def test_a_locked_file_is_waited_for(
        self, reopened: Callable[[], Awaitable[SqlLedger]], tmp_path: Path
    ) -> None:
        ledger = await reopened()
        epoch = await ledger.raise_epoch(0)
        with closing(sqlite3.connect(tmp_path / "ledger.db", isolation_level=None)) as lock:
            lock.execute("BEGIN EXCLUSIVE")
            asked = [
                asyncio.ensure_future(ledger.intend("c1", attempting(0, 1), 0, epoch)),
                asyncio.ensure_future(ledger.record("c1", outcome(1, 1), outcome=True)),
            ]
            done, _ = await asyncio.wait(asked, timeout=0.3)
            assert not done
            lock.execute("COMMIT")
        assert await asyncio.gather(*asked) == [Grant.GRANTED] * 2

    async def test_a_worker_that_stands_still_while_it_writes_keeps_no_other_from_starting(
        self, reopened: Callable[[], Awaitable[SqlLedger]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        await reopened()
        gave_up = asyncio.Event()
        loop = asyncio.get_running_loop()
        monkeypatch.setattr("worker.stores.sqlite.BUSY_S", 0.05)
        monkeypatch.setattr("worker.stores.database.LOCKED_WAITS", 1000)
        monkeypatch.setattr(
            "worker.stores.database._log.error", lambda *_, **__: loop.call_soon_threadsafe(gave_up.set)
        )
        with closing(sqlite3.connect(tmp_path / "ledger.db", isolation_level=None)) as lock:
            lock.execute("BEGIN EXCLUSIVE")
            opening = asyncio.create_task(Database.open(f"sqlite:///{tmp_path / 'ledger.db'}"))
            await gave_up.wait()
            lock.execute("COMMIT")
        await (await opening).close()

    async def test_an_error_tells_no_text(
        self, reopened: Callable[[], Awaitable[SqlLedger]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        logged: list[str] = []
        monkeypatch.setattr(
            "worker.stores.database._log.error", lambda *args, **kwargs: logged.append(f"{args}{kwargs}")
        )
        monkeypatch.setattr("worker.stores.database.PAUSE_S", 0.001)
        ledger = await reopened()
        await ledger.record("c1", changes(0), outcome=False)
        with closing(sqlite3.connect(tmp_path / "ledger.db")) as connection:
            connection.execute("ALTER TABLE conversations RENAME COLUMN state TO gone")
        asked = ledger.record("c1", changes(1, STATE), outcome=False)
        await until(lambda: logged)
        with closing(sqlite3.connect(tmp_path / "ledger.db")) as connection:
            connection.execute("ALTER TABLE conversations RENAME COLUMN gone TO state")
        assert await asked is Grant.GRANTED
        assert "Gott" not in "".join(logged)
