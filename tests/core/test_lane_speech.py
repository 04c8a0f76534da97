"""Speech through a lane: joining, one say at a time, turns, duplicates, expiry, and what each outcome leads to."""

from dataclasses import replace
from typing import Any

import pytest

from schemas.events import EndReason
from tests.support.conversation import (
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
    wire,
)
from worker.core.memory import TurnState
from worker.core.model import CallKind, CallResult, Entry
from worker.core.work import INTENT_S, CallInterrupt, Close, Open, Rules, Say

OFF = replace(RULES, shaping="off")


class TestJoining:
    def test_the_first_chunk_leaves_at_once_and_what_comes_meanwhile_is_joined(self) -> None:
        talk = Conversation()
        first, second, third = speak("t1", "Hel"), speak("t1", "lo "), speak("t1", "you.", final=True)
        talk.offer(first)
        assert talk.say().piece.text == "Hel"
        talk.offer(second, third).done().settle()
        assert talk.said == [("t1", "Hel", False), ("t1", "lo you.", True)]
        assert [data["commandIds"] for data in talk.of("speech.accepted")] == [
            [first.message_id],
            [second.message_id, third.message_id],
        ]

    def test_one_thing_at_a_time(self) -> None:
        talk = Conversation().offer(speak("t1", "a"), speak("t2", "b"))
        talk.say()
        with pytest.raises(AssertionError, match="one thing at a time"):
            talk.lane.next(talk.now)

    def test_off_is_one_chunk_one_call_text_untouched(self) -> None:
        talk = Conversation(OFF)
        texts = ["  Hel", "lo\n", " ", "you.  "]
        chunks = [speak("t1", text) for text in texts]
        talk.offer(*chunks, speak("t1", "", final=True)).settle()
        assert [text for _, text, _ in talk.said] == ["  Hel", "lo\n", "you.  "]
        assert talk.ends(chunks[2]) == ["speech.discarded empty"]
        assert talk.types[-1] == "turn.completed"

    def test_a_piece_never_mixes_turns(self) -> None:
        talk = Conversation().offer(speak("t1", "a"), speak("t2", "b"), speak("t1", "c"), speak("t1", "d", final=True))
        talk.settle()
        assert talk.said == [("t1", "a", False), ("t2", "b", False), ("t1", "cd", True)]
        assert [data["turnId"] for data in talk.of("turn.completed")] == ["t1"]
        assert talk.memory.turns["t2"].state is TurnState.OPEN

    def test_a_piece_ends_with_its_final(self) -> None:
        talk = Conversation().offer(speak("t1", "a", final=True), speak("t1", "b", final=True)).settle()
        assert talk.said == [("t1", "a", True), ("t1", "b", True)]

    def test_a_long_chunk_is_listed_with_its_last_piece(self) -> None:
        long = speak("t1", "word " * 500, final=True)
        talk = Conversation().offer(long).settle()
        accepted = talk.of("speech.accepted")
        assert [data["commandIds"] for data in accepted] == [[], [], [], [long.message_id]]
        assert "".join(data["text"] for data in accepted) == "word " * 500
        assert len({event.id("s") for event in talk.events}) == len(talk.events)
        assert talk.of("turn.completed")[0]["pieces"] == 4

    def test_a_long_chunk_goes_on_where_it_was_after_a_lost_connection(self) -> None:
        talk = Conversation()
        talk.offer(speak("t1", "a" * 1000 + "b" * 10, final=True, message_id="m"))
        talk.say()
        talk.done().forget()
        assert talk.next() is None
        talk.offer(speak("t1", "a" * 1000 + "b" * 10, final=True, message_id="m")).settle()
        assert [text for _, text, _ in talk.said] == ["a" * 1000, "b" * 10]
        assert talk.of("speech.accepted")[-1]["commandIds"] == ["m"]


