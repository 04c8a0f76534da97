"""The hash moves keys again and again, under load, forth and back: no order is broken, nothing lost or said twice.

A real restart that moves keys routes nothing between two states, so producers pause for the milliseconds in which the
queues are bound anew; what they have published before lies in the queues, in the workers and in the store meanwhile.
And keys move once at a time: of commands that lie in two new partitions nobody could tell which came first. So the next
move waits until of every conversation a command has ended that came after the last one.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest

from schemas.routes import partition_queue
from tests.acceptance.conftest import Simulator, StartWorker
from tests.support.bus import Bus, connected, eventually
from worker.amqp.topology import HASH
from worker.core.ownership import score

PARTITIONS = 4
CONVERSATIONS = [f"conversation-{number}" for number in range(12)]
ORDERS = ((3, 2, 1, 0), (0, 1, 2, 3), (1, 2, 3, 0), (0, 1, 2, 3), (2, 3, 0, 1), (3, 2, 1, 0), (0, 1, 2, 3))
LATENCY_MS = 80
PAUSE_S = 0.05
AHEAD = 30
"""Commands of a conversation that wait at most."""


class Load:
    """A producer for each conversation, all of whose chunks are one turn; it is always ahead of the avatar."""

    def __init__(self, bus: Bus, listener: Bus) -> None:
        self.ids: dict[str, list[str]] = {one: [] for one in CONVERSATIONS}
        self.ending = False
        self._bus = bus
        self._listener = listener
        self._passing = asyncio.Event()
        self._passing.set()
        self._under_way = 0

    def ended(self, one: str) -> int:
        """How many commands of the conversation have."""
        return len(self._listener.terminal().keys() & set(self.ids[one]))

    def ahead(self) -> bool:
        """Whether many commands of every conversation wait."""
        return all(len(ids) - self.ended(one) > AHEAD / 2 for one, ids in self.ids.items())

    async def produce(self, one: str) -> None:
        ids = self.ids[one]
        while not self.ending:
            await self._passing.wait()
            if len(ids) - self.ended(one) < AHEAD:
                self._under_way += 1
                ids.append(await self._bus.say(one, one, f"{len(ids)} ", final=False))
                self._under_way -= 1
            await asyncio.sleep(PAUSE_S)

    @asynccontextmanager
    async def paused(self) -> AsyncIterator[dict[str, int]]:
        """Nothing is on its way to the broker; how many commands of each conversation there have been."""
        self._passing.clear()
        await eventually(lambda: not self._under_way)
        yield {one: len(ids) for one, ids in self.ids.items()}
        self._passing.set()

    async def served(self, before: dict[str, int]) -> None:
        """Return once of every conversation a command has ended that came after those."""

        def ended() -> bool:
            terminal = self._listener.terminal().keys()
            return all(terminal & set(ids[before[one] :]) for one, ids in self.ids.items())

        await self._listener.until(ended, within_s=60)


async def bind_anew(bus: Bus, order: Sequence[int]) -> None:
    """The hash takes its queues by their routing keys."""
    queues = [await bus.channel.get_queue(partition_queue(number)) for number in range(PARTITIONS)]
    for queue in queues:
        for key in range(PARTITIONS):
            await queue.unbind(HASH, f"{key:02d}")
    for key, number in enumerate(order):
        await queues[number].bind(HASH, f"{key:02d}")


@pytest.mark.timeout(180)
async def test_keys_move_forth_and_back_under_load(
    start_worker: StartWorker, simulator: Simulator, bus: Bus, amqp_url: str
) -> None:
    settings = {"PARTITIONS": f"{PARTITIONS}", "SPEECH_SHAPING": "off", "FLOW_PAUSE_CHARS": "100000"}
    workers = [await start_worker(WORKER_NAME=name, **settings) for name in ("w1", "w4")]
    owners = {max((score(name, partition), name) for name in ("w1", "w4"))[1] for partition in range(PARTITIONS)}
    assert len(owners) == 2, "on RabbitMQ 4 both have partitions; before, the first one has all"
    await simulator.change(latency_ms=LATENCY_MS)
    async with connected(amqp_url) as mouth:
        load = Load(mouth, bus)
        producing = [asyncio.create_task(load.produce(one)) for one in CONVERSATIONS]
        await load.served(dict.fromkeys(CONVERSATIONS, 0))
        for order in ORDERS:
            await eventually(load.ahead)
            async with load.paused() as before:
                await bind_anew(bus, order)
            await load.served(before)
        load.ending = True
        await asyncio.gather(*producing)
        await bus.all_ended([one for ids in load.ids.values() for one in ids], within_s=60)
    assert await simulator.spoken() == {
        one: "".join(f"{number} " for number in range(len(ids))) for one, ids in load.ids.items()
    }
    for session in await simulator.sessions():
        assert session["overlaps"]["any"] == []
        assert session["duplicates"] == []
    assert not bus.of("speech.accepted", possibleDuplicate=True)
    assert await bus.depth("avatar.parked") == 0
    moved = sum(worker.log.count('"conversation_moved"') for worker in workers)
    assert moved >= 2 * len(CONVERSATIONS), f"only {moved} moves: the order of the bindings did not matter"
