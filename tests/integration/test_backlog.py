"""The durable inbox: what a slow conversation holds is kept in the store, and said by whoever owns it then."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from schemas.routes import partition_queue
from tests.integration.conftest import Start, Station
from tests.support.bus import PATIENCE_S, Bus, eventually
from tests.support.scrape import value

PREFETCH = 20
QUEUE = partition_queue(0)


@pytest.fixture
def store_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'store.db'}"


async def until_kept(station: Station, count: int) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while len(await station.kept.kept("slow", 0)) != count:  # noqa: ASYNC110 - the store has no such event
            await asyncio.sleep(0.05)


async def keep_back(station: Station, bus: Bus, count: int, **properties: Any) -> list[str]:
    """Let a conversation hang at the first of its chunks; returns when the store keeps them all."""
    station.avatar.hanging = {"slow turn"}
    station.avatar.gate.clear()
    ids = []
    for number in range(count):
        final = number == count - 1
        ids.append(await bus.say("slow", "slow turn", f"word{number} ", final=final, **properties))
        await eventually(lambda: bool(station.avatar.said))
    await until_kept(station, count)
    return ids


def spoken(station: Station, turn_id: str = "slow turn") -> str:
    return "".join(piece.text for piece in station.avatar.said if piece.turn_id == turn_id)


def words(count: int) -> str:
    return "".join(f"word{number} " for number in range(count))


async def test_a_conversation_that_hangs_does_not_fill_the_window(start: Start, bus: Bus) -> None:
    async with start(prefetch=PREFETCH) as station:
        held = await keep_back(station, bus, 5 * PREFETCH)
        swift = [await bus.say(f"swift{number}", "t", "at once") for number in range(5 * PREFETCH)]
        await bus.all_ended(swift)
        station.avatar.gate.set()
        await bus.all_ended(held)
        assert spoken(station) == words(5 * PREFETCH)
        await station.settled()
        await until_kept(station, 0)
        await station.gone()
        assert await bus.left_in(QUEUE) == 0


async def test_another_worker_says_what_is_kept_although_nothing_is_delivered(
    start: Start, bus: Bus, store_url: str
) -> None:
    async with start(store_url=store_url, prefetch=PREFETCH) as one:
        held = await keep_back(one, bus, 30)
        await one.gone()
    assert spoken(one) == "word0 "
    async with start(store_url=store_url, prefetch=PREFETCH, name="w2") as other:
        await bus.all_ended(held)
        assert spoken(other) == words(30)
        flagged = [event["data"]["text"] for event in bus.of("speech.accepted", possibleDuplicate=True)]
        assert flagged == ["word0 "]


async def test_what_is_kept_comes_before_what_is_delivered(start: Start, bus: Bus, store_url: str) -> None:
    async with start(store_url=store_url, prefetch=PREFETCH) as one:
        held = await keep_back(one, bus, 30)
        await one.gone()
    late = await bus.say("slow", "late turn", "at last")
    async with start(store_url=store_url, prefetch=PREFETCH, name="w2") as other:
        await bus.all_ended([*held, late])
        assert [piece.turn_id for piece in other.avatar.said][-1] == "late turn"
        assert spoken(other) == words(30)


async def test_commands_without_an_id_are_said_once(start: Start, bus: Bus, store_url: str) -> None:
    async with start(store_url=store_url, prefetch=PREFETCH) as one:
        await keep_back(one, bus, 10, message_id=None)
        await one.gone()
    async with start(store_url=store_url, prefetch=PREFETCH, name="w2") as other:
        await eventually(lambda: spoken(other) == words(10))
        await until_kept(other, 0)


async def test_an_owner_that_was_fenced_off_keeps_nothing(start: Start, bus: Bus) -> None:
    async with start(prefetch=PREFETCH) as station:
        station.avatar.gate.clear()
        first = await bus.say("slow", "slow turn", "one ", final=False)
        await station.said("one ")
        await station.ledger.raise_epoch(0)
        before = station.inbox.tenure_of(0)
        second = await bus.say("slow", "slow turn", "two")
        # It asks the store to keep what it holds, learns that it is not the owner, and joins anew.
        await eventually(lambda: station.inbox.tenure_of(0) is not before)
        assert value(station.metrics.registry, "partitions_left_total", how="lost") == 1
        station.avatar.gate.set()
        await bus.all_ended([first, second])
        assert spoken(station) == "one two"


async def test_a_kept_command_is_parked_as_it_came(start: Start, bus: Bus) -> None:
    async with start(prefetch=PREFETCH) as station:
        station.avatar.refuses = {"word1 "}
        held = await keep_back(station, bus, 3, headers={"tag": "x"}, correlation_id="r", content_type="text/x")
        station.avatar.gate.set()
        await bus.all_ended(held)
        (copy, *_) = await bus.parked(2)
        properties = copy.header.properties
        assert properties.message_id == held[1]
        assert (properties.correlation_id, properties.content_type) == ("r", "text/x")
        assert properties.headers is not None
        assert properties.headers["tag"] == "x"
        assert properties.headers["avatar-routing-key"] == "slow"
        assert b"word1 " in copy.body


async def test_what_only_looks_like_a_knock_is_a_command(station: Station, bus: Bus) -> None:
    command = {"turnId": "t", "text": "hello", "isFinal": True}
    ended = await bus.send("c", command, message_type="avatar.knock")
    await bus.all_ended([ended])
    await station.said("hello")