class TestBlank:
    def test_white_space_waits_for_its_word(self) -> None:
        blank = speak("t1", " ")
        talk = Conversation(replace(RULES, stall_first_s=0.5)).offer(blank)
        assert talk.waits() == 0.5
        talk.offer(speak("t1", "you")).settle()
        assert talk.said == [("t1", "you", False)]
        assert talk.ends(blank) == ["speech.accepted"]

    def test_but_not_for_ever(self) -> None:
        blank = speak("t1", " \n")
        talk = Conversation().offer(blank).settle()
        assert talk.calls == []
        assert talk.ends(blank) == ["speech.discarded empty"]

    def test_nor_does_anything_wait_behind_it(self) -> None:
        talk = Conversation().offer(speak("t1", " "), speak("t2", "b"))
        assert talk.say().piece.turn_id == "t2"

    @pytest.mark.parametrize("rules", [RULES, OFF], ids=["sentences", "off"])
    @pytest.mark.parametrize("text", ["", " \n"], ids=["empty", "blank"])
    def test_a_final_with_nothing_left_to_carry_it_closes_the_turn_without_a_call(self, rules: Any, text: str) -> None:
        closing = speak("t1", text, final=True)
        talk = Conversation(rules).offer(speak("t1", "Hello")).settle().offer(closing).settle()
        assert talk.said == [("t1", "Hello", False)]
        assert talk.ends(closing) == ["speech.discarded empty"]
        (completed,) = talk.of("turn.completed")
        assert (completed["finalSent"], completed["pieces"], completed["textLength"]) == (False, 1, 5)

    def test_an_empty_final_goes_with_the_piece_that_carries_it(self) -> None:
        closing = speak("t1", "", final=True)
        talk = Conversation().offer(speak("t1", "Hello"), closing).settle()
        assert talk.said == [("t1", "Hello", True)]
        assert talk.ends(closing) == ["speech.accepted"]

    @pytest.mark.parametrize("blanks", [[" " * 2000], [" " * 600, " " * 600], [" " * 1000]])
    def test_white_space_beyond_the_cap_is_never_sent_alone(self, blanks: list[str]) -> None:
        chunks = [speak("t1", text) for text in [*blanks, "x" * 600]]
        talk = Conversation().offer(*chunks).settle()
        assert [text.strip() for _, text, _ in talk.said] == ["x" * 600]
        assert all(len(talk.ends(chunk)) == 1 for chunk in chunks)


class TestTurns:
    def test_the_life_of_a_turn(self) -> None:
        talk = Conversation().offer(speak("t1", "a")).settle().offer(speak("t1", "bc", final=True)).settle()
        assert talk.types == ["turn.started", "speech.accepted", "speech.accepted", "turn.completed"]
        assert talk.of("turn.completed") == [{"turnId": "t1", "pieces": 2, "textLength": 3, "finalSent": True}]

    def test_a_final_merely_closes_a_turn(self) -> None:
        talk = Conversation().offer(speak("t1", "a", final=True)).settle().offer(speak("t1", "b", final=True)).settle()
        assert [text for _, text, _ in talk.said] == ["a", "b"]
        assert talk.types.count("turn.completed") == 2
        assert len({event.id("s") for event in talk.events}) == len(talk.events)

    def test_when_a_chunk_fails_the_rest_of_its_turn_fails_and_other_turns_do_not(self) -> None:
        first, rest, other = speak("t1", "a"), speak("t1", "b"), speak("t2", "c", final=True)
        talk = Conversation(OFF).offer(first, rest, other).settle(REFUSED)
        late = speak("t1", "d", final=True)
        talk.offer(late).settle()
        assert talk.said == [("t1", "a", False), ("t2", "c", True)]
        assert talk.ends(first) == ["speech.failed refused"]
        assert talk.ends(rest) == talk.ends(late) == ["speech.failed turn_failed"]
        assert talk.of("turn.failed") == [{"turnId": "t1", "reason": "refused"}]
        assert talk.of("speech.failed")[0]["status"] == 400

    def test_what_failed_is_parked_with_its_reason(self) -> None:
        talk = Conversation().offer(speak("t1", "a")).settle(NOT_TAKEN, REFUSED)
        (failed,) = [conclusion for conclusion in talk.conclusions if conclusion.parked]
        assert failed.parked is not None
        assert (failed.parked.reason, failed.parked.error, failed.parked.attempts) == (
            "refused",
            "Text is required",
            2,
        )

    def test_only_failures_are_parked(self) -> None:
        talk = Conversation(OFF).offer(speak("t1", "a"), speak("t1", " ", final=True), interrupt()).settle()
        assert not any(conclusion.parked for conclusion in talk.conclusions)


