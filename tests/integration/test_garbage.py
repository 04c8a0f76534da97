"""No message may kill a connection or stay unanswered: whatever its properties and body, it ends in one event."""

import asyncio
import json
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

import pytest
from aio_pika.exceptions import AMQPError
from aiormq.abc import DeliveredMessage
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pamqp import decode

from tests.integration.conftest import Station
from tests.support.bus import Bus, Document, Moment, Raw, connected, properties
from tests.support.owner import Owner

BAD = b"\xff\xfe\x80"
QUEUE = "avatar.commands.v1.p00"
SPEAK = {"turnId": "t", "text": "Hello"}
NO_COMMAND = {"turnId": 1}


def nested(levels: int) -> Document:
    table: Document = {"x": 1}
    for _ in range(levels):
        table = {"t": table}
    return table


def arrays(levels: int) -> list[Any]:
    array: list[Any] = [1]
    for _ in range(levels):
        array = [array]
    return array


ODD: dict[str, Document] = {
    "nothing": {},
    "message_id that is not UTF-8": {"message_id": Raw(BAD)},
    "255 bytes of message_id that are not UTF-8": {"message_id": Raw(b"\xff" * 255)},
    "message_id of 255 bytes": {"message_id": "m" * 255},
    "header name that is not UTF-8": {"headers": {Raw(BAD): "x"}},
    "header value that is not UTF-8": {"headers": {"x": Raw(b"\xff" * 300), "traceparent": Raw(BAD)}},
    "time stamp beyond the calendar": {"timestamp": Moment.of(2**62)},
    "time stamp of the year 9999": {"timestamp": datetime(9999, 12, 31, tzinfo=UTC)},
    "time stamp 0": {"timestamp": datetime.fromtimestamp(0, tz=UTC)},
    "published-at-ms in seconds": {"headers": {"published-at-ms": 1_700_000_000}},
    "published-at-ms as text": {"headers": {"published-at-ms": "now"}},
    "published-at-ms in the far future": {"headers": {"published-at-ms": 2**62}},
    "time stamp beyond the calendar in a header": {"headers": {"when": Moment.of(2**62)}},
    "priority": {"priority": 255},
    "deep tables": {"headers": nested(200)},
    "deep arrays": {"headers": {"a": arrays(200)}},
    "tables in arrays in tables": {"headers": {"a": [nested(5), arrays(5), {Raw(BAD): [nested(2)]}]}},
    "a huge header": {"headers": {"x": "\x01" * 100_000}},
    "many headers": {"headers": {f"h{number}": "\x01" * 1000 for number in range(120)}},
    "long header names": {"headers": {Raw(b"\xff" * 128): 1, "n" * 128: 2}},
    "reply_to one of ours": {"reply_to": "avatar.parked", "correlation_id": "c"},
    "reply_to that is not UTF-8": {"reply_to": Raw(BAD), "correlation_id": Raw(BAD)},
    "255 bytes of correlation_id that are not UTF-8": {"correlation_id": Raw(b"\xff" * 255)},
    "correlation_id with control characters": {"correlation_id": "\x00" * 255},
    "other short strings that are not UTF-8": {
        name: Raw(BAD) for name in ("content_type", "content_encoding", "message_type", "app_id")
    },
}
NAMES = list(ODD)

BODIES: list[tuple[bytes, str]] = [
    (b"", "not_json"),
    (b"\xff\xfe", "not_utf8"),
    (b"{", "not_json"),
    (b"[" * 200_000, "not_json"),
    (b'{"a":' * 30_000 + b"1" + b"}" * 30_000, "not_json"),
    (b'{"a":' * 50_000 + b"1" + b"}" * 50_000, "too_large"),
    (b"[]", "invalid_field"),
    (b"null", "invalid_field"),
    (b'{"turnId":"t","text":"x","isFinal":"yes"}', "invalid_field"),
    (b'{"turnId":"t","text":"x","isFinal":1}', "invalid_field"),
    (b'{"turnId":null,"text":"x"}', "invalid_field"),
    (b'{"turnId":"t","text":"","isFinal":false}', "invalid_field"),
    (b'{"turnId":"t","text":"\\ud800"}', "not_json"),
    (b'{"turnId":"t","text":"' + b"x" * 256 * 1024 + b'"}', "too_large"),
    (b'{"type":"dance"}', "unknown_type"),
    (b'{"type":1}', "invalid_field"),
    (b'{"conversationId":"other","turnId":"t","text":"x"}', "conversation_mismatch"),
    (b'{"conversationId":7,"turnId":"t","text":"x"}', "invalid_field"),
    (b'{"conversationId":"","turnId":"t","text":"x"}', "invalid_conversation_id"),
]

