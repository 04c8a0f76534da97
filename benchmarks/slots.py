"""Five sessions for forty conversations on three workers that are killed at random: `python -m benchmarks.slots`.

Conversations come and go for as long as asked; each starts a session, speaks, pauses, and ends it. Looked at: how many
sessions the simulator has at once, whether one that somebody uses is lost to a time-out, whether every command ends.
"""

import argparse
import asyncio
import json
import random
import signal
import tempfile
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aio_pika
import aiohttp

from benchmarks.stage import verdict
from tests.chaos.fleet import Simulator, Worker, running
from tests.chaos.proxy import Proxy
from tests.support.brokers import TEST_PLUGINS, empty
from worker.local.broker import own_broker

SLOTS, WORKERS, CONVERSATIONS = 5, 3, 40
SETTLE_S = 150.0
LOOK_S = 0.2


@dataclass(slots=True)
class Run:
    """What happened. `sent`: ids of commands; `ended`: how they did; `told`: sessions that were announced."""

    simulator: Simulator
    workers: list[Worker]
    channel: aio_pika.abc.AbstractChannel
    http: aiohttp.ClientSession
    dice: random.Random
    over_at: float
    sent: set[str] = field(default_factory=set)
    ended: dict[str, str] = field(default_factory=dict)
    told: set[str] = field(default_factory=set)
    most: int = 0
    kills: int = 0

    async def send(self, name: str, **body: Any) -> None:
        """Publish a command."""
        message_id = uuid.uuid4().hex
        exchange = await self.channel.get_exchange("avatar.commands", ensure=False)
        message = aio_pika.Message(
            json.dumps(body).encode(), message_id=message_id, delivery_mode=aio_pika.DeliveryMode.PERSISTENT
        )
        await exchange.publish(message, name, mandatory=True)
        self.sent.add(message_id)

    async def come_and_go(self, name: str) -> None:
        """One conversation."""
        await asyncio.sleep(self.dice.uniform(0, 20))
        while time.monotonic() < self.over_at:
            await self.send(name, type="session.start")
            for _ in range(self.dice.randint(0, 3)):
                await self.send(name, turnId=uuid.uuid4().hex, text="A sentence that takes a moment.", isFinal=True)
                await asyncio.sleep(self.dice.uniform(0.2, 4))
            await self.send(name, type="session.end")
            await asyncio.sleep(self.dice.uniform(5, 40))

    async def hear(self) -> None:
        """Note how commands end."""
        queue = await self.channel.declare_queue(exclusive=True)
        await queue.bind("avatar.events", "#")
        async with queue.iterator(no_ack=True) as messages:
            async for message in messages:
                event = json.loads(message.body)
                for one in event["data"].get("commandIds", ()):
                    self.ended[one] = event["type"]
                if event["type"] == "avatar.session.ready":
                    self.told.add(event["data"]["sessionId"])

    async def watch(self) -> None:
        """Note how many sessions there are at most."""
        while True:
            counters = await self.simulator.control("GET", "counters")
            self.most = max(self.most, counters["sessions"]["open"])
            await asyncio.sleep(LOOK_S)

    async def kill(self) -> None:
        """Kill a worker now and then, and start it again."""
        while time.monotonic() < self.over_at:
            await asyncio.sleep(self.dice.uniform(3, 15))
            victim = self.dice.choice(self.workers)
            victim.send(signal.SIGKILL)
            await victim.ended(5)
            self.kills += 1
            await asyncio.sleep(self.dice.uniform(0, 3))
            await victim.start()
            await victim.ready(self.http)


async def main(seconds: float, seed: int) -> int:
    """Run, print, judge."""
    print(f"seed {seed}, {seconds:.0f} s", flush=True)
    async with _set_up(random.Random(seed), seconds) as run:
        beside = [asyncio.create_task(run.hear()), asyncio.create_task(run.watch())]
        async with asyncio.TaskGroup() as group:
            group.create_task(run.kill())
            for number in range(CONVERSATIONS):
                group.create_task(run.come_and_go(f"c{number}"))
        deadline = time.monotonic() + SETTLE_S
        while run.sent - run.ended.keys() and time.monotonic() < deadline:  # noqa: ASYNC110 - what is polled is no event
            await asyncio.sleep(LOOK_S)
        found = (await run.simulator.control("GET", "transcript"))["sessions"]
        for task in beside:
            task.cancel()
        await asyncio.gather(*beside, return_exceptions=True)
    unknown = [session for session in found if session["id"] not in run.told]
    left = [session for session in found if session["ended_by"] is None]
    lapsed = [session for session in found if session["ended_by"] == "idle" and session["id"] in run.told]
    print(f"{len(run.sent)} commands, {len(found)} sessions, {run.kills} kills; {len(unknown)} creates cut by a kill")
    print(f"at most {run.most} sessions at once; {len(left)} left, {len(lapsed)} lost to a time-out")
    return verdict(
        never_more_than_there_may_be=run.most <= SLOTS,
        none_lost_to_a_timeout=not lapsed,
        every_command_ends=not run.sent - run.ended.keys(),
        nothing_left_but_what_a_kill_cut=len(left) <= len(unknown),
    )


@asynccontextmanager
async def _set_up(dice: random.Random, seconds: float) -> AsyncIterator[Run]:
    async with AsyncExitStack() as stack:
        broker = stack.enter_context(own_broker(plugins=TEST_PLUGINS))
        url = await stack.enter_async_context(empty(broker))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="avatar-slots-")))
        http = await stack.enter_async_context(aiohttp.ClientSession())
        simulator = Simulator(folder, http, latency_ms=100)
        await stack.enter_async_context(running(simulator))
        await simulator.listening()
        await simulator.control("POST", "settings", {"idle_timeout_s": 25, "token_life_s": 60, "session_limit": 0})
        settings = {
            "AVATAR_BASE_URL": simulator.base_url,
            "AVATAR_KS": "chaos-ks",
            "AVATAR_ID": "bench",
            "AVATAR_MAX_SESSIONS": str(SLOTS),
            "SESSION_END_WAIT_S": "2",
            "STORE_URL": f"sqlite:///{folder / 'store.db'}",
        }
        workers: list[Worker] = []
        for number in range(WORKERS):
            proxy = await stack.enter_async_context(Proxy(urlsplit(url).port or 5672).running())
            workers.append(Worker(f"w{number}", folder, proxy, url, settings))
            await stack.enter_async_context(running(workers[-1]))
        for worker in workers:
            assert await worker.ready(http), worker.fail("was not ready in time")
        connection = await stack.enter_async_context(await aio_pika.connect(url))
        channel = await connection.channel(publisher_confirms=True, on_return_raises=True)
        yield Run(simulator, workers, channel, http, dice, time.monotonic() + seconds)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    raise SystemExit(asyncio.run(main(options.seconds, options.seed)))
