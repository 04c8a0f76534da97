"""Five sessions for forty conversations on three workers that are killed at random: `python -m benchmarks.slots`.

Conversations come and go for as long as asked. Some stay for minutes and fall silent for longer than the API waits for
a sign of life, or stay beyond the life of a token; some leave without a word. What is judged is what the simulator
saw, held against what a listener was told:

- at no time more sessions than there may be, those included that nobody knows because a kill cut their creation;
- no session that was announced ends otherwise than by our request: not by a time-out, not by a token that ran out;
- every start ends in ready or failed, every command ends, each in one event;
- a session that was never announced was being created when a worker was killed, and nothing else is left in the end.
"""

import argparse
import asyncio
import json
import random
import signal
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aio_pika
import aiohttp

from benchmarks.stage import quantiles, verdict
from tests.chaos.fleet import Simulator, Worker, running
from tests.chaos.proxy import Proxy
from tests.support.brokers import TEST_PLUGINS, empty
from worker.local.broker import own_broker

SLOTS, WORKERS, CONVERSATIONS = 5, 3, 40
API_IDLE_S, TOKEN_LIFE_S = 25, 60
IDLE_S = 40
SETTLE_S = 150.0
CREATE_S = 1.5
"""How long the API takes to answer a create, so that kills meet some."""
LOOK_S = 0.2
NOTED_S = 1.0
"""A create that was answered so long before a kill is in the store."""

View = Mapping[str, Any]


@dataclass(slots=True)
class Run:
    """What happened. By message id: what was `sent` and when, how it `ended`; `told`: sessions that were announced."""

    simulator: Simulator
    workers: list[Worker]
    channel: aio_pika.abc.AbstractChannel
    events: aio_pika.abc.AbstractQueue
    http: aiohttp.ClientSession
    dice: random.Random
    over_at: float
    sent: dict[str, tuple[str, float]] = field(default_factory=dict)
    ended: dict[str, dict[str, tuple[str, str, float]]] = field(default_factory=dict)
    told: set[str] = field(default_factory=set)
    ends: Counter[str] = field(default_factory=Counter)
    kills: list[float] = field(default_factory=list)
    heard: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def send(self, name: str, **body: Any) -> str:
        """Publish a command."""
        message_id = uuid.uuid4().hex
        exchange = await self.channel.get_exchange("avatar.commands", ensure=False)
        message = aio_pika.Message(
            json.dumps(body).encode(), message_id=message_id, delivery_mode=aio_pika.DeliveryMode.PERSISTENT
        )
        self.sent[message_id] = body.get("type", "speak"), time.monotonic()
        await exchange.publish(message, name, mandatory=True)
        return message_id

    async def come_and_go(self, name: str) -> None:
        """One conversation."""
        await asyncio.sleep(self.dice.uniform(0, 20))
        while time.monotonic() < self.over_at:
            await self._visit(name)
            await asyncio.sleep(self.dice.uniform(5, 40))

    async def _visit(self, name: str) -> None:
        start = await self.send(name, type="session.start")
        if self.dice.random() < 0.8 and not await self._is_ready(start):
            return
        stays = self.dice.random() < 0.25
        until = time.monotonic() + (self.dice.uniform(30, 120) if stays else self.dice.uniform(0, 12))
        while time.monotonic() < until:
            turn_id = uuid.uuid4().hex
            await self.send(name, turnId=turn_id, text="A sentence that takes a moment. And", isFinal=False)
            await asyncio.sleep(self.dice.uniform(0, 2))
            await self.send(name, turnId=turn_id, text=" another one.", isFinal=True)
            await asyncio.sleep(self.dice.uniform(3, API_IDLE_S + 5) if stays else self.dice.uniform(0.2, 4))
        if self.dice.random() < 0.85:
            await self.send(name, type="session.end")

    async def _is_ready(self, start: str) -> bool:
        async with self.heard:
            await self.heard.wait_for(lambda: start in self.ended)
        return any(type_ == "avatar.session.ready" for type_, _, _ in self.ended[start].values())

    async def hear(self) -> None:
        """Note how commands end."""
        async with self.events.iterator(no_ack=True) as messages:
            async for message in messages:
                event = json.loads(message.body)
                data, type_ = event["data"], event["type"]
                async with self.heard:
                    for one in data.get("commandIds", ()):
                        found = self.ended.setdefault(one, {})
                        found.setdefault(event["id"], (type_, data.get("reason", ""), time.monotonic()))
                    self.heard.notify_all()
                if type_ == "avatar.session.ready":
                    self.told.add(data["sessionId"])
                elif type_ == "avatar.session.ended":
                    self.ends[data["reason"]] += 1

    async def kill(self) -> None:
        """Kill a worker now and then, and start it again."""
        while time.monotonic() < self.over_at:
            await asyncio.sleep(self.dice.uniform(3, 15))
            victim = self.dice.choice(self.workers)
            self.kills.append(time.monotonic())
            victim.send(signal.SIGKILL)
            await victim.ended(5)
            await asyncio.sleep(self.dice.uniform(0, 3))
            await victim.start()
            if not await victim.ready(self.http):
                raise victim.fail("was not ready in time")

    async def settle(self) -> list[View]:
        """Return what the simulator has seen, once every command and every session that was announced has ended."""
        deadline = time.monotonic() + SETTLE_S
        while True:
            found: list[View] = (await self.simulator.control("GET", "transcript"))["sessions"]
            lives = [one for one in found if one["ended_by"] is None and one["id"] in self.told]
            if not (lives or self.sent.keys() - self.ended.keys()) or time.monotonic() > deadline:
                return found
            await asyncio.sleep(LOOK_S)

    def was_cut(self, session: View) -> bool:
        """Whether a worker was killed while the session was created, or before that could be noted."""
        create = session["calls"][0]
        return any(create["begun_s"] <= kill <= (create["ended_s"] or kill) + NOTED_S for kill in self.kills)


