"""`worker demo` as a process: it shows and checks what it promises, and leaves nothing behind."""

import asyncio
import contextlib
import json
import os
import shutil
import signal
from asyncio.subprocess import Process
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import aio_pika
import pytest

from tests.acceptance.conftest import EXAMPLES, KS, Simulator, finished, started
from worker.local.broker.base import free_port, wait_until
from worker.local.demo.record import Record, complaints

pytestmark = pytest.mark.timeout(120)

SAID = "All of it was said"
NOT_SAID = "Not all of it went well"


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    """The temporary folder of the demo and everything it starts: empty afterwards, and no process knows it any more."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    yield scratch
    assert list(scratch.iterdir()) == []
    assert running_in(scratch) == []


def running_in(scratch: Path) -> list[str]:
    """Command lines of the processes whose environment names the folder. Erlang's epmd is shared and stays."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.fsencode(scratch) in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
    return [command for command in found if "epmd" not in command]


def demo(scratch: Path, **env: str) -> AbstractAsyncContextManager[Process]:
    return started("-m", "worker", "demo", env={"TMPDIR": str(scratch), "COLUMNS": "100", **env}, cwd=scratch)


async def output_has(process: Process, text: str) -> None:
    """Read the output up to the line with this text."""
    assert process.stdout is not None
    async for line in process.stdout:
        if text in line.decode():
            return
    pytest.fail(f"the demo ended without saying {text!r}")


async def test_a_stranger_sees_three_avatars_speak(scratch: Path) -> None:
    """With nothing set: a private broker, the simulator, everything."""
    async with demo(scratch) as process:
        result = await finished(process)

    assert (result.code, result.err) == (0, ""), result
    assert SAID in result.out
    words = " ".join(result.out.replace("│", " ").split())
    assert "because it steers itself. When" in words, "without its mark-up"
    assert "1. The front wheel turns a little to the same side. 2." in words
    for text in ("sky.txt", "stopped.txt"):
        assert " ".join((EXAMPLES / "texts" / text).read_text().split()) in words
    assert "Once upon a time" in words
    assert "… interrupted" in words
    assert "let the echoes fly" not in words
    assert "3 create" in words
    assert "p50" in words


async def test_it_uses_the_broker_that_is_named(scratch: Path, amqp_url: str) -> None:
    async with demo(scratch, AMQP_URL=amqp_url) as process:
        result = await finished(process)

    assert (result.code, result.err) == (0, ""), result
    assert SAID in result.out
    assert "external" in result.out


async def test_ctrl_c_ends_the_sessions_and_everything_else(scratch: Path, amqp_url: str) -> None:
    async with await aio_pika.connect(amqp_url) as connection, connection.channel() as channel:
        events = await channel.declare_exchange("avatar.events", "topic", durable=True)
        queue = await channel.declare_queue(exclusive=True)
        await queue.bind(events, "#")

        async with demo(scratch, AMQP_URL=amqp_url) as process:
            await output_has(process, "avatar ")
            os.killpg(process.pid, signal.SIGINT)
            result = await finished(process)

        assert (result.code, result.err) == (130, "")
        assert "Nothing is left running" in result.out
        heard = []
        while message := await queue.get(no_ack=True, fail=False):
            heard.append(json.loads(message.body))
    ready = {event["data"]["sessionId"] for event in heard if event["type"] == "avatar.session.ready"}
    ended = {event["data"]["sessionId"] for event in heard if event["type"] == "avatar.session.ended"}
    assert ready == ended != set()


async def test_ctrl_c_while_the_broker_starts(scratch: Path) -> None:
    async with demo(scratch) as process:
        assert await asyncio.to_thread(wait_until, lambda: len(running_in(scratch)) > 1, within_s=30)
        os.killpg(process.pid, signal.SIGINT)
        result = await finished(process)

    assert (result.code, result.err) == (130, "")


async def test_killed_it_takes_its_processes_along(scratch: Path, amqp_url: str) -> None:
    async with demo(scratch, AMQP_URL=amqp_url) as process:
        await output_has(process, "avatar ")
        process.kill()
        assert await asyncio.to_thread(wait_until, lambda: not running_in(scratch), within_s=30)
    for leftover in scratch.glob("avatar-demo-*"):
        shutil.rmtree(leftover)


# ---------------------------------------------------------------- with the real API, played by a simulator


@pytest.fixture
def real_api(simulator: Simulator, amqp_url: str) -> dict[str, str]:
    return {
        "AMQP_URL": amqp_url,
        "AVATAR_BASE_URL": simulator.api_url,
        "AVATAR_KS": KS,
        "AVATAR_ID": "my-avatar",
        "SESSION_END_WAIT_S": "1",
    }


async def test_with_a_kaltura_session_it_uses_the_real_api_with_two_sessions(
    scratch: Path, real_api: dict[str, str], simulator: Simulator
) -> None:
    async with demo(scratch, **real_api) as process:
        result = await finished(process)

    assert (result.code, result.err) == (0, ""), result
    assert SAID in result.out
    assert "real Avatar API" in result.out
    sessions = (await simulator.transcript())["sessions"]
    assert [(session["avatar_id"], session["ended_by"]) for session in sessions] == [("my-avatar", "request")] * 2


