"""Interrupts through a lane, seen in every phase of what they interrupt."""

from dataclasses import replace

import pytest

from tests.support.conversation import (
    DENIED,
    GONE,
    NOT_TAKEN,
    NOW,
    OK,
    REFUSED,
    RULES,
    STALE,
    UNKNOWN,
    Conversation,
    entry,
    interrupt,
    speak,
)
from worker.core.memory import TurnState
from worker.core.model import CallResult
from worker.core.work import CallInterrupt, Open, Say

ALL_OR_ONE = pytest.mark.parametrize("wanted", [None, "t1"], ids=["all", "one"])


@ALL_OR_ONE
def test_what_waits_is_discarded_when_the_interrupt_is_seen(wanted: str | None) -> None:
    chunks = [speak("t1", "a"), speak("t1", "b", final=True)]
    stop = interrupt(wanted)
    talk = Conversation().offer(*chunks, stop)
    assert [talk.ends(chunk) for chunk in chunks] == [["speech.discarded interrupted"]] * 2
    assert talk.of("turn.interrupted") == [{"turnId": "t1", "discardedCommands": 2}]
    talk.settle()
    assert talk.said == []
    assert talk.of("interrupt.done") == [
        {"commandIds": [stop.message_id], "turnIds": ["t1"], "latencyMs": 0, "apiStatus": 200}
    ]


def test_what_comes_after_it_is_spoken() -> None:
    talk = Conversation().offer(speak("t1", "a"), interrupt(), speak("t2", "b", final=True)).settle()
    assert [type(call) for call in talk.calls] == [CallInterrupt, Say]
    assert talk.said == [("t2", "b", True)]


@ALL_OR_ONE
def test_later_chunks_of_a_silent_turn_are_discarded(wanted: str | None) -> None:
    talk = Conversation().offer(speak("t1", "a")).settle().offer(interrupt(wanted)).settle()
    late = [speak("t1", "b"), speak("t1", "", final=True)]
    talk.offer(*late).settle()
    assert [text for _, text, _ in talk.said] == ["a"]
    assert [talk.ends(chunk) for chunk in late] == [["speech.discarded interrupted"]] * 2
    assert "turn.completed" not in talk.types


def test_all_means_the_open_turns_and_those_that_lose_a_chunk() -> None:
    talk = Conversation().offer(speak("open", "a"), speak("closed", "b", final=True)).settle()
    talk.offer(speak("waiting", "c"), interrupt()).settle()
    assert sorted(talk.of("interrupt.done")[0]["turnIds"]) == ["open", "waiting"]
    talk.offer(speak("closed", "again", final=True), speak("open", "no", final=True)).settle()
    assert talk.said[-1] == ("closed", "again", True)


def test_a_closed_turn_that_would_be_opened_again_loses_a_chunk_and_is_silent() -> None:
    talk = Conversation().offer(speak("t1", "a", final=True)).settle()
    talk.offer(speak("t1", "b"), interrupt(), speak("t1", "c", final=True)).settle()
    assert [text for _, text, _ in talk.said] == ["a"]


def test_one_means_only_that_turn() -> None:
    talk = Conversation().offer(speak("t1", "a"), speak("t2", "b"), speak("t1", "c"), interrupt("t1")).settle()
    assert talk.said == [("t2", "b", False)]
    assert talk.of("turn.interrupted") == [{"turnId": "t1", "discardedCommands": 2}]


def test_a_turn_not_yet_seen_is_silent_too() -> None:
    talk = Conversation().offer(interrupt("t9")).settle().offer(speak("t9", "a", final=True)).settle()
    assert talk.said == []


