"""Events are confirmed before the command is acknowledged, and no listener can stop speech."""

import asyncio
import json
import os
import sys
from asyncio.subprocess import PIPE
from pathlib import Path

import pytest
from aio_pika import Message
from aio_pika.abc import AbstractExchange, AbstractIncomingMessage

from tests.integration.conftest import Start, Station
from tests.support.bus import Bus, Document, eventually, properties
from tests.support.proxy import proxied
from tests.support.scrape import value
from worker.amqp import outbox

ROOT = Path(__file__).parents[2]
QUEUE = "avatar.commands.v1.p00"


@pytest.fixture
async def full(bus: Bus) -> str:
    """A listener's queue that takes one event and refuses all others."""
    queue = await bus.channel.declare_queue(
        exclusive=True, arguments={"x-max-length": 1, "x-overflow": "reject-publish"}
    )
    await bus.channel.declare_exchange("avatar.events", "topic", durable=True)
    await queue.bind("avatar.events", "#")
    await bus.publish(b"{}", queue.name, exchange="")
    return queue.name


async def test_a_command_is_acknowledged_after_its_event_is_confirmed(start: Start, bus: Bus, full: str) -> None:
    async with start(event_retry_s=3600) as station:
        await bus.say("c", "t1", "one")
        await station.said("one")
        await bus.event("session.ready")  # the listener that is not full has it, and has it again and again
        await bus.until(lambda: len(bus.of("session.ready")) > 1)
        await station.gone()
        assert await bus.left_in(QUEUE) == 1


async def test_a_full_listener_does_not_stop_speech(start: Start, bus: Bus, full: str) -> None:
    async with start(event_retry_s=0.5) as station:
        for number in range(3):
            await bus.say("c", f"t{number}", f"text {number}")
        await station.said("text 0", "text 1", "text 2")
        await station.settled()
        assert value(station.metrics.registry, "events_dropped_total") > 0
        await station.gone()
        assert await bus.left_in(QUEUE) == 0


async def test_a_listener_that_makes_room_in_time_misses_nothing(start: Start, bus: Bus, full: str) -> None:
    async with start(event_retry_s=3600) as station:
        message_id = await bus.say("c", "t", "one")
        await station.said("one")
        queue = await bus.channel.get_queue(full)
        heard: list[str] = []
        async with asyncio.timeout(20):
            while "avatar.speech.accepted" not in heard:
                message = await queue.get(no_ack=True, fail=False)
                if message is None:
                    await asyncio.sleep(0.02)
                elif message.body != b"{}":
                    heard.append(json.loads(message.body)["type"])
        assert heard[:3] == ["avatar.session.ready", "avatar.turn.started", "avatar.speech.accepted"]
        await bus.ended(message_id)


async def test_an_event_is_published_again_under_a_fresh_message_id(start: Start, bus: Bus, full: str) -> None:
    """Under one id the results of two attempts would be mixed up: tests/integration/test_traps_publishing.py."""
    copies: asyncio.Queue[AbstractIncomingMessage] = asyncio.Queue()
    queue = await bus.channel.declare_queue(exclusive=True)
    await queue.bind("avatar.events", "avatar.session.ready.*")
    await queue.consume(copies.put, no_ack=True)
    async with start(event_retry_s=3600), asyncio.timeout(20):
        await bus.say("c", "t1", "one")
        found = [await copies.get() for _ in range(3)]
    assert len({json.loads(copy.body)["id"] for copy in found}) == 1
    assert len({copy.message_id for copy in found}) == 3


