"""What becomes of a command that the broker gave up: it had no queue for it, or let it expire there.

A copy is parked in any case, as `dead_lettered`, and what it was tells how it ends:

    speak                         speech.failed, dead_lettered, and its turn with it, as with any chunk that fails
    session.start, .attach        session.failed, unavailable; whoever asked is answered
    interrupt, session.end        command.rejected, invalid_field: these two have no event for having failed, and those
                                  they have would say that something stopped or ended
    no command                    command.rejected, with its own reason
    ended before                  the event that told it then, again, or, for another body, message_id_reused
"""

from dataclasses import replace
from typing import assert_never

from schemas.commands import (
    FieldError,
    Interrupt,
    Malformed,
    RejectReason,
    SessionAttach,
    SessionEnd,
    SessionStart,
    Speak,
)
from schemas.events import SessionFailure, SpeechFailure
from worker.core import verdict
from worker.core.memory import Ended, Memory, TurnState
from worker.core.model import CallKind, CallResult, Entry, Misfit, speak_of
from worker.core.verdict import Conclusion, Parked

REASON = "dead_lettered"

_RULE = FieldError("$", "came back from the broker, which could not deliver it; send it again")


def conclude(found: Entry | Misfit, why: str) -> Conclusion:
    """How it ends, if it has not ended before; `why` is what the broker says."""
    if isinstance(found, Misfit):
        rejected = verdict.rejected(found)
        assert rejected.parked is not None
        return _kept(rejected, f"{why}; {rejected.parked.reason}: {rejected.parked.error}")
    return _kept(_failed(found, why), why)


def _failed(entry: Entry, why: str) -> Conclusion:
    conversation_id = entry.command.conversation_id
    lost = CallResult(CallKind.NOT_TAKEN, error=why)
    match entry.command:
        case Speak():
            failed = verdict.failed(conversation_id, [entry], SpeechFailure.DEAD_LETTERED, why=lost)
            return replace(failed, after=(verdict.turn_failed(conversation_id, entry, SpeechFailure.DEAD_LETTERED),))
        case SessionStart() | SessionAttach():
            return verdict.session_failed(conversation_id, SessionFailure.UNAVAILABLE, lost, entry, ends=True)
        case Interrupt() | SessionEnd():
            malformed = Malformed(RejectReason.INVALID_FIELD, (_RULE,), conversation_id)
            misfit = Misfit(
                malformed, entry.key, entry.delivery, "", entry.message_id, entry.traceparent, entry.reply_to
            )
            return replace(verdict.rejected(misfit), entries=(entry,))
        case _ as unreachable:
            assert_never(unreachable)


def note(memory: Memory, entry: Entry, ended: Ended) -> Ended:
    """Write into the conversation's memory how it ends; whoever serves the conversation finds its turn failed.

    Returns how it is to be told: nothing goes with it where its turn was silent already.
    """
    if isinstance(entry.command, Speak) and not _fail_turn(memory, entry, ended.at):
        ended = replace(ended, after=())
    if entry.known_as is not None:
        memory.end(entry.known_as, ended)
    return ended


def _fail_turn(memory: Memory, entry: Entry, now: float) -> bool:
    """What was sent again on purpose begins a failed turn anew, once, and so fails it again."""
    turn_id = speak_of(entry).turn_id
    stands = memory.turns.get(turn_id)
    anew = stands is not None and stands.state is TurnState.FAILED and entry.replay not in ("", stands.replay)
    if memory.is_silent(turn_id) and not anew:
        return False
    turn = memory.turn(turn_id, now)
    turn.state, turn.replay = TurnState.FAILED, entry.replay or turn.replay
    memory.shape(turn_id, None)
    return True


def conclude_again(ended: Ended, entry: Entry, why: str) -> Conclusion:
    """It has ended before: that stands."""
    if ended.fingerprint == entry.fingerprint:
        return _kept(verdict.repeated(ended, entry, None), why)
    return _kept(verdict.message_id_reused(entry.command.conversation_id, entry), why)


def _kept(ends: Conclusion, why: str) -> Conclusion:
    return replace(ends, parked=Parked(REASON, why, ended=ends.event.type))
