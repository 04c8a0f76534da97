"""Status events, worker → listeners (contract, section 3): CloudEvents 1.0, structured JSON.

`Event` is what happened; `encode` wraps it in its envelope. The envelope's `id` is a function of the event's `key`,
never of the clock or of chance: an event sent again after a crash bears the same id, and listeners drop repeats by it.
"""

import json
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel
from pydantic.json_schema import SkipJsonSchema

from schemas.commands import RejectReason
from schemas.routes import INVALID_SUBJECT, event_routing_key

CONTENT_TYPE = "application/cloudevents+json"
MAX_COMMAND_IDS = 500
"""How many commands one `avatar.speech.discarded` may list."""

_NAMESPACE = uuid.UUID("6b4c0f7e-3f0e-5d5c-9a52-3c1a5c0b7e11")
_Maybe = SkipJsonSchema[None]


class EndReason(StrEnum):
    """Why a session ended."""

    REQUESTED = "requested"
    IDLE = "idle"
    LOST = "lost"
    REPLACED = "replaced"
    SHUTDOWN = "shutdown"


class SessionFailure(StrEnum):
    """Why a session could not be had."""

    CAPACITY = "capacity"
    CREDENTIALS = "credentials"
    REFUSED = "refused"
    UNAVAILABLE = "unavailable"


class DiscardReason(StrEnum):
    """Why a chunk was not spoken although nothing went wrong."""

    INTERRUPTED = "interrupted"
    EXPIRED = "expired"
    EMPTY = "empty"
    DUPLICATE = "duplicate"


class SpeechFailure(StrEnum):
    """Why a chunk could not be spoken."""

    NO_SESSION = "no_session"
    CAPACITY = "capacity"
    CREDENTIALS = "credentials"
    REFUSED = "refused"
    SESSION_LOST = "session_lost"
    UNKNOWN_OUTCOME = "unknown_outcome"
    TURN_FAILED = "turn_failed"
    DEAD_LETTERED = "dead_lettered"


class _Data(BaseModel):
    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, frozen=True, extra="forbid")


class _Listing(_Data):
    command_ids: tuple[str, ...]


class SessionReady(_Listing):
    """`avatar.session.ready`: the conversation has an avatar. Never carries the token."""

    session_id: str
    avatar_id: str | _Maybe = None
    voice_id: str | _Maybe = None


class SessionEnded(_Listing):
    """`avatar.session.ended`; `session_id` is absent where there was no session to end."""

    session_id: str | _Maybe = None
    reason: EndReason


class SessionFailed(_Listing):
    """`avatar.session.failed`; `status` is the HTTP status, where one was seen."""

    reason: SessionFailure
    status: int | _Maybe = None


class TurnStarted(_Data):
    """`avatar.turn.started`: the API took the turn's first piece."""

    turn_id: str


class TurnCompleted(_Data):
    """`avatar.turn.completed`: the turn is closed and all of it was handed to the API (not: spoken to the end).

    `text_length` counts characters; `final_sent` tells whether a call carried `isFinal: true`.
    """

    turn_id: str
    pieces: int
    text_length: int
    final_sent: bool
    auto_final: bool | _Maybe = None


class TurnInterrupted(_Data):
    """`avatar.turn.interrupted`: the turn is silent from here on."""

    turn_id: str
    discarded_commands: int


class TurnFailed(_Data):
    """`avatar.turn.failed`; `reason` is that of its first failed or expired chunk."""

    turn_id: str
    reason: SpeechFailure | Literal["expired"]


class SpeechAccepted(_Listing):
    """`avatar.speech.accepted`: the API took a piece. `latency_ms` is the age of its oldest chunk at that moment."""

    turn_id: str
    text: str
    is_final: bool
    attempts: int
    latency_ms: int
    possible_duplicate: bool | _Maybe = None


class SpeechDiscarded(_Data):
    """`avatar.speech.discarded`: chunks that will not be spoken, at most 500 an event."""

    turn_id: str
    command_ids: Annotated[tuple[str, ...], Field(max_length=MAX_COMMAND_IDS)]
    reason: DiscardReason


