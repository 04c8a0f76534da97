"""The broker goes away in whatever way: the worker comes back by itself, and nothing is lost or said twice."""

import asyncio
from pathlib import Path

import pytest
from aio_pika.abc import AbstractConnection
from aiormq.exceptions import ChannelInvalidStateError

from schemas.routes import partition_queue
from tests.integration.conftest import Avatar, Start, agreed
from tests.support.bus import Bus, connected, eventually
from tests.support.proxy import proxied
from worker.amqp.delivery import AmqpDelivery
from worker.amqp.inbox import Inbox
from worker.amqp.tenure import ChannelTenure
from worker.core.model import Entry, Marker, Misfit
from worker.core.ownership import score
from worker.core.work import Rules
from worker.errors import LinkLost
from worker.flow.clock import SteadyClock
from worker.local.broker import OwnedBroker

QUEUE = "avatar.commands.v1.p00"


async def test_a_say_in_flight_outlives_the_connection(start: Start, bus: Bus, amqp_url: str) -> None:
    async with proxied(amqp_url) as proxy, start(url=proxy.url) as station:
        station.avatar.gate.clear()
        first = await bus.say("c", "t", "one ", final=False)
        await station.said("one ")
        second = await bus.say("c", "t", "two")
        proxy.cut()
        await station.reconnected()
        station.avatar.gate.set()
        await bus.all_ended([first, second])
        await station.said("one ", "two")
        await station.settled()
        await station.gone()
        assert await bus.left_in(QUEUE) == 0


async def test_a_turn_that_a_dead_worker_left_open_is_closed_though_nothing_is_delivered(
    start: Start, bus: Bus, tmp_path: Path
) -> None:
    url, rules = f"sqlite:///{tmp_path}/store.db", Rules(default_avatar="a", auto_final_s=2)
    async with start(name="w1", store_url=url, rules=rules) as station:
        await bus.ended(await bus.say("c", "t", "One.", final=False))
        await station.settled()
    assert bus.of("turn.completed") == []
    async with start(name="w2", store_url=url, rules=rules):
        event = await bus.event("turn.completed", "c")
    assert (event["worker"], event["data"]["autoFinal"]) == ("w2", True)


async def test_nothing_is_lost_or_said_twice_while_the_connection_comes_and_goes(
    start: Start, bus: Bus, amqp_url: str
) -> None:
    async with proxied(amqp_url) as proxy, start(url=proxy.url, partitions=2) as station:
        ids, words = [], [f"word{number} " for number in range(200)]
        for number, word in enumerate(words):
            ids.append(await bus.say("c", "t", word, final=number == 199))
            if number % 50 == 30:
                proxy.cut()
        await bus.all_ended(ids)
        assert "".join(piece.text for piece in station.avatar.said) == "".join(words)
        assert station.lives()[0] > 1
        await station.ready()
        # What came again is told again, and acknowledged then.
        await eventually(lambda: not station.lanes.is_served("c"))
        await station.settled()
        await station.gone()
        assert [await bus.left_in(partition_queue(number)) for number in (0, 1)] == [0, 0]


async def test_a_deleted_queue_is_declared_again(start: Start, bus: Bus) -> None:
    async with start(partitions=2) as station:
        for number in (0, 1):
            await bus.channel.queue_delete(partition_queue(number))
            await station.reconnected(2 + number)
        ids = [await bus.say(f"c{number}", "t", "x") for number in range(20)]
        await bus.all_ended(ids)


async def test_another_worker_takes_over(start: Start, bus: Bus) -> None:
    async with start(name="w1") as first, start(name="w2") as second:
        await bus.ended(await bus.say("c", "t", "one"))
        owner, standby = (first, second) if first.avatar.said else (second, first)
        owner.avatar.gate.clear()
        message_id = await bus.say("c", "t", "two")
        await owner.said("one", "two")
        await owner.gone()
        await bus.ended(message_id)
        await standby.said("two")


async def test_another_worker_takes_over_from_one_that_nothing_reaches_any_more(
    start: Start, bus: Bus, amqp_url: str, tmp_path: Path
) -> None:
    """The broker gives it up after two or three heartbeats. What it was sent comes through when all is over."""
    avatar, store_url = Avatar(), f"sqlite:///{tmp_path}/store.db"
    ranked = sorted(("w1", "w2"), key=lambda name: score(name, 0), reverse=True)
    async with (
        proxied(amqp_url) as proxy,
        start(url=proxy.url, name=ranked[0], heartbeat_s=1, store_url=store_url, avatar=avatar) as cut_off,
        start(name=ranked[1], store_url=store_url, avatar=avatar) as standby,
    ):
        ids = [await bus.say("c", "t", "0 ", final=False)]
        await bus.ended(ids[0])
        assert cut_off.inbox.owned == 1
        proxy.passing.clear()
        ids += [await bus.say("c", "t", f"{number} ", final=number == 9) for number in range(1, 10)]
        await bus.all_ended(ids)
        assert standby.inbox.owned == 1
        proxy.passing.set()
        await cut_off.reconnected()
        ids.append(await bus.say("c", "u", "10 "))
        await bus.all_ended(ids)
        assert "".join(piece.text for piece in avatar.said) == "".join(f"{number} " for number in range(11))
        assert not bus.of("speech.accepted", possibleDuplicate=True)