class TestDuplicates:
    @pytest.mark.parametrize("outcome", [OK, REFUSED])
    def test_a_command_that_ended_is_told_again_under_the_same_id(self, outcome: CallResult) -> None:
        talk = Conversation().offer(speak("t1", "a", message_id="m")).settle(outcome)
        first = talk.events
        assert len(first) == 2, "with the turn's"
        talk.conclusions.clear()
        again = speak("t1", "a", message_id="m")
        talk.offer(again).settle()
        assert len(talk.calls) == 1
        assert [event.id("s") for event in talk.events] == [event.id("s") for event in first]
        assert [conclusion.entries for conclusion in talk.conclusions] == [(again,)]

    def test_a_command_that_waits_twice_is_said_once(self) -> None:
        first, again = speak("t1", "a", message_id="m"), speak("t1", "a", message_id="m")
        talk = Conversation().offer(first, again, speak("t1", "b", final=True)).settle()
        assert "".join(text for _, text, _ in talk.said) == "ab"
        assert talk.ends(first) == talk.ends(again) == ["speech.accepted"]
        assert len({event.id("s") for event in talk.events if "m" in getattr(event.data, "command_ids", ())}) == 1

    @pytest.mark.parametrize("wait", [True, False], ids=["both wait", "first has ended"])
    def test_the_same_id_with_another_body_is_rejected(self, wait: bool) -> None:
        talk = Conversation().offer(speak("t1", "a", message_id="m"))
        if not wait:
            talk.settle()
        other = speak("t1", "b", message_id="m")
        talk.offer(other).settle()
        assert [text for _, text, _ in talk.said] == ["a"]
        assert talk.ends(other) == ["command.rejected message_id_reused"]
        (conclusion,) = [conclusion for conclusion in talk.conclusions if other in conclusion.entries]
        assert conclusion.parked is not None

    def test_an_id_that_something_else_waits_under_is_neither_said_nor_interrupted(self) -> None:
        other = speak("t1", "a", message_id="m")
        talk = Conversation().offer(entry("m", type="session.start"), other, interrupt()).settle()
        assert talk.ends(other) == ["command.rejected message_id_reused"]
        assert talk.of("interrupt.done")[0]["turnIds"] == []

    def test_a_repeat_of_a_failed_command_is_not_parked_again(self) -> None:
        talk = Conversation().offer(speak("t1", "a", message_id="m")).settle(REFUSED)
        talk.conclusions.clear()
        talk.offer(speak("t1", "a", message_id="m")).settle()
        assert [conclusion.parked for conclusion in talk.conclusions] == [None]

    def test_without_an_id_it_is_spoken_again_and_flagged_if_redelivered(self) -> None:
        talk = Conversation().offer(speak("t1", "a", message_id=None)).settle()
        talk.offer(speak("t1", "a", message_id=None, redelivered=True)).settle()
        assert [text for _, text, _ in talk.said] == ["a", "a"]
        assert [data.get("possibleDuplicate") for data in talk.of("speech.accepted")] == [None, True]
        assert [data["commandIds"] for data in talk.of("speech.accepted")] == [[], []]

    def test_with_an_id_redelivery_alone_means_nothing(self) -> None:
        talk = Conversation().offer(speak("t1", "a", redelivered=True)).settle()
        assert "possibleDuplicate" not in talk.of("speech.accepted")[0]

    def test_ids_are_forgotten_in_the_end(self) -> None:
        talk = Conversation().offer(speak("t1", "a", message_id="m")).settle()
        talk.written.ended.clear()
        talk.forget().offer(speak("t1", "a", message_id="m")).settle()
        assert len(talk.said) == 2


