"""What the simulator remembers: its settings, its sessions, and every call in its order of arrival.

Times are `time.monotonic()` seconds, which all processes of one machine share.
"""

import asyncio
import json
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Literal
from urllib.parse import parse_qsl

from pydantic import BaseModel, ConfigDict, Field

CREATE = "create"
SAY_TEXT = "say-text"
KS_START, KS_WIDGET, KS_APP_TOKEN = "ks-start", "ks-widget", "ks-app-token"
Route = Literal[
    "create", "init-client", "say-text", "interrupt", "keep-alive", "end", "ks-start", "ks-widget", "ks-app-token"
]
_SECRET_FIELDS = ("secret", "ks", "tokenHash")
Stage = Literal["begun", "accepted", "finished"]
Tally = Counter[tuple[str, Stage]]


class Settings(BaseModel):
    """How the simulated service behaves; each can be changed while it runs."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    ks: str | None = Field("demo-ks", repr=False)
    """The stored Kaltura Session that `create` takes, besides those of the KS service; None: no such, as after a
    revocation. It may be a real one."""
    partner_id: int = Field(101, ge=1)
    admin_secret: str = Field("demo-secret", repr=False)
    app_token_id: str = "0_demo"  # noqa: S105  an id, not a token
    app_token: str | None = Field("demo-app-token", repr=False)
    """None: it is not active."""
    app_token_hash: Literal["MD5", "SHA1", "SHA256", "SHA512"] = "SHA256"  # noqa: S105  the name of a hash
    ks_life_s: float = Field(86_400, gt=0)
    """Of a KS that the KS service makes, at most."""
    latency_ms: float = Field(0, ge=0)
    session_limit: int = Field(0, ge=0)
    """Open sessions at once; 0: no limit."""
    idle_timeout_s: float = Field(60, ge=0)
    """A session nothing was accepted for so long is over; 0: never. The vendor does not publish its own."""
    token_life_s: float = Field(86_400, gt=0)
    avatars: tuple[str, ...] = ()
    """Known avatar ids; empty: any."""
    voices: tuple[str, ...] = ()
    """Known voice ids; empty: any."""
    create_path: str = Field("/create", pattern=r"^(/[A-Za-z0-9_-]+)?$")
    """Below the base path; empty: the bare base, as the vendor's endpoint page has it."""
    avatar_field: Literal["avatarId", "id"] = "avatarId"
    """Its name inside `visualConfig`: `avatarId` in the documentation, `id` in the vendor's SDK."""


@dataclass(slots=True, eq=False)
class IssuedKs:
    """A Kaltura Session that the KS service has made; `expires` by `time.monotonic()`."""

    admin: bool
    """Whether it may create avatar sessions: type 2, entitlement disabled."""
    expires: float
    revoked: bool = False

    def good(self, now: float) -> bool:
        """Whether it is taken at all."""
        return not self.revoked and now < self.expires


@dataclass(slots=True, eq=False)
class Call:
    """One request to the Avatar API, or to the KS service. It counts as running from `begun` to `ended`."""

    number: int
    """From 1, over all sessions, in order of arrival."""
    route: str
    path: str
    begun: float
    session: "Session | None" = None
    raw: bytes = b""
    ended: float | None = None
    status: int | None = None
    """None while it runs; 0: nobody got an answer."""
    effect: bool = False
    """Whether it was taken: the text will be spoken, the session was created, and so on."""
    fault: str | None = None
    error: str | None = None

    def form(self) -> dict[str, str]:
        """What was sent to the KS service."""
        return dict(parse_qsl(self.raw.decode(errors="replace"), keep_blank_values=True))

    def body(self) -> object:
        """What was sent, as JSON if it is; of a form without the secrets. Read when asked for: a call pays nothing."""
        if self.route in (KS_START, KS_WIDGET, KS_APP_TOKEN):
            return {name: "…" if name in _SECRET_FIELDS else value for name, value in self.form().items()}
        try:
            body: object = json.loads(self.raw)
        except (ValueError, RecursionError):
            return self.raw.decode(errors="replace")
        return body