class TestWhetherTheApiIsCalled:
    def test_whenever_there_is_a_session(self) -> None:
        talk = Conversation().offer(speak("t1", "a", final=True)).settle().offer(interrupt()).settle()
        assert [type(call) for call in talk.calls] == [Say, CallInterrupt]
        assert talk.of("interrupt.done")[0]["turnIds"] == []

    @ALL_OR_ONE
    def test_not_without_one(self, wanted: str | None) -> None:
        talk = Conversation(session=None).offer(interrupt(wanted)).settle()
        assert talk.calls == []
        (done,) = talk.of("interrupt.done")
        assert done["turnIds"] == []
        assert "apiStatus" not in done

    def test_for_one_turn_unless_another_was_accepted_since(self) -> None:
        talk = Conversation().offer(speak("t1", "a"), speak("t2", "b")).settle()
        talk.offer(interrupt("t1")).settle()
        assert CallInterrupt() not in talk.calls
        talk.offer(interrupt("t2")).settle()
        assert CallInterrupt() in talk.calls

    def test_for_one_turn_of_an_earlier_life_in_doubt_yes(self) -> None:
        assert Conversation().offer(interrupt("t1")).settle().calls == [CallInterrupt()]

    @pytest.mark.parametrize("wanted", ["t1", "t2"])
    def test_text_that_was_perhaps_taken_may_be_playing(self, wanted: str) -> None:
        talk = Conversation(replace(RULES, ambiguous="skip")).offer(speak("t1", "a")).settle()
        talk.offer(speak("t2", "b")).settle(UNKNOWN)
        talk.offer(interrupt(wanted)).settle()
        assert CallInterrupt() in talk.calls

    @pytest.mark.parametrize(
        ("outcome", "status"), [(OK, 200), (UNKNOWN, 0), (NOT_TAKEN, 503), (REFUSED, 400), (GONE, 410)]
    )
    def test_it_is_called_once_whatever_it_answers(self, outcome: CallResult, status: int) -> None:
        talk = Conversation().offer(speak("t1", "a")).settle().offer(interrupt()).settle(outcome)
        assert talk.calls.count(CallInterrupt()) == 1
        assert talk.of("interrupt.done")[0]["apiStatus"] == status
        assert ("session.ended" in talk.types) is (outcome is GONE)

    def test_a_session_that_ended_meanwhile_needs_no_call(self) -> None:
        talk = Conversation().offer(speak("t1", "a")).settle().offer(interrupt()).settle(STALE)
        assert "apiStatus" not in talk.of("interrupt.done")[0]

    def test_an_interrupt_that_did_not_get_through_leaves_the_avatar_speaking(self) -> None:
        talk = Conversation().offer(speak("t1", "a" * 140, final=True)).settle()
        talk.offer(interrupt()).settle(REFUSED).offer(entry(type="session.end"))
        assert talk.waits() == pytest.approx(10, abs=0.1)


class TestWhileACallIsInFlight:
    def test_a_say_that_is_accepted_is_told_as_accepted_and_its_turn_is_silent(self) -> None:
        said, waiting = speak("t1", "a", final=True), speak("t1", "b")
        talk = Conversation().offer(said)
        talk.say()
        talk.offer(waiting, interrupt())
        assert talk.ends(waiting) == ["speech.discarded interrupted"]
        talk.done().settle()
        assert talk.ends(said) == ["speech.accepted"]
        assert talk.calls[-1] == CallInterrupt()
        assert talk.memory.turns["t1"].state is TurnState.INTERRUPTED
        assert "turn.completed" not in talk.types

    @ALL_OR_ONE
    @pytest.mark.parametrize("outcome", [NOT_TAKEN, UNKNOWN, REFUSED])
    def test_a_say_that_is_not_is_not_repeated_and_ends_as_interrupted(
        self, outcome: CallResult, wanted: str | None
    ) -> None:
        chunk = speak("t1", "a")
        talk = Conversation().offer(chunk)
        talk.say()
        talk.offer(interrupt(wanted)).done(outcome).settle()
        assert len(talk.said) == 1
        assert talk.ends(chunk) == ["speech.discarded interrupted"]
        assert CallInterrupt() in talk.calls
        assert talk.of("interrupt.done")[0]["turnIds"] == ["t1"]

    def test_a_lost_session_ends_it_as_interrupted_too(self) -> None:
        chunk = speak("t1", "a")
        talk = Conversation().offer(chunk)
        talk.say()
        talk.offer(interrupt()).done(GONE).settle()
        assert talk.ends(chunk) == ["speech.discarded interrupted"]
        assert talk.types.count("session.ended") == 1

    def test_a_say_of_another_turn_is_left_alone(self) -> None:
        talk = Conversation().offer(speak("t1", "a"))
        talk.say()
        talk.offer(interrupt("t2")).done(NOT_TAKEN).settle()
        assert [text for _, text, _ in talk.said] == ["a", "a"]

    @pytest.mark.parametrize("outcome", [OK, NOT_TAKEN, REFUSED, DENIED, UNKNOWN])
    def test_a_session_is_being_created(self, outcome: CallResult) -> None:
        chunk = speak("t1", "a")
        talk = Conversation(session=None).offer(chunk)
        assert isinstance(talk.next(), Open)
        talk.offer(interrupt()).done(outcome).settle()
        assert talk.said == []
        assert talk.ends(chunk) == ["speech.discarded interrupted"]
        assert talk.types.count("interrupt.done") == 1