async def test_copies_are_parked_one_after_the_other(
    station: Station, bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They keep the command's message_id, which several may have."""
    under_way: list[int] = [0]
    publish = outbox._publish

    async def counted(exchange: AbstractExchange, message: Message, routing_key: str, *, mandatory: bool) -> None:
        parking = routing_key == "avatar.parked"
        under_way.append(under_way[-1] + parking)
        await publish(exchange, message, routing_key, mandatory=mandatory)
        under_way.append(under_way[-1] - parking)

    monkeypatch.setattr(outbox, "_publish", counted)
    for number in range(10):
        await bus.send(f"c{number}", b"{", message_id="the same")
    await bus.until(lambda: len(bus.of("command.rejected")) == 10)
    assert len(await bus.parked(10)) == 10
    assert max(under_way) == 1


async def test_nobody_has_to_listen(start: Start, bus: Bus) -> None:
    async with start() as station:
        await bus.channel.exchange_delete("avatar.events")
        await bus.channel.declare_exchange("avatar.events", "topic", durable=True)
        await bus.say("c", "t", "one")
        await station.said("one")
        await station.settled()
        await station.gone()
        assert await bus.left_in(QUEUE) == 0
        assert bus.events == []


async def test_events_survive_the_loss_of_the_connection(start: Start, bus: Bus, amqp_url: str) -> None:
    async with proxied(amqp_url) as proxy, start(publish_url=proxy.url) as station:
        ids = []
        for number in range(200):
            ids.append(await bus.say(f"c{number}", "t", "x"))
            if number % 50 == 25:
                proxy.cut()
        await bus.all_ended(ids)
        assert station.lives()[0] == 1, "the consuming connection is another one"
        await station.ready()
        await station.settled()
        await station.gone()
        assert await bus.left_in(QUEUE) == 0


async def test_events_survive_the_loss_of_a_publishing_channel(station: Station, bus: Bus) -> None:
    """The broker closes a channel that publishes to an exchange that is gone; the link declares it again."""
    await bus.channel.exchange_delete("avatar.events")
    await bus.say("c", "t", "one")
    await eventually(lambda: station.publishing.count > 1)
    await station.ready()
    await bus.listen()
    await bus.ended(await bus.say("c", "t", "two"))
    await station.said("one", "two")
    assert station.consuming.count == 1
    await station.settled()
    await station.gone()
    assert await bus.left_in(QUEUE) == 0


async def test_a_parked_copy_says_what_it_was_and_why(station: Station, bus: Bus) -> None:
    sent = properties(
        message_id="m",
        correlation_id="corr",
        reply_to="somebody",
        content_type="application/json",
        headers={"x-mine": "kept", "number": 7, "traceparent": "00-" + "a" * 32 + "-" + "b" * 16 + "-01"},
    )
    await bus.publish(b'{"type":"dance"}', "conversation", exchange="avatar.interrupts", properties=sent)
    event = await bus.ended("m")
    assert event["traceparent"].startswith("00-aaaa")
    (copy,) = await bus.parked()
    kept = copy.header.properties
    headers: Document = kept.headers or {}
    assert (
        headers.items()
        >= {
            "x-mine": "kept",
            "number": 7,
            "avatar-reason": "unknown_type",
            "avatar-attempts": 0,
            "avatar-exchange": "avatar.interrupts",
            "avatar-routing-key": "conversation",
        }.items()
    )
    assert "must be one of" in headers["avatar-error"]
    assert headers["avatar-first-at-ms"] <= headers["avatar-parked-at-ms"]
    assert (kept.message_id, kept.correlation_id, kept.reply_to) == ("m", "corr", "somebody")
    assert kept.delivery_mode == 2
    assert kept.expiration is None


async def test_the_queue_of_parked_commands_is_made_again(station: Station, bus: Bus) -> None:
    await bus.channel.queue_delete("avatar.parked")
    ids = [await bus.send(f"c{number}", b"{") for number in range(5)]
    await bus.all_ended(ids)
    assert len(await bus.parked(5)) == 5
    assert station.lives() == (1, 1)


async def listed(amqp_url: str, *options: str) -> str:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "worker", "parked", "list", *options),
        env=os.environ | {"AMQP_URL": amqp_url, "COLUMNS": "200", "PYTHONPATH": str(ROOT)},
        cwd=Path(__file__).parent,
        stdout=PIPE,
    )
    out, _ = await process.communicate()
    assert process.returncode == 0
    return out.decode()


async def test_parked_commands_are_listed_and_stay(station: Station, bus: Bus, amqp_url: str) -> None:
    for key in ("first", "[/b] :smile:", "n\u00b0 \x1b[31m"):
        await bus.publish(b"{", key, properties=properties(message_id=f"id of {key}"))
    await bus.until(lambda: len(bus.of("command.rejected")) == 3)
    rows = [json.loads(line) for line in (await listed(amqp_url, "--json")).splitlines()]
    assert [row["routing_key"] for row in rows] == ["first", "[/b] :smile:", r"n° \x1b[31m"]
    assert {row["reason"] for row in rows} == {"not_json"}
    table = await listed(amqp_url)
    assert "[/b] :smile:" in table
    assert "\x1b[31m" not in table
    assert len((await listed(amqp_url, "--json", "--limit", "1")).splitlines()) == 1
    assert await bus.depth("avatar.parked") == 3
