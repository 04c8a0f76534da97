"""What the product is for, at the size it must bear: all of it is said, whole, in order, one call at a time."""

import asyncio
import time
from collections.abc import Iterator

import pytest

from tests.acceptance.conftest import Simulator, StartWorker
from tests.support.bus import PATIENCE_S, Bus, connected

CONVERSATIONS = 200
CHUNKS = 50
WORKERS = 3


def texts(conversation: int) -> list[str]:
    return [f"{conversation}.{number} " for number in range(CHUNKS)]


async def produce(bus: Bus) -> list[str]:
    """Publish all chunks, the conversations side by side; returns their ids."""
    ids: list[str] = []
    for number, chunks in enumerate(zip(*map(texts, range(CONVERSATIONS)), strict=True)):
        final = number == CHUNKS - 1
        says = (bus.say(f"c{at}", f"turn {at}", text, final=final) for at, text in enumerate(chunks))
        ids += await asyncio.gather(*says)
    return ids


async def words_said(simulator: Simulator) -> int:
    return sum(len(text.split()) for text in (await simulator.spoken()).values())


async def check(simulator: Simulator) -> None:
    sessions = await simulator.sessions()
    assert len(sessions) == CONVERSATIONS, "a conversation has had more than one session"
    for session in sessions:
        assert session["overlaps"] == {"say": [], "any": []}
        assert session["duplicates"] == []
    spoken = await simulator.spoken()
    assert {turn_id: text.split() for turn_id, text in spoken.items()} == {
        f"turn {at}": "".join(texts(at)).split() for at in range(CONVERSATIONS)
    }


@pytest.mark.timeout(150)
async def test_every_text_arrives_whole_and_every_command_ends_once(
    start_worker: StartWorker, simulator: Simulator, bus: Bus
) -> None:
    await asyncio.gather(*(start_worker(PARTITIONS="4") for _ in range(WORKERS)))
    ids = await produce(bus)
    await bus.all_ended(ids, within_s=90)
    await check(simulator)
    assert {type_ for event in bus.events if (type_ := event["type"]).startswith("avatar.speech.")} == {
        "avatar.speech.accepted"
    }
    await bus.until(lambda: len(bus.of("turn.completed")) >= CONVERSATIONS)
    assert len({event["id"] for event in bus.of("turn.completed")}) == CONVERSATIONS
    await bus.drained(*queues())


@pytest.mark.timeout(150)
async def test_nobody_has_to_listen(start_worker: StartWorker, simulator: Simulator, amqp_url: str) -> None:
    await asyncio.gather(*(start_worker(PARTITIONS="4") for _ in range(WORKERS)))
    async with connected(amqp_url) as bus:
        await produce(bus)
        deadline = time.monotonic() + 90
        while await words_said(simulator) < CONVERSATIONS * CHUNKS:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.2)
        await bus.drained(*queues(), within_s=PATIENCE_S)
    await check(simulator)


def queues() -> Iterator[str]:
    return (f"avatar.commands.v1.p0{number}" for number in range(4))
