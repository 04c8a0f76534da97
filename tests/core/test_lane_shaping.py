"""When pieces leave a lane, how turns close, and how producers are held back."""

from dataclasses import replace
from typing import Any

import pytest

from tests.support.conversation import (
    GONE,
    NOT_TAKEN,
    NOW,
    REFUSED,
    RULES,
    UNKNOWN,
    Conversation,
    entry,
    express,
    interrupt,
    speak,
    wire,
)
from worker.core.book import Book
from worker.core.memory import NUMBERED_TURNS, TurnState
from worker.core.model import CallResult, Entry
from worker.core.pressure import Pressure
from worker.core.sequence import Disorder
from worker.core.speech import RESUME_WAIT_S
from worker.core.work import Rules, Say

REAL = replace(RULES, stall_first_s=0.5, stall_s=1.0, auto_final_s=30)
BYE = replace(REAL, final_text="Bye.")
SENTENCE = "This is a sentence of some length. "


def talk_of(*texts: str, rules: Rules = REAL) -> Conversation:
    return Conversation(rules).offer(*(speak("t1", text) for text in texts))


class TestWhenPiecesLeave:
    def test_the_first_leaves_with_the_word_behind_it_and_the_tail_stays(self) -> None:
        talk = talk_of(SENTENCE, "And")
        assert talk.waits() > 0
        talk.offer(speak("t1", " now"))
        assert talk.say().piece.text == SENTENCE
        assert talk.done().waits() > 0

    def test_what_arrives_during_a_call_joins_the_tail(self) -> None:
        talk = talk_of(SENTENCE, "And now")
        talk.say()
        talk.offer(speak("t1", " for"), speak("t1", " more.", final=True)).done().settle()
        assert [text for _, text, _ in talk.said] == [SENTENCE, "And now for more."]

    def test_a_stall_is_sooner_before_the_first_piece(self) -> None:
        talk = talk_of("Well, ")
        assert talk.waits() == 0.5
        talk.now += 0.5
        assert talk.say().piece.text == "Well, "
        talk.done().offer(speak("t1", "then"))
        assert talk.waits() == 1.0

    def test_its_clock_begins_anew_with_each_word(self) -> None:
        talk = talk_of("Well, ")
        assert talk.waits() == 0.5
        talk.now += 0.4
        assert talk.waits() == pytest.approx(0.1)
        talk.offer(speak("t1", "then "))
        assert talk.waits() == 0.5

    def test_half_a_word_waits_for_a_second_one(self) -> None:
        chunk = speak("t1", "Well, the")
        talk = Conversation(REAL).offer(chunk)
        talk.now += talk.waits()
        assert talk.say().piece.text == "Well, "
        assert talk.done().ends(chunk) == []
        assert talk.waits() == 1.0
        talk.now += 1.0
        assert talk.say().piece.text == "the"
        assert talk.done().ends(chunk) == ["speech.accepted"]

    @pytest.mark.parametrize("text", [" ", "🎉 ", "```py\nx = 1\n", "!", "---\n"])
    def test_what_has_no_word_is_not_held_for_long(self, text: str) -> None:
        chunk = speak("t1", text)
        talk = Conversation(REAL).offer(chunk)
        while talk.now < NOW + 2:
            talk.now += talk.waits()
        assert talk.ends(chunk) == ["speech.discarded empty"]
        assert talk.calls == []

    def test_a_long_block_of_code_fills_no_window(self) -> None:
        talk = talk_of("Look:\n", "```py\n", rules=replace(REAL, max_age_s=0))
        for _ in range(600):
            talk.offer(speak("t1", "x = 1\n"))
            while isinstance(work := talk.next(), Say):
                talk.done()
            assert work is not None
            talk.now += 0.025
        assert len(talk.lane) <= 1.1 / 0.025
        talk.offer(speak("t1", "```\nThat was it.", final=True)).settle()
        assert [text for _, text, _ in talk.said] == ["Look:\n", "That was it."]
        assert talk.memory.state.shapes == {}

    @pytest.mark.parametrize(
        "body", [{"turnId": "t2", "text": "b"}, {"type": "session.end"}, {"type": "session.start"}]
    )
    def test_another_command_flushes_and_leaves_the_turn_open(self, body: dict[str, Any]) -> None:
        talk = talk_of("**Well", ", th").offer(entry(**body))
        assert talk.say().piece.text == "Well, th"
        talk.done()
        assert talk.memory.turns["t1"].state is TurnState.OPEN

    def test_its_mark_up_is_still_open_behind_the_other_turn(self) -> None:
        talk = talk_of("Look:\n```py\nx = 1\n").offer(speak("t2", "Between.", final=True))
        talk.offer(speak("t1", "y = 2\n```\nThat was it.", final=True)).settle()
        assert talk.said == [("t1", "Look:", False), ("t2", "Between.", True), ("t1", "That was it.", True)]

    def test_neither_a_repeat_nor_an_interrupt_of_another_turn_parts_a_word(self) -> None:
        first = speak("t1", "Wel", message_id="m1")
        talk = Conversation(REAL).offer(first, speak("t1", "Wel", message_id="m1"), speak("t1", "l then.", final=True))
        talk.settle()
        talk = Conversation(REAL).offer(speak("t1", "Wel"), interrupt("t2"), speak("t1", "l then.", final=True))
        talk.settle()
        assert talk.said == [("t1", "Well then.", True)]

    def test_an_interrupt_drops_the_tail(self) -> None:
        talk = talk_of(SENTENCE, "And now")
        talk.say()
        talk.done().offer(interrupt()).settle()
        assert talk.offer(speak("t1", " late", final=True)).settle().said == [("t1", SENTENCE, False)]
        assert talk.memory.state.shapes == {}

    def test_so_does_its_express_copy(self) -> None:
        talk = talk_of("And now")
        assert talk.waits() > 0
        assert talk.offer(express(interrupt())).settle().said == []

    @pytest.mark.parametrize("result", [REFUSED, GONE])
    def test_a_failure_takes_the_tail_with_it(self, result: CallResult) -> None:
        tail = speak("t1", " now")
        talk = talk_of(SENTENCE, "And", rules=replace(REAL, on_lost="fail")).offer(tail)
        talk.say()
        talk.done(result).settle()
        assert talk.ends(tail) == ["speech.failed turn_failed"]

    def test_a_tail_that_is_too_old_expires(self) -> None:
        talk = talk_of("And now", rules=replace(REAL, max_age_s=0.2))
        talk.now += talk.waits()
        talk.settle()
        assert talk.said == []
        assert talk.of("turn.failed") == [{"turnId": "t1", "reason": "expired"}]

    def test_what_was_left_after_a_lost_answer_goes_on_as_if_nothing_had_happened(self) -> None:
        chunks = [speak("t1", text, message_id=f"m{n}") for n, text in enumerate([SENTENCE + "**And", " n", "ow** go"])]
        talk = Conversation(REAL).offer(*chunks)
        talk.say()
        talk.done(UNKNOWN).forget()
        talk.now += 5
        talk.offer(*(replace(one, redelivered=True) for one in chunks), speak("t1", " on.", final=True)).settle()
        assert [text for _, text, _ in talk.said] == [SENTENCE, SENTENCE, "And now go on."]

    def test_of_a_long_chunk_no_more_is_read_than_a_piece_needs(self) -> None:
        talk = talk_of("[a](" * 60_000)
        talk.say()
        draft = talk.lane._speech._pieces._draft
        assert draft is not None
        assert sum(map(len, draft._unread)) > 200_000

    def test_a_piece_that_was_not_taken_stays_as_it_was(self) -> None:
        talk = talk_of(SENTENCE, "And now")
        piece = talk.say().piece
        talk.done(NOT_TAKEN, jitter=0.0).offer(speak("t1", " we", final=True))
        assert talk.say().piece is piece


