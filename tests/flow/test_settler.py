"""The settler: park, tell, answer, acknowledge, in this order, and one conversation never waits for another."""

import asyncio
from dataclasses import replace

import pytest

from schemas.events import Event, TurnStarted
from tests.support.conversation import entry
from tests.support.fakes import FakeDelivery, FakeOutbox, idle, until
from worker.core.model import Entry, ReplyTo
from worker.core.verdict import Answer, Conclusion, Parked
from worker.flow.settler import Settler
from worker.ports import Grant


def conclusion(outbox: FakeOutbox, name: str, *, conversation_id: str = "c1", entries: int = 1) -> Conclusion:
    made: list[Entry] = [
        entry(delivery=FakeDelivery(outbox, name), reply_to=ReplyTo("q", None, 1), type="session.end")
        for _ in range(entries)
    ]
    event = Event(conversation_id, TurnStarted(turn_id=name), name)
    return Conclusion(event, tuple(made), Parked("refused", ""), Answer({"error": name}))


async def test_the_order_is_the_guarantee() -> None:
    outbox = FakeOutbox()
    settler = Settler(outbox)
    settler.submit([conclusion(outbox, "a", entries=2), conclusion(outbox, "b")])
    await settler.drain()
    one = ["park", "tell", "answer", "settle"]
    assert outbox.whats == ["park", "park", "tell", "answer", "answer", "settle", "settle", *one]


async def test_nothing_is_acknowledged_before_its_event_is_confirmed() -> None:
    outbox = FakeOutbox(gate=asyncio.Event())
    settler = Settler(outbox)
    settler.submit([conclusion(outbox, "a")])
    await idle()
    assert outbox.whats == ["park"]
    assert outbox.gate is not None
    outbox.gate.set()
    await settler.drain()
    assert outbox.whats == ["park", "tell", "answer", "settle"]


async def test_what_cannot_be_parked_told_or_answered_is_not_acknowledged_and_the_next_goes_on() -> None:
    for step in ("park", "tell", "answer"):
        outbox = FakeOutbox(failures=[step])
        settler = Settler(outbox)
        settler.submit([conclusion(outbox, "a"), conclusion(outbox, "b")])
        await settler.drain()
        assert [name for what, name in outbox.log if what == "settle"] == ["b"], step


async def test_conversations_do_not_wait_for_each_other() -> None:
    class HoldingOne(FakeOutbox):
        async def tell(self, event: Event) -> None:
            if event.conversation_id == "held":
                await asyncio.Event().wait()
            await super().tell(event)

    outbox = HoldingOne()
    settler = Settler(outbox)
    settler.submit([conclusion(outbox, "a", conversation_id="held"), conclusion(outbox, "b")])
    await until(lambda: ("settle", "b") in outbox.log)
    assert ("settle", "a") not in outbox.log
    await settler.abandon()
    assert ("settle", "a") not in outbox.log


async def test_what_is_submitted_while_one_is_carried_out_follows_it() -> None:
    outbox = FakeOutbox(gate=asyncio.Event())
    settler = Settler(outbox)
    settler.submit([conclusion(outbox, "a")])
    await idle()
    settler.submit([conclusion(outbox, "b")])
    assert outbox.gate is not None
    outbox.gate.set()
    await settler.drain()
    assert [name for what, name in outbox.log if what == "settle"] == ["a", "b"]
    settler.submit([conclusion(outbox, "c")])
    await settler.drain()
    assert outbox.log[-1] == ("settle", "c")


async def test_abandoned_work_is_left_to_be_delivered_again() -> None:
    outbox = FakeOutbox(gate=asyncio.Event())
    settler = Settler(outbox)
    settler.submit([conclusion(outbox, "a"), conclusion(outbox, "b")])
    await idle()
    await settler.abandon()
    assert "settle" not in outbox.whats


async def test_nothing_is_told_before_it_is_recorded_and_nothing_overtakes_it() -> None:
    outbox = FakeOutbox()
    settler = Settler(outbox)
    recorded: asyncio.Future[Grant] = asyncio.get_running_loop().create_future()
    settler.submit([conclusion(outbox, "a")], recorded)
    settler.submit([conclusion(outbox, "b")])
    await idle()
    assert outbox.log == []
    recorded.set_result(Grant.GRANTED)
    await settler.drain()
    assert [name for what, name in outbox.log if what == "settle"] == ["a", "b"]


@pytest.mark.parametrize("grant", [Grant.OUTDATED, Grant.REFUSED])
async def test_what_could_not_be_recorded_is_neither_parked_nor_told_nor_acknowledged(grant: Grant) -> None:
    outbox = FakeOutbox()
    settler = Settler(outbox)
    recorded: asyncio.Future[Grant] = asyncio.get_running_loop().create_future()
    recorded.set_result(grant)
    settler.submit([conclusion(outbox, "a"), conclusion(outbox, "b")], recorded)
    settler.submit([conclusion(outbox, "c")])
    await settler.drain()
    assert outbox.whats == ["park", "tell", "answer", "settle"]


async def test_the_events_that_go_with_it_are_told_in_their_order() -> None:
    outbox = FakeOutbox()
    settler = Settler(outbox)
    before, one, after = (conclusion(outbox, name) for name in ("before", "a", "after"))
    settler.submit([replace(one, before=(before.event,), after=(after.event,))])
    await settler.drain()
    assert [event.key for what, event in outbox.log if what == "tell"] == ["before", "a", "after"]
    assert outbox.whats[-1] == "settle"
