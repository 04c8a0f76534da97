"""How things end: every function is one word of the closed set.

It says which event tells it, whether a copy is parked, and what the asker is answered. Acknowledging comes always, and
always last.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from schemas.commands import FieldError, RejectReason, SessionStart
from schemas.events import (
    MAX_COMMAND_IDS,
    CommandRejected,
    DiscardReason,
    EndReason,
    Event,
    InterruptDone,
    RejectedField,
    SessionEnded,
    SessionFailed,
    SessionFailure,
    SessionReady,
    SpeechAccepted,
    SpeechDiscarded,
    SpeechFailed,
    SpeechFailure,
    TurnCompleted,
    TurnFailed,
    TurnInterrupted,
    TurnStarted,
)
from worker.core.memory import Ended, Turn
from worker.core.model import CallResult, Entry, Misfit, Piece, Session, speak_of


@dataclass(frozen=True, slots=True)
class Parked:
    """Why a copy is kept, and after how many calls. `ended`: the type of its event, where `reason` does not tell."""

    reason: str
    error: str
    attempts: int = 0
    ended: str = ""


@dataclass(frozen=True, slots=True)
class Answer:
    """What goes to `reply_to`. The payload may hold a token."""

    payload: dict[str, Any] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Conclusion:
    """An end, ready to be carried out in this order: park, tell, answer, acknowledge.

    `entries` end with it. `before` and `after` are events that go with it: a turn that begins or is over by it. `told`:
    that was done already, only the rest is left to do. `again`: it had ended before, and is told as it was then.
    """

    event: Event
    entries: tuple[Entry | Misfit, ...] = ()
    parked: Parked | None = None
    answer: Answer | None = None
    before: tuple[Event, ...] = ()
    after: tuple[Event, ...] = ()
    told: bool = False
    again: bool = False

    @property
    def events(self) -> tuple[Event, ...]:
        """All it tells, in order."""
        return () if self.told else (*self.before, self.event, *self.after)


def _ids(entries: Sequence[Entry]) -> tuple[str, ...]:
    return tuple(entry.message_id for entry in entries if entry.message_id is not None)


def _trace(entries: Sequence[Entry]) -> str | None:
    return next((entry.traceparent for entry in entries if entry.traceparent is not None), None)


def repeated(ended: Ended, entry: Entry, session: Session | None) -> Conclusion:
    """The command has ended before: tell it again under the same id, and answer again whoever asked."""
    answer = _answer_again(ended.event, session, entry)
    return Conclusion(ended.event, (entry,), answer=answer, before=ended.before, after=ended.after, again=True)


def _answer_again(event: Event, session: Session | None, entry: Entry) -> Answer | None:
    if entry.reply_to is None or not isinstance(entry.command, SessionStart):
        return None
    if isinstance(event.data, SessionFailed):
        return _refusal(str(event.data.reason), event.data.status)
    handed_over = _hand_off(session, entry) if session else None
    return handed_over or _refusal("the session has ended; ask for another under a new message id")


def accepted(conversation_id: str, piece: Piece, *, attempts: int, latency_ms: int, repeated: bool) -> Conclusion:
    """The API took the piece; the chunks that lie wholly behind it end."""
    ending = piece.ending
    data = SpeechAccepted(
        turn_id=piece.turn_id,
        command_ids=_ids(ending),
        text=piece.text,
        is_final=piece.is_final,
        attempts=attempts,
        latency_ms=latency_ms,
        possible_duplicate=True if repeated else None,
    )
    trace = _trace([part.entry for part in piece.parts])
    return Conclusion(Event(conversation_id, data, piece.key, trace), ending)


def discarded(conversation_id: str, entries: Sequence[Entry], reason: DiscardReason) -> Iterator[Conclusion]:
    """Chunks of one turn that are not spoken, in as few events as the limit of ids allows."""
    turn_id = speak_of(entries[0]).turn_id
    for start in range(0, len(entries), MAX_COMMAND_IDS):
        group = tuple(entries[start : start + MAX_COMMAND_IDS])
        data = SpeechDiscarded(turn_id=turn_id, command_ids=_ids(group), reason=reason)
        yield Conclusion(Event(conversation_id, data, group[0].key, _trace(group)), group)


def failed(
    conversation_id: str, entries: Sequence[Entry], reason: SpeechFailure, *, attempts: int = 0, why: CallResult | None
) -> Conclusion:
    """Chunks of one turn that could not be spoken; a copy of each is parked."""
    data = SpeechFailed(
        turn_id=speak_of(entries[0]).turn_id,
        command_ids=_ids(entries),
        reason=reason,
        status=why.status if why else None,
    )
    event = Event(conversation_id, data, entries[0].key, _trace(entries))
    return Conclusion(event, tuple(entries), Parked(reason, why.error if why else "", attempts))


def message_id_reused(conversation_id: str, entry: Entry) -> Conclusion:
    """The id was used before, by another body."""
    rule = FieldError("message_id", "was used before by a command with another body; use a new id for a new command")
    return _rejected(conversation_id, entry, RejectReason.MESSAGE_ID_REUSED, (rule,), None)


def rejected(misfit: Misfit) -> Conclusion:
    """The message is no command."""
    malformed = misfit.malformed
    return _rejected(malformed.conversation_id, misfit, malformed.reason, malformed.errors, misfit.routing_key)


def _rejected(
    conversation_id: str | None,
    message: Entry | Misfit,
    reason: RejectReason,
    errors: tuple[FieldError, ...],
    routing_key: str | None,
) -> Conclusion:
    data = CommandRejected(
        command_ids=(message.message_id,) if message.message_id is not None else (),
        reason=reason,
        errors=tuple(RejectedField(field=error.field, rule=error.rule) for error in errors),
        routing_key=None if conversation_id else (routing_key or ""),
    )
    # The reason is part of the key: one id may end as spoken under one body and as rejected under another.
    event = Event(conversation_id, data, f"{reason}\n{message.key}", message.traceparent)
    error = "; ".join(f"{error.field}: {error.rule}" for error in errors)
    answer = Answer({"error": f"{reason}: {error}"}) if message.reply_to else None
    return Conclusion(event, (message,), Parked(reason, error), answer)


def turn_started(conversation_id: str, piece: Piece) -> Event:
    """The API took the first piece of the turn."""
    return Event(conversation_id, TurnStarted(turn_id=piece.turn_id), piece.key)


def turn_completed(
    conversation_id: str, turn_id: str, turn: Turn, closing: Entry | str, *, final_sent: bool, auto_final: bool = False
) -> Event:
    """All of the turn was handed to the API. `closing` is the command that closed it, or a name for what else did."""
    data = TurnCompleted(
        turn_id=turn_id,
        pieces=turn.pieces,
        text_length=turn.text_length,
        final_sent=final_sent,
        auto_final=True if auto_final else None,
    )
    if isinstance(closing, str):
        return Event(conversation_id, data, f"{turn_id}\n{closing}")
    return Event(conversation_id, data, f"{turn_id}\n{closing.key}", closing.traceparent)


def turn_interrupted(conversation_id: str, turn_id: str, interrupt: Entry, discarded: int) -> Event:
    """The turn is silent from here on."""
    data = TurnInterrupted(turn_id=turn_id, discarded_commands=discarded)
    return Event(conversation_id, data, f"{turn_id}\n{interrupt.key}", interrupt.traceparent)


def turn_fenced(conversation_id: str, turn_id: str, interrupt_key: str) -> Conclusion:
    """The turn is silent because a chunk of it was overtaken by an interrupt; the chunk ends by itself."""
    data = TurnInterrupted(turn_id=turn_id, discarded_commands=1)
    return Conclusion(Event(conversation_id, data, f"{turn_id}\n{interrupt_key}"))


def turn_failed(conversation_id: str, entry: Entry, reason: SpeechFailure | Literal["expired"]) -> Event:
    """The turn is silent because `entry`, a chunk of it, failed or expired."""
    turn_id = speak_of(entry).turn_id
    data = TurnFailed(turn_id=turn_id, reason=reason)
    return Event(conversation_id, data, f"{turn_id}\n{entry.key}", entry.traceparent)


def interrupt_done(
    conversation_id: str, entry: Entry, turn_ids: Sequence[str], *, latency_ms: int, result: CallResult | None
) -> Event:
    """The interrupt has acted; `result` is None where there was nothing to call."""
    status = None if result is None else (result.status or 0)
    data = InterruptDone(command_ids=_ids([entry]), turn_ids=tuple(turn_ids), latency_ms=latency_ms, api_status=status)
    return Event(conversation_id, data, entry.key, entry.traceparent)


def session_ready(conversation_id: str, session: Session, entry: Entry | None) -> Conclusion:
    """The conversation has an avatar. `entry` asked for it and ends; None: speech did."""
    data = SessionReady(
        session_id=session.session_id,
        avatar_id=session.avatar_id,
        voice_id=session.voice_id,
        command_ids=_ids([entry]) if entry else (),
    )
    key = f"{session.session_id}\n{entry.key if entry else ''}"
    event = Event(conversation_id, data, key, entry.traceparent if entry else None)
    return Conclusion(event, (entry,) if entry else (), answer=_hand_off(session, entry))


def _hand_off(session: Session, entry: Entry | None) -> Answer | None:
    if entry is None or entry.reply_to is None or not isinstance(entry.command, SessionStart):
        return None
    if entry.command.handoff == "token":
        return Answer({"sessionId": session.session_id, "token": session.token})
    viewer = session.viewer
    if viewer is None:
        return None
    return Answer({"sessionId": session.session_id, "whepUrl": viewer.whep_url, "turn": viewer.turn})


def session_ended(
    conversation_id: str, session: Session | None, reason: EndReason, entry: Entry | None = None
) -> Conclusion:
    """The session is over. `entry` asked for it and ends; None: nobody did, or the asker has an end of its own."""
    session_id = session.session_id if session else None
    data = SessionEnded(session_id=session_id, reason=reason, command_ids=_ids([entry]) if entry else ())
    key = f"{session_id}\n{reason}\n{entry.key if entry else ''}"
    event = Event(conversation_id, data, key, entry.traceparent if entry else None)
    return Conclusion(event, (entry,) if entry else ())


def session_failed(
    conversation_id: str, reason: SessionFailure, why: CallResult, entry: Entry, *, ends: bool
) -> Conclusion:
    """No session could be had for `entry`, which ends with it if it is a `session.start` (`ends`)."""
    data = SessionFailed(reason=reason, status=why.status, command_ids=_ids([entry]) if ends else ())
    event = Event(conversation_id, data, entry.key, entry.traceparent)
    answer = _refusal(f"{reason}: {why.error}" if why.error else str(reason), why.status)
    return Conclusion(event, (entry,) if ends else (), answer=answer if ends and entry.reply_to else None)


def _refusal(error: str, status: int | None = None) -> Answer:
    payload: dict[str, Any] = {"error": error}
    return Answer(payload | {"status": status} if status else payload)


def milliseconds(seconds: float) -> int:
    """As events state durations: whole, and never negative, since clocks of two machines differ."""
    return round(max(0.0, seconds) * 1000)
