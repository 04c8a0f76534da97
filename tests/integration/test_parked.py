"""What was given up is listed, sent again in a life of its own, dropped; a conversation is explained."""

import asyncio
import json
import os
import sys
from asyncio.subprocess import PIPE
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.integration.conftest import Start, Station
from tests.support.bus import Bus, Document, connected, properties

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Ran:
    """What a command left behind."""

    code: int | None
    out: str
    err: str

    @property
    def rows(self) -> list[Document]:
        return [json.loads(line) for line in self.out.splitlines()]


Command = Callable[..., Coroutine[Any, Any, Ran]]


@pytest.fixture
def store_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'store.db'}"


@pytest.fixture
def command(amqp_url: str, store_url: str, tmp_path: Path) -> Command:
    async def run(*arguments: str, url: str = amqp_url) -> Ran:
        settings = {"AMQP_URL": url, "STORE_URL": store_url, "COLUMNS": "300", "PYTHONPATH": str(ROOT)}
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "worker", *arguments),
            env=os.environ | settings,
            cwd=tmp_path,
            stdout=PIPE,
            stderr=PIPE,
        )
        out, err = await process.communicate()
        return Ran(process.returncode, out.decode(), err.decode())

    return run


async def lived(bus: Bus, ids: Iterable[str], lives: int) -> None:
    """Return once each of these commands has ended so often."""
    await bus.until(lambda: all(len(bus.terminal()[id_]) == lives for id_ in ids))


async def failed_turn(bus: Bus, station: Station, conversation_id: str, turn_id: str = "t") -> list[str]:
    """A turn of three chunks whose first is refused; all three are parked."""
    word = f"bad {conversation_id}. "
    station.avatar.refuses.add(word)
    ids = [await bus.say(conversation_id, turn_id, word, final=False)]
    await bus.ended(ids[0])
    ids.append(await bus.say(conversation_id, turn_id, "two ", final=False))
    ids.append(await bus.say(conversation_id, turn_id, "three."))
    await bus.all_ended(ids)
    return ids


async def test_replay_shows_first_and_then_speaks_the_whole_turn(
    start: Start, bus: Bus, command: Command, store_url: str
) -> None:
    async with start(store_url=store_url) as station:
        ids = await failed_turn(bus, station, "c")
        others = await failed_turn(bus, station, "d")
        first = {id_: event_ids.copy() for id_, event_ids in bus.terminal().items()}
        station.avatar.said.clear()
        station.avatar.refuses.clear()

        shown = await command("parked", "replay", "--reason", "refused", "--conversation", "c", "--json")
        assert [row["message_id"] for row in shown.rows] == ids, "one was refused, its turn goes with it"
        assert "add --yes" in (await command("parked", "replay", "--conversation", "c")).out
        assert await bus.depth("avatar.parked") == 6
        assert station.avatar.said == []

        done = await command("parked", "replay", "--conversation", "c", "--yes", "--json")
        assert (done.code, [row["message_id"] for row in done.rows]) == (0, ids)
        await lived(bus, ids, 2)
        assert "".join(piece.text for piece in station.avatar.said) == "bad c. two three."
        again = [bus.terminal()[id_] - first[id_] for id_ in ids]
        told = [event for event in bus.events if {event["id"]} in again]
        assert {event["type"] for event in told} == {"avatar.speech.accepted"}
        assert [id_ for event in told for id_ in event["data"]["commandIds"]] == ids
        await bus.event("turn.completed", "c")
        assert len(bus.of("turn.completed", "c")) == 1
        assert [row["message_id"] for row in (await command("parked", "list", "--json")).rows] == others


async def test_looking_leaves_everything_in_its_order(bus: Bus, station: Station, command: Command) -> None:
    """More than a map of Erlang keeps in order by itself, which is 32."""
    ids = [await bus.send("c", {"type": "fly", "number": number}) for number in range(60)]
    await bus.all_ended(ids)
    parked = [row["message_id"] for row in (await command("parked", "list", "--json")).rows]
    assert sorted(parked) == sorted(ids)
    for arguments in (("list",), ("list", "--limit", "5"), ("replay",), ("drop", "--age", "3600", "--yes")):
        await command("parked", *arguments)
        again = [row["message_id"] for row in (await command("parked", "list", "--json")).rows]
        assert again == parked, arguments


