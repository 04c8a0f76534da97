"""Fakes of the ports for the tests of the flow: they note what is asked of them, and a test decides how it ends."""

import asyncio
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from schemas.events import Event
from worker.core.model import CallKind, CallResult, Entry, Misfit, Piece, ReplyTo, Session, Viewer
from worker.core.verdict import Parked
from worker.core.work import Open
from worker.errors import LinkLost
from worker.ports import Delivery, Ledger

OK = CallResult(CallKind.OK, 200)
DEADLINE_S = 5.0


async def until(condition: Callable[[], Any], what: str = "") -> None:
    """Let the loop run until the condition holds; fails after `DEADLINE_S`."""
    try:
        async with asyncio.timeout(DEADLINE_S):
            while not condition():  # noqa: ASYNC110  what is polled is any state, not an event
                await asyncio.sleep(0.001)
    except TimeoutError:
        raise AssertionError(f"never happened: {what or condition}") from None


async def idle() -> None:
    """Let everything that can run now run: for what must *not* happen."""
    for _ in range(50):
        await asyncio.sleep(0)


@dataclass
class FakeClock:
    """Time that a test puts on."""

    now: float = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class FakeApi:
    """The Avatar API. `results` are used up one a call, by verb; `gates` hold back the answer of a verb until set.

    An interrupt may come beside another call; no say may begin beside an interrupt.
    """

    results: dict[str, list[CallResult | Exception]] = field(default_factory=dict)
    gates: dict[str, asyncio.Event] = field(default_factory=dict)
    calls: list[tuple[str, str, str]] = field(default_factory=list)
    running: dict[str, int] = field(default_factory=dict)
    interrupting: dict[str, int] = field(default_factory=dict)
    overlaps: int = 0
    _sessions: Iterator[int] = field(default_factory=lambda: count(1))

    def verbs(self, session_id: str | None = None) -> list[str]:
        """What was called, of one session or of all."""
        return [verb for verb, session, _ in self.calls if session_id in (None, session)]

    @property
    def said(self) -> list[str]:
        """The texts of all says."""
        return [text for verb, _, text in self.calls if verb == "say"]

    async def _call(self, verb: str, session_id: str, text: str = "") -> CallResult:
        self.calls.append((verb, session_id, text))
        running = self.interrupting if verb == "interrupt" else self.running
        if verb != "interrupt":
            self.overlaps += running.get(session_id, 0)
            if verb == "say":
                self.overlaps += self.interrupting.get(session_id, 0)
        running[session_id] = running.get(session_id, 0) + 1
        try:
            gate = self.gates.get(f"{verb} {text}") or self.gates.get(verb)
            if gate is not None:
                await gate.wait()
            else:
                await asyncio.sleep(0)
        finally:
            running[session_id] -= 1
        results = self.results.get(verb)
        result = results.pop(0) if results else OK
        if isinstance(result, Exception):
            raise result
        return result

    async def create(self, wanted: Open) -> tuple[CallResult, Session | None]:
        session_id = f"s{next(self._sessions)}"
        result = await self._call("create", session_id)
        session = Session(session_id, "token", wanted.avatar_id, wanted.voice_id)
        return result, session if result.kind is CallKind.OK else None

    async def say(self, session: Session, piece: Piece, _still: object = None) -> CallResult:
        return await self._call("say", session.session_id, piece.text)

    async def interrupt(self, session: Session) -> CallResult:
        return await self._call("interrupt", session.session_id)

    async def keep_alive(self, session: Session) -> CallResult:
        return await self._call("keep_alive", session.session_id)

    async def init_client(self, session: Session) -> tuple[CallResult, Viewer | None]:
        result = await self._call("init_client", session.session_id)
        return result, Viewer("https://whep", {}) if result.kind is CallKind.OK else None

    async def end(self, session: Session) -> CallResult:
        return await self._call("end", session.session_id)


@dataclass
class FakeOutbox:
    """What left for the broker, in one `log` with what was acknowledged; `gate` holds events back until set."""

    log: list[tuple[str, Any]] = field(default_factory=list)
    gate: asyncio.Event | None = None
    gone: set[int] = field(default_factory=set)
    failures: list[str] = field(default_factory=list)

    async def _do(self, what: str, detail: Any) -> None:
        await asyncio.sleep(0)
        if what in self.failures:
            self.failures.remove(what)
            raise RuntimeError("a bug")
        self.log.append((what, detail))

    async def tell(self, event: Event) -> None:
        if self.gate is not None:
            await self.gate.wait()
        await self._do("tell", event)

    async def park(self, delivery: Delivery, parked: Parked) -> None:
        await self._do("park", (delivery, parked.reason))

    async def mark(self, conversation_id: str, old: int, new: int) -> bool:
        await self._do("mark", (conversation_id, old, new))
        return old not in self.gone

    async def answer(self, reply_to: ReplyTo, payload: Mapping[str, Any]) -> None:
        await self._do("answer", (reply_to.queue, dict(payload)))

    @property
    def whats(self) -> list[str]:
        """What was done, in order."""
        return [what for what, _ in self.log]

    @property
    def told(self) -> list[str]:
        """The short types of the events."""
        return [event.type.removeprefix("avatar.") for what, event in self.log if what == "tell"]


@dataclass(eq=False)
class FakeTenure:
    """One ownership of a partition. `refusals` counts how often it was told that it is over, `ended` when it is."""

    ledger: Ledger | None = None
    partition: int = 0
    ended: bool = False
    refusals: int = 0
    raised: int | None = None
    _asking: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def epoch(self) -> int:
        assert self.ledger is not None
        async with self._asking:
            if self.raised is None:
                self.raised = await self.ledger.raise_epoch(self.partition)
        if self.ended:
            raise LinkLost("the partition was given up")
        return self.raised

    def refused(self) -> None:
        self.refusals += 1

    def unpack(self, key: str, packed: str, remove: Callable[[], None]) -> Entry | Misfit:
        raise NotImplementedError(f"{key}: a fake delivery cannot be kept")


@dataclass(eq=False)
class FakeDelivery:
    """The broker's side of a command, which notes its acknowledgement in the outbox's log."""

    outbox: FakeOutbox
    name: str = ""
    tenure: FakeTenure = field(default_factory=FakeTenure)
    received: float = 0.0
    settled: int = 0

    async def settle(self) -> bool:
        await asyncio.sleep(0)
        if self.tenure.ended:
            return False
        self.settled += 1
        self.outbox.log.append(("settle", self.name))
        return True