WITH_TOKEN: list[bytes] = [
    b'{"type":"session.attach","token":"s3cret-t0ken"}',
    b'{"type":"session.attach","sessionId":5,"Token":"s3cret-t0ken"}',
    b'{"type":"dance","inner":[{"token":{"value":"s3cret-t0ken"}}]}',
    b'{"type":"session.attach","tok\\u0065n":"s3cret-t0ken"}',
    b'{"type":"session.attach","sessionId":"s","token":"s3cret-t0ken"',
    b'{"type":"session.attach","sessionId":"s","token":"s3cret-t0ken',
    b"{'type':'session.attach','sessionId':'s','token':'s3cret-t0ken'}",
    b'{"type":"session.attach","sessionId":"s","token": s3cret-t0ken}',
    '{"type":"session.attach","token":"s3cret-t0ken"}'.encode("utf-16"),
]


async def unharmed(bus: Bus, station: Station) -> None:
    """The worker has acknowledged everything, over the connections it has had all along."""
    await bus.ended(await bus.say("good", "g", "still here"))
    assert station.lives() == (1, 1)
    await station.settled()
    await station.gone()
    assert await bus.left_in(QUEUE) == 0


def headers_of(copy: DeliveredMessage) -> Document:
    return copy.header.properties.headers or {}


def missing(bus: Bus, type_: str, expected: Iterable[str] = NAMES) -> list[str]:
    """The cases that have no event of the type; there is none with two."""
    ended = [event["subject"] for event in bus.of(type_)]
    return [name for number, name in enumerate(expected) if ended.count(f"c{number}") != 1]


@pytest.mark.parametrize("odd", ["routing key", "message_id"])
async def test_what_is_not_utf_8_kills_the_connection_unless_it_is_decoded_leniently(
    bus: Bus, amqp_url: str, monkeypatch: pytest.MonkeyPatch, odd: str
) -> None:
    """Why `worker.amqp.lenient` is there."""
    monkeypatch.setitem(decode.METHODS, "shortstr", decode.short_str)
    died = asyncio.Event()
    async with connected(amqp_url) as victim:
        victim.connection.close_callbacks.add(lambda *_: died.set())
        queue = await victim.channel.declare_queue(exclusive=True)
        await queue.bind("amq.topic", "#")
        await Owner.of(victim.connection, prefetch=1, queue=queue.name)
        strange = properties(message_id=Raw(BAD)) if odd == "message_id" else None
        key = Raw(BAD) if odd == "routing key" else "c"
        await bus.publish(b"", key, exchange="amq.topic", properties=strange)
        await asyncio.wait_for(died.wait(), 20)


async def test_odd_properties_do_not_matter_to_speech(station: Station, bus: Bus) -> None:
    for number, name in enumerate(NAMES):
        await bus.publish(SPEAK, f"c{number}", properties=properties(**ODD[name]))
    await bus.until(lambda: not missing(bus, "speech.accepted"))
    await unharmed(bus, station)


async def test_a_message_with_odd_properties_can_be_parked(station: Station, bus: Bus) -> None:
    for number, name in enumerate(NAMES):
        await bus.publish(NO_COMMAND, f"c{number}", properties=properties(**ODD[name]))
    await bus.until(lambda: not missing(bus, "command.rejected"))
    copies = await bus.parked(len(NAMES))
    assert {bytes(copy.body) for copy in copies} == {json.dumps(NO_COMMAND).encode()}
    assert {headers_of(copy)["avatar-routing-key"] for copy in copies} == {f"c{number}" for number in range(len(NAMES))}
    await unharmed(bus, station)


async def test_a_request_with_odd_properties_is_answered_or_left_alone(station: Station, bus: Bus) -> None:
    queue = await bus.answer_queue()
    for number, name in enumerate(NAMES):
        odd = properties(**{"reply_to": queue} | ODD[name])
        await bus.publish({"type": "session.start"}, f"c{number}", properties=odd)
    await bus.until(lambda: not missing(bus, "session.ready"))
    await bus.until(lambda: len(bus.answers) == sum("reply_to" not in odd for odd in ODD.values()))
    await unharmed(bus, station)


async def test_ids_are_told_as_they_were_sent(station: Station, bus: Bus) -> None:
    odd = "n\u00b0\u00a01\n\x00" + "\x01" * 200
    await bus.send(
        "c", {"type": "session.start"}, message_id=odd, correlation_id=odd, reply_to=await bus.answer_queue()
    )
    assert (await bus.ended(odd))["type"] == "avatar.session.ready"
    await bus.until(lambda: bool(bus.answers))
    assert bus.answers[0].correlation_id == odd