class TestExpiry:
    def test_when_one_chunk_expires_the_rest_of_the_turn_does(self) -> None:
        old, young, other = speak("t1", "a", born=NOW - 121), speak("t1", "b"), speak("t2", "c", final=True)
        talk = Conversation().offer(old, young, other).settle()
        late = speak("t1", "d", final=True)
        talk.offer(late).settle()
        assert talk.said == [("t2", "c", True)]
        for chunk in (old, young, late):
            assert talk.ends(chunk) == ["speech.discarded expired"]
        assert talk.of("turn.failed") == [{"turnId": "t1", "reason": "expired"}]

    def test_no_answer_begins_in_the_middle(self) -> None:
        talk = Conversation().offer(speak("t1", "a"), speak("t1", "b", born=NOW - 121), speak("t1", "c")).settle()
        assert talk.said == [("t1", "a", False)]
        assert talk.types[-2:] == ["turn.failed", "speech.discarded"]

    def test_it_is_looked_at_before_a_retry_but_not_while_a_call_is_in_flight(self) -> None:
        chunk = speak("t1", "a")
        talk = Conversation().offer(chunk)
        talk.say()
        talk.now += 130
        talk.done(NOT_TAKEN)
        assert talk.next() is None
        assert talk.ends(chunk) == ["speech.discarded expired"]

    @pytest.mark.parametrize("died", [False, True])
    def test_a_piece_that_was_perhaps_said_expires_whole_though_its_first_chunk_is_younger(self, died: bool) -> None:
        chunks = [speak("t1", "a", message_id="m1"), speak("t1", "b", message_id="m2", born=NOW - 10, final=True)]
        talk = Conversation().offer(*chunks)
        assert talk.say().piece.text == "ab"
        if died:
            talk.forget().offer(*chunks)
        else:
            talk.done(UNKNOWN)
        talk.now += 115
        talk.settle()
        assert len(talk.said) == 1
        assert [talk.ends(chunk) for chunk in chunks] == [["speech.discarded expired"]] * 2

    def test_a_call_in_flight_may_end_well_however_late(self) -> None:
        talk = Conversation().offer(speak("t1", "a"))
        talk.say()
        talk.now += 130
        assert talk.done().settle().types == ["turn.started", "speech.accepted"]

    def test_exactly_as_old_as_allowed_is_not_too_old(self) -> None:
        assert len(Conversation().offer(speak("t1", "a", born=NOW - 120)).settle().said) == 1

    def test_zero_is_no_limit(self) -> None:
        talk = Conversation(replace(RULES, max_age_s=0)).offer(speak("t1", "a", born=0.0)).settle()
        assert len(talk.said) == 1

    def test_speech_that_waits_for_a_session_expires_too(self) -> None:
        chunk = speak("t1", "a")
        talk = Conversation(session=None).offer(chunk).settle(*[NOT_TAKEN] * 500)
        assert not talk.said
        assert talk.ends(chunk) == ["speech.discarded expired"]
        assert 120 < talk.now - NOW < 135

    def test_an_event_lists_at_most_500_commands(self) -> None:
        chunks = [speak("t1", "a", born=NOW - 121) for _ in range(1201)]
        talk = Conversation().offer(*chunks).settle()
        assert [len(data["commandIds"]) for data in talk.of("speech.discarded")] == [500, 500, 201]
        assert len({event.id("s") for event in talk.events}) == len(talk.events)


