"""Sessions that the API loses, or whose token is about to expire; and the wait for one that is free."""

from dataclasses import replace
from typing import Any

import pytest

from schemas.events import EndReason
from tests.support.conversation import (
    DENIED,
    GONE,
    OK,
    REFUSED,
    RULES,
    UNKNOWN,
    Conversation,
    entry,
    interrupt,
    speak,
)
from worker.core.model import CallKind, CallResult, Entry, ReplyTo, Session
from worker.core.session_plan import MAX_LOSSES
from worker.core.work import Close, InitClient, Open, Say, Wait

REPLY = ReplyTo("answers", "corr", 30_000)
BOB = Session("s1", "secret-token", "bob", "v2", 1.2)
FULL = CallResult(CallKind.FULL, retry_after_s=0.5, error="all 5 sessions are in use", local=True)


def start(**fields: Any) -> Entry:
    return entry(type="session.start", reply_to=REPLY, **fields)


def tokens(talk: Conversation) -> list[Any]:
    return [one.answer.payload.get("sessionId") for one in talk.conclusions if one.answer]


class TestLost:
    def test_another_of_its_kind_says_the_piece_again_flagged_and_the_rest_follows(self) -> None:
        talk = Conversation(session=BOB).offer(speak("t1", "One. ", final=False), speak("t1", "Two.", final=True))
        talk.settle(GONE)
        assert [type(call) for call in talk.calls][:3] == [Say, Open, Say]
        assert talk.calls[1] == Open("bob", "v2", 1.2)
        assert [kind for kind in talk.types if kind.startswith("session")] == ["session.ended", "session.ready"]
        assert talk.of("session.ended")[0]["reason"] == "lost"
        first, *rest = talk.of("speech.accepted")
        assert first["possibleDuplicate"] is True
        assert not [one for one in rest if "possibleDuplicate" in one]
        said = [text for _, text, _ in talk.said]
        assert said[0] == said[1]
        assert "".join(said[1:]).replace(" ", "") == "One.Two."

    def test_whoever_asks_again_gets_the_new_hand_off(self) -> None:
        talk = Conversation(session=BOB).offer(start()).settle().offer(speak("t1", "a", final=True)).settle(GONE)
        talk.offer(start()).settle()
        assert tokens(talk) == ["s1", "opened1"]

    def test_a_loss_found_while_nobody_spoke_is_made_good_by_the_next_word(self) -> None:
        talk = Conversation(session=None)
        talk.lane.begin(None, BOB)
        talk.offer(speak("t1", "a", final=True)).settle()
        assert talk.calls[0] == Open("bob", "v2", 1.2)
        assert "possibleDuplicate" not in talk.of("speech.accepted")[0]

    def test_a_start_with_another_avatar_gets_that(self) -> None:
        talk = Conversation(session=None)
        talk.lane.begin(None, BOB)
        talk.offer(start(avatarId="carl")).settle()
        assert talk.calls[0] == Open("carl", None, None)

    def test_one_that_is_lost_again_and_again_is_not_recreated_for_ever(self) -> None:
        chunk = speak("t1", "a", final=True)
        talk = Conversation().offer(chunk)
        for _ in range(20):
            work = talk.next()
            if work is None:
                break
            if isinstance(work, Wait):
                talk.now = work.until
            else:
                talk.done(GONE if isinstance(work, Say) else CallResult(CallKind.OK, 200))
        assert talk.ends(chunk) == ["speech.failed session_lost"]
        assert len([call for call in talk.calls if isinstance(call, Open)]) == MAX_LOSSES

    def test_a_viewer_s_session_that_is_lost_again_and_again_fails(self) -> None:
        one = start(handoff="viewer")
        talk = Conversation().offer(one)
        for _ in range(20):
            work = talk.next()
            if work is None or isinstance(work, Wait):
                break
            talk.done(GONE if isinstance(work, InitClient) else CallResult(CallKind.OK, 200))
        assert talk.ends(one) == ["session.failed unavailable"]

    def test_what_is_silent_by_then_is_not_said_again(self) -> None:
        talk = Conversation().offer(speak("t1", "a", final=True))
        talk.say()
        talk.offer(interrupt()).interrupted()
        talk.done(GONE).settle()
        assert [type(call) for call in talk.calls].count(Say) == 1

    def test_somebody_else_s_session_is_never_recreated(self) -> None:
        chunk = speak("t1", "a", final=True)
        talk = Conversation(session=Session("theirs", "t", attached=True)).offer(chunk).settle(GONE)
        assert talk.ends(chunk) == ["speech.failed session_lost"]
        assert [type(call) for call in talk.calls] == [Say]

    def test_failing_may_be_chosen(self) -> None:
        chunk = speak("t1", "a", final=True)
        talk = Conversation(replace(RULES, on_lost="fail")).offer(chunk).settle(GONE)
        assert talk.ends(chunk) == ["speech.failed session_lost"]


