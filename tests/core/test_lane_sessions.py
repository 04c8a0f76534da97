"""Sessions through a lane: started, replaced, attached, ended, handed over; and why they could not be had."""

from dataclasses import replace
from typing import Any

import pytest

from schemas.events import EndReason
from tests.support.conversation import (
    DENIED,
    GONE,
    NOT_TAKEN,
    OK,
    REFUSED,
    RULES,
    SESSION,
    STALE,
    UNKNOWN,
    Conversation,
    entry,
    interrupt,
    speak,
)
from worker.core.model import CallKind, CallResult, Entry, ReplyTo, Session, Viewer
from worker.core.work import Attach, Close, InitClient, Open, Rules, Say, Wait

REPLY = ReplyTo("answers", "corr", 30_000)
LIMIT = CallResult(CallKind.NOT_TAKEN, 429, retry_after_s=3)
QUEUED = CallResult(CallKind.FULL, 429, retry_after_s=0.5, error="others go first", local=True)


def start(**fields: Any) -> Entry:
    return entry(type="session.start", reply_to=REPLY, **fields)


def end() -> Entry:
    return entry(type="session.end")


def attach(session_id: str = "theirs") -> Entry:
    return entry(type="session.attach", sessionId=session_id, token="their-token")


def answers(talk: Conversation) -> list[dict[str, Any]]:
    return [conclusion.answer.payload for conclusion in talk.conclusions if conclusion.answer]


class TestStartedBySpeech:
    def test_with_the_default_avatar_and_voice(self) -> None:
        talk = Conversation(session=None).offer(speak("t1", "a", final=True)).settle()
        assert talk.calls[0] == Open("ann", "v1", None)
        assert talk.types == ["session.ready", "turn.started", "speech.accepted", "turn.completed"]
        assert talk.of("session.ready") == [
            {"commandIds": [], "sessionId": "opened1", "avatarId": "ann", "voiceId": "v1"}
        ]

    def test_none_without_a_default_avatar(self) -> None:
        chunk = speak("t1", "a")
        talk = Conversation(Rules(), session=None).offer(chunk, speak("t1", "b")).settle()
        assert talk.calls == []
        assert talk.ends(chunk) == ["speech.failed no_session"]
        assert talk.types == ["speech.failed", "turn.failed"]

    @pytest.mark.parametrize(
        ("outcome", "speech", "session"),
        [(DENIED, "credentials", "credentials"), (REFUSED, "refused", "refused")],
    )
    def test_the_turn_fails_with_the_reason(self, outcome: CallResult, speech: str, session: str) -> None:
        chunk = speak("t1", "a")
        talk = Conversation(session=None).offer(chunk).settle(outcome)
        assert talk.ends(chunk) == [f"speech.failed {speech}"]
        (failed,) = talk.of("session.failed")
        assert failed == {"commandIds": [], "reason": session, "status": outcome.status}

    def test_capacity_is_waited_for_but_not_for_ever(self) -> None:
        chunk = speak("t1", "a")
        talk = Conversation(session=None).offer(chunk)
        began = talk.now
        talk.settle(*[LIMIT] * 50)
        assert talk.ends(chunk) == ["speech.failed capacity"]
        assert 10 <= talk.now - began < 15

    def test_an_api_that_is_down_is_waited_for_as_long_as_the_speech_is_young(self) -> None:
        talk = Conversation(session=None).offer(speak("t1", "a")).settle(*[NOT_TAKEN] * 10)
        assert len(talk.said) == 1
        assert "session.failed" not in talk.types

    def test_a_create_whose_answer_was_lost_is_repeated_after_its_time(self) -> None:
        talk = Conversation(session=None).offer(speak("t1", "a"))
        assert isinstance(talk.next(), Open)
        talk.done(UNKNOWN, jitter=0.0)
        assert talk.waits() == 2.0
        talk.settle()
        assert "possibleDuplicate" not in talk.of("speech.accepted")[0]


