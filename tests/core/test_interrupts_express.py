"""Both copies of an interrupt through a lane: in any order, doubled, late, or alone."""

from dataclasses import replace

import pytest

from tests.support.conversation import (
    NOT_TAKEN,
    OK,
    RULES,
    STALE,
    UNKNOWN,
    Conversation,
    entry,
    express,
    interrupt,
    speak,
)
from worker.core.interrupts import FENCE_S
from worker.core.model import CallResult, Entry
from worker.core.work import CallInterrupt, Open, Say


def told_once(talk: Conversation, stop: Entry) -> None:
    """One `interrupt.done` names it, and one call told the API."""
    named = [data for data in talk.of("interrupt.done") if stop.message_id in data["commandIds"]]
    assert len(named) == 1
    assert talk.calls.count(CallInterrupt()) == 1


class TestExpressFirst:
    def test_it_acts_on_what_waits_and_on_what_it_has_overtaken(self) -> None:
        stop = interrupt()
        waiting, overtaken = speak("t1", "a"), [speak("t1", "b"), speak("t2", "c"), speak("t2", "d", final=True)]
        talk = Conversation().offer(waiting, express(stop))
        assert talk.ends(waiting) == ["speech.discarded interrupted"]
        assert talk.calls == [CallInterrupt()], "at once"
        talk.offer(*overtaken, stop, speak("t3", "new", final=True)).settle()
        assert talk.said == [("t3", "new", True)]
        assert [talk.ends(chunk) for chunk in overtaken] == [["speech.discarded interrupted"]] * 3
        assert [(data["turnId"], data["discardedCommands"]) for data in talk.of("turn.interrupted")] == [
            ("t1", 1),
            ("t2", 1),
        ]
        told_once(talk, stop)

    def test_the_ordered_copy_that_comes_before_the_answer_ends_with_it(self) -> None:
        stop = interrupt()
        talk = Conversation().offer(speak("t1", "a"), express(stop), stop)
        assert talk.ends(stop) == []
        talk.settle()
        assert talk.ends(stop) == ["interrupt.done"]
        told_once(talk, stop)

    def test_the_ordered_copy_that_comes_after_it_is_only_acknowledged(self) -> None:
        stop = interrupt()
        talk = Conversation().offer(express(stop)).settle().offer(stop).settle()
        assert talk.ends(stop) == [""]
        told_once(talk, stop)

    def test_a_closed_turn_that_was_heard_is_opened_again_beyond_the_fence(self) -> None:
        stop = interrupt()
        talk = Conversation().offer(speak("t1", "a", final=True)).settle()
        talk.offer(express(stop), stop, speak("t1", "b", final=True)).settle()
        assert [text for _, text, _ in talk.said] == ["a", "b"]

    def test_a_turn_silent_behind_the_fence_stays_so_beyond_it(self) -> None:
        stop, late = interrupt(), speak("t1", "b")
        talk = Conversation().offer(express(stop), speak("t1", "a"), stop, late).settle()
        assert talk.said == []
        assert talk.ends(late) == ["speech.discarded interrupted"]

    def test_nothing_new_is_said_while_the_api_is_being_told(self) -> None:
        stop = interrupt()
        talk = Conversation().offer(express(stop), stop, speak("t2", "b", final=True))
        assert talk.waits() > 0
        talk.interrupted()
        assert talk.say().piece.text == "b"

    @pytest.mark.parametrize("outcome", [UNKNOWN, NOT_TAKEN, STALE])
    def test_the_silence_holds_whatever_the_api_answers(self, outcome: CallResult) -> None:
        stop, chunk = interrupt(), speak("t1", "a")
        talk = Conversation().offer(express(stop), chunk).settle(outcome).offer(stop).settle()
        assert talk.said == []
        assert talk.ends(chunk) == ["speech.discarded interrupted"]
        told_once(talk, stop)


