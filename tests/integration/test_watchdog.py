"""Links that stand and pass nothing on are noticed; a broker that is short of memory is waited for."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest
from aio_pika.abc import AbstractConnection

from tests.integration.conftest import Life
from tests.support.alarm import alarm
from tests.support.bus import connected, eventually
from tests.support.proxy import proxied
from worker.amqp.link import Link, is_blocked
from worker.amqp.watchdog import Watchdog
from worker.errors import LinkLost, LinkSilent
from worker.local.broker import OwnedBroker
from worker.ops import logs

SILENCE_S = 1.0


async def hold(connection: AbstractConnection) -> None:
    """A session that only notices when its connection is gone."""
    gone = asyncio.Event()
    connection.close_callbacks.add(lambda *_: gone.set())
    await gone.wait()
    raise LinkLost("closed")


@dataclass
class Watched:
    """Two links under a watchdog."""

    watchdog: Watchdog
    publishing: Life
    consuming: Life
    running: "asyncio.Task[None]"

    def lives(self) -> tuple[int, int]:
        return self.publishing.count, self.consuming.count

    async def ready(self) -> None:
        async with asyncio.timeout(30):
            await self.watchdog.ready.wait()

    async def unready(self) -> None:
        await eventually(lambda: not self.watchdog.ready.is_set())


@asynccontextmanager
async def watched(publish_url: str, consume_url: str) -> AsyncIterator[Watched]:
    watchdog = Watchdog(every_s=0.1, silence_s=SILENCE_S)
    publishing, consuming = Life(hold), Life(hold)
    work = (
        watchdog.run(),
        Link(publish_url, name="publish", heartbeat_s=10).run(watchdog.publishing(publishing)),
        Link(consume_url, name="consume", heartbeat_s=10).run(watchdog.consuming(consuming)),
    )
    tasks = [asyncio.create_task(one) for one in work]
    try:
        yield Watched(watchdog, publishing, consuming, tasks[0])
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@pytest.mark.parametrize("end", ["publishing", "consuming"])
async def test_silence_has_both_links_rebuilt(amqp_url: str, end: str) -> None:
    async with proxied(amqp_url) as proxy:
        urls = (proxy.url, amqp_url) if end == "publishing" else (amqp_url, proxy.url)
        async with watched(*urls) as links:
            await links.ready()
            proxy.passing.clear()
            await links.unready()
            proxy.passing.set()
            await links.ready()
            assert links.lives() == (2, 2)
            assert not links.running.done()


async def test_a_link_that_comes_back_by_itself_is_left_alone(amqp_url: str) -> None:
    async with proxied(amqp_url) as proxy, watched(proxy.url, amqp_url) as links:
        await links.ready()
        for life in (2, 3):
            proxy.cut()
            await links.unready()
            await links.ready()
            assert links.lives() == (life, 1)


async def test_silence_that_rebuilding_does_not_end_is_the_end(amqp_url: str) -> None:
    """Connections stand, and what is published reaches nobody: the name of the queue is another on the way."""

    def forged(data: bytes) -> bytes:
        return data.replace(b"amq.gen-", b"amq.non-")

    async with proxied(amqp_url, forged) as proxy, watched(proxy.url, amqp_url) as links:
        with pytest.raises(LinkSilent, match="twice"):
            await asyncio.wait_for(links.running, 30)
        assert links.lives() == (2, 2)


async def test_it_leaves_no_channel_behind(amqp_url: str) -> None:
    async with proxied(amqp_url) as proxy, watched(proxy.url, amqp_url) as links:
        await links.ready()
        consuming = links.watchdog._standing["consuming"]
        for _ in range(3):
            proxy.cut()
            await links.unready()
            await links.ready()
        assert links.watchdog._standing["consuming"] is consuming
        assert consuming.transport is not None
        channels = consuming.transport.connection.channels
        assert len([number for number, channel in channels.items() if number and channel]) == 1


@pytest.mark.timeout(120)
async def test_a_broker_short_of_memory_is_waited_for(
    owned_broker: OwnedBroker, capfd: pytest.CaptureFixture[str]
) -> None:
    async with watched(owned_broker.url, owned_broker.url) as links:
        await links.ready()
        async with alarm(owned_broker):
            await links.unready()
            blocked = links.watchdog._standing["publishing"]
            assert await is_blocked(blocked)
            assert not await is_blocked(links.watchdog._standing["consuming"])
            await asyncio.wait({links.running}, timeout=3 * SILENCE_S)
            assert not links.running.done()
        await links.ready()
        assert links.lives() == (1, 1)
        assert not await is_blocked(blocked)
    assert capfd.readouterr().out.count(logs.BROKER_BLOCKED) == 1


async def test_a_connection_that_nobody_blocks_is_not_blocked(amqp_url: str) -> None:
    async with connected(amqp_url) as bus:
        assert not await is_blocked(bus.connection)
    assert not await is_blocked(bus.connection)
