"""What becomes of a command that the broker gave up: it had no queue for it, or let it expire there.

A copy is parked in any case, as `dead_lettered`, and what it was tells how it ends:

    speak                         speech.failed, dead_lettered
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
from worker.core.memory import Ended
from worker.core.model import CallKind, CallResult, Entry, Misfit
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
            return verdict.failed(conversation_id, [entry], SpeechFailure.DEAD_LETTERED, why=lost)
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


def conclude_again(ended: Ended, entry: Entry, why: str) -> Conclusion:
    """It has ended before: that stands."""
    if ended.fingerprint == entry.fingerprint:
        return _kept(verdict.repeated(ended, entry, None), why)
    return _kept(verdict.message_id_reused(entry.command.conversation_id, entry), why)


def _kept(ends: Conclusion, why: str) -> Conclusion:
    return replace(ends, parked=Parked(REASON, why, ended=ends.event.type))
