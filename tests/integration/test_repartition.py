"""The number of partitions changes while nobody works, and whatever interrupts that can be gone on with."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable

import aio_pika
import pytest
from aio_pika.abc import AbstractChannel, AbstractConnection

from schemas.routes import partition_queue
from tests.integration.conftest import Start, agreed
from tests.support.bus import Bus
from worker.amqp import repartition as repartitioning
from worker.amqp import topology
from worker.amqp.repartition import repartition
from worker.errors import TopologyError


@pytest.fixture
async def connection(amqp_url: str) -> AsyncIterator[AbstractConnection]:
    async with await aio_pika.connect(amqp_url) as connection:
        yield connection


async def depths(bus: Bus, partitions: int) -> list[int]:
    return [await bus.depth(partition_queue(number)) for number in range(partitions)]


async def lands_once(bus: Bus, partitions: int) -> None:
    """Every conversation has one partition, and none is left out."""
    for number in range(40 * partitions):
        await bus.say(f"conversation-{number}", "t", "x")
    await bus.interrupt("conversation-0")
    found = await depths(bus, partitions)
    assert sum(found) == 40 * partitions + 1
    assert all(found)


@pytest.mark.parametrize(("before", "after"), [(1, 4), (4, 1), (2, 5), (5, 2), (3, 3)])
async def test_every_command_lands_once_afterwards(
    bus: Bus, connection: AbstractConnection, before: int, after: int
) -> None:
    await topology.declare(connection, agreed(before))
    done = await repartition(connection, agreed(after))
    assert (done.before, done.record.partitions) == (before, after)
    await topology.declare(connection, agreed(after))
    with pytest.raises(TopologyError):
        await topology.declare(connection, agreed(after + 1))
    assert await topology._count_partitions(connection) == after
    await lands_once(bus, after)


async def test_on_an_empty_broker_it_declares(bus: Bus, connection: AbstractConnection) -> None:
    assert (await repartition(connection, agreed(3))).before == 0
    await lands_once(bus, 3)
    await topology.declare(connection, agreed(3))


async def test_the_store_stays_and_the_prefetch_is_the_new_one(connection: AbstractConnection) -> None:
    await topology.declare(connection, agreed(2, "theirs", prefetch=100))
    await repartition(connection, agreed(2, "mine", prefetch=50))
    with pytest.raises(TopologyError, match="STORE_URL"):
        await topology.declare(connection, agreed(2, "mine", prefetch=50))
    await topology.declare(connection, agreed(2, "theirs", prefetch=50))


async def test_no_worker_may_run(start: Start, bus: Bus, connection: AbstractConnection) -> None:
    async with start(partitions=2) as station:
        with pytest.raises(TopologyError, match="stop all workers"):
            await repartition(connection, agreed(4))
        await bus.ended(await bus.say("c", "t", "still spoken"))
        await station.settled()
        await station.gone()
    await repartition(connection, agreed(4))


async def test_no_command_may_wait(bus: Bus, connection: AbstractConnection) -> None:
    await topology.declare(connection, agreed(2))
    await bus.say("c", "t", "x")
    with pytest.raises(TopologyError, match="PARTITIONS=2 until the queues are empty"):
        await repartition(connection, agreed(4))
    await topology.declare(connection, agreed(2))
    assert sum(await depths(bus, 2)) == 1


async def test_what_slips_in_is_kept_and_the_change_undone(
    bus: Bus, connection: AbstractConnection, monkeypatch: pytest.MonkeyPatch
) -> None:
    await topology.declare(connection, agreed(2))
    unbind = repartitioning._unbind

    async def late(*arguments: object) -> None:
        await bus.say("c", "t", "x")
        await unbind(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(repartitioning, "_unbind", late)
    with pytest.raises(TopologyError, match="PARTITIONS=2 until the queues are empty"):
        await repartition(connection, agreed(4))
    await topology.declare(connection, agreed(2))
    await bus.say("c", "t", "y")
    assert sorted(await depths(bus, 2)) == [0, 2]


class KilledError(Exception):
    """The command was killed."""


def killed_at(step: int) -> Callable[[AbstractChannel, str], None]:
    """Raises at the step of that number."""
    steps = iter(range(step + 1))

    def count(_channel: AbstractChannel, _what: str) -> None:
        if next(steps, step) == step:
            raise KilledError

    return count


CHANGES = ("exchange_delete", "queue_delete", "declare_queue", "declare_exchange")


@pytest.mark.parametrize("step", range(0, 34, 3))
async def test_interrupted_anywhere_it_completes_when_run_again(
    amqp_url: str, bus: Bus, connection: AbstractConnection, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Killed at one of its calls; a worker then refuses, or has a whole topology, and running it again completes it."""
    await topology.declare(connection, agreed(3))
    count = killed_at(step)
    with monkeypatch.context() as patch:
        for name in CHANGES:
            call = getattr(aio_pika.Channel, name)

            async def counted(
                channel: AbstractChannel, what: str = "", *args: object, _call: object = call, **kwargs: object
            ) -> object:
                if not kwargs.get("passive"):
                    count(channel, what)
                return await _call(channel, what, *args, **kwargs)  # type: ignore[operator]

            patch.setattr(aio_pika.Channel, name, counted)
        async with await aio_pika.connect(amqp_url) as killed:
            try:
                await repartition(killed, agreed(2))
            except KilledError:
                interrupted = True
            else:
                interrupted = False
    assert interrupted or step > 12
    await repartition(connection, agreed(2))
    await topology.declare(connection, agreed(2))
    await lands_once(bus, 2)


async def test_half_done_it_keeps_workers_away(bus: Bus, connection: AbstractConnection) -> None:
    await topology.declare(connection, agreed(3))
    async with topology.locked(connection), connection.channel() as channel:
        found = await topology.records(channel, patient=True)
        half_done = topology.Record(2, "the store", 200, was=3)
        await topology.write(channel, half_done, found)
    for partitions in (2, 3):
        with pytest.raises(TopologyError, match="repartition 2"):
            await topology.declare(connection, agreed(partitions))
    # A command that came before everything was unbound: the old topology is put up again for it.
    await bus.say("c", "t", "x")
    with pytest.raises(TopologyError, match="PARTITIONS=3 until the queues are empty"):
        await repartition(connection, agreed(2))
    await topology.declare(connection, agreed(3))


async def test_a_worker_that_starts_meanwhile_waits_and_is_refused(
    amqp_url: str, connection: AbstractConnection
) -> None:
    await topology.declare(connection, agreed(2))
    async with await aio_pika.connect(amqp_url) as other:
        changing = asyncio.create_task(repartition(connection, agreed(4)))
        await asyncio.sleep(0)
        await changing
        with pytest.raises(TopologyError, match="PARTITIONS=4"):
            await topology.declare(other, agreed(2))


async def test_another_prefetch_is_refused_with_the_remedy(connection: AbstractConnection) -> None:
    await topology.declare(connection, agreed(1, prefetch=100))
    with pytest.raises(TopologyError, match="set PREFETCH=100"):
        await topology.declare(connection, agreed(1, prefetch=99))


async def test_an_older_record_is_completed(bus: Bus, connection: AbstractConnection) -> None:
    await topology.declare(connection, agreed(2))
    await (await bus.channel.get_queue("avatar.topology")).purge()
    older = json.dumps({"partitions": 2, "store_id": "the store"}).encode()
    await bus.publish(older, "avatar.topology", exchange="")
    await topology.declare(connection, agreed(2, prefetch=77))
    with pytest.raises(TopologyError, match="set PREFETCH=77"):
        await topology.declare(connection, agreed(2))
