"""What becomes of a command that the broker gave up, by what it is and how it has ended."""

from dataclasses import replace
from typing import Any

import pytest

from schemas.commands import FieldError, Malformed, RejectReason
from schemas.events import Event
from tests.support.conversation import NOW, Conversation, entry, speak, wire
from worker.core import undelivered, verdict
from worker.core.memory import Ended, Memory, Turn, TurnState
from worker.core.model import Entry, Misfit, ReplyTo
from worker.core.work import Say


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


class TestItsTurn:
    def note(self, memory: Memory, one: Entry) -> tuple[Event, ...]:
        ends = undelivered.conclude(one, "gone")
        return undelivered.note(memory, one, Ended(one.fingerprint, ends.event, NOW, after=ends.after)).after

    def test_fails_with_the_reason_of_the_chunk(self) -> None:
        memory = Memory()
        (told,) = self.note(memory, speak("t", "x"))
        assert wire(told) == {"turnId": "t", "reason": "dead_lettered"}
        assert memory.turns["t"].state is TurnState.FAILED

    @pytest.mark.parametrize("state", [TurnState.INTERRUPTED, TurnState.FAILED, TurnState.EXPIRED])
    def test_stays_as_it_is_if_it_is_silent(self, state: TurnState) -> None:
        memory = Memory(turns={"t": Turn(state, touched=1.0)})
        assert self.note(memory, speak("t", "x")) == ()
        assert memory.turns["t"] == Turn(state, touched=1.0)

    def test_fails_again_where_it_was_sent_again_and_once_for_all_that_was(self) -> None:
        memory = Memory(turns={"t": Turn(TurnState.FAILED)})
        first, second = (replace(speak("t", "x"), key=f"m{n}\nreplay 1", replay="run") for n in range(2))
        assert len(self.note(memory, first)) == 1
        assert self.note(memory, second) == ()
        assert memory.turns["t"].replay == "run", "the rest of that run is not spoken"

    def test_what_a_dead_worker_was_saying_of_it_is_not_repeated_nor_cut(self) -> None:
        one = speak("t", "x", message_id="m1")
        talk = Conversation().offer(one)
        talk.say()
        memory = talk.written.recall()
        self.note(memory, speak("t", "y"))
        changes = memory.take_changes()
        assert changes is not None
        assert talk.written.write(changes)
        again = speak("t", "x", message_id="m1")
        talk.forget().offer(again).settle()
        assert [type(call) for call in talk.calls] == [Say], "nobody has interrupted it"
        assert talk.ends(again) == ["speech.failed turn_failed"]
