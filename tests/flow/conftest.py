"""A worker's flow without a broker and without an API."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.support.conversation import RULES, entry
from tests.support.fakes import FakeApi, FakeClock, FakeDelivery, FakeOutbox, FakeStore, until
from worker.core.model import Entry, ReplyTo
from worker.flow import runner
from worker.flow.desk import Desk
from worker.flow.keeper import Keeper
from worker.flow.lanes import Lanes
from worker.flow.settler import Settler


@dataclass
class Flow:
    """Everything between the broker and the API; `store` may be shared with another."""

    store: FakeStore = field(default_factory=FakeStore)
    owner: str = "w1"
    clock: FakeClock = field(default_factory=FakeClock)

    def __post_init__(self) -> None:
        self.api = FakeApi()
        self.outbox = FakeOutbox()
        self.settler = Settler(self.outbox)
        self.desk = Desk(self.api, self.store, self.owner, self.clock)
        self.lanes = Lanes(RULES, self.desk, self.settler, self.clock, keep_s=3600)
        self.keeper = Keeper(
            self.desk,
            self.clock,
            keep_alive_s=10,
            idle_s=300,
            is_served=self.lanes.is_served,
            submit=self.settler.submit,
        )
        self.deliveries: list[FakeDelivery] = []

    def offer(self, *, conversation_id: str = "c1", reply_to: ReplyTo | None = None, **body: Any) -> Entry:
        """Deliver a command."""
        delivery = FakeDelivery(self.outbox, str(body.get("text", body.get("type"))))
        self.deliveries.append(delivery)
        one = entry(delivery=delivery, conversation_id=conversation_id, born=self.clock(), reply_to=reply_to, **body)
        self.lanes.offer(one)
        return one

    def speak(self, text: str, *, conversation_id: str = "c1", turn_id: str = "t1", final: bool = False) -> Entry:
        """Deliver a chunk."""
        return self.offer(conversation_id=conversation_id, turnId=turn_id, text=text, isFinal=final)

    async def all_settled(self) -> None:
        """Every delivery is acknowledged."""
        await until(lambda: all(delivery.settled for delivery in self.deliveries), "all settled")

    async def tick(self) -> None:
        """What the keeper does once a second, to its end."""
        await self.keeper._mind_leases()
        self.keeper._mind_sessions()
        if self.keeper._busy:
            await asyncio.wait(list(self.keeper._busy.values()))
        await asyncio.sleep(0)


@pytest.fixture
async def flow(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Flow]:
    monkeypatch.setattr(runner, "PAUSE_S", 0.01)
    monkeypatch.setattr(runner, "LINGER_S", 0.01)
    one = Flow()
    yield one
    assert one.api.overlaps == 0
    await one.lanes.abandon()
    assert all(delivery.settled <= 1 for delivery in one.deliveries)
    assert not one.lanes._runners