class TestOutcomes:
    def test_not_taken_is_tried_again_with_growing_pauses_and_the_same_piece(self) -> None:
        talk = Conversation().offer(speak("t1", "a"))
        piece = talk.say().piece
        pauses = []
        for _ in range(9):
            talk.done(NOT_TAKEN, jitter=1.0).offer(speak("t1", "later"))
            pauses.append(round(talk.waits(), 3))
            talk.now += pauses[-1]
            assert talk.say().piece is piece
        assert pauses == [0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10, 10, 10]
        talk.done().settle()
        assert talk.of("speech.accepted")[0]["attempts"] == 10
        assert "possibleDuplicate" not in talk.of("speech.accepted")[0]

    def test_the_jitter_is_full(self) -> None:
        talk = Conversation().offer(speak("t1", "a"))
        talk.say()
        talk.done(NOT_TAKEN, jitter=0.0)
        talk.say()

    @pytest.mark.parametrize("jitter", [0.0, 0.9])
    def test_retry_after_is_obeyed(self, jitter: float) -> None:
        talk = Conversation().offer(speak("t1", "a"))
        talk.say()
        talk.done(CallResult(CallKind.NOT_TAKEN, 429, retry_after_s=7), jitter=jitter)
        assert 7 <= talk.waits() < 7.2

    def test_a_lost_answer_counts_as_running_for_a_while_and_is_then_repeated_as_it_was_sent(self) -> None:
        talk = Conversation().offer(speak("t1", "a"))
        piece = talk.say().piece
        talk.now += 0.5
        talk.done(UNKNOWN, jitter=0.0).offer(speak("t1", "b", final=True))
        assert talk.waits() == pytest.approx(1.5)
        talk.now += 1.5
        assert talk.say().piece is piece
        talk.done().settle()
        first, second = talk.of("speech.accepted")
        assert (first["text"], first["attempts"], first["possibleDuplicate"]) == ("a", 2, True)
        assert (second["text"], second.get("possibleDuplicate")) == ("b", None)

    def test_the_wait_counts_from_the_beginning_of_the_call(self) -> None:
        talk = Conversation().offer(speak("t1", "a"))
        talk.say()
        talk.now += 10
        talk.done(UNKNOWN, jitter=0.0)
        talk.say()

    def test_skip_does_not_repeat_it_and_what_follows_waits_all_the_same(self) -> None:
        chunk = speak("t1", "a")
        talk = Conversation(replace(RULES, ambiguous="skip")).offer(chunk)
        talk.say()
        talk.done(UNKNOWN).offer(speak("t2", "b"))
        assert talk.ends(chunk) == ["speech.failed unknown_outcome"]
        assert talk.waits() == 2.0
        talk.settle()
        assert [text for _, text, _ in talk.said] == ["a", "b"]

    def test_after_any_lost_answer_nothing_else_may_be_called_before_it_is_over(self) -> None:
        followers = [speak("t2", "b"), interrupt(), entry(type="session.end")]
        for follower in followers:
            talk = Conversation(replace(RULES, ambiguous="skip")).offer(speak("t1", "a"))
            talk.say()
            talk.done(UNKNOWN).offer(follower)
            assert talk.waits() == 2.0

    @pytest.mark.parametrize(
        ("before", "session"),
        [
            (entry(type="session.end"), True),
            (entry(type="session.start"), False),
            (entry(type="session.start", handoff="viewer"), True),
        ],
        ids=["end", "create", "init-client"],
    )
    def test_the_lost_answer_may_be_that_of_any_call(self, before: Any, session: bool) -> None:
        talk = Conversation() if session else Conversation(session=None)
        talk.offer(before)
        assert talk.next() is not None
        talk.done(UNKNOWN, jitter=0.0).offer(speak("t2", "b"))
        assert talk.waits() == 2.0

    def test_nor_after_the_lost_answer_of_an_interrupt_beside(self) -> None:
        talk = Conversation().offer(interrupt(), speak("t2", "b"))
        talk.now += 1
        assert talk.interrupted(UNKNOWN).waits() == 1.0
        assert talk.forget().offer(speak("t2", "b")).waits() == 1.0, "nor may a successor"

    def test_gone_fails_the_turn_where_sessions_are_not_recreated_and_the_next_turn_gets_a_new_one(self) -> None:
        chunk = speak("t1", "a")
        rules = replace(RULES, on_lost="fail")
        talk = Conversation(rules).offer(chunk, speak("t2", "b", final=True)).settle(GONE)
        assert talk.ends(chunk) == ["speech.failed session_lost"]
        assert talk.of("session.ended") == [{"commandIds": [], "sessionId": "s1", "reason": "lost"}]
        assert [type(call) for call in talk.calls] == [Say, Open, Say]
        assert talk.of("session.ready")[0]["commandIds"] == []
        assert talk.said[-1] == ("t2", "b", True)

    def test_stale_means_nothing_was_sent_a_new_session_says_it(self) -> None:
        talk = Conversation().offer(speak("t1", "a", final=True)).settle(STALE)
        assert [type(call) for call in talk.calls] == [Say, Open, Say]
        accepted = talk.of("speech.accepted")[0]
        assert (accepted["attempts"], accepted.get("possibleDuplicate")) == (1, None)
        assert "session.ended" not in talk.types, "whoever ended it has told"

    def test_the_latency_is_the_age_of_the_oldest_chunk(self) -> None:
        talk = Conversation().offer(speak("t1", "a", born=NOW - 0.25), speak("t1", "b")).settle()
        assert talk.of("speech.accepted")[0]["latencyMs"] == 250

    def test_a_clock_that_runs_ahead_elsewhere_makes_no_negative_latency(self) -> None:
        talk = Conversation().offer(speak("t1", "a", born=NOW + 5)).settle()
        assert talk.of("speech.accepted")[0]["latencyMs"] == 0

    def test_the_trace_is_that_of_the_oldest_command(self) -> None:
        talk = Conversation().offer(speak("t1", "a"), speak("t1", "b", traceparent="T1"), speak("t1", "c"))
        talk.settle()
        assert [event.traceparent for event in talk.events if event.type.endswith("accepted")] == ["T1"]