class Catcher:
    """An `inbox.Receiver` that keeps what comes."""

    def __init__(self) -> None:
        self.entries: asyncio.Queue[Entry] = asyncio.Queue()

    def offer(self, entry: Entry) -> None:
        self.entries.put_nowait(entry)

    def hear(self, entry: Entry) -> None:
        pass

    def pass_through(self, marker: Marker) -> None:
        raise AssertionError(marker)

    def reject(self, misfit: Misfit) -> None:
        raise AssertionError(misfit)

    def forget(self, is_gone: object) -> None:
        pass

    async def leave(self, is_gone: object) -> None:
        pass


async def epochs(_partition: int) -> int:
    return 1


async def silent() -> None:
    pass


async def consume(connection: AbstractConnection, catcher: Catcher) -> tuple[Inbox, "asyncio.Task[None]"]:
    inbox = Inbox(catcher, epochs, silent, wanted=agreed(1), worker="w", clock=SteadyClock())
    inbox.express.ready.set()  # as if: nobody is interrupted here
    task = asyncio.create_task(inbox.session(connection))
    async with asyncio.timeout(10):
        await inbox.ready.wait()
    return inbox, task


@pytest.mark.parametrize("loss", ["gate", "channel", "connection"])
async def test_a_delivery_that_is_no_longer_ours_is_stale(bus: Bus, amqp_url: str, loss: str) -> None:
    catcher = Catcher()
    async with connected(amqp_url) as other:
        inbox, task = await consume(other.connection, catcher)
        await bus.say("c", "t", "x")
        entry = await asyncio.wait_for(catcher.entries.get(), 10)
        delivery = entry.delivery
        assert isinstance(delivery, AmqpDelivery)
        if loss == "gate":
            inbox.gate()
        elif loss == "channel":
            assert delivery._channel is not None
            await delivery._channel.close()
        else:
            await other.connection.close()
        assert await delivery.settle() is False
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert await bus.left_in(QUEUE) == 1


@pytest.mark.parametrize("raised", [ChannelInvalidStateError("gone"), Exception(), asyncio.CancelledError()], ids=repr)
async def test_a_partition_that_is_given_up_while_the_connection_goes_ends_the_session(
    bus: Bus, amqp_url: str, monkeypatch: pytest.MonkeyPatch, raised: BaseException
) -> None:
    """Whatever aiormq makes of that: a bare Exception and a cancellation that nobody asked for are among it."""

    async def lost(_: ChannelTenure) -> None:
        raise raised

    catcher = Catcher()
    async with connected(amqp_url) as other:
        _, task = await consume(other.connection, catcher)
        await bus.say("c", "t", "x")
        entry = await asyncio.wait_for(catcher.entries.get(), 10)
        assert isinstance(entry.delivery, AmqpDelivery)
        monkeypatch.setattr(ChannelTenure, "close", lost)
        entry.delivery.tenure.refused()
        with pytest.raises(LinkLost, match="could not be joined again"):
            await asyncio.wait_for(task, 10)


async def test_a_delivery_is_acknowledged(bus: Bus, amqp_url: str) -> None:
    catcher = Catcher()
    async with connected(amqp_url) as other:
        _, task = await consume(other.connection, catcher)
        await bus.say("c", "t", "x")
        entry = await asyncio.wait_for(catcher.entries.get(), 10)
        assert isinstance(entry.delivery, AmqpDelivery)
        assert await entry.delivery.settle() is True
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert await bus.left_in(QUEUE) == 0


async def test_the_broker_restarts(start: Start, owned_broker: OwnedBroker) -> None:
    async with start(url=owned_broker.url, partitions=2) as station:
        async with connected(owned_broker.url) as before:
            station.avatar.gate.clear()
            held = await before.say("held", "t", "one ", final=False)
            await station.said("one ")
        await asyncio.to_thread(owned_broker.stop)
        station.avatar.gate.set()
        await asyncio.to_thread(owned_broker.start)
        async with connected(owned_broker.url) as after:
            await after.listen()
            await station.ready()
            last = await after.say("held", "t", "two")
            await after.ended(last)
            await station.said("one ", "two")
            assert held in after.terminal() or station.lives()[1] > 1
            await station.settled()
            await station.gone()
            assert [await after.left_in(partition_queue(number)) for number in (0, 1)] == [0, 0]