async def test_a_life_ends_once_and_the_next_is_another(
    start: Start, bus: Bus, command: Command, store_url: str
) -> None:
    async with start(store_url=store_url) as station:
        ids = await failed_turn(bus, station, "c")
        for replays in (1, 2):
            await command("parked", "replay", "--yes")
            await lived(bus, ids, 1 + replays)
            await station.settled()
            rows = (await command("parked", "list", "--json")).rows
            assert [(row["message_id"], row["replays"]) for row in rows] == [(id_, replays) for id_ in ids]
            assert {row["reason"] for row in rows} <= {"refused", "turn_failed"}
        assert len(bus.of("turn.failed", "c")) == 3

        # The same once more, as a producer or a replay that was cut short might: told again, neither said nor parked.
        said, heard = len(station.avatar.said), len(bus.of("speech.failed"))
        headers = {"avatar-replay": 2, "avatar-replay-run": "another"}
        body = {"turnId": "t", "text": "bad c. ", "isFinal": False}
        await bus.send("c", body, message_id=ids[0], headers=headers)
        await bus.until(lambda: len(bus.of("speech.failed")) > heard)
        assert len(bus.terminal()[ids[0]]) == 3
        assert len(station.avatar.said) == said
        assert await bus.depth("avatar.parked") == 3


async def test_a_replayed_command_is_published_as_it_was_but_new(station: Station, bus: Bus, command: Command) -> None:
    sent = properties(
        message_id="m",
        correlation_id="corr",
        content_type="application/json",
        timestamp=None,
        headers={"x-mine": "kept", "published-at-ms": 1_600_000_000_000, "traceparent": "00-" + "a" * 32 + "-b-01"},
    )
    await bus.publish(b'{"type":"dance"}', "conversation", properties=sent)
    await bus.ended("m")
    await bus.channel.declare_queue("tap", exclusive=True)
    tap = await bus.channel.get_queue("tap")
    await tap.bind("avatar.commands", "#")
    assert (await command("parked", "replay", "--yes")).code == 0
    copy = await tap.get(no_ack=True)
    assert copy is not None
    assert (copy.routing_key, copy.exchange, copy.body) == ("conversation", "avatar.commands", b'{"type":"dance"}')
    assert (copy.message_id, copy.correlation_id, copy.delivery_mode) == ("m", "corr", 2)
    assert copy.headers.keys() == {"x-mine", "published-at-ms", "traceparent", "avatar-replay", "avatar-replay-run"}
    assert copy.headers["avatar-replay"] == 1
    published = copy.headers["published-at-ms"]
    assert isinstance(published, int)
    assert published > 1_700_000_000_000
    assert copy.timestamp is not None
    await lived(bus, ["m"], 2)
    assert {event["type"] for event in bus.events} == {"avatar.command.rejected"}


async def test_what_cannot_be_replayed_stays_and_says_why(station: Station, bus: Bus, command: Command) -> None:
    attach = {"type": "session.attach", "sessionId": 5, "token": "s3cret"}
    await bus.ended(await bus.send("c", attach))
    for reason, ended in (("dead_lettered", "avatar.speech.accepted"), ("", ""), ("dead_lettered", "avatar.x.failed")):
        headers = {"avatar-reason": reason, "avatar-ended": ended, "avatar-routing-key": "d"}
        odd = properties(headers=headers, delivery_mode=2)
        await bus.publish({"turnId": "t", "text": "x"}, "avatar.parked", exchange="", properties=odd)
    done = await command("parked", "replay", "--yes", "--json")
    assert sorted(row["stays_because"] for row in done.rows) == [
        "",
        "it had ended before, as avatar.speech.accepted",
        "its token was taken out; attach the session again",
        "no worker parked it",
    ]
    await station.said("x")
    assert await bus.depth("avatar.parked") == 3
    assert "taken out" in (await command("parked", "list")).out


