"""`tail` as a person types it."""

import asyncio
import json
import signal
from asyncio.subprocess import Process
from pathlib import Path

from schemas.routes import EVENTS
from tests.acceptance.conftest import StartWorker, finished, started
from tests.support.bus import Bus


async def line_of(process: Process, event_type: str) -> str:
    """The next line with this event; what was published before it listened is not heard."""
    assert process.stdout is not None
    async with asyncio.timeout(20):
        while event_type not in (line := (await process.stdout.readline()).decode()):
            assert line, "it has ended"
    return line


async def test_events_are_shown_as_they_come(
    start_worker: StartWorker, bus: Bus, amqp_url: str, tmp_path: Path
) -> None:
    await start_worker()
    env = {"AMQP_URL": amqp_url}
    async with (
        started("-m", "worker", "tail", env=env, cwd=tmp_path) as everything,
        started("-m", "worker", "tail", "--json", "--conversation", "c", env=env, cwd=tmp_path) as one,
    ):
        for process in (everything, one):
            assert process.stderr is not None
            assert await asyncio.wait_for(process.stderr.readline(), 20) == b"listening; Ctrl-C ends\n"
        await bus.publish(b"no event", "x", exchange=EVENTS, mandatory=False)
        await bus.all_ended([await bus.say("other", "t", "Not for this one."), await bus.say("c", "t", "Hello.")])
        shown = [await line_of(everything, "speech.accepted") for _ in range(2)]
        assert any(" c  {" in line and '"text": "Hello."' in line for line in shown)
        event = json.loads(await line_of(one, "speech.accepted"))
        assert (event["subject"], event["data"]["text"]) == ("c", "Hello.")
        everything.send_signal(signal.SIGINT)
        left = await finished(everything)
        assert (left.code, left.err) == (130, "")


async def test_without_events_it_says_so(amqp_url: str, tmp_path: Path) -> None:
    async with started("-m", "worker", "tail", env={"AMQP_URL": amqp_url}, cwd=tmp_path) as process:
        found = await finished(process)
    assert found.code == 2
    assert "no exchange avatar.events" in found.err
