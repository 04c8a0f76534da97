"""`/metrics` of a worker as Prometheus reads it."""

import asyncio

import aiohttp

from tests.acceptance.conftest import Simulator, StartWorker, Worker
from tests.support.bus import Bus
from tests.support.scrape import Sample, samples


async def scrape(worker: Worker) -> dict[Sample, float]:
    async with aiohttp.ClientSession() as http, http.get(f"{worker.ops_url}/metrics") as answer:
        assert answer.status == 200
        assert answer.content_type == "text/plain"
        return samples(await answer.text())


async def shows(worker: Worker, name: str, value: float, **labels: str) -> None:
    """Return once it does: what is counted is counted after it was told."""
    sample = (f"avatar_worker_{name}", tuple(sorted(labels.items())))
    async with asyncio.timeout(20):
        while (found := (await scrape(worker)).get(sample)) != value:
            assert found is None or found < value or not name.endswith("_total"), f"{sample} is {found}"
            await asyncio.sleep(0.05)


async def test_a_conversation_is_counted(start_worker: StartWorker, simulator: Simulator, bus: Bus) -> None:
    worker = await start_worker()
    await simulator.fault(kind="status", status=503, route="say-text", times=1)
    said = [await bus.say("c", "t1", "Hello there. ", final=False), await bus.say("c", "t1", "")]
    await bus.all_ended(said)
    stop = await bus.interrupt("c")
    bad = await bus.send("c", {"type": "fly"})
    await bus.all_ended([stop, bad])

    accepted = len(bus.of("speech.accepted"))
    await shows(worker, "speech_latency_seconds_count", accepted)
    await shows(worker, "api_calls_total", accepted, route="say-text", outcome="ok")
    await shows(worker, "commands_ended_total", len(said), event="avatar.speech.accepted", reason="")
    await shows(worker, "speech_retries_total", 1)
    await shows(worker, "commands_ended_total", 1, event="avatar.interrupt.done", reason="")
    await shows(worker, "commands_ended_total", 1, event="avatar.command.rejected", reason="unknown_type")
    await shows(worker, "interrupt_latency_seconds_count", 1)
    await shows(worker, "api_calls_total", 1, route="create", outcome="ok")
    await shows(worker, "api_calls_total", 1, route="say-text", outcome="not_taken")
    await shows(worker, "api_call_duration_seconds_count", 1, route="create")
    await shows(worker, "sessions_held", 1)
    await shows(worker, "partitions_owned", 1)
    await shows(worker, "breaker_open", 0)
    await shows(worker, "commands_in_hand", 0)
    await shows(worker, "commands_kept", 0)
    await shows(worker, "conversations_served", 0)
    (build,) = [labels for name, labels in await scrape(worker) if name == "avatar_worker_build_info"]
    assert build != (("version", "unknown"),)


async def test_what_is_held_shows(start_worker: StartWorker, simulator: Simulator, bus: Bus) -> None:
    worker = await start_worker()
    await simulator.fault(kind="hang", route="say-text", times=1)
    ids = [await bus.say("c", "t1", "One.", final=True)]
    await simulator.wait("say-text", stage="begun")
    ids += [await bus.say("c", "t2", f"{number} ", final=False) for number in range(5)]
    ids.append(await bus.say("c", "t2", ""))
    await shows(worker, "conversations_served", 1)
    # After a second the store has them in the broker's stead.
    await shows(worker, "commands_kept", len(ids))
    await shows(worker, "commands_in_hand", 0)
    await simulator.release()
    await bus.all_ended(ids)
    await shows(worker, "commands_kept", 0)