@pytest.mark.parametrize("odd", [{"expiration": "abc"}, {"expiration": "-1"}, {"delivery_mode": 7}], ids=str)
async def test_what_the_broker_may_refuse(station: Station, bus: Bus, amqp_url: str, odd: Document) -> None:
    """RabbitMQ 3 refuses all of these, RabbitMQ 4 takes a strange delivery mode."""
    async with connected(amqp_url) as producer:
        try:
            await producer.publish(SPEAK, "c", properties=properties(**odd))
        except AMQPError as refusal:
            assert "PRECONDITION_FAILED" in str(refusal)  # noqa: PT017 - one of two ways it may go
        else:
            await bus.event("speech.accepted", "c")
    await unharmed(bus, station)


@pytest.mark.parametrize(
    ("routing_key", "shown"),
    [
        pytest.param(Raw(BAD), r"\xff\xfe\x80", id="not UTF-8"),
        pytest.param(Raw(b"\xff" * 255), (r"\xff" * 64)[:255], id="not UTF-8, 255 bytes"),
        pytest.param("k" * 255, "k" * 255, id="255 bytes"),
        pytest.param("", "", id="empty"),
        pytest.param("[/b]\x1b[31m", r"[/b]\x1b[31m", id="control characters"),
    ],
)
async def test_a_routing_key_that_is_no_conversation(station: Station, bus: Bus, routing_key: str, shown: str) -> None:
    await bus.publish(SPEAK, routing_key, properties=properties(message_id="m"))
    event = await bus.ended("m")
    assert (event["type"], event["subject"]) == ("avatar.command.rejected", "$invalid")
    assert (event["data"]["reason"], event["data"]["routingKey"]) == ("invalid_conversation_id", shown)
    (copy,) = await bus.parked()
    assert headers_of(copy)["avatar-routing-key"] == (shown if isinstance(routing_key, Raw) else routing_key)
    await unharmed(bus, station)


async def test_a_body_that_is_no_command(station: Station, bus: Bus) -> None:
    for number, (body, _) in enumerate(BODIES):
        await bus.publish(body, "c", properties=properties(message_id=f"{number}"))
    await bus.all_ended(f"{number}" for number in range(len(BODIES)))
    for number, (body, reason) in enumerate(BODIES):
        event = await bus.ended(f"{number}")
        assert (event["type"], event["data"]["reason"]) == ("avatar.command.rejected", reason), body[:80]
        assert event["data"]["errors"][0]["rule"]
    assert {bytes(copy.body) for copy in await bus.parked(len(BODIES))} == {body for body, _ in BODIES}
    await unharmed(bus, station)


async def test_no_token_is_kept(station: Station, bus: Bus) -> None:
    for number, body in enumerate(WITH_TOKEN):
        await bus.publish(body, "c", properties=properties(message_id=f"{number}"))
    await bus.all_ended(f"{number}" for number in range(len(WITH_TOKEN)))
    copies = await bus.parked(len(WITH_TOKEN))
    kept = [bytes(copy.body).replace(b"\0", b"") for copy in copies] + [
        repr(headers_of(copy)).encode() for copy in copies
    ]
    assert [text for text in kept if b"s3cret" in text] == []
    assert "s3cret" not in json.dumps(bus.events)


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**40), 2**40), st.floats(allow_nan=False), st.text(max_size=20)
)
KEYS = st.sampled_from(["conversationId", "type", "turnId", "text", "isFinal", "seq", "token", "handoff", "x"])
KINDS = st.sampled_from(["speak", "interrupt", "session.start", "session.attach", "session.end", "dance"])
DOCUMENTS = st.dictionaries(KEYS, st.one_of(VALUES, KINDS, st.sampled_from(["c", "t"])), max_size=6)
BODY = st.one_of(st.binary(max_size=200), DOCUMENTS.map(lambda document: json.dumps(document).encode()))
KEY = st.one_of(st.just(b"c"), st.binary(max_size=60), st.text(max_size=20).map(str.encode))


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(messages=st.lists(st.tuples(BODY, KEY), min_size=10, max_size=40))
async def test_garbage_ends_in_one_event_each(station: Station, bus: Bus, messages: list[tuple[bytes, bytes]]) -> None:
    """Several thousand draws of a message: each has its own id, so that no two are taken for one."""
    ids = [f"{number}-{len(bus.events)}" for number in range(len(messages))]
    for message_id, (body, key) in zip(ids, messages, strict=True):
        await bus.publish(body, Raw(key), properties=properties(message_id=message_id))
    await bus.all_ended(ids)
    await bus.drained(QUEUE)
    assert station.lives() == (1, 1)


async def test_what_nobody_thought_of_is_rejected(station: Station, bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise LookupError("nobody thought of it")

    monkeypatch.setattr("worker.amqp.reading.parse", fail)
    await bus.publish(SPEAK, "c")
    event = await bus.event("command.rejected", reason="invalid_field")
    assert event["subject"] == "$invalid"
    monkeypatch.undo()
    await unharmed(bus, station)