class TestStart:
    def test_the_answer_carries_the_token_and_the_event_does_not(self) -> None:
        one = start(avatarId="bob", voiceId="v2", voiceSpeed=1.2)
        talk = Conversation(session=None).offer(one).settle()
        assert talk.calls == [Open("bob", "v2", 1.2)]
        assert answers(talk) == [{"sessionId": "opened1", "token": "secret-token"}]
        assert talk.of("session.ready") == [
            {"commandIds": [one.message_id], "sessionId": "opened1", "avatarId": "bob", "voiceId": "v2"}
        ]
        assert "secret" not in repr(talk.conclusions) + repr(talk.calls) + repr(talk.lane)

    def test_defaults(self) -> None:
        assert Conversation(session=None).offer(start()).settle().calls == [Open("ann", "v1", None)]

    def test_a_viewer_gets_what_a_page_needs(self) -> None:
        talk = Conversation(session=None).offer(start(handoff="viewer")).settle()
        assert [type(call) for call in talk.calls] == [Open, InitClient]
        assert answers(talk) == [
            {"sessionId": "opened1", "whepUrl": "https://whep", "turn": {"credential": "secret-turn"}}
        ]
        assert "secret" not in repr(talk.conclusions)

    def test_nobody_asked_nobody_is_answered(self) -> None:
        talk = Conversation(session=None).offer(entry(type="session.start")).settle()
        assert answers(talk) == []

    @pytest.mark.parametrize(
        "same", [{}, {"avatarId": "ann"}, {"voiceId": "v1"}, {"avatarId": "ann", "voiceId": "v1", "voiceSpeed": 2}]
    )
    def test_a_live_session_answers_without_a_call(self, same: dict[str, Any]) -> None:
        one = start(**same)
        talk = Conversation().offer(one).settle()
        assert talk.calls == []
        assert answers(talk) == [{"sessionId": "s1", "token": "secret-token"}]
        assert talk.ends(one) == ["session.ready"]

    def test_the_viewer_hand_off_is_fetched_once_and_stored(self) -> None:
        talk = Conversation().offer(start(handoff="viewer"), start(handoff="viewer")).settle()
        assert talk.calls == [InitClient()]
        first, second = answers(talk)
        assert first == second
        stored = replace(SESSION, viewer=Viewer("https://whep", {}))
        assert Conversation(session=stored).offer(start(handoff="viewer")).settle().calls == []

    def test_a_repeat_is_answered_again(self) -> None:
        talk = Conversation(session=None)
        for _ in range(2):
            talk.offer(entry("m", type="session.start", reply_to=REPLY)).settle()
        assert len(answers(talk)) == 2
        assert len({event.id("s") for event in talk.events}) == 1

    def test_a_repeat_of_one_that_failed_is_answered_as_it_was(self) -> None:
        talk = Conversation(session=None)
        for _ in range(2):
            talk.offer(entry("m", type="session.start", reply_to=REPLY)).settle(REFUSED)
        first, second = answers(talk)
        assert str(first["error"]).startswith(second["error"])
        assert first["status"] == second["status"] == REFUSED.status
        assert talk.types == ["session.failed"] * 2

    def test_a_repeat_after_the_session_s_end_is_told_so(self) -> None:
        talk = Conversation(session=None).offer(entry("m", type="session.start", reply_to=REPLY), end()).settle()
        talk.offer(entry("m", type="session.start", reply_to=REPLY)).settle()
        assert "has ended" in answers(talk)[1]["error"]

    @pytest.mark.parametrize("other", [{"avatarId": "bob"}, {"voiceId": "v2"}])
    def test_another_avatar_or_voice_replaces_it_after_what_was_queued_before(self, other: dict[str, Any]) -> None:
        one = start(**other)
        talk = Conversation().offer(speak("t1", "a" * 140, final=True), one)
        talk.say()
        talk.done()
        assert talk.waits() == pytest.approx(10), "what was said is heard first"
        talk.offer(speak("t2", "b")).settle()
        assert [type(call) for call in talk.calls] == [Say, Close, Open, Say]
        assert talk.of("session.ended") == [{"commandIds": [], "sessionId": "s1", "reason": "replaced"}]
        assert talk.ends(one) == ["session.ready"]

    @pytest.mark.parametrize(
        ("outcome", "reason"), [(DENIED, "credentials"), (REFUSED, "refused"), (LIMIT, "capacity")]
    )
    def test_a_failure_is_answered(self, outcome: CallResult, reason: str) -> None:
        one = start()
        talk = Conversation(session=None).offer(one).settle(*[outcome] * 50)
        assert talk.ends(one) == [f"session.failed {reason}"]
        (answer,) = answers(talk)
        assert answer["error"].startswith(reason)
        assert answer["status"] == outcome.status

    @pytest.mark.parametrize("outcome", [NOT_TAKEN, UNKNOWN])
    def test_an_api_that_is_down_is_told_after_the_wait(self, outcome: CallResult) -> None:
        one = start()
        talk = Conversation(session=None).offer(one)
        began = talk.now
        talk.settle(*[outcome] * 100)
        assert talk.ends(one) == ["session.failed unavailable"]
        assert 10 <= talk.now - began < 21

    @pytest.mark.parametrize(("status", "reason"), [(429, "capacity"), (503, "unavailable")])
    def test_it_is_answered_in_time_whenever_the_api_wants_to_be_asked_again(self, status: int, reason: str) -> None:
        one = start()
        talk = Conversation(session=None).offer(one)
        began = talk.now
        talk.settle(CallResult(CallKind.NOT_TAKEN, status, retry_after_s=60))
        assert talk.ends(one) == [f"session.failed {reason}"]
        assert talk.now - began == pytest.approx(10)
        assert answers(talk)[0]["status"] == status

    def test_it_is_answered_in_time_while_all_calls_are_held_back(self) -> None:
        one = start()
        talk = Conversation(session=None).offer(one)
        began = talk.now
        step = talk.lane.next(began, began + 120)
        assert step.work == Wait(began + 10)
        (failed,) = talk.lane.next(began + 10, began + 120).conclusions
        assert failed.entries == (one,)
        assert failed.answer is not None
        assert str(failed.answer.payload["error"]).startswith("unavailable")

    def test_each_start_has_its_own_time(self) -> None:
        first, second = start(), start()
        talk = Conversation(session=None).offer(first, second)
        began = talk.now
        talk.settle(*[NOT_TAKEN] * 200)
        assert talk.ends(first) == talk.ends(second) == ["session.failed unavailable"]
        assert 19 < talk.now - began < 22

    def test_no_avatar_at_all(self) -> None:
        one = start()
        talk = Conversation(Rules(), session=None).offer(one).settle()
        assert talk.ends(one) == ["session.failed refused"]
        assert "AVATAR_ID" in answers(talk)[0]["error"]

    @pytest.mark.parametrize(("outcome", "reason"), [(REFUSED, "refused"), (UNKNOWN, "unavailable")])
    def test_a_viewer_that_cannot_be_initialised(self, outcome: CallResult, reason: str) -> None:
        one = start(handoff="viewer")
        talk = Conversation().offer(one).settle(outcome)
        assert talk.ends(one) == [f"session.failed {reason}"]

    @pytest.mark.parametrize("outcome", [GONE, STALE])
    def test_a_session_that_has_ended_unnoticed_is_made_anew(self, outcome: CallResult) -> None:
        one = start(handoff="viewer")
        talk = Conversation().offer(one).settle(outcome)
        assert [type(call) for call in talk.calls] == [InitClient, Open, InitClient]
        assert talk.ends(one) == ["session.ready"]

    def test_a_failed_start_spoils_nothing_after_it(self) -> None:
        talk = Conversation(session=None).offer(start(), speak("t1", "a")).settle(REFUSED)
        assert [type(call) for call in talk.calls] == [Open, Open, Say]


