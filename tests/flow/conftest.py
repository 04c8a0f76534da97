"""A worker's flow without a broker and without an API, on a ledger in memory."""

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import pytest
import sqlalchemy as sa

from schemas.events import Event
from tests.support.conversation import RULES, entry, wire
from tests.support.fakes import FakeApi, FakeClock, FakeDelivery, FakeOutbox, FakeTenure, idle, until
from worker.core.memory import Changes, Ended, Memory
from worker.core.model import CallResult, Entry, ReplyTo, Session, Viewer
from worker.core.work import Call, Rules
from worker.flow import runner
from worker.flow.backlog import Backlog
from worker.flow.desk import Desk
from worker.flow.keeper import Keeper
from worker.flow.lanes import Lanes
from worker.flow.settler import Settler
from worker.ops.metrics import Metrics
from worker.ports import Grant, Slots
from worker.stores.backlog import SqlBacklog
from worker.stores.database import Database
from worker.stores.ledger import SqlLedger
from worker.stores.sessions import SqlSessions
from worker.stores.tables import ghosts, sessions

_T = TypeVar("_T")


class HeldLedger(SqlLedger):
    """A ledger that a test may hold up: `gates` hold back what a method returns until set; `asked` counts calls."""

    def __init__(self, database: Database, clock: FakeClock) -> None:
        super().__init__(database, clock)
        self.gates: dict[str, asyncio.Event] = {}
        self.asked: defaultdict[str, int] = defaultdict(int)

    async def recall(self, conversation_id: str) -> Memory:
        return await self._hold("recall", super().recall(conversation_id))

    async def known(self, conversation_id: str, message_ids: Sequence[str]) -> dict[str, Ended]:
        return await self._hold("known", super().known(conversation_id, message_ids))

    def intend(
        self, conversation_id: str, changes: Changes | None, partition: int, epoch: int, session_id: str | None = None
    ) -> asyncio.Task[Grant]:
        asked = super().intend(conversation_id, changes, partition, epoch, session_id)
        return asyncio.create_task(self._hold("intend", asked))

    def record(self, conversation_id: str, changes: Changes, *, outcome: bool) -> asyncio.Task[Grant]:
        asked = super().record(conversation_id, changes, outcome=outcome)
        return asyncio.create_task(self._hold("record", asked))

    async def _hold(self, method: str, asked: Awaitable[_T]) -> _T:
        self.asked[method] += 1
        answer = await asked
        if method in self.gates:
            await self.gates[method].wait()
        return answer


class BreakableDatabase:
    """A way to the database that can be out of reach."""

    def __init__(self, database: Database) -> None:
        self.broken = False
        self._database = database

    def __getattr__(self, name: str) -> Any:
        if self.broken:
            raise OSError("out of reach")
        return getattr(self._database, name)


class HeldStore(SqlSessions):
    """A session store that a test may look into, and put out of reach."""

    def __init__(self, database: Database) -> None:
        self.way = BreakableDatabase(database)
        self._all = database
        super().__init__(self.way)  # type: ignore[arg-type]  # it stands in for one

    async def rows(self) -> dict[str, Any]:
        """The rows that take a slot, by conversation."""
        query = sa.select(sessions).where(sessions.c.state.in_(("creating", "ready", "ending")))
        return {row.conversation_id: row for row in await self._all.read(lambda one: one.execute(query).all())}

    async def change(self, conversation_id: str, **values: object) -> None:
        """Somebody else writes."""
        mine = sessions.c.conversation_id == conversation_id
        await self._all.write(lambda one: one.execute(sa.update(sessions).where(mine).values(values)), "test")

    async def ghosts(self) -> int:
        """How many sessions may exist that nobody knows."""
        query = sa.select(sa.func.count()).select_from(ghosts)
        return int(await self._all.read(lambda one: one.execute(query).scalar_one()))