@dataclass(slots=True, eq=False)
class Session:
    """One avatar session with its calls, running ones included."""

    id: str
    avatar_id: str
    voice: dict[str, str | float] | None
    token: str = field(repr=False)
    token_expires: float
    created: float
    last_active: float
    max_gap_s: float = 0.0
    """Between two accepted calls; what a keep-alive has to keep short."""
    ended: float | None = None
    ended_by: Literal["request", "idle", "control"] | None = None
    forgotten: bool = False
    initialized: bool = False
    calls: list[Call] = field(default_factory=list)
    running: list[Call] = field(default_factory=list)
    tally: Tally = field(default_factory=Counter)
    overlaps: list[tuple[int, int]] = field(default_factory=list)
    """Numbers of calls of any route that ran at the same time, the earlier one first."""
    say_overlaps: list[tuple[int, int]] = field(default_factory=list)

    def touch(self, now: float) -> None:
        """Note that a call was accepted."""
        self.max_gap_s = max(self.max_gap_s, now - self.last_active)
        self.last_active = now

    def gap(self) -> float:
        """The longest time without an accepted call, up to now or to the session's end; seconds."""
        return max(self.max_gap_s, (self.ended or time.monotonic()) - self.last_active)

    def end(self, by: Literal["request", "idle", "control"], at: float) -> None:
        """End the session; the first reason stands."""
        if self.ended is None:
            self.ended, self.ended_by = at, by


@dataclass(slots=True, eq=False)
class _Waiter:
    tally: Tally
    route: str
    stage: Stage
    calls: int
    reached: asyncio.Future[None]

    def check(self) -> None:
        if not self.reached.done() and count(self.tally, self.route, self.stage) >= self.calls:
            self.reached.set_result(None)


def count(tally: Tally, route: str, stage: Stage) -> int:
    """The calls of `route` (`*`: of all) that came as far as `stage`."""
    if route != "*":
        return tally[route, stage]
    return sum(calls for (_, at), calls in tally.items() if at == stage)


class World:
    """All sessions and calls since the start or the last reset."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.calls: list[Call] = []
        self.sessions: dict[str, Session] = {}
        self.issued: dict[str, IssuedKs] = {}
        self.tally: Tally = Counter()
        self.statuses: Counter[tuple[str, int]] = Counter()
        self._epoch_offset_s = time.time() - time.monotonic()
        self._waiters: set[_Waiter] = set()

    def begin(self, route: str, path: str, session_id: str | None) -> Call:
        """Record a call that has arrived, and what it runs at the same time as."""
        call = Call(len(self.calls) + 1, route, path, time.monotonic())
        self.calls.append(call)
        session = self.sessions.get(session_id) if session_id else None
        if session is not None:
            call.session = session
            for other in session.running:
                session.overlaps.append((other.number, call.number))
                if other.route == route == SAY_TEXT:
                    session.say_overlaps.append((other.number, call.number))
            session.running.append(call)
            session.calls.append(call)
        self._note(call, "begun")
        return call

    def accept(self, call: Call, now: float) -> None:
        """Record that the call took effect."""
        call.effect = True
        if call.session is not None:
            call.session.touch(now)
        self._note(call, "accepted")

    def answer(self, call: Call, status: int) -> None:
        """Record what the caller was told; 0: nothing."""
        call.status = status
        self.statuses[call.route, status] += 1

    def finish(self, call: Call) -> None:
        """Record that the call no longer runs."""
        call.ended = time.monotonic()
        if call.session is not None and call in call.session.running:
            call.session.running.remove(call)
        self._note(call, "finished")

    def open(self, call: Call, session: Session) -> None:
        """Add the session that this `create` has made."""
        self.sessions[session.id] = call.session = session
        session.calls.append(call)

    def end_idle(self, session: Session) -> None:
        """End the session if its idle time is over. Looked at when it matters, so that sessions need no timers."""
        limit = self.settings.idle_timeout_s
        if limit and time.monotonic() - session.last_active > limit:
            session.end("idle", session.last_active + limit)

    def open_sessions(self) -> int:
        """How many sessions take up a slot of the account."""
        for session in self.sessions.values():
            self.end_idle(session)
        return sum(session.ended is None for session in self.sessions.values())

    def epoch(self, moment: float | None) -> float | None:
        """The same moment in seconds since 1970."""
        return None if moment is None else moment + self._epoch_offset_s

    async def wait(self, tally: Tally, route: str, stage: Stage, calls: int, timeout_s: float) -> bool:
        """Wait until `tally` has `calls` calls of `route` at `stage`; False when `timeout_s` were not enough."""
        waiter = _Waiter(tally, route, stage, calls, asyncio.get_running_loop().create_future())
        waiter.check()
        self._waiters.add(waiter)
        try:
            async with asyncio.timeout(timeout_s):
                await waiter.reached
        except TimeoutError:
            return False
        finally:
            self._waiters.discard(waiter)
        return True

    def _note(self, call: Call, stage: Stage) -> None:
        self.tally[call.route, stage] += 1
        if call.session is not None:
            call.session.tally[call.route, stage] += 1
        for waiter in self._waiters:
            waiter.check()