class TestPaused:
    """The API has asked to be left alone: whoever wants a session takes its place in the line meanwhile."""

    def paused(self, seconds: float, *entries: Entry, **fields: Any) -> Conversation:
        talk = Conversation(session=None, **fields)
        talk.pause_until = talk.now + seconds
        return talk.offer(*entries)

    def test_a_start_takes_its_place_once_and_asks_when_the_pause_is_over(self) -> None:
        talk = self.paused(6, start())
        began = talk.now
        assert talk.next() == Open("ann", "v1", None, not_before=began + 6)
        talk.done(QUEUED)
        assert talk.lane.seeks_session
        assert talk.waits() == 6
        talk.now += 6
        assert talk.next() == Open("ann", "v1", None)

    def test_a_pause_that_grows_keeps_it_waiting(self) -> None:
        talk = self.paused(6, start())
        assert isinstance(talk.next(), Open)
        talk.done(QUEUED)
        talk.now += 6
        talk.pause_until = talk.now + 1
        assert talk.next() == Open("ann", "v1", None, not_before=talk.now + 1)

    def test_it_fails_in_time_for_want_of_capacity(self) -> None:
        one = start()
        talk = self.paused(60, one)
        began = talk.now
        talk.settle(QUEUED)
        assert talk.ends(one) == ["session.failed capacity"]
        assert talk.of("session.failed")[0]["status"] == 429
        assert talk.now - began == pytest.approx(10)

    def test_an_outage_is_none(self) -> None:
        one = start()
        talk = self.paused(60, one)
        began = talk.now
        assert talk.lane.next(began, began + 60, began + 60).work == Wait(began + 10)
        (failed,) = talk.lane.next(began + 10, began + 60, began + 60).conclusions
        assert failed.answer is not None
        assert str(failed.answer.payload["error"]).startswith("unavailable")

    def test_one_that_somebody_has_made_meanwhile_is_taken_at_once(self) -> None:
        one = start()
        talk = self.paused(60, one)
        assert isinstance(talk.next(), Open)
        talk.done(OK)
        assert talk.next() is None
        assert talk.ends(one) == ["session.ready"]

    def test_speech_waits_it_out_and_for_a_session_after_it(self) -> None:
        chunk = speak("t1", "a", final=True)
        talk = self.paused(60, chunk)
        began = talk.now
        talk.settle(*[QUEUED] * 10)
        assert talk.ends(chunk) == ["speech.accepted"]
        assert 60 < talk.now - began < 70

    def test_whoever_was_told_so_itself_does_not_wait_for_ever(self) -> None:
        """Its own pause is over a little earlier than the worker's, so that it takes its place once more."""
        chunk = speak("t1", "a", final=True)
        talk = self.paused(0, chunk)
        began = talk.now
        while not talk.ends(chunk):
            work = talk.next()
            if isinstance(work, Wait):
                talk.now = work.until
            elif isinstance(work, Open) and work.not_before:
                talk.done(QUEUED)
            else:
                talk.pause_until = talk.now + 3.01
                talk.done(LIMIT)
        assert talk.ends(chunk) == ["speech.failed capacity"]
        assert 10 <= talk.now - began < 14

    def test_whoever_has_a_session_waits(self) -> None:
        talk = Conversation(pause_until=1_000_007.0).offer(speak("t1", "a", final=True))
        assert talk.waits() == 7

    def test_a_renewal_that_nobody_has_asked_for_waits(self) -> None:
        talk = Conversation(session=None)
        talk.lane.begin(replace(SESSION, renew_at=talk.now, expires_at=talk.now + 30))
        assert talk.next() == Close(False, EndReason.REPLACED)
        talk.done()
        talk.pause_until = talk.now + 7
        assert talk.waits() == 7