def most_at_once(sessions: Iterable[View]) -> int:
    """How many there were at most."""
    changes = [(one["created_epoch_s"], 1) for one in sessions]
    changes += [(one["ended_epoch_s"], -1) for one in sessions if one["ended_epoch_s"] is not None]
    now = most = 0
    for _, change in sorted(changes):
        now += change
        most = max(most, now)
    return most


def judge(run: Run, found: list[View]) -> int:
    """Print, and say which promises hold."""
    known = [session for session in found if session["id"] in run.told]
    unknown = [session for session in found if session["id"] not in run.told]
    left = [session for session in found if session["ended_by"] is None]
    cut = [session for session in unknown if run.was_cut(session)]
    starts = {one: run.ended.get(one, {}) for one, (type_, _) in run.sent.items() if type_ == "session.start"}
    words = Counter((type_, reason) for ended in run.ended.values() for type_, reason, _ in ended.values())
    took = [at - run.sent[one][1] for one, ended in starts.items() for _, _, at in ended.values()]
    ages = [(one["ended_epoch_s"] or one["created_epoch_s"]) - one["created_epoch_s"] for one in known]
    long = sum(age > API_IDLE_S for age in ages)
    most, gap_s = most_at_once(found), max((session["max_gap_s"] for session in known), default=0.0)
    print(f"{len(run.sent)} commands, {len(starts)} starts, {len(found)} sessions, {len(run.kills)} kills")
    for (type_, reason), times in sorted(words.items()):
        print(f"  {times:5} {type_} {reason}")
    print(f"sessions' ends told: {dict(run.ends)}")
    print(f"from publishing a start, behind what its conversation had queued, to its end: {quantiles(took)}")
    print(
        f"at most {most} at once, {most_at_once(known)} of them known; {long} lived for more than "
        f"{API_IDLE_S} s, the oldest {max(ages, default=0):.0f} s; longest without a call {gap_s:.1f} s"
    )
    print(f"{len(unknown)} never announced, {len(cut)} of them cut by a kill; {len(left)} left")
    return verdict(
        never_more_than_there_may_be=most <= SLOTS,
        all_places_used=most == SLOTS,
        none_lost_to_a_timeout=all(session["ended_by"] == "request" for session in known) and not run.ends["lost"],
        some_stayed_longer_than_the_api_waits=long > 0,
        every_start_ends_as_ready_or_failed=all(
            {type_ for type_, _, _ in ended.values()} <= {"avatar.session.ready", "avatar.session.failed"} and ended
            for ended in starts.values()
        ),
        every_command_ends_once=all(len(run.ended.get(one, ())) == 1 for one in run.sent),
        nothing_left_but_what_a_kill_cut=len(left) <= len(cut) == len(unknown),
    )


async def main(seconds: float, seed: int) -> int:
    """Run, print, judge."""
    print(f"seed {seed}, {seconds:.0f} s", flush=True)
    async with _set_up(random.Random(seed), seconds) as run:
        hearing = asyncio.create_task(run.hear())
        async with asyncio.TaskGroup() as group:
            group.create_task(run.kill())
            for number in range(CONVERSATIONS):
                group.create_task(run.come_and_go(f"c{number}"))
        found = await run.settle()
        hearing.cancel()
        await asyncio.gather(hearing, return_exceptions=True)
    return judge(run, found)


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
        settings = {"idle_timeout_s": API_IDLE_S, "token_life_s": TOKEN_LIFE_S, "session_limit": 0}
        await simulator.control("POST", "settings", settings)
        slow = {"kind": "latency", "when": "after", "route": "create", "seconds": CREATE_S, "times": None}
        await simulator.control("POST", "faults", slow)
        workers: list[Worker] = []
        for number in range(WORKERS):
            proxy = await stack.enter_async_context(Proxy(urlsplit(url).port or 5672).running())
            workers.append(Worker(f"w{number}", folder, proxy, url, _settings(simulator, folder)))
            await stack.enter_async_context(running(workers[-1]))
        for worker in workers:
            assert await worker.ready(http), worker.fail("was not ready in time")
        connection = await stack.enter_async_context(await aio_pika.connect(url))
        channel = await connection.channel(publisher_confirms=True, on_return_raises=True)
        events = await channel.declare_queue(exclusive=True)
        await events.bind("avatar.events", "#")
        print(f"RabbitMQ {broker.version}", flush=True)
        yield Run(simulator, workers, channel, events, http, dice, time.monotonic() + seconds)


def _settings(simulator: Simulator, folder: Path) -> dict[str, str]:
    return {
        "AVATAR_BASE_URL": simulator.base_url,
        "AVATAR_KS": "chaos-ks",
        "AVATAR_ID": "bench",
        "AVATAR_MAX_SESSIONS": str(SLOTS),
        "SESSION_IDLE_S": str(IDLE_S),
        "SESSION_END_WAIT_S": "2",
        "STORE_URL": f"sqlite:///{folder / 'store.db'}",
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    raise SystemExit(asyncio.run(main(options.seconds, options.seed)))
