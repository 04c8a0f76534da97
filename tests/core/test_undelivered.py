"""What becomes of a command that the broker gave up, by what it is and how it has ended."""

from typing import Any

import pytest

from schemas.commands import FieldError, Malformed, RejectReason
from tests.support.conversation import NOW, entry, speak, wire
from worker.core import undelivered, verdict
from worker.core.memory import Ended
from worker.core.model import Misfit, ReplyTo


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({"turnId": "t", "text": "x"}, ("avatar.speech.failed", "dead_lettered")),
        ({"type": "session.start"}, ("avatar.session.failed", "unavailable")),
        ({"type": "session.attach", "sessionId": "s", "token": "t"}, ("avatar.session.failed", "unavailable")),
        ({"type": "interrupt"}, ("avatar.command.rejected", "invalid_field")),
        ({"type": "session.end"}, ("avatar.command.rejected", "invalid_field")),
    ],
    ids=str,
)
def test_each_kind_has_its_word(body: dict[str, Any], told: tuple[str, str]) -> None:
    one = entry(**body, reply_to=ReplyTo("asker", None, 1000))
    ends = undelivered.conclude(one, "gone")
    assert (ends.event.type, wire(ends.event)["reason"]) == told
    assert wire(ends.event)["commandIds"] == [one.message_id]
    assert ends.entries == (one,)
    assert ends.parked == verdict.Parked("dead_lettered", "gone", ended=told[0])
    assert (ends.answer is None) == (told[0] == "avatar.speech.failed")


def test_no_command_is_rejected_for_what_is_wrong_with_it() -> None:
    malformed = Malformed(RejectReason.NOT_JSON, (FieldError("$", "must be JSON"),), None)
    ends = undelivered.conclude(Misfit(malformed, "k", None, "key"), "gone")
    assert wire(ends.event)["reason"] == "not_json"
    assert ends.parked == verdict.Parked(
        "dead_lettered", "gone; not_json: $: must be JSON", ended="avatar.command.rejected"
    )


def test_what_had_ended_is_told_as_it_was() -> None:
    one = speak("t", "x")
    first = undelivered.conclude(one, "gone")
    ends = undelivered.conclude_again(Ended(one.fingerprint, first.event, NOW), one, "gone")
    assert ends.event == first.event
    other = undelivered.conclude_again(Ended(b"another body", first.event, NOW), one, "gone")
    assert wire(other.event)["reason"] == "message_id_reused"


def test_without_an_id_no_command_is_listed() -> None:
    assert wire(undelivered.conclude(speak("t", "x", message_id=None), "gone").event)["commandIds"] == []
