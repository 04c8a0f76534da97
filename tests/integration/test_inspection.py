"""What is wrong with the broker is found without disturbing anybody, and the advice helps."""

from collections.abc import AsyncIterator

import aio_pika
import pytest
from aio_pika.abc import AbstractConnection

from schemas.routes import partition_queue
from tests.integration.conftest import Start, agreed
from tests.support.bus import Bus
from worker.amqp import inspection, topology
from worker.amqp.repartition import repartition
from worker.amqp.topology import Record
from worker.core.finding import Finding, State


@pytest.fixture
async def connection(amqp_url: str) -> AsyncIterator[AbstractConnection]:
    async with await aio_pika.connect(amqp_url) as connection:
        yield connection


async def inspected(connection: AbstractConnection, wanted: Record) -> dict[str, Finding]:
    return {finding.item: finding for finding in await inspection.inspect(connection, wanted)}


async def wrong(connection: AbstractConnection, wanted: Record) -> dict[str, str]:
    findings = await inspection.inspect(connection, wanted)
    return {finding.item: finding.text for finding in findings if finding.state is State.WRONG}


async def nothing_is_left(bus: Bus, partitions: int) -> None:
    for queue in (*map(partition_queue, range(partitions)), "avatar.parked", "avatar.dead"):
        assert await bus.depth(queue) == 0, queue


@pytest.mark.parametrize("partitions", [1, 4])
async def test_all_is_well_and_the_probes_leave_nothing(
    bus: Bus, connection: AbstractConnection, partitions: int
) -> None:
    await topology.declare(connection, agreed(partitions))
    for _ in range(2):
        found = await inspected(connection, agreed(partitions))
        states = {item: finding.state for item, finding in found.items()}
        assert states.pop("policies") is State.UNCHECKED
        assert set(states.values()) == {State.OK}
        assert {"way avatar.commands", "way avatar.interrupts", "way avatar.dead"} <= states.keys()
    await nothing_is_left(bus, partitions)
    await topology.declare(connection, agreed(partitions))


async def test_nothing_stands_yet_and_nothing_is_made(bus: Bus, connection: AbstractConnection) -> None:
    assert await wrong(connection, agreed(1)) == {
        "topology": "nothing of it stands there yet: run `topology`, or start a worker"
    }
    assert await topology._count_partitions(connection) == 0


async def test_no_probe_is_sent_while_a_worker_runs(start: Start, bus: Bus, connection: AbstractConnection) -> None:
    async with start() as station:
        found = await inspected(connection, agreed(1))
        assert found["bindings"].state is State.UNCHECKED
        assert not [finding for finding in found.values() if finding.state is State.WRONG]
        await bus.ended(await bus.say("c", "t", "one"))
        assert {event["type"] for event in bus.events}.isdisjoint({"avatar.command.rejected"})
        assert station.lives() == (1, 1)


async def test_no_probe_is_sent_while_commands_wait(bus: Bus, connection: AbstractConnection) -> None:
    await topology.declare(connection, agreed(1))
    await bus.say("c", "t", "one")
    found = await inspected(connection, agreed(1))
    assert found["bindings"].state is State.UNCHECKED
    assert await bus.depth(partition_queue(0)) == 1


async def test_what_was_bound_before_the_partitions_is_found_and_mended(
    bus: Bus, connection: AbstractConnection
) -> None:
    """Changing 1 to 4 partitions while the old binding stands delivers most commands twice."""
    await topology.declare(connection, agreed(4))
    await (await bus.channel.get_queue(partition_queue(0))).bind("avatar.commands", "#")
    found = await wrong(connection, agreed(4))
    assert "2 times" in found["way avatar.commands"]
    assert "topology repartition 4" in found["way avatar.commands"]
    await nothing_is_left(bus, 4)
    await repartition(connection, agreed(4))
    assert await wrong(connection, agreed(4)) == {}


async def test_a_leg_of_the_interrupts_that_is_missing_is_found(bus: Bus, connection: AbstractConnection) -> None:
    """Publishing there is confirmed all the same."""
    await topology.declare(connection, agreed(2))
    commands = await bus.channel.get_exchange("avatar.commands")
    await commands.unbind("avatar.interrupts")
    await (await bus.channel.declare_queue(exclusive=True)).bind("avatar.interrupts")
    assert await wrong(connection, agreed(2)) == {
        "way avatar.interrupts": "what is published there reaches no partition: run `topology`, or start a worker"
    }
    await topology.declare(connection, agreed(2))
    assert await wrong(connection, agreed(2)) == {}


async def test_a_second_leg_of_the_interrupts_is_found(bus: Bus, connection: AbstractConnection) -> None:
    await topology.declare(connection, agreed(2))
    for number in (0, 1):
        await (await bus.channel.get_queue(partition_queue(number))).bind("avatar.interrupts")
    found = await wrong(connection, agreed(2))
    assert found.keys() == {"way avatar.interrupts"}
    await nothing_is_left(bus, 2)


async def test_a_partition_that_nothing_reaches_is_found(bus: Bus, connection: AbstractConnection) -> None:
    await topology.declare(connection, agreed(4))
    queue = await bus.channel.get_queue(partition_queue(2))
    await queue.unbind("avatar.commands.v1.hash", "02")
    found = await wrong(connection, agreed(4))
    assert "no conversation has partition 2" in found["way avatar.commands"]


async def test_what_cannot_be_routed_would_be_lost(bus: Bus, connection: AbstractConnection) -> None:
    await topology.declare(connection, agreed(1))
    await (await bus.channel.get_queue("avatar.dead")).unbind("avatar.dead")
    assert (await wrong(connection, agreed(1))).keys() == {"way avatar.dead"}


async def test_everything_that_differs_is_named_at_once(bus: Bus, connection: AbstractConnection) -> None:
    await topology.declare(connection, agreed(2))
    await bus.channel.queue_delete("avatar.parked")
    await bus.channel.declare_queue("avatar.parked", durable=True)
    await bus.channel.exchange_delete("avatar.events")
    await bus.channel.declare_queue("avatar.commands.v1.p07", durable=True)
    found = await wrong(connection, agreed(2, prefetch=1))
    assert found.keys() == {
        "agreement",
        "queue avatar.parked",
        "exchange avatar.events",
        "queue avatar.commands.v1.p07",
    }
    assert "set PREFETCH=200" in found["agreement"]
    assert "inequivalent arg" in found["queue avatar.parked"]


async def test_the_number_of_partitions_is_the_brokers(connection: AbstractConnection) -> None:
    await topology.declare(connection, agreed(3))
    assert (await wrong(connection, agreed(2))).keys() == {"agreement"}


async def test_permissions_are_tried(amqp_url: str, connection: AbstractConnection) -> None:
    assert (await inspection.permissions(connection)).state is State.OK
    await topology.declare(connection, agreed(1))
    assert (await inspection.permissions(connection)).state is State.OK