class TestClosing:
    def test_the_tail_carries_the_final(self) -> None:
        closing = speak("t1", "", final=True)
        talk = talk_of(SENTENCE, "And now").offer(closing).settle()
        assert talk.said == [("t1", SENTENCE, False), ("t1", "And now", True)]
        assert talk.ends(closing) == ["speech.accepted"]

    @pytest.mark.parametrize("text", ["", " \n", "**", "!", "🎉"])
    def test_a_final_that_has_nothing_to_say_is_not_sent(self, text: str) -> None:
        closing = speak("t1", text, final=True)
        talk = talk_of("Well, then. ").settle_calls().offer(closing).settle_calls()
        assert talk.said == [("t1", "Well, then. ", False)]
        assert talk.ends(closing) == ["speech.discarded empty"]
        assert talk.of("turn.completed") == [{"turnId": "t1", "pieces": 1, "textLength": 12, "finalSent": False}]

    def test_unless_there_is_a_text_for_it(self) -> None:
        closing = speak("t1", "", final=True)
        talk = talk_of("Well, then. ", rules=BYE).settle_calls().offer(closing).settle_calls()
        assert talk.said[1:] == [("t1", "Bye.", True)]
        assert talk.ends(closing) == ["speech.accepted"]
        assert talk.of("turn.completed")[0]["finalSent"] is True

    @pytest.mark.parametrize("rules", [REAL, BYE])
    def test_a_turn_that_was_never_heard_needs_no_end(self, rules: Rules) -> None:
        talk = Conversation(rules).offer(speak("t1", "", final=True)).settle_calls()
        assert talk.calls == []
        assert talk.of("turn.completed")[0]["finalSent"] is False

    def test_a_silent_turn_is_closed_after_a_while(self) -> None:
        talk = talk_of("Well, then. ").settle()
        assert talk.now == NOW + 30
        (completed,) = talk.of("turn.completed")
        assert completed == {"turnId": "t1", "pieces": 1, "textLength": 12, "finalSent": False, "autoFinal": True}
        assert talk.offer(speak("t1", "Again.", final=True)).settle().said[-1] == ("t1", "Again.", True)
        assert len({event.id("") for event in talk.events}) == len(talk.events)

    def test_a_closed_turn_keeps_no_lane(self) -> None:
        assert talk_of().offer(speak("t1", "Well, then.", final=True)).settle().now == NOW

    def test_with_what_still_waits(self) -> None:
        talk = talk_of("Well, then. ", "[open](htt").settle()
        assert talk.said == [("t1", "Well, then. ", False), ("t1", "[open](htt", True)]
        assert talk.of("turn.completed")[0]["autoFinal"] is True
        assert talk.of("turn.completed")[0]["finalSent"] is True

    def test_while_another_one_is_speaking(self) -> None:
        talk = talk_of("Well, then. ").settle_calls()
        for _ in range(40):
            talk.offer(speak("t2", "On and on. ")).settle_calls()
            talk.now += 1
        assert [data["turnId"] for data in talk.of("turn.completed")] == ["t1"]

    def test_a_closing_text_without_a_chunk_is_said_once(self) -> None:
        talk = talk_of("Well, then. ", rules=BYE).settle()
        assert talk.said[1:] == [("t1", "Bye.", True)]
        accepted = talk.of("speech.accepted")[-1]
        assert (accepted["commandIds"], accepted["latencyMs"]) == ([], 0)
        assert talk.of("turn.completed") == [
            {"turnId": "t1", "pieces": 2, "textLength": 16, "finalSent": True, "autoFinal": True}
        ]

    def test_it_is_said_again_after_a_crash_and_flagged(self) -> None:
        talk = talk_of("Well, then. ", rules=BYE).settle_calls()
        talk.now += 30
        assert talk.say().piece.text == "Bye."
        talk.forget().settle()
        assert talk.said[1:] == [("t1", "Bye.", True)] * 2
        assert talk.of("speech.accepted")[-1]["possibleDuplicate"] is True
        assert talk.memory.turns["t1"].state is TurnState.CLOSED

    def test_it_is_not_said_again_if_the_turn_was_interrupted_meanwhile(self) -> None:
        talk = talk_of("Well, then. ", rules=BYE).settle_calls()
        talk.now += 30
        talk.say()
        talk.forget().memory.turn("t1", talk.now).state = TurnState.INTERRUPTED
        talk.offer(speak("t2", "Other.", final=True)).settle()
        assert talk.said[1:] == [("t1", "Bye.", True), ("t2", "Other.", True)]
        assert talk.memory.state.attempt is None

    @pytest.mark.parametrize("result", [REFUSED, GONE])
    def test_a_closing_text_that_fails_fails_nothing(self, result: CallResult) -> None:
        talk = talk_of("Well, then. ", rules=BYE).settle_calls()
        talk.now += 30
        talk.say()
        talk.done(result).settle()
        assert talk.of("turn.completed")[0]["finalSent"] is False
        assert "turn.failed" not in talk.types

    def test_the_end_of_the_session_closes_as_a_final_does(self) -> None:
        talk = talk_of("Well, th", rules=BYE).offer(speak("t2", "On. "), entry(type="session.end")).settle()
        assert talk.said == [
            ("t1", "Well, th", False),
            ("t2", "On. ", False),
            ("t1", "Bye.", True),
            ("t2", "Bye.", True),
        ]
        assert [data["finalSent"] for data in talk.of("turn.completed")] == [True, True]
        assert len({event.id("") for event in talk.events}) == len(talk.events)

    def test_a_turn_left_open_by_a_dead_worker_closes_when_the_conversation_is_served_again(self) -> None:
        talk = talk_of("Well, then. ").settle_calls().forget()
        talk.now += 100
        talk.offer(speak("t2", "New.", final=True)).settle_calls()
        assert talk.of("turn.completed")[0] | {"autoFinal": True} == talk.of("turn.completed")[0]

    @pytest.mark.parametrize("comes", [True, False])
    def test_not_before_what_it_was_saying_has_come_again_or_stays_away(self, comes: bool) -> None:
        chunk = speak("t1", "Well, then. ", message_id="m1")
        talk = Conversation(REAL).offer(chunk)
        talk.now += talk.waits()
        talk.say()
        talk.forget()
        talk.now += 100
        assert talk.waits() == RESUME_WAIT_S
        assert "turn.completed" not in talk.types
        if comes:
            talk.offer(chunk)
        talk.settle()
        assert [data["pieces"] for data in talk.of("turn.completed")] == [int(comes)]
        assert [data.get("possibleDuplicate") for data in talk.of("speech.accepted")] == [True] * comes
        assert talk.memory.state.attempt is None

    def test_zero_is_never(self) -> None:
        assert talk_of("Well, then. ", rules=replace(REAL, auto_final_s=0)).settle().now == NOW + 0.5


