"""How soon pieces of speech leave, how many calls they take, and whether anything piles up.

    python -m benchmarks.speech                         40 tokens/s in 50 conversations, API latency 40 and 150 ms
    python -m benchmarks.speech --conversations 500 --partitions 8 --pause-s 65 --seconds 120

A private RabbitMQ a run (or the one in AMQP_URL: fresh, and for one run), the simulator and one worker, each a process.
A piece is *decided* when the token that its cut depends on is published, and *leaves* when its call reaches the
simulator, so the time between includes the broker, the ledger and this script's own delays. "From arrival" counts from
when the worker was handed that token, and is what it says itself in `/metrics`. The sessions are there before the first
word.
"""

import argparse
import asyncio
import json
import math
import re
import statistics
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urljoin

import aio_pika
import aiohttp
import uvloop
from aio_pika.abc import AbstractIncomingMessage
from aiormq.abc import AbstractChannel, ChannelFrame
from pamqp import commands as spec
from pamqp.body import ContentBody
from pamqp.header import ContentHeader
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.stage import cpu_s
from worker.core.shaping.shaper import Shaper, Shaping
from worker.local.broker import find_broker
from worker.local.broker.base import free_port
from worker.local.demo.processes import Backstage

ANSWER = """## Tides in short

The Moon pulls the water on the near side of the Earth **a little harder** than the Earth itself, and the Earth a \
little harder than the water on the far side. So there are *two* bulges, and the Earth turns below them once a day. \
That is why most coasts see high water twice, about 12 hours and 25 minutes apart.

- The **Sun** does the same, with not quite half the strength.
- At new and full Moon both pull in line: those are *spring tides*.
- At half Moon they pull across each other, and the tides are small.

How high the water rises in a harbour has more to do with the shape of the sea bed than with the sky. In a funnel like \
the Bay of Fundy the wave is squeezed until it stands 16 metres tall; in the middle of the ocean you would not notice \
half a metre. If you want the times for a place, ask for its tide table: it is computed from years of measurements, \
and it is right to a few minutes unless a storm interferes.
"""
TOKENS = re.findall(r"\s*\S{1,4}|\s+", ANSWER)


@dataclass(frozen=True, slots=True)
class Turn:
    """One answer: when each of its tokens was published (epoch seconds)."""

    conversation: str
    id: str
    published: list[float] = field(default_factory=list)