class TestBetweenAttempts:
    @ALL_OR_ONE
    def test_a_piece_not_taken_is_given_up_at_once(self, wanted: str | None) -> None:
        chunk = speak("t1", "a")
        talk = Conversation().offer(chunk)
        talk.say()
        talk.done(NOT_TAKEN).offer(interrupt(wanted))
        assert talk.ends(chunk) == ["speech.discarded interrupted"]
        assert talk.calls[1:] == [CallInterrupt()]
        talk.settle()
        assert talk.calls[1:] == [CallInterrupt()], "there is nothing it could have missed"

    def test_a_piece_perhaps_taken_is_not_repeated_and_the_api_is_told_again_when_that_call_is_over(self) -> None:
        chunk = speak("t1", "a")
        talk = Conversation().offer(chunk)
        talk.say()
        talk.done(UNKNOWN).offer(interrupt("t1"))
        assert talk.ends(chunk) == ["speech.discarded interrupted"]
        assert talk.of("turn.interrupted")[0]["discardedCommands"] == 1
        assert talk.calls[1:] == [CallInterrupt()]
        talk.interrupted()
        assert talk.waits() == 2.0
        talk.now += 2
        assert talk.next() == CallInterrupt()
        talk.done().settle()
        assert talk.types.count("interrupt.done") == 1

    def test_it_is_not_told_again_if_what_was_perhaps_taken_is_another_turn(self) -> None:
        talk = Conversation(replace(RULES, ambiguous="repeat")).offer(speak("t1", "a")).settle()
        talk.offer(speak("t2", "b"))
        talk.say()
        talk.done(UNKNOWN, jitter=0.0).offer(interrupt("t1")).settle()
        assert talk.calls.count(CallInterrupt()) == 1
        assert [data["attempts"] for data in talk.of("speech.accepted")] == [1, 2]

    def test_the_piece_of_another_turn_goes_on_being_tried(self) -> None:
        talk = Conversation().offer(speak("t1", "a"))
        talk.say()
        talk.done(NOT_TAKEN).offer(interrupt("t2")).settle()
        assert len(talk.said) == 2
        assert talk.of("speech.accepted")[0]["attempts"] == 2


