"""What a lane holds and hands out: entries, pieces, sessions, and what the Avatar API made of a call."""

import math
from dataclasses import dataclass, field
from enum import StrEnum

from schemas.commands import Command, Malformed, Speak
from worker.core.shaping import shaper


@dataclass(frozen=True, slots=True)
class ReplyTo:
    """Where the answer to a command goes, and for how long it is of use."""

    queue: str
    correlation_id: str | None
    expires_ms: int


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """One delivered command. Two entries are the same only if they are the same delivery.

    `key` names the command in event ids: its `message_id`, or something random where it has none. `born` is where its
    age counts from. `delivery` is the broker's side of it, which the core only passes on. A command that an operator
    sends again leads another life: its key is another, and `replay` names what it was sent again with. `express`: the
    copy of an interrupt that overtakes; it is not queued.
    """

    command: Command
    key: str
    born: float
    delivery: object
    message_id: str | None = None
    fingerprint: bytes = b""
    redelivered: bool = False
    traceparent: str | None = None
    reply_to: ReplyTo | None = None
    replay: str = ""
    express: bool = False

    @property
    def known_as(self) -> str | None:
        """What its end is remembered by; None: it has no id, and nobody would know it again."""
        return self.key if self.message_id is not None else None


@dataclass(frozen=True, slots=True, eq=False)
class Marker:
    """What was sent through the old partition of a conversation whose commands come from partition `to` now.

    No command: no event tells of it, and it is never parked.
    """

    conversation_id: str
    to: int
    delivery: object


@dataclass(frozen=True, slots=True, eq=False)
class Misfit:
    """One delivered message that is no command."""

    malformed: Malformed
    key: str
    delivery: object
    routing_key: str
    message_id: str | None = None
    traceparent: str | None = None
    reply_to: ReplyTo | None = None


@dataclass(frozen=True, slots=True)
class Part:
    """The characters `start` to `end` of one chunk; `last` when nothing of the chunk is left after them."""

    entry: Entry
    start: int
    end: int
    last: bool


@dataclass(frozen=True, slots=True)
class Piece:
    """What one `say-text` carries: text of one turn, from one chunk or several.

    `shapes`: what the next piece of the turn depends on. `auto_final`: no chunk said that it is the last. `name`: what
    it is called by where it has no chunk at all. `decided_by`: the chunk with which it was known that it ends here;
    None: it was the time, or what came behind its turn.
    """

    turn_id: str
    text: str
    is_final: bool
    parts: tuple[Part, ...]
    shapes: shaper.State | None = None
    auto_final: bool = False
    name: str = ""
    decided_by: Entry | None = None

    @property
    def ending(self) -> tuple[Entry, ...]:
        """The chunks that end with this piece."""
        return tuple(part.entry for part in self.parts if part.last)

    @property
    def key(self) -> str:
        """The same whenever the same piece is told of again."""
        return f"{self.parts[0].entry.key}\n{self.parts[0].start}" if self.parts else f"{self.turn_id}\n{self.name}"

    @property
    def born(self) -> float:
        """The age of a piece is that of its oldest chunk; without any it has none."""
        return min((part.entry.born for part in self.parts), default=math.inf)


@dataclass(frozen=True, slots=True)
class Viewer:
    """What a page needs to show the avatar without its token. `turn` holds credentials."""

    whep_url: str = field(repr=False)
    turn: dict[str, object] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Session:
    """An avatar session of a conversation. `attached`: somebody else created it, nobody knows with which avatar.

    Its token is good until `expires_at`, epoch seconds; from `renew_at` on, another session is wanted. None: unknown.
    """

    session_id: str
    token: str = field(repr=False)
    avatar_id: str | None = None
    voice_id: str | None = None
    voice_speed: float | None = None
    attached: bool = False
    viewer: Viewer | None = field(default=None, repr=False)
    renew_at: float | None = None
    expires_at: float | None = None


class CallKind(StrEnum):
    """What became of a call, as far as anybody can know: `avatar.faults` maps everything to one of these."""

    OK = "ok"
    NOT_TAKEN = "not_taken"
    """Surely without effect; try again freely."""
    UNKNOWN = "unknown"
    """Perhaps with effect: the answer was lost."""
    REFUSED = "refused"
    """Without effect, and it would be refused again."""
    DENIED = "denied"
    """The credentials were refused."""
    GONE = "gone"
    """The session does not exist any more."""
    FULL = "full"
    """Nothing was called: there is no room for another session, or others wait for one in front."""
    STALE = "stale"
    """Nothing was called: the session had ended meanwhile."""


@dataclass(frozen=True, slots=True)
class CallResult:
    """The outcome of one call: `status` is the HTTP status (None: no answer), `retry_after_s` the server's wish.

    `local`: the trouble is this session's own, and says nothing about the API.
    """

    kind: CallKind
    status: int | None = None
    retry_after_s: float | None = None
    error: str = ""
    local: bool = False

    @property
    def is_full(self) -> bool:
        """Of a create: whether there was no room for another session, in the fleet or at the API (429)."""
        return self.kind is CallKind.FULL or (self.kind is CallKind.NOT_TAKEN and self.status == 429)


TOO_LATE = CallResult(CallKind.NOT_TAKEN, error="it came too late to be made", local=True)
"""Nothing was called: the turn is silent meanwhile, or the time is over within which the call had to begin."""


def speak_of(entry: Entry) -> Speak:
    """The command of an entry known to be speech."""
    assert isinstance(entry.command, Speak)
    return entry.command