class TestRenewal:
    def session(self, talk: Conversation, ahead_s: float = 10.0) -> Session:
        return replace(BOB, renew_at=talk.now, expires_at=talk.now + ahead_s)

    def test_an_idle_one_is_replaced_by_its_like(self) -> None:
        talk = Conversation(session=None)
        talk.lane.begin(self.session(talk))
        talk.settle()
        assert talk.calls == [Close(False, EndReason.REPLACED), Open("bob", "v2", 1.2)]
        assert talk.types == ["session.ended", "session.ready"]
        assert talk.of("session.ended")[0] == {"commandIds": [], "sessionId": "s1", "reason": "replaced"}
        assert talk.next() is None

    def test_not_before_its_time(self) -> None:
        talk = Conversation(session=None)
        talk.lane.begin(replace(self.session(talk), renew_at=talk.now + 1))
        talk.offer(speak("t1", "a", final=True)).settle()
        assert [type(call) for call in talk.calls] == [Say]

    def test_never_in_the_middle_of_a_turn(self) -> None:
        talk = Conversation(session=None)
        talk.lane.begin(replace(self.session(talk), renew_at=talk.now + 1))
        talk.offer(speak("t1", "A sentence that is said. And more", final=False))
        talk.say()
        talk.done()
        talk.now += 2
        talk.offer(speak("t1", " of it.", final=True)).settle()
        kinds = [type(call) for call in talk.calls]
        assert kinds[kinds.index(Close) :] == [Close, Open]

    def test_before_the_first_word_of_the_next_turn(self) -> None:
        talk = Conversation(session=None)
        talk.lane.begin(self.session(talk))
        talk.offer(speak("t1", "a", final=True)).settle()
        assert [type(call) for call in talk.calls] == [Close, Open, Say]
        assert "possibleDuplicate" not in talk.of("speech.accepted")[0]

    def test_a_start_gets_the_new_hand_off(self) -> None:
        talk = Conversation(session=None)
        talk.lane.begin(self.session(talk))
        talk.offer(start()).settle()
        assert tokens(talk) == ["opened1"]

    def test_what_is_playing_is_heard_but_not_beyond_the_token_s_end(self) -> None:
        talk = Conversation(session=None)
        talk.lane.begin(replace(self.session(talk, 12.0), renew_at=talk.now + 1))
        talk.offer(speak("t1", "a" * 280, final=True))
        talk.say()
        talk.done()
        talk.now += 1
        assert talk.waits() == pytest.approx(9.0)

    def test_one_of_somebody_else_is_left_alone(self) -> None:
        talk = Conversation(session=None)
        talk.lane.begin(replace(self.session(talk), attached=True))
        assert talk.next() is None

    def test_one_that_cannot_be_made_again_is_made_when_it_is_needed(self) -> None:
        talk = Conversation(session=None)
        talk.lane.begin(self.session(talk))
        assert isinstance(talk.next(), Close)
        talk.done()
        assert isinstance(talk.next(), Open)
        talk.done(FULL)
        assert talk.next() is None
        talk.offer(speak("t1", "a", final=True)).settle()
        assert talk.calls[-2] == Open("bob", "v2", 1.2)

    @pytest.mark.parametrize("outcome", [OK, FULL, DENIED, REFUSED, UNKNOWN])
    @pytest.mark.parametrize("then", ["speech", "start", "interrupt", "end"])
    def test_what_comes_while_it_is_made_again_has_not_asked_for_it(self, outcome: CallResult, then: str) -> None:
        one = {
            "speech": speak("t1", "a", final=True),
            "start": start(),
            "interrupt": interrupt(),
            "end": entry(type="session.end"),
        }[then]
        talk = Conversation(session=None)
        talk.lane.begin(self.session(talk))
        talk.next()
        talk.done()
        assert isinstance(talk.next(), Open)
        talk.offer(one).done(outcome)
        assert [data["sessionId"] for data in talk.of("session.ready")] == (["opened1"] if outcome is OK else [])
        assert "session.failed" not in talk.types
        talk.settle()
        ends = {"speech": "speech.accepted", "start": "session.ready", "interrupt": "interrupt.done"}
        assert talk.ends(one) == [ends.get(then, "session.ended requested")]


class TestCapacity:
    @pytest.mark.parametrize("of", ["start", "speech"])
    def test_a_free_session_is_waited_for_at_a_steady_pace_and_not_for_ever(self, of: str) -> None:
        one = start() if of == "start" else speak("t1", "a", final=True)
        talk = Conversation(session=None).offer(one)
        began = talk.now
        talk.settle(*[FULL] * 50)
        assert talk.ends(one) == ["session.failed capacity" if of == "start" else "speech.failed capacity"]
        assert talk.now - began == pytest.approx(10)
        assert len(talk.calls) == (20 if of == "start" else 21)

    def test_the_first_that_is_free_is_used(self) -> None:
        one = start()
        talk = Conversation(session=None).offer(one).settle(FULL, FULL)
        assert talk.ends(one) == ["session.ready"]


def test_an_interrupt_ends_the_wait_of_an_end() -> None:
    done = entry(type="session.end")
    talk = Conversation().offer(speak("t1", "a" * 280, final=True), done)
    talk.say()
    talk.done()
    assert talk.waits() > 10
    began = talk.now
    talk.offer(interrupt()).settle()
    assert (talk.ends(done), talk.now) == (["session.ended requested"], began)