class TestOrderedFirst:
    def test_the_express_copy_that_comes_late_does_nothing(self) -> None:
        stop, chunk = interrupt(), speak("t2", "b", final=True)
        talk = Conversation().offer(speak("t1", "a"), stop, chunk, express(stop)).settle()
        assert talk.ends(chunk) == ["speech.accepted"]
        assert talk.memory.state.fences == {}
        told_once(talk, stop)

    def test_nor_does_it_once_the_interrupt_has_ended(self) -> None:
        stop = interrupt()
        talk = Conversation().offer(stop).settle().offer(express(stop), speak("t1", "a")).settle()
        assert [text for _, text, _ in talk.said] == ["a"]
        told_once(talk, stop)

    def test_nor_in_another_lane(self) -> None:
        stop = interrupt()
        talk = Conversation().offer(stop).settle().forget().offer(express(stop), speak("t1", "a")).settle()
        assert [text for _, text, _ in talk.said] == ["a"]
        told_once(talk, stop)


class TestDoubled:
    def test_express_copies(self) -> None:
        stop = interrupt()
        talk = Conversation().offer(express(stop), express(stop), speak("t1", "a")).settle()
        talk.offer(express(stop), stop, express(stop), speak("t2", "b")).settle()
        assert [text for _, text, _ in talk.said] == ["b"]
        assert talk.types.count("turn.interrupted") == 1
        told_once(talk, stop)

    @pytest.mark.parametrize("answered", [True, False])
    def test_an_ordered_copy_that_was_sent_twice_does_not_act_twice(self, answered: bool) -> None:
        stop, again = interrupt(message_id="i"), interrupt(message_id="i")
        talk = Conversation().offer(express(stop), stop)
        if answered:
            talk.settle()
        chunk = speak("t1", "a", final=True)
        talk.offer(chunk, again).settle()
        assert talk.ends(chunk) == ["speech.accepted"]
        assert talk.ends(again) == ["interrupt.done"]
        assert len({event.id("s") for event in talk.events if event.type == "avatar.interrupt.done"}) == 1
        assert talk.calls.count(CallInterrupt()) == 1

    @pytest.mark.parametrize("answered", [True, False])
    def test_another_body_under_its_id_is_rejected(self, answered: bool) -> None:
        stop = interrupt(message_id="i")
        others = [speak("t1", "a", message_id="i"), interrupt("t9", message_id="i")]
        talk = Conversation().offer(express(stop))
        if answered:
            talk.settle()
        talk.offer(*others).settle()
        assert [talk.ends(other) for other in others] == [["command.rejected message_id_reused"]] * 2
        assert "t9" not in talk.memory.turns
        talk.offer(stop).settle()
        told_ids = {event.id("s") for event in talk.events if event.type == "avatar.interrupt.done"}
        assert len(told_ids) == 1
        assert talk.calls == [CallInterrupt()]

    def test_an_id_that_a_chunk_waits_under_does_not_interrupt(self) -> None:
        chunk, stop = speak("t1", "a", message_id="i"), interrupt(message_id="i")
        talk = Conversation().offer(chunk, express(stop), stop).settle()
        assert talk.ends(chunk) == ["speech.accepted"]
        assert talk.ends(stop) == ["command.rejected message_id_reused"]
        assert CallInterrupt() not in talk.calls
        assert talk.memory.state.fences == {}


class TestAlone:
    def test_without_the_express_copy_it_acts_in_its_place(self) -> None:
        stop = interrupt()
        talk = Conversation().offer(speak("t1", "a"), stop, speak("t2", "b", final=True)).settle()
        assert talk.said == [("t2", "b", True)]
        told_once(talk, stop)

    @pytest.mark.parametrize("max_age_s", [30.0, 0.0])
    def test_without_the_ordered_copy_the_fence_falls_in_the_end(self, max_age_s: float) -> None:
        stop = interrupt()
        talk = Conversation(replace(RULES, max_age_s=max_age_s)).offer(express(stop)).settle()
        talk.now += (max_age_s or FENCE_S) - 0.1
        behind = speak("t1", "a", born=talk.now)
        talk.offer(behind).settle()
        assert talk.ends(behind) == ["speech.discarded interrupted"]
        talk.now += 0.1
        talk.offer(speak("t2", "b", born=talk.now, final=True)).settle()
        assert talk.said == [("t2", "b", True)]
        assert talk.memory.state.fences == {}
        told_once(talk, stop)

    def test_an_ordered_copy_later_than_its_fence_silences_nothing_more(self) -> None:
        stop = interrupt()
        talk = Conversation().offer(express(stop)).settle()
        talk.now += RULES.max_age_s
        chunk = speak("t1", "a", born=talk.now, final=True)
        talk.offer(chunk, stop).settle()
        assert talk.ends(chunk) == ["speech.accepted"]
        assert talk.ends(stop) == [""]


