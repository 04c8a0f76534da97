"""A conversation to talk through: makes entries as the inbox would, and drives a `Lane` as the runner would.

What it remembers goes through JSON, as in the ledger.
"""

import hashlib
import json
from dataclasses import dataclass, field, replace
from itertools import count
from types import SimpleNamespace
from typing import Any

from schemas.commands import Malformed, parse
from schemas.events import Event
from worker.core.book import Book
from worker.core.lane import Lane
from worker.core.memory import Changes, Ended, Memory, Turn
from worker.core.model import CallKind, CallResult, Entry, ReplyTo, Session, Viewer
from worker.core.outcome import merged
from worker.core.verdict import Conclusion
from worker.core.work import Attach, Call, CallInterrupt, Open, Rules, Say, Wait, Work
from worker.stores import documents

NOW = 1_000_000.0
OK = CallResult(CallKind.OK, 200)
NOT_TAKEN = CallResult(CallKind.NOT_TAKEN, 503)
UNKNOWN = CallResult(CallKind.UNKNOWN)
REFUSED = CallResult(CallKind.REFUSED, 400, error="Text is required")
DENIED = CallResult(CallKind.DENIED, 401)
GONE = CallResult(CallKind.GONE, 410)
STALE = CallResult(CallKind.STALE)
SESSION = Session("s1", "secret-token", "ann", "v1")
# Nothing is held back: what there is leaves as soon as it may, whole turns and words or not.
RULES = Rules(default_avatar="ann", default_voice="v1", stall_first_s=0, stall_s=0, auto_final_s=0)

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


def express(ordered: Entry) -> Entry:
    """The express copy of that interrupt."""
    return replace(ordered, delivery=None, express=True)


@dataclass
class Written:
    """What the ledger has of one conversation, in its own format."""

    version: str = ""
    state: str = ""
    turns: dict[str, Turn] = field(default_factory=dict)
    ended: dict[str, Any] = field(default_factory=dict)

    def write(self, changes: Changes, *, outcome: bool = False) -> bool:
        """Write what nobody else has overtaken, see `ports.Ledger.record`."""
        memory = self.recall()
        if outcome:
            mine = memory.state.attempt is not None and memory.state.number == changes.state.number
            mine = mine and not changes.ended.keys() & self.ended.keys()
            changes = changes if changes.base == self.version else merged(changes, memory.state, memory.turns)
        else:
            mine = changes.base == self.version
        if not mine:
            return False
        self.version = changes.version
        self.state = documents.state_text(changes.state)
        self.turns |= changes.turns
        for message_id, ended in changes.ended.items():
            row = SimpleNamespace(fingerprint=ended.fingerprint, touched=ended.at, event=documents.ended_text(ended))
            assert self.ended.setdefault(message_id, row) is row, "a command ends once"
        return True

    def recall(self) -> Memory:
        """See `ports.Ledger`, here and below."""
        if not self.version:
            return Memory(writer=f"w{next(_numbers)}")
        turns = {turn_id: replace(turn) for turn_id, turn in self.turns.items()}
        return Memory(documents.state_of(self.state), turns, version=self.version, writer=f"w{next(_numbers)}")

    def known(self, message_id: str | None) -> dict[str, Ended]:
        """How the command has ended, if it has."""
        return {message_id: documents.ended_of(self.ended[message_id])} if message_id in self.ended else {}


class Outdated(Exception):  # noqa: N818
    """Somebody else has written about the conversation."""


