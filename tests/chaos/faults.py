"""What is done to the fleet: a seeded schedule, and its execution with a note of every fault."""

import asyncio
import random
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

import aiohttp

from tests.chaos import stores
from tests.chaos.fleet import Simulator, Worker
from tests.chaos.stores import Intent, Store
from tests.chaos.traffic import Listener
from tests.support.postgres import OwnedPostgres
from worker.local.broker import OwnedBroker

HEARTBEAT_S = 2
HOLE_S = 10.0
STORE_S = 20.0
"""How long a PostgreSQL that was killed stays away."""
BEGUN_BEFORE_S = 5.0
"""How long a worker may take to end that was started while it was away."""
STOP_S = (4.5 * HEARTBEAT_S, 6.0 * HEARTBEAT_S)
"""How long a stopped worker sleeps: longer than the broker waits for its heartbeats."""
DISMISSED_WITHIN_S = 40.0
"""More than DRAIN_TIMEOUT_S."""


class Fault(StrEnum):
    """What can be done."""

    KILL = "kill -9"
    TERM = "SIGTERM"
    STOP = "SIGSTOP"
    RESTART = "broker restart"
    STORE = "PostgreSQL killed"
    CUT = "cut"
    HOLE = "black hole"


@dataclass(frozen=True, slots=True)
class Demand:
    """How often each fault has to happen in a run; `kill -9` counts only with a say in flight."""

    seconds: float
    counts: dict[Fault, int]
    dropped: float = 0.0
    """The share of the answers to say-text that is dropped after the text was taken."""
    kept: int = 0
    """How many commands go through the durable inbox."""
    timed: int = 0
    """How many interrupts the clock can judge, see `interruptions.Timed`."""

    def without(self, fault: Fault) -> "Demand":
        """The same but for one that there is nobody to strike with."""
        return replace(self, counts={other: count for other, count in self.counts.items() if other is not fault})


FULL = Demand(
    60.0,
    {Fault.KILL: 8, Fault.TERM: 2, Fault.STOP: 2, Fault.RESTART: 1, Fault.STORE: 1, Fault.CUT: 2, Fault.HOLE: 1},
    dropped=0.005,
    kept=20,
    timed=10,
)
SHORT = Demand(10.0, {Fault.KILL: 2, Fault.STOP: 1, Fault.CUT: 1})


def api_faults(seed: int) -> list[dict[str, Any]]:
    """What the Avatar API does wrong, at random, for the simulator's `/_control/faults`.

    A call whose answer is dropped goes on for 1.5 s in the simulator: a repeat within that time is an overlap.
    """
    say: dict[str, Any] = {"route": "say-text", "times": None, "seed": seed}
    return [
        say | {"kind": "drop", "when": "after", "probability": 0.008},
        say
        | {"kind": "drop", "when": "after", "probability": 0.004, "seconds": 0.3, "linger_s": 1.5, "seed": seed + 1},
        say | {"kind": "drop", "when": "before", "probability": 0.003},
        say | {"kind": "status", "status": 503, "probability": 0.005},
        say | {"kind": "status", "status": 429, "retry_after": 1, "probability": 0.003},
        say | {"kind": "status", "status": 500, "when": "after", "probability": 0.003},
        say | {"kind": "status", "status": 500, "when": "before", "probability": 0.002},
        say | {"kind": "hang", "when": "after", "seconds": 1.2, "probability": 0.003},
        say | {"kind": "latency", "when": "before", "seconds": 0.6, "probability": 0.005},
        # Some answers come so late that the store keeps what waits behind them.
        *(
            say | {"kind": "hang", "when": "after", "seconds": 2.5, "probability": 0.3, "turn": turn}
            for turn in ("t2", "t5", "t8")
        ),
        {"route": "create", "times": None, "seed": seed, "kind": "status", "status": 503, "probability": 0.05},
        {"route": "create", "times": None, "seed": seed, "kind": "drop", "when": "after", "probability": 0.05},
        {"route": "interrupt", "times": None, "seed": seed, "kind": "hang", "seconds": 3.0, "probability": 0.04},
        {"route": "interrupt", "times": None, "seed": seed, "kind": "status", "status": 503, "probability": 0.04},
        {"route": "interrupt", "times": None, "seed": seed, "kind": "drop", "when": "after", "probability": 0.04},
        {"route": "keep-alive", "times": None, "seed": seed, "kind": "hang", "seconds": 3.0, "probability": 0.03},
    ]