class TestInLine:
    @pytest.mark.parametrize("outcome", [CallResult(CallKind.NOT_TAKEN, 429), replace(QUEUED, retry_after_s=None)])
    def test_room_is_asked_for_at_a_steady_pace(self, outcome: CallResult) -> None:
        talk = Conversation(session=None).offer(start())
        for _ in range(15):
            assert isinstance(talk.next(), Open)
            talk.done(outcome)
            assert talk.waits() == pytest.approx(0.5)
            talk.now += 0.5

    def test_whoever_needs_no_session_any_more_seeks_none(self) -> None:
        talk = Conversation(replace(RULES, stall_first_s=0.5), session=None)
        talk.offer(start(), speak("t1", "not all of it"))
        assert isinstance(talk.next(), Open)
        talk.done(QUEUED)
        talk.waits()
        assert talk.lane.seeks_session
        talk.now += 10
        talk.waits()
        assert talk.of("session.failed"), "and now it waits for more text"
        assert not talk.lane.seeks_session


class TestAttach:
    def test_it_calls_nobody(self) -> None:
        one = attach()
        talk = Conversation(session=None).offer(one, speak("t1", "a")).settle()
        assert [type(call) for call in talk.calls] == [Attach, Say]
        (call, _) = talk.calls
        assert isinstance(call, Attach)
        assert call.session == Session("theirs", "their-token", attached=True)
        assert talk.of("session.ready") == [{"commandIds": [one.message_id], "sessionId": "theirs"}]
        assert "their-token" not in repr(talk.works) + repr(talk.conclusions) + repr(one)

    def test_our_own_session_is_ended_first(self) -> None:
        talk = Conversation().offer(attach()).settle()
        assert [type(call) for call in talk.calls] == [Close, Attach]
        assert talk.of("session.ended")[0]["reason"] == "replaced"

    def test_the_same_session_is_not(self) -> None:
        talk = Conversation().offer(attach("s1")).settle()
        assert [type(call) for call in talk.calls] == [Attach]

    @pytest.mark.parametrize("outcome", [NOT_TAKEN, UNKNOWN])
    def test_one_that_was_not_taken_over_is_not_ready(self, outcome: CallResult) -> None:
        one = attach()
        talk = Conversation(session=None).offer(one)
        assert isinstance(talk.next(), Attach)
        talk.done(outcome)
        assert (talk.ends(one), talk.lane.session) == ([], None)
        talk.settle()
        assert [type(call) for call in talk.calls] == [Attach, Attach]
        assert talk.ends(one) == ["session.ready"]