async def test_dropped_are_those_that_were_meant(station: Station, bus: Bus, command: Command) -> None:
    for conversation_id, body in (("a", b"{"), ("a", b"[]"), ("b", b"{")):
        await bus.ended(await bus.send(conversation_id, body))
    assert len((await command("parked", "list", "--json", "--reason", "not_json")).rows) == 2
    assert (await command("parked", "list", "--json", "--age", "3600")).rows == []
    assert len((await command("parked", "list", "--json", "--age", "0")).rows) == 3
    shown = await command("parked", "drop", "--conversation", "a", "--reason", "not_json")
    assert "1 would be dropped" in shown.out
    assert await bus.depth("avatar.parked") == 3
    dropped = await command("parked", "drop", "--conversation", "a", "--reason", "not_json", "--yes", "--json")
    assert [row["reason"] for row in dropped.rows] == ["not_json"]
    left = (await command("parked", "list", "--json")).rows
    assert [(row["conversation_id"], row["reason"]) for row in left] == [("a", "invalid_field"), ("b", "not_json")]


async def test_what_the_broker_does_not_take_stays_parked(station: Station, bus: Bus, command: Command) -> None:
    ids = [await bus.send(f"c{number}", b"{") for number in range(2)]
    await bus.all_ended(ids)
    await station.gone()
    full = await bus.channel.declare_queue(
        exclusive=True, arguments={"x-max-length": 0, "x-overflow": "reject-publish"}
    )
    await full.bind("avatar.commands", "#")
    done = await command("parked", "replay", "--yes", "--json")
    assert (done.code, done.out) == (1, "")
    assert f"did not take {ids[0]}" in done.err
    assert [row["message_id"] for row in (await command("parked", "list", "--json")).rows] == ids


async def test_one_at_a_time_looks_through_the_parked(
    station: Station, bus: Bus, command: Command, amqp_url: str
) -> None:
    async with connected(amqp_url) as other:
        await other.channel.declare_queue("avatar.parked.mutex", exclusive=True)
        first = asyncio.create_task(command("parked", "list"))
        await asyncio.wait([first], timeout=2)
        assert not first.done()
    assert (await first).code == 0


async def test_a_conversation_is_explained(start: Start, bus: Bus, command: Command, store_url: str) -> None:
    async with start(store_url=store_url) as station:
        ids = await failed_turn(bus, station, "c")
        await bus.ended(await bus.say("c", "u", "fine."))
        station.avatar.gate.clear()
        await bus.say("c", "v", "hanging.")
        await station.said("bad c. ", "fine.", "hanging.")

        told = json.loads((await command("explain", "c", "--json")).out)
        assert (told["partition"], told["epoch"], told["waiting_in_partition"]) == (0, 1, 0)
        assert (told["session"]["session_id"], told["session"]["owner"], told["session"]["held"]) == ("s", "w1", True)
        states = {turn["turn_id"]: turn["state"] for turn in told["turns"]}
        assert states == {"t": "failed", "u": "closed", "v": "open"}
        assert (told["attempt"]["turn_id"], told["attempt"]["text_length"]) == ("v", len("hanging."))
        assert told["ended"] == 4
        assert told["last_ends"][0]["event"] == "avatar.speech.accepted"
        assert [row["message_id"] for row in told["parked"]] == ids

        shown = await command("explain", "c")
        assert shown.code == 0
        for text in ("avatar.commands.v1.p00, epoch 1", "w1 holds it until", "8 characters of turn v", "turn_failed"):
            assert text in shown.out
        assert "hanging" not in shown.out


async def test_a_conversation_nobody_knows(start: Start, command: Command, store_url: str) -> None:
    async with start(store_url=store_url):
        told = json.loads((await command("explain", "nobody", "--json")).out)
        assert (told["known"], told["session"], told["turns"], told["parked"]) == (False, None, [], [])
        without_broker = await command("explain", "nobody", url="amqp://127.0.0.1:1/")
        assert without_broker.code == 1
        assert "no broker at 127.0.0.1:1" in without_broker.out


async def test_explaining_makes_no_store(command: Command, tmp_path: Path) -> None:
    ran = await command("explain", "c")
    assert (ran.code, "there is no store" in ran.err) == (2, True)
    assert list(tmp_path.iterdir()) == []
    assert (await command("explain", "not an id")).code == 2
