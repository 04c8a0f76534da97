"""Keys move to other partitions while producers go on: no order is broken, nothing is lost or said twice."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from schemas import routes
from schemas.routes import partition_queue
from tests.integration.conftest import Avatar, Start, Station
from tests.support.bus import Bus, connected, eventually
from worker.amqp.topology import HASH, HASH_TYPE

PARTITIONS = 4
CONVERSATIONS = [f"conversation-{number}" for number in range(24)]
OTHER = f"{HASH}.other"


Move = Callable[[Bus, "Producers", list[Station]], Awaitable[None]]


class Producers:
    """One per conversation; all chunks of a conversation are one turn."""

    def __init__(self, bus: Bus) -> None:
        self.ids: list[str] = []
        self.publishing = asyncio.Lock()
        self._bus = bus
        self._said: dict[str, int] = dict.fromkeys(CONVERSATIONS, 0)

    async def say(self, chunks: int, pause_s: float = 0.0) -> None:
        """So many chunks of every conversation."""
        await asyncio.gather(*(self._say(one, chunks, pause_s) for one in CONVERSATIONS))

    async def _say(self, conversation_id: str, chunks: int, pause_s: float) -> None:
        for _ in range(chunks):
            number = self._said[conversation_id]
            self._said[conversation_id] += 1
            async with self.publishing:
                self.ids.append(await self._bus.say(conversation_id, conversation_id, f"{number} ", final=False))
            await asyncio.sleep(pause_s)

    def check(self, avatar: Avatar) -> None:
        """Whether the avatar was handed every chunk once and in order."""
        for one, count in self._said.items():
            text = "".join(piece.text for piece in avatar.said if piece.turn_id == one)
            assert text == "".join(f"{number} " for number in range(count)), one


@pytest.fixture
def stations() -> list[Station]:
    """The workers of `fleet`."""
    return []


@pytest.fixture
async def fleet(
    start: Start, stations: list[Station], tmp_path: Path
) -> AsyncIterator[Callable[..., Awaitable[Avatar]]]:
    """Starts three workers that share a store, and an avatar that hears what all of them say."""
    async with AsyncExitStack() as stack:

        async def join(prefetch: int = 200) -> Avatar:
            avatar = Avatar()
            for number in range(3):
                one = start(
                    name=f"w{number}",
                    partitions=PARTITIONS,
                    store_url=f"sqlite:///{tmp_path / 'store.db'}",
                    prefetch=prefetch,
                    avatar=avatar,
                )
                stations.append(await stack.enter_async_context(one))
            return avatar

        yield join


@pytest.fixture
async def mouth(amqp_url: str) -> AsyncIterator[Bus]:
    """The producers' connection."""
    async with connected(amqp_url) as bus:
        yield bus


async def switch(bus: Bus, _: Producers, __: list[Station]) -> None:
    """Let another hash exchange take over, with its queues bound in another order; for a moment both are at work."""
    other = await bus.channel.declare_exchange(OTHER, HASH_TYPE, durable=True)
    for number in range(PARTITIONS):
        queue = await bus.channel.get_queue(partition_queue(PARTITIONS - 1 - number))
        await queue.bind(other, routing_key=f"{number:02d}")
    await other.bind(routes.COMMANDS, routing_key="#")
    await bus.channel.exchange_delete(HASH)


async def rebind(bus: Bus, producers: Producers, stations: list[Station]) -> None:
    """Take every queue out and bind it again, in another order: each step moves most keys.

    Nothing is published in the very moment of a step, and a step comes when the workers have dealt with the one before:
    nobody could tell which of two chunks came first that lie in different queues while the row names a third.
    """

    async def settled() -> None:
        await asyncio.sleep(0.3)
        await eventually(lambda: not any(one.lanes.hold_moved for one in stations))

    for number in range(PARTITIONS):
        queue = await bus.channel.get_queue(partition_queue(number))
        async with producers.publishing:
            await queue.unbind(HASH, f"{number:02d}")
        await settled()
        async with producers.publishing:
            await queue.bind(HASH, f"{9 - number:02d}")
        await settled()


@pytest.mark.timeout(120)
@pytest.mark.parametrize("move", [switch, rebind])
async def test_no_order_is_broken_under_load(
    fleet: Callable[..., Awaitable[Avatar]], stations: list[Station], bus: Bus, mouth: Bus, move: Move
) -> None:
    avatar, producers = await fleet(), Producers(mouth)
    await producers.say(3)
    await bus.all_ended(producers.ids)
    for number in (1, 3):  # before RabbitMQ 4 they would all stay with the first worker
        stations[0].inbox._tenures[number].hand_over()
    load = asyncio.create_task(producers.say(120, pause_s=0.05))
    await asyncio.sleep(0.3)
    await move(bus, producers, stations)
    await load
    await producers.say(3)
    await bus.all_ended(producers.ids, within_s=60)
    producers.check(avatar)
    owners = [one for one in stations if any(one.inbox.tenure_of(number) for number in range(PARTITIONS))]
    assert len(owners) > 1


@pytest.mark.timeout(120)
async def test_a_backlog_of_more_than_every_window_moves_as_well(
    fleet: Callable[..., Awaitable[Avatar]], bus: Bus, mouth: Bus
) -> None:
    """What is held back for the old partitions must not keep the markers out of them."""
    avatar, producers = await fleet(prefetch=20), Producers(mouth)
    await producers.say(1)
    await bus.all_ended(producers.ids)
    avatar.gate.clear()
    await producers.say(20)
    await switch(bus, producers, [])
    await producers.say(20)
    avatar.gate.set()
    await bus.all_ended(producers.ids, within_s=90)
    producers.check(avatar)
