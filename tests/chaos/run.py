"""One run: everything is started, attacked, healed, waited for and judged."""

import asyncio
import json
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import aio_pika
import aiohttp

from schemas import routes
from tests.chaos import faults, judge, stores
from tests.chaos.evidence import Evidence, Verdict
from tests.chaos.faults import Demand, Fault, Saboteur
from tests.chaos.fleet import Simulator, Worker, running
from tests.chaos.proxy import Proxy
from tests.chaos.stores import Store
from tests.chaos.traffic import Listener, Producers
from tests.support import brokers
from tests.support.postgres import OwnedPostgres, Postgres
from worker.local.broker import Broker, OwnedBroker

PARTITIONS = 8
WORKERS = 3
_QUIET_S = 120.0


@dataclass(frozen=True, slots=True)
class Options:
    """How hard. `rate` in chunks a second, over all conversations. `keep`: a folder for logs, transcript and events.

    `postgres`: where the workers' store is; None: a file.
    """

    seed: int
    seconds: float
    conversations: int = 30
    rate: float = 60.0
    latency_ms: float = 60.0
    keep: Path | None = None
    postgres: Postgres | None = None


@dataclass(frozen=True, slots=True)
class _Stage:
    """Who plays."""

    broker: Broker
    url: str
    http: aiohttp.ClientSession
    simulator: Simulator
    workers: list[Worker]
    listener: Listener
    store: Store


async def run(broker: Broker, options: Options, demand: Demand, tell: Callable[[str], None]) -> Verdict:
    """Plays on an empty virtual host, or wipes a broker that was named."""
    if options.postgres is None:
        demand = demand.without(Fault.STORE)
    async with AsyncExitStack() as stack:
        url = await stack.enter_async_context(brokers.empty(broker, also=[Listener.QUEUE]))
        folder = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="avatar-chaos-")))
        stage = await stack.enter_async_context(_stage(broker, url, options, folder))
        begun = time.monotonic()

        def note(what: str) -> None:
            tell(f"  {time.monotonic() - begun:6.1f} s  {what}")

        return await _play(stage, options, demand, note)


@asynccontextmanager
async def _stage(broker: Broker, url: str, options: Options, folder: Path) -> AsyncIterator[_Stage]:
    """Simulator, listener and workers, all at work."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    async with AsyncExitStack() as stack:
        http = await stack.enter_async_context(aiohttp.ClientSession())
        simulator = Simulator(folder, http, options.latency_ms)
        await stack.enter_async_context(running(simulator))
        await simulator.listening()
        store = await stack.enter_async_context(stores.opened(options.postgres, folder))
        settings = {
            "AVATAR_BASE_URL": simulator.base_url,
            "AVATAR_KS": "chaos-ks",
            "AVATAR_ID": "chaos",
            "STORE_URL": store.url,
            "PARTITIONS": str(PARTITIONS),
            "HEARTBEAT_S": str(faults.HEARTBEAT_S),
            "SPEECH_MAX_AGE_S": "300",
            "KEEP_ALIVE_S": "2",
            "LOG_FORMAT": "json",
        }
        workers = []
        for number in range(WORKERS):
            proxy = await stack.enter_async_context(Proxy(urlsplit(url).port or 5672).running())
            worker = Worker(f"w{number}", folder, proxy, url, settings)
            await stack.enter_async_context(running(worker))
            workers.append(worker)
        for worker in workers:
            if not await worker.ready(http):
                raise worker.fail("was not ready in time")
        yield _Stage(broker, url, http, simulator, workers, Listener(url), store)


async def _play(stage: _Stage, options: Options, demand: Demand, note: Callable[[str], None]) -> Verdict:
    producers = Producers(stage.url, options.seed, conversations=options.conversations, rate=options.rate)
    saboteur = Saboteur(
        options.seed,
        stage.workers,
        broker=stage.broker if isinstance(stage.broker, OwnedBroker) else None,
        postgres=options.postgres if isinstance(options.postgres, OwnedPostgres) else None,
        simulator=stage.simulator,
        listener=stage.listener,
        store=stage.store,
        http=stage.http,
        tell=note,
    )
    # A producer or a listener that fails is no fault of the fleet: it ends the run.
    async with asyncio.TaskGroup() as group:
        listening = group.create_task(stage.listener.run())
        await stage.listener.listening.wait()
        await stage.simulator.control("POST", "faults", faults.api_faults(options.seed))
        producing = group.create_task(producers.run())
        begun = time.monotonic()
        # What needs the store can happen only while it is there.
        away_s = faults.STORE_S * demand.counts.get(Fault.STORE, 0)
        await saboteur.run(faults.plan(options.seed, demand, options.seconds + away_s), demand)
        seconds = time.monotonic() - begun
        note("healed; waiting for the rest")
        await stage.simulator.control("DELETE", "faults")
        producers.stop()
        async with asyncio.timeout(_QUIET_S):
            await producing
        quiet = await _quiet(producers, stage.listener)
        note("quiet" if quiet else f"not quiet after {_QUIET_S:.0f} s")
        for worker in stage.workers:
            await saboteur.dismiss(worker)
        heard = len(stage.listener.arrivals)
        listening.cancel()
    verdict = judge.judge(await _evidence(stage, options.keep, producers, saboteur, seconds), demand)
    verdict.figures["published again"] = dict(producers.resent)
    verdict.broken["ended badly"] = saboteur.ended_badly
    verdict.broken["not quiet"] = [] if quiet else [f"{heard} events, and still no end after {_QUIET_S:.0f} s"]
    return verdict


async def _evidence(
    stage: _Stage, keep: Path | None, producers: Producers, saboteur: Saboteur, seconds: float
) -> Evidence:
    listener = stage.listener
    transcript = await stage.simulator.control("GET", "transcript")
    kept, held = await stores.kept(stage.store)
    if keep:
        (keep / "transcript.json").write_text(json.dumps(transcript))
        (keep / "events.json").write_text(json.dumps([(one.at, one.event) for one in listener.arrivals]))
    return Evidence(
        commands=producers.commands,
        arrivals=listener.arrivals,
        ended=listener.ended,
        transcript=transcript,
        happened=saboteur.happened,
        parked=await _parked(stage.url),
        left=await _left(stage.url),
        kept=kept,
        held=held,
        hits=await saboteur.hits(),
        seconds=seconds,
    )


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