class TestNumbers:
    def numbered(self, seq: int, message_id: str | None = "", turn: str = "t1") -> Entry:
        return entry(message_id, turnId=turn, text=f"word {seq}. ", isFinal=False, seq=seq)

    @pytest.mark.parametrize("wait", [True, False], ids=["both wait", "the first has ended"])
    @pytest.mark.parametrize("crash", [True, False])
    def test_the_same_number_under_another_id_is_a_duplicate(self, *, wait: bool, crash: bool) -> None:
        first, again = self.numbered(1, "m1"), self.numbered(1, "m2")
        talk = Conversation(REAL).offer(first)
        if not wait:
            talk.settle_calls()
        if crash:
            talk.forget()
            if wait:
                talk.offer(replace(first, redelivered=True))
        talk.offer(again).settle()
        assert [text for _, text, _ in talk.said] == ["word 1. "]
        assert talk.ends(again) == ["speech.discarded duplicate"]

    def test_without_an_id_a_number_is_one(self) -> None:
        talk = Conversation(REAL).offer(self.numbered(1, None)).settle_calls()
        talk.forget().offer(self.numbered(1, None)).settle()
        assert len(talk.said) == 1

    def test_other_turns_have_their_own(self) -> None:
        talk = Conversation(REAL).offer(self.numbered(1), self.numbered(1, turn="t2")).settle()
        assert len(talk.said) == 2

    def test_gaps_and_steps_back_are_noted_and_spoken(self) -> None:
        talk = Conversation(REAL).offer(*(self.numbered(seq) for seq in (0, 1, 5, 3, 4, 6)))
        assert talk.lane.take_disorders() == [
            Disorder("t1", "gap", 2, 5),
            Disorder("t1", "step_back", 6, 3),
            Disorder("t1", "gap", 5, 6),
        ]
        assert "".join(text for _, text, _ in talk.settle().said) == "word 0. word 1. word 5. word 3. word 4. word 6. "
        assert talk.forget().memory.state.numbers == {"t1": ((0, 1), (3, 6))}

    def test_they_are_remembered_of_the_latest_turns(self) -> None:
        talk = Conversation(REAL)
        for turn in range(NUMBERED_TURNS + 5):
            talk.offer(self.numbered(1, turn=f"t{turn}")).settle_calls()
        assert len(talk.memory.state.numbers) == NUMBERED_TURNS