class TestLostConnection:
    def test_what_waits_is_dropped_and_said_when_it_comes_again(self) -> None:
        talk = Conversation().offer(speak("t1", "a", message_id="m1")).settle()
        talk.offer(speak("t1", "b", message_id="m2")).forget()
        assert len(talk.lane) == 0
        talk.offer(*(speak("t1", text, message_id=id_) for text, id_ in [("a", "m1"), ("b", "m2")])).settle()
        assert [text for _, text, _ in talk.said] == ["a", "b"]

    @pytest.mark.parametrize(
        ("outcome", "accepted"),
        [
            (OK, [("a", None), ("a", None), ("b", None)]),  # told again under the same id
            (NOT_TAKEN, [("ab", None)]),
            (UNKNOWN, [("a", True), ("b", None)]),
            (REFUSED, []),
        ],
        ids=lambda value: getattr(value, "kind", ""),
    )
    def test_what_is_in_a_call_ends_once(self, outcome: CallResult, accepted: list[tuple[str, bool | None]]) -> None:
        talk = Conversation().offer(speak("t1", "a", message_id="m1"))
        talk.say()
        talk.done(outcome).forget()
        again = [speak("t1", "a", message_id="m1"), speak("t1", "b", message_id="m2")]
        talk.offer(*again).settle()
        assert [(data["text"], data.get("possibleDuplicate")) for data in talk.of("speech.accepted")] == accepted
        told = {event.id("s") for event in talk.events if "m1" in getattr(event.data, "command_ids", ())}
        assert len(told) == 1
        assert all(len(talk.ends(one)) == 1 for one in again)

    def test_an_end_that_waited_for_playback_leaves_no_trace(self) -> None:
        talk = Conversation().offer(speak("t1", "a" * 300, final=True)).settle().offer(entry(type="session.end"))
        assert talk.waits() > 0
        start = entry(type="session.start", avatarId="bob")
        talk.forget().offer(start).settle()
        assert Close(False, EndReason.REPLACED) in talk.calls
        assert talk.of("session.ended")[0]["reason"] == "replaced"
        assert talk.ends(start) == ["session.ready"]