class TestTwoInterrupts:
    @pytest.mark.parametrize("crossed", [False, True])
    def test_each_has_its_own_fence(self, crossed: bool) -> None:
        first, second = interrupt(), interrupt()
        copies = [express(second), express(first)] if crossed else [express(first), express(second)]
        between, beyond = speak("t2", "b"), speak("t3", "c", final=True)
        talk = Conversation().offer(*copies, speak("t1", "a"), first, between, second, beyond).settle()
        assert talk.said == [("t3", "c", True)]
        assert [data["commandIds"] for data in talk.of("interrupt.done")] == [[copy.message_id] for copy in copies]
        assert talk.memory.state.fences == {}


class TestOneTurn:
    def test_others_are_spared_ahead_of_its_ordered_copy_too(self) -> None:
        stop = interrupt("t1")
        talk = Conversation().offer(speak("t1", "a"), express(stop), speak("t2", "b", final=True), speak("t1", "c"))
        talk.offer(stop).settle()
        assert talk.said == [("t2", "b", True)]
        assert talk.of("turn.interrupted") == [{"turnId": "t1", "discardedCommands": 1}]
        assert talk.of("interrupt.done")[0]["turnIds"] == ["t1"]
        assert talk.memory.state.fences == {}

    def test_one_that_is_not_yet_seen_is_silent(self) -> None:
        stop, chunk = interrupt("t9"), speak("t9", "a", final=True)
        talk = Conversation().offer(express(stop), chunk, stop, speak("t1", "b", final=True)).settle()
        assert talk.said == [("t1", "b", True)]
        assert talk.ends(chunk) == ["speech.discarded interrupted"]

    def test_it_does_not_cut_what_is_being_said_of_another(self) -> None:
        stop = interrupt("t1")
        talk = Conversation().offer(speak("t2", "b", final=True))
        talk.say()
        talk.offer(express(stop))
        assert talk.calls == [Say(talk.lane._speech.piece)]  # type: ignore[arg-type]  # a piece is under way
        talk.done().settle()
        assert CallInterrupt() not in talk.calls


class TestSayInFlight:
    @pytest.mark.parametrize(("outcome", "again"), [(OK, 1), (UNKNOWN, 1), (NOT_TAKEN, 0)])
    def test_the_api_is_told_at_once_and_again_when_it_returns(self, outcome: CallResult, again: int) -> None:
        stop, chunk = interrupt(), speak("t1", "a")
        talk = Conversation().offer(chunk)
        talk.say()
        talk.offer(express(stop))
        assert talk.calls[1:] == [CallInterrupt()]
        talk.interrupted()
        assert talk.types.count("interrupt.done") == 1
        talk.done(outcome).settle().offer(stop).settle()
        assert talk.calls[1:] == [CallInterrupt()] * (1 + again)
        assert talk.ends(chunk) == ["speech.accepted" if outcome is OK else "speech.discarded interrupted"]
        assert talk.types.count("interrupt.done") == 1

    def test_an_interrupt_that_meets_the_second_telling_is_told_of_too(self) -> None:
        talk = Conversation().offer(speak("t1", "a"))
        talk.say()
        talk.offer(express(interrupt())).interrupted().done()
        assert talk.next() == CallInterrupt()
        waiting = speak("t2", "b")
        talk.offer(express(interrupt()), waiting).done().settle()
        assert talk.calls.count(CallInterrupt()) == 3
        assert talk.ends(waiting) == ["speech.discarded interrupted"]

    def test_a_session_lost_meanwhile_needs_no_second_telling(self) -> None:
        talk = Conversation().offer(speak("t1", "a"))
        talk.say()
        talk.offer(express(interrupt())).interrupted(STALE).done(STALE).settle()
        talk.offer(entry(type="session.start")).settle()
        assert [type(call) for call in talk.calls] == [Say, CallInterrupt, Open]