class TestOrder:
    def test_other_commands_are_never_discarded(self) -> None:
        start, end = entry(type="session.start"), entry(type="session.end")
        talk = Conversation().offer(start, speak("t1", "a"), end, interrupt()).settle()
        assert talk.ends(start) == ["session.ready"]
        assert talk.ends(end) == ["session.ended requested"]
        assert talk.types.index("interrupt.done") < talk.types.index("session.ready"), "at once, not in its place"

    def test_a_failed_turn_stays_failed(self) -> None:
        rest = speak("t1", "b")
        talk = Conversation().offer(speak("t1", "a")).settle(REFUSED).offer(rest, interrupt("t1")).settle()
        assert talk.ends(rest) == ["speech.failed turn_failed"]
        assert "turn.interrupted" not in talk.types

    def test_a_turn_is_interrupted_once(self) -> None:
        talk = Conversation().offer(speak("t1", "a")).settle().offer(interrupt("t1"), interrupt("t1")).settle()
        assert talk.types.count("turn.interrupted") == 1
        assert [data["turnIds"] for data in talk.of("interrupt.done")] == [["t1"], []]

    def test_hundreds_of_chunks_are_told_in_events_of_500(self) -> None:
        talk = Conversation().offer(*(speak("t1", "a") for _ in range(1200)), interrupt())
        assert [len(data["commandIds"]) for data in talk.of("speech.discarded")] == [500, 500, 200]
        assert talk.of("turn.interrupted")[0]["discardedCommands"] == 1200

    def test_the_latency_counts_from_its_publishing(self) -> None:
        talk = Conversation().offer(interrupt(born=NOW - 0.5)).settle()
        assert talk.of("interrupt.done")[0]["latencyMs"] == 500


def test_a_chunk_under_the_id_of_an_interrupt_that_is_being_told_waits_and_is_rejected() -> None:
    said, stop, reused = speak("t1", "a"), interrupt("t1", message_id="i"), speak("t1", "b", message_id="i")
    talk = Conversation().offer(said)
    talk.say()
    talk.offer(stop, reused).done(NOT_TAKEN)
    talk.next()
    assert talk.ends(said) == ["speech.discarded interrupted"]
    assert talk.ends(reused) == []
    talk.settle()
    assert talk.ends(stop) == ["interrupt.done"]
    assert talk.ends(reused) == ["command.rejected message_id_reused"]


class TestDeliveredAgain:
    def test_an_interrupt_that_ended_does_not_act_on_what_came_after_it(self) -> None:
        talk = Conversation().offer(speak("t1", "a", message_id="m1"), interrupt(message_id="i")).settle()
        talk.offer(speak("t2", "b", message_id="m2")).settle()
        talk.conclusions.clear()
        again = interrupt(message_id="i")
        talk.offer(speak("t2", "c"), again).settle()
        assert [text for _, text, _ in talk.said] == ["b", "c"]
        assert talk.ends(again) == ["interrupt.done"]

    def test_nor_does_one_whose_call_is_under_way(self) -> None:
        talk = Conversation().offer(speak("t1", "a")).settle().offer(interrupt(message_id="i"))
        assert talk.calls[-1] == CallInterrupt()
        again = interrupt(message_id="i")
        talk.interrupted().forget().offer(again, speak("t1", "late"), speak("t2", "b")).settle()
        assert talk.calls.count(CallInterrupt()) == 1
        assert talk.said[-1] == ("t2", "b", False)
        assert talk.ends(again) == ["interrupt.done"]

    @pytest.mark.parametrize("acted", [False, True])
    def test_one_that_was_dropped_stays_in_its_place_and_ends_as_if_it_had_not_been(self, acted: bool) -> None:
        talk = Conversation().offer(speak("t1", "a", message_id="m1"))
        talk.say()
        talk.done()
        if acted:
            talk.offer(speak("t1", "x", message_id="m2"), interrupt(message_id="i"), speak("t2", "b", message_id="m3"))
        talk.forget()
        talk.offer(speak("t1", "a", message_id="m1"), speak("t1", "x", message_id="m2"))
        talk.offer(interrupt(message_id="i"), speak("t2", "b", message_id="m3")).settle()
        assert talk.said == [("t1", "a", False), ("t2", "b", False)]
        (done,) = talk.of("interrupt.done")
        assert done["turnIds"] == ["t1"]
        assert talk.memory.state.silenced == {}