@dataclass(slots=True)
class Load:
    """What was published, and what the events say of it."""

    turns: list[Turn] = field(default_factory=list)
    chunks: int = 0
    ended: int = 0
    ready: set[str] = field(default_factory=set)
    completed: int = 0
    waiting: list[int] = field(default_factory=list)
    cpu_s: float = 0.0
    first_words: list[tuple[float, float]] = field(default_factory=list)
    news: asyncio.Event = field(default_factory=asyncio.Event)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Return when that is so."""
        async with asyncio.timeout(300):
            while not condition():
                self.news.clear()
                await self.news.wait()

    async def hear(self, message: AbstractIncomingMessage) -> None:
        """One event."""
        event = json.loads(message.body)
        if event["type"].startswith("avatar.speech."):
            self.ended += len(event["data"]["commandIds"])
        elif event["type"] == "avatar.session.ready":
            self.ready.add(event["subject"])
        elif event["type"] == "avatar.turn.completed":
            self.completed += 1
        self.news.set()


def decided_at() -> Iterator[int]:
    """For each piece of the answer, which token decides it."""
    shaper = Shaper(Shaping())
    for number, token in enumerate(TOKENS):
        yield from (number for _ in shaper.push(token))
    yield from (len(TOKENS) - 1 for _ in shaper.finish())


class Commands:
    """Publishes as cheaply as it can: what producers cost elsewhere is not to be taken from the worker here."""

    def __init__(self, channel: AbstractChannel) -> None:
        self._number = channel.number
        self._queue = channel.connection.write_queue

    async def publish(self, conversation: str, body: dict[str, Any]) -> None:
        """One command."""
        content = json.dumps(body).encode()
        properties = spec.Basic.Properties(delivery_mode=2, message_id=uuid.uuid4().hex)
        frames = (
            spec.Basic.Publish(exchange="avatar.commands", routing_key=conversation),
            ContentHeader(0, len(content), properties),
            ContentBody(content),
        )
        await self._queue.put(ChannelFrame.marshall(self._number, frames))


async def converse(commands: Commands, load: Load, conversation: str, until: float, args: argparse.Namespace) -> None:
    """Answers, one after the other, a token every 1/rate seconds, and a pause between them."""
    while time.time() < until:
        turn = Turn(conversation, uuid.uuid4().hex)
        load.turns.append(turn)
        begun = time.time()
        for number, token in enumerate(TOKENS):
            await asyncio.sleep(begun + number / args.rate - time.time())
            turn.published.append(time.time())
            load.chunks += 1
            final = number == len(TOKENS) - 1
            await commands.publish(conversation, {"turnId": turn.id, "text": token, "isFinal": final})
        await asyncio.sleep(args.pause_s)


async def drive(url: str, args: argparse.Namespace) -> Load:
    """Let all conversations speak; return when all has ended, or a minute later."""
    load = Load()
    names = [f"bench-{number}" for number in range(args.conversations)]
    async with await aio_pika.connect(url) as connection:
        channel = await connection.channel(publisher_confirms=False)
        commands = Commands(await channel.get_underlay_channel())
        queue = await channel.declare_queue(exclusive=True)
        await queue.bind("avatar.events", "#")
        await queue.consume(load.hear, no_ack=True)
        for name in names:
            await commands.publish(name, {"type": "session.start"})
        await load.until(lambda: len(load.ready) == len(names))
        begun = time.time()
        speakers = []
        for number, name in enumerate(names):  # spread, so that always as many speak
            await asyncio.sleep(begun + number * args.pause_s / len(names) - time.time())
            speakers.append(asyncio.create_task(converse(commands, load, name, begun + args.seconds, args)))
        while not all(speaker.done() for speaker in speakers):
            load.waiting.append(load.chunks - load.ended)
            await asyncio.sleep(0.25)
        await load.until(lambda: load.completed == len(load.turns))
    return load


async def measure(url: str, folder: Path, latency_ms: int, args: argparse.Namespace) -> tuple[Load, dict[str, Any]]:
    """One run: simulator, worker, load; what was published and the simulator's transcript."""
    backstage = Backstage(folder, hidden=("AVATAR_", "VOICE_", "SPEECH_", "FLOW_"))
    async with AsyncExitStack() as stack:
        settings = {"AVATAR_KS": "bench", "AVATAR_ID": "bench"}
        simulator = backstage.running(
            "simulator", "-m", "worker", "simulator", "--port", "0", "--latency-ms", str(latency_ms), settings=settings
        )
        api_url = await (await stack.enter_async_context(simulator)).logged(r"listening on (\S+)")
        port = free_port()
        settings |= {
            "AMQP_URL": url,
            "AVATAR_BASE_URL": api_url,
            "OPS_PORT": str(port),
            "PARTITIONS": str(args.partitions),
            "STORE_URL": f"sqlite:///{folder / f'{latency_ms}.db'}",
        }
        worker = await stack.enter_async_context(backstage.running("worker", "-m", "worker", "run", settings=settings))
        ops = f"http://127.0.0.1:{port}"
        await worker.answers(f"{ops}/readyz")
        used = cpu_s(worker.process.pid)
        load = await drive(url, args)
        load.cpu_s = cpu_s(worker.process.pid) - used
        async with aiohttp.ClientSession() as http:
            async with http.get(f"{ops}/metrics") as answer:
                load.first_words = buckets(await answer.text())
            async with http.get(urljoin(api_url, "/_control/transcript")) as answer:
                return load, await answer.json()


