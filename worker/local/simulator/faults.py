"""What is made to go wrong: a queue of faults, the first that fits a call is spent on it."""

import asyncio
import random
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from worker.local.simulator.api import BAD_KS, BAD_TOKEN, ENDED, KS_NOT_AUTHORIZED, NOT_FOUND, TEXT_REQUIRED, Answer
from worker.local.simulator.model import CREATE, Call, Route

_GONE_POLL_S: Final = 0.02
_ERRORS: Final = {
    400: TEXT_REQUIRED,
    401: BAD_TOKEN,
    403: KS_NOT_AUTHORIZED,
    404: NOT_FOUND,
    410: ENDED,
    429: "Too many requests",
    500: "Internal server error",
    502: "Bad gateway",
    503: "Service unavailable",
    504: "Gateway timeout",
}


class Fault(BaseModel):
    """One entry of the queue.

    `when` says on which side of the effect it strikes. *before*: the call is not even looked at, nothing is taken.
    *after*: the text is taken, the session created, and only the answer suffers; a call the rules refuse gets its true
    answer.

    | kind | the caller gets |
    |---|---|
    | `latency` | the true answer, `seconds` late; *before*: the call takes effect that late, too |
    | `status` | `status` with the vendor's error body |
    | `refuse` | 200 with `success: false` |
    | `exception` | 200 with a `KalturaAPIException` object |
    | `garbage` | `status` (502) with a body that is not JSON |
    | `hang` | nothing until released or `seconds` are over; then 504 (*before*) or the true answer (*after*) |
    | `drop` | nothing: the connection is cut |
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    kind: Literal["latency", "status", "refuse", "exception", "garbage", "hang", "drop"]
    when: Literal["before", "after"] = "before"
    route: Route | Literal["*"] = "*"
    session: str | None = None
    """Only calls of this session id."""
    avatar: str | None = None
    """Only calls of sessions with this avatar id, their `create` included."""
    turn: str | None = None
    """Only `say-text` of this `turnId`."""
    times: int | None = Field(1, ge=1)
    """How many calls it strikes; null: all that fit, until cleared."""
    probability: float = Field(1.0, gt=0, le=1)
    """Of striking a call that fits; one that is let off goes on to the next fault."""
    seed: int = 0
    """Of the dice for `probability`: the same calls in the same order meet the same fate."""
    seconds: float | None = Field(None, ge=0)
    """How long the answer is held back; `hang` without it: until released."""
    status: int | None = Field(None, ge=400, le=599)
    error: str | None = None
    """Error text, for `exception` its code; default: the documented one."""
    retry_after: int | str | None = None
    """Value of the `Retry-After` header: seconds or an HTTP date."""
    linger_s: float = Field(0.0, ge=0)
    """The call counts as running until so long after it began, however early its caller was left alone: the server is
    still busy with it. A repeat inside that time is an overlap."""

    @model_validator(mode="after")
    def _complete(self) -> "Fault":
        if self.kind == "status" and self.status is None:
            raise ValueError("status: required for this kind")
        if self.kind == "latency" and self.seconds is None:
            raise ValueError("seconds: required for this kind")
        return self

    def fits(self, call: Call) -> bool:
        """Whether the call is one of those this fault is meant for."""
        session = call.session
        return (
            self.route in ("*", call.route)
            and (self.session is None or (session is not None and session.id == self.session))
            and (self.avatar is None or self.avatar == (session.avatar_id if session else _avatar_of(call)))
            and (self.turn is None or self.turn == _fields_of(call).get("turnId"))
        )

    def answer(self, call: Call, true: Answer | None) -> Answer | None:
        """What the caller gets (None: the connection is cut), given the true answer (None: not looked at)."""
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        match self.kind:
            case "drop":
                return None
            case "status":
                status = self.status or 500
                return Answer.error(status, self.error or _error_of(status, call), headers)
            case "refuse":
                return Answer.error(200, self.error or "Request refused", headers)
            case "exception":
                code = self.error or "INTERNAL_SERVER_ERROR"
                exception = {"objectType": "KalturaAPIException", "code": code, "message": code, "args": {}}
                return Answer.of(200, exception, headers)
            case "garbage":
                page = b"<html><body>upstream said no</body></html>"
                return Answer(self.status or 502, page, "text/html", headers)
            case "latency" | "hang":
                return true or Answer.error(504, _ERRORS[504])


@dataclass(slots=True)
class Armed:
    """A fault in the queue, with what is left of it."""

    fault: Fault
    struck: int = 0
    dice: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.dice = random.Random(self.fault.seed)  # noqa: S311  a repeatable die, not a secret

    @property
    def left(self) -> int | None:
        """How many calls it will still strike; None: no limit."""
        return None if self.fault.times is None else self.fault.times - self.struck

    def strikes(self, call: Call) -> bool:
        """Whether it strikes this call; if so, it is that much used up."""
        if self.left == 0 or not self.fault.fits(call) or self.dice.random() >= self.fault.probability:
            return False
        self.struck += 1
        return True


class FaultQueue:
    """All faults since the start or the last clearing, in the order they were queued, and the calls they hold."""

    def __init__(self) -> None:
        self.armed: list[Armed] = []
        self._held: set[asyncio.Event] = set()

    def pick(self, call: Call) -> Fault | None:
        """The fault to spend on this call."""
        return next((armed.fault for armed in self.armed if armed.strikes(call)), None)

    async def hold(self, seconds: float | None, gone: Callable[[], bool]) -> None:
        """Hold a call until it is released, `seconds` are over, or its caller is `gone` (looked at by polling)."""
        released = asyncio.Event()
        self._held.add(released)
        deadline = None if seconds is None else asyncio.get_running_loop().time() + seconds
        with suppress(TimeoutError):
            async with asyncio.timeout_at(deadline):
                while not released.is_set() and not gone():
                    with suppress(TimeoutError):
                        await asyncio.wait_for(released.wait(), _GONE_POLL_S)
        self._held.discard(released)

    def release(self) -> int:
        """Let all held calls go; returns how many there were."""
        held = len(self._held)
        for event in self._held:
            event.set()
        return held


def _error_of(status: int, call: Call) -> str:
    if status == 401 and call.route == CREATE:
        return BAD_KS
    return _ERRORS.get(status, "Error")


def _fields_of(call: Call) -> dict[str, object]:
    body = call.body()
    return body if isinstance(body, dict) else {}


def _avatar_of(call: Call) -> object:
    visual = _fields_of(call).get("visualConfig")
    return (visual.get("avatarId") or visual.get("id")) if isinstance(visual, dict) else None