class TestAnotherWorkerGoesOn:
    def test_the_fence_stands_and_the_ordered_copy_ends_as_the_express_one_did(self) -> None:
        stop, chunk = interrupt(), speak("t1", "a")
        talk = Conversation().offer(express(stop)).settle().forget()
        assert talk.memory.state.fences == {stop.key: talk.now}
        talk.offer(chunk, stop, speak("t2", "b", final=True)).settle()
        assert talk.ends(chunk) == ["speech.discarded interrupted"]
        assert talk.said == [("t2", "b", True)]
        assert talk.ends(stop) == ["interrupt.done"]
        assert len({event.id("s") for event in talk.events if event.type == "avatar.interrupt.done"}) == 1
        assert talk.calls.count(CallInterrupt()) == 1
        assert talk.memory.state.fences == {}

    @pytest.mark.parametrize("doubled", [True, False])
    def test_one_that_was_not_told_yet_is_told_by_the_successor(self, doubled: bool) -> None:
        stop, chunk = interrupt(), speak("t1", "a")
        talk = Conversation().offer(express(stop)).forget()
        talk.offer(*([express(stop)] if doubled else []), chunk, stop, speak("t2", "b", final=True)).settle()
        assert talk.ends(chunk) == ["speech.discarded interrupted"]
        assert talk.ends(stop) == ["interrupt.done"]
        assert talk.said == [("t2", "b", True)]
        assert talk.types.count("interrupt.done") == 1
        assert (talk.memory.state.silenced, talk.memory.state.fences) == ({}, {})

    def test_what_a_dead_worker_was_saying_is_silent_and_the_api_is_told_again(self) -> None:
        stop = interrupt()
        talk = Conversation().offer(speak("t1", "a", message_id="m1"))
        talk.say()
        talk.offer(express(stop)).interrupted()
        talk.forget().offer(speak("t1", "a", message_id="m1"), stop).settle()
        assert [type(call) for call in talk.calls] == [Say, CallInterrupt, CallInterrupt]
        assert len({event.id("s") for event in talk.events if event.type == "avatar.turn.interrupted"}) == 1

    def test_the_tombstone_outlives_it(self) -> None:
        stop, late = interrupt(), speak("t1", "late")
        talk = Conversation().offer(express(stop), speak("t1", "a")).settle().offer(stop).settle()
        talk.forget().offer(late).settle()
        assert talk.ends(late) == ["speech.discarded interrupted"]
        assert talk.said == []


class TestOtherCommands:
    def test_they_are_never_discarded(self) -> None:
        start, end, stop = entry(type="session.start"), entry(type="session.end"), interrupt()
        ahead = entry(type="session.start")
        talk = Conversation().offer(ahead, express(stop), start, speak("t1", "a"), end, stop).settle()
        assert [talk.ends(ahead), talk.ends(start)] == [["session.ready"]] * 2
        assert talk.ends(end) == ["session.ended requested"]
        assert talk.said == []

    def test_without_a_session_nothing_is_called_and_the_fence_stands(self) -> None:
        stop, chunk = interrupt(), speak("t1", "a")
        talk = Conversation(session=None).offer(express(stop), chunk, stop).settle()
        assert talk.calls == []
        assert talk.ends(chunk) == ["speech.discarded interrupted"]
        assert talk.of("interrupt.done") == [{"commandIds": [stop.message_id], "turnIds": [], "latencyMs": 0}]