class TestPressure:
    def test_it_pauses_above_and_resumes_below(self) -> None:
        pressure = Pressure("c1", RULES)
        told = [pressure.look(waiting, NOW + number) for number, waiting in enumerate([999, 1000, 500, 201, 200, 999])]
        data = [None if event is None else (event.type.removeprefix("avatar.flow."), wire(event)) for event in told]
        assert data == [
            None,
            ("paused", {"waitingChars": 1000, "validS": 10.0}),
            None,
            None,
            ("resumed", {"waitingChars": 200}),
            None,
        ]

    def test_it_is_repeated_in_time_and_each_time_is_another_event(self) -> None:
        pressure = Pressure("c1", RULES)
        first = pressure.look(2000, NOW)
        assert pressure.again_at is not None
        assert pressure.again_at < NOW + 10
        assert pressure.look(2000, pressure.again_at - 0.1) is None
        again = pressure.look(1500, pressure.again_at)
        assert first is not None
        assert again is not None
        assert first.id("") != again.id("")

    def test_a_lane_counts_what_waits_for_the_api_not_for_more_text(self) -> None:
        talk = talk_of("word " * 40)
        talk.waits()
        assert talk.lane.waiting_chars == 0
        talk.offer(speak("t1", SENTENCE * 60))
        piece = talk.say().piece
        assert talk.lane.waiting_chars == 200 + len(SENTENCE) * 60 - sum(part.end - part.start for part in piece.parts)
        talk.done(NOT_TAKEN)
        talk.waits()
        assert talk.lane.waiting_chars > 1000
        assert talk.settle_calls().lane.waiting_chars == 0

    def test_what_waits_is_looked_through_once_however_often_it_is_asked(self, monkeypatch: pytest.MonkeyPatch) -> None:
        talk = talk_of(SENTENCE, "And now")
        talk.say()
        talk.done(NOT_TAKEN)
        looks, known = 0, Book.known

        def counting(book: Book, entry: Entry) -> bool:
            nonlocal looks
            looks += 1
            return known(book, entry)

        monkeypatch.setattr(Book, "known", counting)
        for number in range(300):
            talk.offer(speak(f"t{number % 10}", "word "))
            talk.waits()
            assert talk.lane.waiting_chars == len("And now" + "word " * (number + 1))
        assert looks < 300 * 4