@dataclass
class Flow:
    """Everything between the broker and the API. Several may share a database and a store, as workers do."""

    database: Database
    owner: str = "w1"
    clock: FakeClock = field(default_factory=FakeClock)
    rules: Rules = RULES
    slots: Slots = field(default_factory=Slots)

    def __post_init__(self) -> None:
        self.api = FakeApi()
        self.outbox = FakeOutbox()
        self.metrics = Metrics()
        self.settler = Settler(self.outbox, self.metrics)
        self.store = HeldStore(self.database)
        self.desk = Desk(self.api, self.store, self.owner, self.clock, self.slots)
        self.ledger = HeldLedger(self.database, self.clock)
        self.lanes = Lanes(
            self.rules,
            desk=self.desk,
            ledger=self.ledger,
            backlog=Backlog(SqlBacklog(self.database), window=100),
            settler=self.settler,
            mark=self.outbox.mark,
            clock=self.clock,
            metrics=self.metrics,
        )
        self.keeper = Keeper(
            self.desk,
            self.clock,
            keep_alive_s=10,
            idle_s=300,
            is_served=self.lanes.is_served,
            is_holding=lambda: self.lanes.is_holding,
            submit=self.settler.submit,
            renew=self.lanes.renew,
        )
        self.deliveries: list[FakeDelivery] = []
        self.entries: list[Entry] = []
        self.tenure = FakeTenure(self.ledger)

    async def close(self) -> None:
        """Stop at once, and look whether all is in order."""
        await self.lanes.abandon()
        assert self.api.overlaps == 0
        assert all(delivery.settled <= 1 for delivery in self.deliveries)
        assert not self.lanes._runners

    def offer(
        self, message_id: str | None = "", *, conversation_id: str = "c1", reply_to: ReplyTo | None = None, **body: Any
    ) -> Entry:
        """Deliver a command."""
        one = entry(message_id, conversation_id=conversation_id, born=self.clock(), reply_to=reply_to, **body)
        return self.deliver(one, str(body.get("text", body.get("type"))))

    def deliver(self, one: Entry, name: str = "") -> Entry:
        """Deliver what may have been delivered before."""
        delivery = FakeDelivery(self.outbox, name, self.tenure, received=self.clock())
        one = replace(one, delivery=delivery)
        self.deliveries.append(delivery)
        self.entries.append(one)
        self.lanes.offer(one)
        return one

    def speak(self, text: str, *, conversation_id: str = "c1", turn_id: str = "t1", final: bool = False) -> Entry:
        """Deliver a chunk."""
        return self.offer(conversation_id=conversation_id, turnId=turn_id, text=text, isFinal=final)

    def lose(self) -> list[Entry]:
        """The tenure ends; returns what was not acknowledged, and would be delivered again."""
        self.tenure.ended = True
        self.lanes.forget(self.tenure)
        self.tenure = FakeTenure(self.ledger)
        unacked = [one for one, delivery in zip(self.entries, self.deliveries, strict=True) if not delivery.settled]
        self.entries, self.deliveries = [], []
        return [replace(one, redelivered=True) for one in unacked]

    def redeliver(self) -> None:
        """The tenure ends, and another one begins."""
        for one in self.lose():
            self.deliver(one)

    async def call(self, conversation_id: str, call: Call) -> tuple[CallResult, Session | Viewer | None]:
        """What a lane would have the desk do."""
        return await self.desk.carry_out(conversation_id, call, lambda: True)

    async def all_settled(self) -> None:
        """Every delivery is acknowledged."""
        await until(lambda: all(delivery.settled for delivery in self.deliveries), "all settled")

    async def said(self, *texts: str) -> None:
        """Exactly these texts were said."""
        await until(lambda: self.api.said == list(texts), f"{self.api.said} said")

    async def quiet(self) -> None:
        """Let everything happen that can happen now, in the database's thread too: for what must *not* happen."""
        for _ in range(10):
            await idle()
            await SqlLedger.recall(self.ledger, "nobody")

    def told(self, short_type: str) -> list[Event]:
        """The events of one type."""
        return [event for what, event in self.outbox.log if what == "tell" and event.type == f"avatar.{short_type}"]

    def flags(self) -> list[tuple[str, bool | None]]:
        """Text and flag of all that was told as accepted."""
        told = [wire(event) for event in self.told("speech.accepted")]
        return [(data["text"], data.get("possibleDuplicate")) for data in told]

    async def tick(self) -> None:
        """What the keeper does once a second, to its end."""
        await self.keeper._mind_leases()
        self.keeper._mind_sessions()
        if self.keeper._busy:
            await asyncio.wait(list(self.keeper._busy.values()))
        await asyncio.sleep(0)


class Fleet:
    """Makes workers that share a store and a ledger."""

    def __init__(self, database: Database, stack: AsyncExitStack) -> None:
        self._database = database
        self._stack = stack
        self._clock = FakeClock()

    def join(self, owner: str, rules: Rules = RULES, slots: Slots | None = None) -> Flow:
        """Another worker."""
        one = Flow(self._database, owner, self._clock, rules, slots or Slots())
        self._stack.push_async_callback(one.close)
        return one


@pytest.fixture
async def fleet(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Fleet]:
    monkeypatch.setattr(runner, "PAUSE_S", 0.01)
    monkeypatch.setattr(runner, "LINGER_S", 0.01)
    async with AsyncExitStack() as stack:
        database = await Database.open("sqlite://")
        stack.push_async_callback(database.close)
        yield Fleet(database, stack)


@pytest.fixture
async def flow(fleet: Fleet) -> Flow:
    return fleet.join("w1")