def buckets(exposition: str) -> list[tuple[float, float]]:
    """Of the first pieces, how many (second) left within how many seconds (first) of the token that decided them."""
    return [
        (float(sample.labels["le"]), sample.value)
        for family in text_string_to_metric_families(exposition)
        for sample in family.samples
        if sample.name == "avatar_worker_first_words_seconds_bucket"
    ]


def quantile_ms(buckets: Sequence[tuple[float, float]], share: float) -> float:
    """Where in its bucket that share would lie if all in it were spread evenly; NaN: beyond the last."""
    wanted = share * buckets[-1][1]
    low, below = 0.0, 0.0
    for high, count in buckets[:-1]:
        if count >= wanted:
            return 1000 * (low + (high - low) * (wanted - below) / (count - below))
        low, below = high, count
    return math.nan


def report(latency_ms: int, load: Load, transcript: dict[str, Any]) -> dict[str, float]:
    """The figures of a run."""
    deciding = list(decided_at())
    begun: dict[str, list[float]] = {}
    for session in transcript["sessions"]:
        for call in session["calls"]:
            if call["route"] == "say-text" and call["effect"]:
                begun.setdefault(call["body"]["turnId"], []).append(call["begun_epoch_s"])
    first, all_, whole = [], [], 0
    for turn in load.turns:
        calls = begun.get(turn.id, [])
        if len(calls) == len(deciding):  # else a stall has cut it otherwise
            whole += 1
            late = [1000 * (at - turn.published[token]) for at, token in zip(calls, deciding, strict=True)]
            first.append(late[0])
            all_ += late
    if not whole:
        raise SystemExit(
            f"every answer stalled: {len(deciding)} pieces were to be, calls {[*map(len, begun.values())]}"
        )
    third = len(load.waiting) // 3
    return {
        "api latency ms": latency_ms,
        "turns": len(load.turns),
        "cut by text alone": whole,
        "chunks": load.chunks,
        "calls": sum(map(len, begun.values())),
        "worker's CPU ms per chunk": round(1000 * load.cpu_s / load.chunks, 2),
        "chunks per call": round(load.chunks / sum(map(len, begun.values())), 1),
        "first piece from arrival p50": round(quantile_ms(load.first_words, 0.5), 1),
        "first piece from arrival p95": round(quantile_ms(load.first_words, 0.95), 1),
        "first piece p50 ms": round(statistics.median(first), 1),
        "first piece p95 ms": round(statistics.quantiles(first, n=20)[18], 1),
        "any piece p50 ms": round(statistics.median(all_), 1),
        "any piece p95 ms": round(statistics.quantiles(all_, n=20)[18], 1),
        "waiting chunks, 1st third": round(statistics.mean(load.waiting[:third])),
        "waiting chunks, last third": round(statistics.mean(load.waiting[-third:])),
        "overlapping calls": transcript["counters"]["overlaps"]["say"],
    }


def main() -> int:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conversations", type=int, default=50)
    parser.add_argument("--rate", type=float, default=40, help="tokens a second in each conversation (default: 40)")
    parser.add_argument("--seconds", type=float, default=20, help="begin no answer later than that (default: 20)")
    parser.add_argument("--pause-s", type=float, default=1, help="between the answers of a conversation (default: 1)")
    parser.add_argument("--partitions", type=int, default=1)
    parser.add_argument("--latencies-ms", type=int, nargs="+", default=[40, 150])
    args = parser.parse_args()
    rows = []
    for latency_ms in args.latencies_ms:
        with find_broker() as broker, TemporaryDirectory(prefix="avatar-bench-") as folder:
            sys.stdout.write(f"RabbitMQ {broker.version}, {broker.kind}; Python {sys.version.split()[0]}\n")
            rows.append(report(latency_ms, *uvloop.run(measure(broker.url, Path(folder), latency_ms, args))))
    for name in rows[0]:
        sys.stdout.write(f"{name:30}" + "".join(f"{row[name]:>10}" for row in rows) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
