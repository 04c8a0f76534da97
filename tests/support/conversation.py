"""A conversation to talk through: makes entries as the inbox would, and drives a `Lane` as the runner would."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from schemas.commands import Malformed, parse
from schemas.events import Event
from worker.core.book import Book
from worker.core.lane import Lane
from worker.core.memory import Memory
from worker.core.model import CallKind, CallResult, Entry, ReplyTo, Session, Viewer
from worker.core.verdict import Conclusion
from worker.core.work import Attach, Call, Open, Rules, Say, Wait, Work

NOW = 1_000_000.0
OK = CallResult(CallKind.OK, 200)
NOT_TAKEN = CallResult(CallKind.NOT_TAKEN, 503)
UNKNOWN = CallResult(CallKind.UNKNOWN)
REFUSED = CallResult(CallKind.REFUSED, 400, error="Text is required")
DENIED = CallResult(CallKind.DENIED, 401)
GONE = CallResult(CallKind.GONE, 410)
STALE = CallResult(CallKind.STALE)
SESSION = Session("s1", "secret-token", "ann", "v1")
RULES = Rules(default_avatar="ann", default_voice="v1")

_numbers = count(1)


def entry(
    message_id: str | None = "",
    *,
    born: float = NOW,
    delivery: object = None,
    redelivered: bool = False,
    reply_to: ReplyTo | None = None,
    traceparent: str | None = None,
    conversation_id: str = "c1",
    **body: Any,
) -> Entry:
    """A delivered command of the given body; `message_id` "" stands for a fresh one, None for none."""
    number = next(_numbers)
    raw = json.dumps(body).encode()
    command = parse(raw, conversation_id)
    assert not isinstance(command, Malformed), command
    if message_id == "":
        message_id = f"m{number}"
    return Entry(
        command=command,
        key=message_id or f"random{number}",
        born=born,
        delivery=delivery,
        message_id=message_id,
        fingerprint=hashlib.blake2b(raw, digest_size=16).digest(),
        redelivered=redelivered,
        traceparent=traceparent,
        reply_to=reply_to,
    )


def speak(turn_id: str, text: str, *, final: bool = False, message_id: str | None = "", **envelope: Any) -> Entry:
    """A chunk."""
    return entry(message_id, turnId=turn_id, text=text, isFinal=final, **envelope)


def interrupt(turn_id: str | None = None, *, message_id: str | None = "", **envelope: Any) -> Entry:
    """An interrupt, of one turn or of all."""
    turn: dict[str, Any] = {} if turn_id is None else {"turnId": turn_id}
    return entry(message_id, type="interrupt", **turn, **envelope)


@dataclass
class Conversation:
    """One lane with a clock that stands still; what it tells is kept in `conclusions`."""

    rules: Rules = RULES
    session: Session | None = SESSION
    memory: Memory = field(default_factory=Memory)
    now: float = NOW
    conclusions: list[Conclusion] = field(default_factory=list)
    works: list[Work | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.lane = Lane(Book("c1", self.memory), self.rules)
        self.lane.begin(self.session)
        self.calling: Call | None = None
        self._opened = count(1)

    def offer(self, *entries: Entry) -> "Conversation":
        """Deliver commands."""
        for one in entries:
            self.conclusions += self.lane.offer(one, self.now)
        return self

    def next(self) -> Work | None:
        """Ask for the next work; a call counts as under way from here on."""
        step = self.lane.next(self.now)
        self.conclusions += step.conclusions
        self.works.append(step.work)
        if step.work is not None and not isinstance(step.work, Wait):
            self.calling = step.work
        return step.work

    def done(self, result: CallResult = OK, *, jitter: float = 1.0) -> "Conversation":
        """Answer the call under way."""
        call, self.calling = self.calling, None
        assert call is not None
        got = self.brings(call) if result.kind is CallKind.OK else None
        self.conclusions += self.lane.done(call, result, self.now, got=got, jitter=jitter)
        return self

    def brings(self, call: Call) -> Session | Viewer | None:
        """What a call that succeeds has brought."""
        match call:
            case Open():
                return Session(f"opened{next(self._opened)}", "secret-token", call.avatar_id, call.voice_id)
            case Attach():
                return call.session
            case Say():
                return None
            case _:
                return Viewer("https://whep", {"credential": "secret-turn"})

    def say(self) -> Say:
        """The next work, which must be a say."""
        work = self.next()
        assert isinstance(work, Say), work
        return work

    def waits(self) -> float:
        """The next work, which must be a wait: for how many seconds."""
        work = self.next()
        assert isinstance(work, Wait), work
        return work.until - self.now

    def settle(self, *results: CallResult) -> "Conversation":
        """Run until the lane is idle; calls are answered by `results`, then by OK. Waits are waited for."""
        answers = iter(results)
        for _ in range(1000):
            work = self.next()
            if work is None:
                return self
            if isinstance(work, Wait):
                assert work.until > self.now
                self.now = work.until
            else:
                self.done(next(answers, OK))
        raise AssertionError("the lane does not come to rest")

    def forget(self, is_gone: Callable[[Entry], bool] = lambda _: True) -> "Conversation":
        """The connection is lost."""
        self.lane.forget(is_gone)
        return self

    @property
    def calls(self) -> list[Call]:
        """All calls handed out."""
        return [work for work in self.works if work is not None and not isinstance(work, Wait)]

    @property
    def said(self) -> list[tuple[str, str, bool]]:
        """Turn, text and isFinal of each say handed out, repeats included."""
        pieces = [call.piece for call in self.calls if isinstance(call, Say)]
        return [(piece.turn_id, piece.text, piece.is_final) for piece in pieces]

    @property
    def events(self) -> list[Event]:
        """What was told, in order."""
        return [conclusion.event for conclusion in self.conclusions]

    @property
    def told(self) -> list[tuple[str, dict[str, Any]]]:
        """The same as short types (`speech.accepted`) with wire data."""
        return [(event.type.removeprefix("avatar."), wire(event)) for event in self.events]

    def of(self, short_type: str) -> list[dict[str, Any]]:
        """The data of the events of one type."""
        return [data for kind, data in self.told if kind == short_type]

    @property
    def types(self) -> list[str]:
        """The short types of what was told."""
        return [kind for kind, _ in self.told]

    def ends(self, one: Entry) -> list[str]:
        """The short types (with reason) of the conclusions that this delivery ended with."""
        return [
            " ".join(filter(None, [event.type.removeprefix("avatar."), wire(event).get("reason", "")]))
            for event, entries in ((conclusion.event, conclusion.entries) for conclusion in self.conclusions)
            if one in entries
        ]


def wire(event: Event) -> dict[str, Any]:
    """An event's data as listeners see it."""
    return event.data.model_dump(mode="json", by_alias=True, exclude_none=True)
