"""What every run needs: a broker, the simulator, a worker, producers at a steady rate, and ages by the transcript."""

import asyncio
import json
import os
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aio_pika
import aiohttp

from tests.chaos.fleet import Simulator, Worker, running
from tests.chaos.proxy import Proxy
from tests.support.brokers import TEST_PLUGINS, empty
from worker.local.broker import OwnedBroker, own_broker

TURN_CHUNKS = 10

Source = Callable[[], AbstractContextManager[OwnedBroker]]


@dataclass(slots=True)
class Stage:
    """Everything at work. `published`: when each word was confirmed, in monotonic seconds."""

    url: str
    simulator: Simulator
    workers: list[Worker]
    http: aiohttp.ClientSession
    channel: aio_pika.abc.AbstractChannel
    folder: Path
    published: dict[str, float] = field(default_factory=dict)

    async def talk(self, name: str, chunks_per_s: float, seconds: float, *, first: int = 0) -> None:
        """One conversation at a steady rate; turns of `TURN_CHUNKS`, every chunk one word that occurs once."""
        begun = time.monotonic() + hash(name) % 1000 / 1000 / chunks_per_s
        exchange = await self.channel.get_exchange("avatar.commands", ensure=False)
        for number in range(round(chunks_per_s * seconds)):
            await asyncio.sleep(max(0.0, begun + number / chunks_per_s - time.monotonic()))
            turn, place = divmod(first + number, TURN_CHUNKS)
            word = f"{name}.t{turn}.n{place}"
            body = {"turnId": f"t{turn}", "text": f"{word} ", "isFinal": place == TURN_CHUNKS - 1}
            self.published[word] = time.monotonic()
            await exchange.publish(message(body), name, mandatory=True)

    async def all_talk(self, names: Iterable[str], chunks_per_s: float, seconds: float, *, first: int = 0) -> None:
        """Many of them."""
        async with asyncio.TaskGroup() as group:
            for name in names:
                group.create_task(self.talk(name, chunks_per_s, seconds, first=first))

    async def ages(self) -> dict[str, float]:
        """By word, seconds from its publication to the call that carried it to the API."""
        return {word: at - self.published[word] for word, at in (await self.said()).items() if word in self.published}

    async def said(self) -> dict[str, float]:
        """By word, when the call began that the API took it from first."""
        found: dict[str, float] = {}
        transcript = await self.simulator.control("GET", "transcript")
        calls = [call for session in transcript["sessions"] for call in session["calls"]]
        for call in sorted(calls, key=lambda one: float(one["begun_s"])):
            if call["route"] == "say-text" and call["effect"]:
                for word in call["body"]["text"].split():
                    found.setdefault(word, call["begun_s"])
        return found

    async def quiet(self, words: Iterable[str], within_s: float) -> None:
        """Return once all those words were said."""
        wanted, deadline = set(words), time.monotonic() + within_s
        while missing := wanted - (await self.said()).keys():
            assert time.monotonic() < deadline, f"{len(missing)} chunks were not said in {within_s:.0f} s"
            await asyncio.sleep(0.5)

    def cpu_s(self) -> float:
        """How much processor time the first worker has used."""
        return cpu_s(self.workers[0].pid)


@asynccontextmanager
async def staged(
    *, latency_ms: float, workers: int = 1, source: Source | None = None, **settings: str
) -> AsyncIterator[Stage]:
    """One worker, or several, on a RabbitMQ of their own, from that `source` or any; with a store in a file."""
    async with AsyncExitStack() as stack:
        broker = stack.enter_context(source() if source else own_broker(plugins=TEST_PLUGINS))
        url = await stack.enter_async_context(empty(broker))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="avatar-bench-")))
        http = await stack.enter_async_context(aiohttp.ClientSession())
        simulator = Simulator(folder, http, latency_ms)
        await stack.enter_async_context(running(simulator))
        await simulator.listening()
        common = {
            "AVATAR_BASE_URL": simulator.base_url,
            "AVATAR_KS": "chaos-ks",
            "AVATAR_ID": "bench",
            "STORE_URL": f"sqlite:///{folder / 'ledger.db'}",
            "LOG_FORMAT": "json",
        }
        fleet = []
        for number in range(workers):
            proxy = await stack.enter_async_context(Proxy(urlsplit(url).port or 5672).running())
            fleet.append(Worker(f"w{number}", folder, proxy, url, common | settings))
            await stack.enter_async_context(running(fleet[-1]))
            assert await fleet[-1].ready(http), fleet[-1].fail("was not ready in time")
        connection = await stack.enter_async_context(await aio_pika.connect(url))
        channel = await connection.channel(publisher_confirms=True, on_return_raises=True)
        print(f"RabbitMQ {broker.version}, API latency {latency_ms:.0f} ms", flush=True)
        yield Stage(url, simulator, fleet, http, channel, folder)


def cpu_s(pid: int) -> float:
    """How much processor time that process has used (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def message(body: Mapping[str, object]) -> aio_pika.Message:
    """A command as producers should publish it."""
    return aio_pika.Message(
        json.dumps(body).encode(),
        delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
        message_id=uuid.uuid4().hex,
        headers={"published-at-ms": time.time_ns() // 1_000_000},
    )


def quantiles(values: Iterable[float]) -> str:
    """Median and 99th percentile of seconds, in ms."""
    ranked = sorted(values)
    return f"p50 {at(ranked, 0.5) * 1000:.0f} ms, p99 {at(ranked, 0.99) * 1000:.0f} ms of {len(ranked)}"


def at(ranked: Sequence[float], share: float) -> float:
    """The quantile of what is sorted already; infinite if there is nothing."""
    return ranked[min(len(ranked) - 1, int(len(ranked) * share))] if ranked else float("inf")


def verdict(**promises: bool) -> int:
    """Say which hold; the exit code."""
    for name, holds in promises.items():
        print(f"{'ok ' if holds else 'BAD'} {name.replace('_', ' ')}")
    return 0 if all(promises.values()) else 1


def of(names: Iterable[str], ages: dict[str, Any]) -> dict[str, float]:
    """The ages of those conversations' words."""
    wanted = set(names)
    return {word: age for word, age in ages.items() if word.partition(".")[0] in wanted}