@dataclass
class Conversation:
    """One lane with a clock that stands still; what it tells is kept in `conclusions`.

    `pause_until`: the API has asked to be left alone until then. `telling`: the interrupts the API is being told of
    just now, beside the call under way, since `told_at`.
    """

    rules: Rules = RULES
    session: Session | None = SESSION
    now: float = NOW
    pause_until: float = 0.0
    written: Written = field(default_factory=Written)
    conclusions: list[Conclusion] = field(default_factory=list)
    works: list[Work | None] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._opened = count(1)
        self._begin(self.session)

    def _begin(self, session: Session | None) -> None:
        self.memory = self.written.recall()
        self.book = Book("c1", self.memory)
        self.lane = Lane(self.book, self.rules)
        self.lane.begin(session)
        self.calling: Call | None = None
        self.telling: list[Entry] = []
        self.told_at: list[float] = []
        self.begun = 0.0

    def offer(self, *entries: Entry) -> "Conversation":
        """Deliver commands."""
        for one in entries:
            if one.message_id not in self.memory.ended:
                self.memory.ended |= self.written.known(one.message_id)
            self._tell(self.lane.offer(one, self.now))
            calls = self.lane.take_interrupts()
            self.telling += calls
            self.told_at += [self.now] * len(calls)
            self.works += [CallInterrupt() for _ in calls]
        return self

    def interrupted(self, result: CallResult = OK) -> "Conversation":
        """The API answers the oldest interrupt it is being told of."""
        told = None if result.kind is CallKind.STALE else result
        self.told_at.pop(0)
        self._tell(self.lane.interrupted(self.telling.pop(0), told, self.now))
        return self

    def _tell(self, conclusions: tuple[Conclusion, ...], *, outcome: bool = False) -> None:
        changes = self.memory.take_changes()
        if changes is not None and not self.written.write(changes, outcome=outcome):
            raise Outdated
        self.conclusions += conclusions

    def next(self) -> Work | None:
        """Ask for the next work; a call counts as under way from here on."""
        step = self.lane.next(self.now, 0.0, self.pause_until)
        self._tell(step.conclusions)
        self.works.append(step.work)
        if step.work is not None and not isinstance(step.work, Wait):
            self.calling, self.begun = step.work, self.now
        return step.work

    def done(self, result: CallResult = OK, *, jitter: float = 1.0) -> "Conversation":
        """Answer the call under way."""
        call, self.calling = self.calling, None
        assert call is not None
        got = self.brings(call) if result.kind is CallKind.OK else None
        told = self.lane.done(call, result, self.now, begun=self.begun, got=got, jitter=jitter)
        self._tell(told, outcome=isinstance(call, Say))
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
        """Run until the lane is idle; calls are answered by `results`, then by OK. Waits are waited for.

        What is under way beside is answered first.
        """
        answers = iter(results)
        for _ in range(1000):
            if self.telling:
                self.interrupted(next(answers, OK))
                continue
            work = self.next()
            if work is None:
                return self
            if isinstance(work, Wait):
                assert work.until > self.now
                self.now = work.until
            else:
                self.done(next(answers, OK))
        raise AssertionError("the lane does not come to rest")

    def settle_calls(self, within_s: float = 5.0) -> "Conversation":
        """As `settle`, but nothing is waited for that comes later than that."""
        while (work := self.next()) is not None:
            if not isinstance(work, Wait):
                self.done()
            elif work.until - self.now > within_s:
                break
            else:
                self.now = work.until
        return self

    def forget(self) -> "Conversation":
        """The tenure ends, or the worker dies: lane and call are dropped, and a lane built from what is written."""
        self._begin(self.lane._sessions.session)
        return self

    def rebuild(self) -> "Conversation":
        """The lane fails: another one goes on with what it held."""
        held = tuple(self.book)
        return self.forget().offer(*held)

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
        return [event for conclusion in self.conclusions for event in conclusion.events]

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
        """The short types (with reason) of what this delivery ended with; "" where that was told before."""
        return [
            ""
            if conclusion.told
            else " ".join(filter(None, [conclusion.event.type[7:], wire(conclusion.event).get("reason", "")]))
            for conclusion in self.conclusions
            if one in conclusion.entries
        ]


def wire(event: Event) -> dict[str, Any]:
    """An event's data as listeners see it."""
    return event.data.model_dump(mode="json", by_alias=True, exclude_none=True)