class TestEnd:
    def test_what_was_queued_before_is_handed_over_and_heard(self) -> None:
        one = end()
        talk = Conversation().offer(speak("t1", "a" * 280), one)
        talk.say()
        talk.done()
        assert talk.waits() == pytest.approx(20)
        talk.settle()
        assert [type(call) for call in talk.calls] == [Say, Close]
        assert talk.of("session.ended") == [{"commandIds": [one.message_id], "sessionId": "s1", "reason": "requested"}]

    def test_but_not_longer_than_asked(self) -> None:
        talk = Conversation(replace(RULES, session_end_wait_s=5)).offer(speak("t1", "a" * 1000), end())
        talk.say()
        talk.done()
        assert talk.waits() == 5

    def test_an_open_turn_is_closed_as_by_a_final(self) -> None:
        talk = Conversation().offer(speak("t1", "a")).settle().offer(end()).settle()
        assert talk.of("turn.completed") == [{"turnId": "t1", "pieces": 1, "textLength": 1, "finalSent": False}]

    def test_an_interrupt_before_it_saves_the_wait(self) -> None:
        talk = Conversation().offer(speak("t1", "a" * 280)).settle().offer(interrupt(), end())
        began = talk.now
        talk.settle()
        assert talk.now == began

    def test_what_is_queued_behind_begins_a_new_session(self) -> None:
        talk = Conversation().offer(end(), speak("t1", "a")).settle()
        assert [type(call) for call in talk.calls] == [Close, Open, Say]

    def test_nothing_to_end(self) -> None:
        one = end()
        talk = Conversation(session=None).offer(one).settle()
        assert talk.calls == []
        assert talk.of("session.ended") == [{"commandIds": [one.message_id], "reason": "requested"}]

    @pytest.mark.parametrize("outcome", [OK, GONE, STALE, REFUSED])
    def test_whatever_the_api_says_of_it_it_is_over(self, outcome: CallResult) -> None:
        one = end()
        talk = Conversation().offer(one).settle(outcome)
        assert talk.ends(one) == ["session.ended requested"]
        assert len(talk.calls) == 1

    @pytest.mark.parametrize("outcome", [NOT_TAKEN, UNKNOWN])
    def test_it_is_tried_three_times(self, outcome: CallResult) -> None:
        one = end()
        talk = Conversation().offer(one).settle(*[outcome] * 9)
        assert [call.last_attempt for call in talk.calls if isinstance(call, Close)] == [False, False, True]
        assert talk.ends(one) == ["session.ended requested"]
