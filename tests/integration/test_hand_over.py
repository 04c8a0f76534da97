"""A partition is left while its commands are being acknowledged: the connection stands, and nothing is said twice.

What an ack does that comes too late: tests/integration/test_traps_settling.py.
"""

import asyncio

import pytest

from tests.integration.conftest import Start
from tests.support.bus import Bus, eventually
from tests.support.owner import QUEUE
from tests.support.proxy import proxied
from tests.support.scrape import value
from worker.amqp.tenure import ChannelTenure

CONVERSATIONS = [f"conversation-{number}" for number in range(10)]
MOST_WAITING = 40
TIMES = 10
ENDS = 10
"""How many commands end between one time and the next."""

WAYS = {"handed_over": ChannelTenure.hand_over, "lost": ChannelTenure.refused}


@pytest.mark.parametrize("how", WAYS)
async def test_it_is_left_again_and_again_under_load(start: Start, bus: Bus, how: str) -> None:
    async with start() as station:
        said: list[str] = []
        ids: list[str] = []
        left = asyncio.Event()

        async def produce() -> None:
            while not left.is_set():
                said.append(f"{len(said)} ")
                ids.extend([await bus.say(one, f"{one} {said[-1]}", said[-1]) for one in CONVERSATIONS])
                await bus.until(lambda: len(bus.terminal()) > len(ids) - MOST_WAITING)

        producing = asyncio.create_task(produce())
        tenure: ChannelTenure | None = None
        for _ in range(TIMES):
            await eventually(lambda before=tenure: station.inbox.tenure_of(0) not in (None, before))  # type: ignore[misc]
            ended = len(bus.terminal())
            await bus.until(lambda ended=ended: len(bus.terminal()) >= ended + ENDS)  # type: ignore[misc]
            tenure = station.inbox.tenure_of(0)
            assert tenure is not None
            WAYS[how](tenure)
        left.set()
        await producing
        await bus.all_ended(ids)
        assert value(station.metrics.registry, "partitions_left_total", how=how) == TIMES
        assert station.lives() == (1, 1)
        for one in CONVERSATIONS:
            mine = [piece.text for piece in station.avatar.said if piece.turn_id.startswith(f"{one} ")]
            assert mine == said
        await station.settled()
        await station.gone()
        assert await bus.left_in(QUEUE) == 0


@pytest.mark.parametrize("how", WAYS)
async def test_what_ends_while_its_channel_is_being_closed_is_not_acknowledged(
    start: Start, bus: Bus, amqp_url: str, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr("worker.amqp.inbox.LEAVE_S", 0.1)
    closing = asyncio.Event()
    close = ChannelTenure.close

    async def closed(tenure: ChannelTenure) -> None:
        proxy.answering.clear()
        closing.set()
        await close(tenure)

    async with proxied(amqp_url) as proxy, start(url=proxy.url, publish_url=amqp_url) as station:
        monkeypatch.setattr(ChannelTenure, "close", closed)
        station.avatar.gate.clear()
        message_id = await bus.say("c", "t", "one")
        await station.said("one")
        tenure = station.inbox.tenure_of(0)
        assert tenure is not None
        WAYS[how](tenure)
        await closing.wait()
        station.avatar.gate.set()
        await bus.ended(message_id)
        await station.settled()
        proxy.answering.set()
        await bus.ended(await bus.say("c", "t", "two"))
        assert station.lives() == (1, 1)
        await station.said("one", "two")