@dataclass(slots=True)
class Happened:
    """A fault as it happened, from `begun` to `ended`, in monotonic seconds.

    `intents` are the pieces that were being said when it struck, by the ledger: (conversation, text).
    """

    fault: Fault
    victim: str
    begun: float
    ended: float
    intents: set[tuple[str, str]] = field(default_factory=set)


def plan(seed: int, demand: Demand, seconds: float) -> list[tuple[float, Fault]]:
    """When to do what, in seconds from the start: a little more than is demanded, at random times."""
    dice = random.Random(seed)
    todo: list[tuple[float, Fault]] = []
    scale = max(1.0, seconds / demand.seconds)
    for fault, count in demand.counts.items():
        share = round(count * scale) + (1 if fault in (Fault.KILL, Fault.CUT) else 0)
        # One in each stretch of the time, so that they do not all come at once.
        todo += [((k + dice.uniform(0.05, 0.95)) * seconds / share, fault) for k in range(share)]
    return sorted(todo)


class Saboteur:
    """Carries the plan out."""

    def __init__(
        self,
        seed: int,
        workers: Sequence[Worker],
        *,
        broker: OwnedBroker | None,
        postgres: OwnedPostgres | None,
        simulator: Simulator,
        listener: Listener,
        store: Store,
        http: aiohttp.ClientSession,
        tell: Callable[[str], None],
    ) -> None:
        self.happened: list[Happened] = []
        self.ended_badly: list[str] = []
        self._dice = random.Random(seed)
        self._workers = workers
        self._broker = broker
        self._postgres = postgres
        self._simulator = simulator
        self._listener = listener
        self._store = store
        self._store_is_away = False
        self._http = http
        self._tell = tell

    async def run(self, todo: Sequence[tuple[float, Fault]], demand: Demand) -> None:
        """Do everything that is planned, and then as many more kills as are missing with a say in flight."""
        begun = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for at, fault in todo:
                await asyncio.sleep(begun + at - time.monotonic())
                if fault is Fault.RESTART:
                    await self._restart_broker()
                elif fault is Fault.STORE:
                    await self._kill_store()
                else:
                    group.create_task(self._strike(fault))
        wanted = demand.counts.get(Fault.KILL, 0)
        for _ in range(2 * wanted):
            if await self.hits() >= wanted:
                break
            await asyncio.sleep(self._dice.uniform(0.3, 1.5))
            await self._strike(Fault.KILL)

    async def hits(self) -> int:
        """How many kills cut a say: one was running, and its answer found nobody."""
        transcript = await self._simulator.control("GET", "transcript")
        cut = [
            (call["begun_s"], call["ended_s"])
            for session in transcript["sessions"]
            for call in session["calls"]
            if call["route"] == "say-text" and call["status"] == 0 and call["fault"] is None
        ]
        kills = [one for one in self.happened if one.fault is Fault.KILL]
        return sum(any(begun <= kill.ended and ended >= kill.begun for begun, ended in cut) for kill in kills)

    async def _strike(self, fault: Fault) -> None:
        victim = await self._choose()
        victim.busy = True
        try:
            match fault:
                case Fault.KILL:
                    await self._kill(victim)
                case Fault.TERM:
                    await self._terminate(victim)
                case Fault.STOP:
                    await self._stop(victim)
                case Fault.CUT:
                    await self._cut(victim)
                case Fault.HOLE:
                    await self._black_hole(victim)
            await self._recover(victim)
        finally:
            victim.busy = False

    async def _recover(self, worker: Worker) -> None:
        """Wait until it serves again; one that has ended by itself is noted, and started.

        None starts without its store, as the README says: whoever runs it starts it again.
        """
        while not await worker.ready(self._http):
            if worker.runs:
                raise worker.fail("was not ready in time")
            if self._store_is_away:
                await asyncio.sleep(1)
            else:
                self.ended_badly.append(str(worker.fail("ended by itself")))
                self._tell(f"{worker.name} ended by itself")
            await worker.start()

    async def _choose(self) -> Worker:
        """Mostly the worker that speaks most: a standby is not missed."""
        while True:
            free = [worker for worker in self._workers if not worker.busy and worker.runs]
            speaking = [worker for name in self._listener.speakers() for worker in free if worker.name == name]
            if speaking and self._dice.random() < 0.85:
                return speaking[0]
            if free and self._dice.random() < 0.1:
                return self._dice.choice(free)
            await asyncio.sleep(0.05)

    async def _kill(self, victim: Worker) -> None:
        intents = await self._say_under_way(victim)
        # At once: the say would be over while the store is asked again.
        begun = time.monotonic()
        victim.send(signal.SIGKILL)
        await victim.ended(10)
        note = await self._note(Fault.KILL, victim.name)
        note.begun = begun
        note.intents |= intents
        await asyncio.sleep(self._dice.choice((0, 0, 0.5, 2)))
        await victim.start()

    async def _terminate(self, victim: Worker) -> None:
        note = await self._note(Fault.TERM, victim.name)
        await self.dismiss(victim)
        self._end(note)
        await victim.start()

    async def dismiss(self, worker: Worker) -> None:
        """SIGTERM, and it is to end by itself, with exit code 0."""
        worker.send(signal.SIGTERM)
        code = await worker.ended(DISMISSED_WITHIN_S)
        if code:
            self.ended_badly.append(str(worker.fail(f"ended with {code} after SIGTERM")))
            self._tell(f"{worker.name} ended with {code} after SIGTERM")

    async def _stop(self, victim: Worker) -> None:
        note = await self._note(Fault.STOP, victim.name)
        victim.send(signal.SIGSTOP)
        note.intents |= await self._intents()
        await asyncio.sleep(self._dice.uniform(*STOP_S))
        victim.send(signal.SIGCONT)
        self._end(note)

    async def _cut(self, victim: Worker) -> None:
        """Every second time only one of its connections."""
        while not (links := victim.proxy.links):  # noqa: ASYNC110 - nobody signals it
            await asyncio.sleep(0.02)
        number = self._dice.choice((None, self._dice.randrange(links)))
        which = "" if number is None else f" ({number + 1} of {links} connections)"
        note = await self._note(Fault.CUT, victim.name + which)
        victim.proxy.cut(number)
        await self._watch_intents(note, 1.0)

    async def _black_hole(self, victim: Worker) -> None:
        note = await self._note(Fault.HOLE, victim.name)
        async with asyncio.TaskGroup() as group:
            group.create_task(victim.proxy.black_hole(HOLE_S))
            group.create_task(self._watch_intents(note, HOLE_S))
        self._end(note)

    async def _say_under_way(self, speaker: Worker) -> set[tuple[str, str]]:
        """Wait a moment for one, so that few kills strike an idle worker; the intents that stood open then."""
        found = await stores.intents(self._store)
        known = _begun(found, speaker)
        for _ in range(200):
            await asyncio.sleep(0.005)
            found = await stores.intents(self._store)
            if _begun(found, speaker) - known:
                await asyncio.sleep(0.02)
                break
        return _named(found)

    async def _watch_intents(self, note: Happened, seconds: float) -> None:
        """Whoever has lost its link goes on for as long as it does not know."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            note.intents |= await self._intents()
            await asyncio.sleep(0.05)

    async def _restart_broker(self) -> None:
        if self._broker is None:
            return
        note = await self._note(Fault.RESTART, self._broker.kind)
        await asyncio.to_thread(self._broker.restart)
        self._end(note)
        for worker in self._workers:
            if not worker.busy:
                await self._recover(worker)

    async def _kill_store(self) -> None:
        if self._postgres is None:
            return
        note = await self._note(Fault.STORE, "postgresql")
        self._store_is_away = True
        await asyncio.to_thread(self._postgres.kill)
        await asyncio.sleep(STORE_S)
        await asyncio.to_thread(self._postgres.start)
        self._end(note)
        await asyncio.sleep(BEGUN_BEFORE_S)
        self._store_is_away = False

    async def _note(self, fault: Fault, victim: str) -> Happened:
        intents = await self._intents()
        now = time.monotonic()
        note = Happened(fault, victim, now, now, intents)
        self.happened.append(note)
        self._tell(f"{fault} {victim}, {len(note.intents)} intents open")
        return note

    @staticmethod
    def _end(note: Happened) -> None:
        note.ended = time.monotonic()

    async def _intents(self) -> set[tuple[str, str]]:
        """The pieces whose outcome is not known, by conversation."""
        return _named(await stores.intents(self._store))


def _named(intents: Iterable[Intent]) -> set[tuple[str, str]]:
    return {(one.conversation, one.text) for one in intents}


def _begun(intents: Iterable[Intent], speaker: Worker) -> set[tuple[str, float]]:
    """When each of them was begun that this worker says."""
    return {(one.conversation, one.begun) for one in intents if one.owner == speaker.name}
