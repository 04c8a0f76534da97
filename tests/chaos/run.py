"""One run: everything is started, attacked, healed, waited for and judged."""

import asyncio
import json
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import aio_pika
import aiohttp

from schemas import routes
from tests.chaos import faults, judge
from tests.chaos.faults import Demand, Fault, Saboteur
from tests.chaos.fleet import Simulator, Worker, running
from tests.chaos.judge import Evidence, Verdict
from tests.chaos.proxy import Proxy
from tests.chaos.traffic import Listener, Producers
from worker.local.broker import Broker, OwnedBroker

PARTITIONS = 8
WORKERS = 3
_QUIET_S = 120.0


@dataclass(frozen=True, slots=True)
class Options:
    """How hard. `rate` in chunks a second, over all conversations."""

    seed: int
    seconds: float
    conversations: int = 30
    rate: float = 60.0
    latency_ms: float = 60.0
    keep: Path | None = None
    """A folder for logs, transcript and events; default: a temporary one."""


async def run(broker: Broker, options: Options, demand: Demand, tell: Callable[[str], None]) -> Verdict:
    """Wipes the broker first."""
    await wipe(broker.url)
    async with AsyncExitStack() as stack:
        folder = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="avatar-chaos-")))
        folder.mkdir(parents=True, exist_ok=True)
        http = await stack.enter_async_context(aiohttp.ClientSession())
        simulator = Simulator(folder, http, options.latency_ms)
        await stack.enter_async_context(running(simulator))
        await simulator.listening()
        ledger = folder / "ledger.db"
        settings = {
            "AVATAR_BASE_URL": simulator.base_url,
            "AVATAR_KS": "chaos-ks",
            "AVATAR_ID": "chaos",
            "STORE_URL": f"sqlite:///{ledger}",
            "PARTITIONS": str(PARTITIONS),
            "HEARTBEAT_S": str(faults.HEARTBEAT_S),
            "SPEECH_MAX_AGE_S": "300",
            "KEEP_ALIVE_S": "2",
            "LOG_FORMAT": "json",
        }
        workers = []
        for number in range(WORKERS):
            proxy = await stack.enter_async_context(Proxy(urlsplit(broker.url).port or 5672).running())
            worker = Worker(f"w{number}", folder, proxy, broker.url, settings)
            await stack.enter_async_context(running(worker))
            workers.append(worker)
        listener = Listener(broker.url)
        listening = await stack.enter_async_context(_task(listener.run()))
        await listener.listening.wait()
        for worker in workers:
            if not await worker.ready(http):
                raise worker.fail("was not ready in time")
        producers = Producers(broker.url, options.seed, conversations=options.conversations, rate=options.rate)
        owned = broker if isinstance(broker, OwnedBroker) else None
        begun = time.monotonic()

        def note(what: str) -> None:
            tell(f"  {time.monotonic() - begun:6.1f} s  {what}")

        saboteur = Saboteur(options.seed, workers, owned, simulator, listener, ledger, http, note)
        await simulator.control("POST", "faults", faults.api_faults(options.seed))
        producing = await stack.enter_async_context(_task(producers.run()))
        await saboteur.run(faults.plan(options.seed, demand, options.seconds), demand)
        note("healed; waiting for the rest")
        await simulator.control("DELETE", "faults")
        producers.stop()
        async with asyncio.timeout(_QUIET_S):
            await producing
        quiet = await _quiet(producers, listener)
        note("quiet" if quiet else f"not quiet after {_QUIET_S:.0f} s")
        for worker in workers:
            await saboteur_end(worker, note)
        await asyncio.sleep(0.5)
        listening.cancel()
        left = await _left(broker.url)
        parked = await _parked(broker.url)
        transcript = await simulator.control("GET", "transcript")
        evidence = Evidence(
            producers.commands,
            listener.arrivals,
            listener.ended,
            transcript,
            saboteur.happened,
            parked,
            left,
            await saboteur.hits(),
        )
        if options.keep:
            (folder / "transcript.json").write_text(json.dumps(transcript))
            (folder / "events.json").write_text(json.dumps([(one.at, one.event) for one in listener.arrivals]))
        verdict = judge.judge(evidence, demand)
        verdict.broken["ended by themselves"] = saboteur.gave_up
        verdict.figures["published again"] = dict(producers.resent)
        verdict.figures["exit codes"] = dict(saboteur.exit_codes)
        return verdict


async def saboteur_end(worker: Worker, note: Callable[[str], None]) -> None:
    """A last SIGTERM, in peace: exit code 0."""
    import signal

    worker.send(signal.SIGTERM)
    code = await worker.ended(40)
    if code:
        note(f"{worker.name} ended with {code}")


async def _quiet(producers: Producers, listener: Listener) -> bool:
    """Wait until every command has ended and nothing is heard any more."""
    deadline = time.monotonic() + _QUIET_S
    while time.monotonic() < deadline:
        if all(command.message_id in listener.ended for command in producers.commands):
            heard = len(listener.arrivals)
            await asyncio.sleep(3)
            if len(listener.arrivals) == heard:
                return True
        await asyncio.sleep(0.2)
    return False


async def wipe(url: str) -> None:
    """Delete what earlier runs left."""
    connection = await aio_pika.connect(url)
    async with connection, connection.channel() as channel:
        for queue in (
            Listener.QUEUE,
            routes.PARKED,
            routes.DEAD,
            "avatar.topology",
            *(routes.partition_queue(number) for number in range(routes.MAX_PARTITIONS)),
        ):
            await channel.queue_delete(queue)
        for exchange in (routes.COMMANDS, "avatar.commands.v1.hash", routes.INTERRUPTS, routes.EVENTS, routes.DEAD):
            await channel.exchange_delete(exchange)


async def _left(url: str) -> dict[str, int]:
    connection = await aio_pika.connect(url)
    async with connection, connection.channel() as channel:
        names = [*map(routes.partition_queue, range(PARTITIONS)), routes.DEAD]
        queues = [await channel.declare_queue(name, passive=True) for name in names]
        return {queue.name: queue.declaration_result.message_count or 0 for queue in queues}


async def _parked(url: str) -> list[str]:
    connection = await aio_pika.connect(url)
    async with connection, connection.channel() as channel:
        queue = await channel.get_queue(routes.PARKED)
        found = []
        while (message := await queue.get(fail=False)) is not None:
            found.append(message.message_id or "")
        return found


@asynccontextmanager
async def _task(work: object) -> AsyncIterator["asyncio.Task[None]"]:
    task: asyncio.Task[None] = asyncio.create_task(work)  # type: ignore[arg-type]
    try:
        yield task
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await task


_ = Fault