class SpeechFailed(_Listing):
    """`avatar.speech.failed`: chunks that could not be spoken; a copy of each lies in `avatar.parked`."""

    turn_id: str
    reason: SpeechFailure
    status: int | _Maybe = None
    parked: Literal[True] = True


class RejectedField(_Data):
    """A field and the rule it breaks; never the value."""

    field: str
    rule: str


class CommandRejected(_Listing):
    """`avatar.command.rejected`. `routing_key`, escaped, stands only where no conversation id can be read."""

    reason: RejectReason
    errors: tuple[RejectedField, ...]
    routing_key: Annotated[str, Field(max_length=255)] | _Maybe = None
    parked: Literal[True] = True


class InterruptDone(_Listing):
    """`avatar.interrupt.done`. `api_status`: absent where there was nothing to call, 0 where no answer came."""

    turn_ids: tuple[str, ...]
    latency_ms: int
    api_status: int | _Maybe = None


class FlowPaused(_Data):
    """`avatar.flow.paused`: producers of the conversation should wait. It lapses after `valid_s` unless repeated."""

    waiting_chars: int
    valid_s: float


class FlowResumed(_Data):
    """`avatar.flow.resumed`: they may go on."""

    waiting_chars: int


Data = (
    SessionReady
    | SessionEnded
    | SessionFailed
    | TurnStarted
    | TurnCompleted
    | TurnInterrupted
    | TurnFailed
    | SpeechAccepted
    | SpeechDiscarded
    | SpeechFailed
    | CommandRejected
    | InterruptDone
    | FlowPaused
    | FlowResumed
)

EVENT_TYPES: dict[type[Data], str] = {
    SessionReady: "avatar.session.ready",
    SessionEnded: "avatar.session.ended",
    SessionFailed: "avatar.session.failed",
    TurnStarted: "avatar.turn.started",
    TurnCompleted: "avatar.turn.completed",
    TurnInterrupted: "avatar.turn.interrupted",
    TurnFailed: "avatar.turn.failed",
    SpeechAccepted: "avatar.speech.accepted",
    SpeechDiscarded: "avatar.speech.discarded",
    SpeechFailed: "avatar.speech.failed",
    CommandRejected: "avatar.command.rejected",
    InterruptDone: "avatar.interrupt.done",
    FlowPaused: "avatar.flow.paused",
    FlowResumed: "avatar.flow.resumed",
}


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to a conversation.

    `conversation_id` is None where no valid one can be read. `key` tells this happening from every other of its type
    and conversation, and is the same whenever the same happening is told again. `traceparent` is of the oldest command.
    """

    conversation_id: str | None
    data: Data
    key: str
    traceparent: str | None = None

    @property
    def type(self) -> str:
        """The CloudEvents `type`, e.g. `avatar.speech.accepted`."""
        return EVENT_TYPES[type(self.data)]

    @property
    def subject(self) -> str:
        """The conversation id, or `$invalid`."""
        return self.conversation_id or INVALID_SUBJECT

    @property
    def routing_key(self) -> str:
        """Under which the event is published."""
        return event_routing_key(self.type, self.subject)

    def id(self, source: str) -> str:
        """The CloudEvents `id`: the same for the same happening, in every worker of a deployment."""
        return str(uuid.uuid5(_NAMESPACE, f"{source}\n{self.type}\n{self.subject}\n{self.key}"))


def encode(event: Event, *, source: str, worker: str, time: datetime | None = None) -> bytes:
    """The event as CloudEvents 1.0 structured JSON, UTF-8. `time` defaults to now."""
    data = event.data.model_dump(mode="json", by_alias=True, exclude_none=True)
    envelope: dict[str, Any] = {
        "specversion": "1.0",
        "id": event.id(source),
        "source": source,
        "type": event.type,
        "subject": event.subject,
        "time": (time or datetime.now(UTC)).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "datacontenttype": "application/json",
        "worker": worker,
        "data": {"conversationId": event.subject} | data,
    }
    if event.traceparent is not None:
        envelope["traceparent"] = event.traceparent
    return json.dumps(envelope, ensure_ascii=False, separators=(",", ":")).encode()