class TestFoundWithoutAnOutcome:
    """A worker was saying something when it died, or lost its partition; another goes on."""

    def begun(self, rules: Rules = RULES) -> Conversation:
        """It has died with "ab" on its way; half a second later its chunks come again."""
        talk = Conversation(rules)
        talk.offer(speak("t1", "a", message_id="m1"), speak("t1", "b", final=True, message_id="m2"))
        assert talk.say().piece.text == "ab"
        talk.now += 0.5
        return talk.forget()

    def again(self, *, more: bool = True) -> list[Entry]:
        chunks = [speak("t1", "a", message_id="m1"), speak("t1", "b", final=True, message_id="m2")]
        return [*chunks, speak("t1", "c", final=True, message_id="m3")] if more else chunks

    def test_exactly_the_same_is_said_again_alone_after_the_wait_and_flagged(self) -> None:
        talk = self.begun().offer(*self.again())
        assert talk.waits() == pytest.approx(INTENT_S + 1.5)
        talk.settle()
        assert talk.said == [("t1", "ab", True), ("t1", "ab", True), ("t1", "c", True)]
        first, second = talk.of("speech.accepted")
        assert (first["possibleDuplicate"], first["attempts"]) == (True, 2)
        assert "possibleDuplicate" not in second

    def test_its_chunks_are_waited_for(self) -> None:
        first, *others = self.again()
        talk = self.begun().offer(first)
        talk.now += 4
        assert talk.waits() > 0.5
        talk.offer(*others).settle()
        assert [text for _, text, _ in talk.said] == ["ab", "ab", "c"]

    def test_not_for_ever_and_what_is_left_is_flagged(self) -> None:
        talk = self.begun().offer(self.again()[0]).settle()
        assert 5 <= talk.now - NOW < 10
        assert talk.said[1:] == [("t1", "a", False)]
        assert talk.of("speech.accepted")[0]["possibleDuplicate"] is True

    def test_skip_does_not_repeat_it(self) -> None:
        chunks = self.again(more=False)
        talk = self.begun(replace(RULES, ambiguous="skip")).offer(*chunks, speak("t2", "c"))
        assert talk.waits() == pytest.approx(INTENT_S + 1.5), "what follows waits all the same"
        talk.settle()
        assert [talk.ends(one) for one in chunks] == [["speech.failed unknown_outcome"]] * 2
        assert [text for _, text, _ in talk.said] == ["ab", "c"]

    @pytest.mark.parametrize("outcome", [NOT_TAKEN, UNKNOWN, STALE])
    def test_a_repeat_that_fails_is_flagged_all_the_same(self, outcome: CallResult) -> None:
        talk = self.begun().offer(*self.again(more=False)).settle(outcome)
        assert [data["possibleDuplicate"] for data in talk.of("speech.accepted")] == [True]

    def test_dying_again_changes_nothing(self) -> None:
        talk = self.begun().offer(*self.again(more=False))
        talk.now += 3
        assert talk.say().piece.text == "ab"
        talk.forget().offer(*self.again())
        assert talk.waits() == INTENT_S + 2
        talk.settle()
        assert [text for _, text, _ in talk.said] == ["ab", "ab", "ab", "c"]
        assert [data.get("possibleDuplicate") for data in talk.of("speech.accepted")] == [True, None]

    @pytest.mark.parametrize("outcome", [NOT_TAKEN, STALE, REFUSED])
    def test_what_surely_was_not_said_is_not_flagged(self, outcome: CallResult) -> None:
        talk = Conversation().offer(speak("t1", "a", message_id="m1"))
        talk.say()
        talk.done(outcome).forget()
        assert talk.memory.state.attempt is None
        talk.offer(speak("t1", "a", message_id="m1"))
        if outcome is not REFUSED:
            assert talk.settle().of("speech.accepted")[0].get("possibleDuplicate") is None

    @pytest.mark.parametrize("wanted", [None, "t1"])
    def test_an_interrupt_ends_it_and_is_called_at_once_and_after_the_wait(self, wanted: str | None) -> None:
        chunks = self.again()
        talk = self.begun().offer(*chunks, interrupt(wanted))
        assert [talk.ends(one) for one in chunks] == [["speech.discarded interrupted"]] * 3
        assert talk.memory.state.attempt is None, "its outcome, should it come, is not for anybody to tell"
        assert talk.calls[1:] == [CallInterrupt()]
        assert talk.interrupted().waits() == pytest.approx(INTENT_S + 1.5)
        talk.settle()
        assert talk.calls[1:] == [CallInterrupt(), CallInterrupt()]

    def test_it_expires(self) -> None:
        talk = self.begun()
        talk.now += 130
        talk.offer(*self.again()).settle()
        assert len(talk.said) == 1
        assert talk.of("turn.failed") == [{"turnId": "t1", "reason": "expired"}]
        assert talk.memory.state.attempt is None

    @pytest.mark.parametrize("shaping", ["sentences", "off"])
    def test_part_of_a_long_chunk(self, shaping: Any) -> None:
        long = "word " * 500
        talk = Conversation(replace(RULES, shaping=shaping)).offer(speak("t1", long, message_id="m1"))
        talk.say()
        talk.done()
        talk.say()
        talk.forget().offer(speak("t1", long, message_id="m1")).settle()
        accepted = {event.id(""): wire(event) for event in talk.events if event.type == "avatar.speech.accepted"}
        assert "".join(data["text"] for data in accepted.values()).rstrip() == long.rstrip()
        flags = [data.get("possibleDuplicate") for data in accepted.values()]
        assert flags == [None, True, None, *[None] * (shaping == "sentences")]

    @pytest.mark.parametrize("ended", [False, True], ids=["amid the chunk", "at its end"])
    def test_a_part_that_was_not_told_of_is_told_by_the_next(self, *, ended: bool) -> None:
        long = "word " * 300
        talk = Conversation().offer(speak("t1", long, message_id="m1"))
        talk.say()
        talk.done()
        if ended:
            talk.settle()
        talk.conclusions.clear()
        talk.forget().offer(speak("t1", long, message_id="m1")).settle()
        assert talk.types.count("turn.started") == 1
        assert "".join(data["text"] for data in talk.of("speech.accepted")) == long

    @pytest.mark.parametrize(
        ("call", "at_most"), [(interrupt(), 2), (entry(type="session.end"), INTENT_S + 2)], ids=["interrupt", "end"]
    )
    def test_any_other_call_counts_as_running_too(self, call: Entry, at_most: float) -> None:
        talk = Conversation().offer(call)
        assert talk.next() is not None
        assert talk.forget().offer(speak("t2", "b")).waits() == at_most


class TestRebuilt:
    def test_it_holds_what_the_failed_lane_held(self) -> None:
        talk = Conversation().offer(speak("t1", "a"), interrupt("t1"), speak("t2", "b"))
        talk.rebuild().settle()
        assert [text for _, text, _ in talk.said] == ["b"]
        assert talk.of("interrupt.done")[0]["turnIds"] == ["t1"]

    def test_a_call_that_counts_as_running_still_does(self) -> None:
        talk = Conversation(replace(RULES, ambiguous="skip")).offer(speak("t1", "a"))
        talk.say()
        talk.done(UNKNOWN)
        assert talk.rebuild().offer(speak("t2", "b")).waits() == 2.0