async def test_what_was_not_said_is_told(scratch: Path, real_api: dict[str, str], simulator: Simulator) -> None:
    await simulator.fault(kind="status", status=400, route="say-text")

    async with demo(scratch, **real_api) as process:
        result = await finished(process)

    assert result.code == 1, result
    assert NOT_SAID in result.out
    assert SAID not in result.out


async def test_a_worker_that_cannot_start_shows_why(scratch: Path, real_api: dict[str, str]) -> None:
    async with demo(scratch, **real_api | {"SESSION_IDLE_S": "soon"}) as process:
        result = await finished(process)

    assert result.code == 1
    assert "the worker ended with exit code 2" in result.out
    assert "SESSION_IDLE_S" in result.out


async def test_a_kaltura_session_without_an_avatar_is_refused(scratch: Path) -> None:
    async with demo(scratch, AVATAR_KS=KS) as process:
        result = await finished(process)

    assert result.code == 2
    assert "AVATAR_ID" in result.out


async def test_a_broker_that_does_not_answer_is_told_without_the_password(scratch: Path) -> None:
    async with demo(scratch, AMQP_URL=f"amqp://somebody:secret@127.0.0.1:{free_port()}/") as process:
        result = await finished(process)

    assert result.code == 1
    assert "AMQP_URL" in result.out
    assert "secret" not in result.out + result.err


# ---------------------------------------------------------------- the verdict


def event(kind: str, *commands: str, **data: Any) -> dict[str, Any]:
    return {"type": f"avatar.{kind}", "data": {"commandIds": list(commands), "turnId": "t1", **data}}


@pytest.fixture
def record() -> Record:
    """One turn of two tokens, said and completed."""
    record = Record({"c": "ada"})
    conversation = record.conversations["c"]
    record.published(conversation, "m1", {"turnId": "t1", "text": "One", "isFinal": False})
    record.published(conversation, "m2", {"turnId": "t1", "text": " two.", "isFinal": True})
    record.heard(conversation, event("speech.accepted", "m1", "m2", text="One two.", latencyMs=5))
    record.heard(conversation, event("turn.completed"))
    return record


def test_a_turn_said_once_is_right_however_it_was_cut(record: Record) -> None:
    assert complaints(record, {"c": [("t1", "One two.")]}) == []
    assert complaints(record, {"c": [("t1", "One"), ("t1", "two.")]}) == []


def test_mark_up_is_not_said(record: Record) -> None:
    record.published(record.conversations["c"], "m3", {"turnId": "t1", "text": " **Three**, 🎉", "isFinal": True})
    record.heard(record.conversations["c"], event("speech.accepted", "m3", text="Three,", latencyMs=5))
    assert complaints(record, {"c": [("t1", "One two. "), ("t1", "Three,")]}) == []


@pytest.mark.parametrize(
    "said",
    [
        pytest.param([], id="nothing"),
        pytest.param([("t1", "One")], id="not all"),
        pytest.param([("t1", "One two."), ("t1", "One two.")], id="twice"),
        pytest.param([("t1", " two."), ("t1", "One")], id="in another order"),
        pytest.param([("t1", "One two."), ("t2", "Three.")], id="something else"),
    ],
)
def test_a_turn_said_otherwise_is_wrong(record: Record, said: list[tuple[str, str]]) -> None:
    assert complaints(record, {"c": said})


def test_a_command_ends_exactly_once(record: Record) -> None:
    said = {"c": [("t1", "One two.")]}
    record.heard(record.conversations["c"], event("speech.discarded", "m2"))
    (complaint,) = complaints(record, said)
    assert "m2 has 2 terminal events" in complaint

    record.published(record.conversations["c"], "m3", {"type": "session.end"})
    assert any("m3 has 0 terminal events" in complaint for complaint in complaints(record, said))


def test_an_interrupted_turn_may_end_early_but_only_where_somebody_interrupted(record: Record) -> None:
    conversation = record.conversations["c"]
    record.published(conversation, "m3", {"turnId": "t2", "text": "Three", "isFinal": False})
    record.published(conversation, "m4", {"turnId": "t2", "text": " four.", "isFinal": True})
    record.heard(conversation, event("speech.accepted", "m3", turnId="t2", text="Three", latencyMs=5))
    record.heard(conversation, event("speech.discarded", "m4", turnId="t2"))
    record.heard(conversation, event("turn.interrupted", turnId="t2"))
    said = [("t1", "One two.")]

    (complaint,) = complaints(record, {"c": [*said, ("t2", "Three")]})
    assert "nobody interrupted" in complaint
    record.published(conversation, "m5", {"type": "interrupt"})
    record.heard(conversation, event("interrupt.done", "m5"))
    assert complaints(record, {"c": [*said, ("t2", "Three")]}) == []
    assert complaints(record, {"c": [*said, ("t2", "Three fo")]}) == []
    assert complaints(record, {"c": said}) != []
    assert complaints(record, {"c": [*said, ("t2", "four.")]}) != []
    assert complaints(record, {"c": [("t2", "Three"), *said]}) != []
