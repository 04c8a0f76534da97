"""The breaker: when it opens, who may look whether the API is back, and how the crowd returns."""

import pytest

from tests.support.conversation import DENIED, GONE, NOT_TAKEN, NOW, OK, REFUSED, STALE, UNKNOWN
from worker.core.breaker import FAILURES, FIRST_PAUSE_S, LONGEST_PAUSE_S, RAMP_S, STEP_S, Breaker
from worker.core.model import CallKind, CallResult

LOCAL = CallResult(CallKind.NOT_TAKEN, 503, local=True)


def limit(retry_after_s: float | None) -> CallResult:
    return CallResult(CallKind.NOT_TAKEN, 429, retry_after_s=retry_after_s)


class Lanes:
    """All lanes of a worker, as the breaker sees them."""

    def __init__(self) -> None:
        self.breaker = Breaker()
        self.now = NOW

    def may_call(self) -> bool:
        return self.breaker.hold_until(self.now) <= self.now

    def call(self, *results: CallResult | None) -> "Lanes":
        """One after the other."""
        for result in results:
            self.breaker.begin()
            self.breaker.record(result, self.now)
        return self

    def down(self) -> "Lanes":
        return self.call(*[NOT_TAKEN] * FAILURES)

    def probe(self, result: CallResult | None) -> float:
        """Wait for the pause to be over, and call once; returns how long that took."""
        began = self.now
        self.now = self.breaker.hold_until(self.now)
        assert self.may_call()
        self.call(result)
        return self.now - began

    def at_once(self) -> int:
        """How many calls may begin now, none of which is answered."""
        begun = 0
        while self.may_call() and begun < 1000:
            self.breaker.begin()
            begun += 1
        return begun


class TestOpening:
    def test_closed_it_holds_nobody(self) -> None:
        assert Lanes().at_once() == 1000

    @pytest.mark.parametrize("failure", [NOT_TAKEN, UNKNOWN], ids=lambda result: result.kind)
    def test_after_five_failures_in_a_row(self, failure: CallResult) -> None:
        lanes = Lanes().call(*[failure] * 4)
        assert lanes.may_call()
        lanes.call(failure)
        assert not lanes.may_call()
        assert lanes.breaker.is_open
        assert lanes.breaker.hold_until(lanes.now) == NOW + FIRST_PAUSE_S

    @pytest.mark.parametrize("answer", [OK, REFUSED, GONE, DENIED], ids=lambda result: result.kind)
    def test_any_answer_of_the_api_begins_the_count_anew(self, answer: CallResult) -> None:
        lanes = Lanes().call(*[NOT_TAKEN] * 4, answer, *[NOT_TAKEN] * 4)
        assert not lanes.breaker.is_open
        assert lanes.call(NOT_TAKEN).breaker.is_open

    @pytest.mark.parametrize("nothing", [LOCAL, STALE, None, limit(None)], ids=["local", "stale", "not made", "429"])
    def test_what_says_nothing_of_the_api_neither_counts_nor_begins_the_count_anew(
        self, nothing: CallResult | None
    ) -> None:
        lanes = Lanes().call(*[nothing] * 20)
        assert not lanes.breaker.is_open
        lanes.call(*[NOT_TAKEN, nothing] * 4)
        assert not lanes.breaker.is_open
        assert lanes.call(NOT_TAKEN).breaker.is_open

    def test_calls_that_were_under_way_when_it_opened_tell_nothing_new(self) -> None:
        lanes = Lanes()
        for _ in range(20):
            lanes.breaker.begin()
        for _ in range(20):
            lanes.breaker.record(NOT_TAKEN, lanes.now)
        assert lanes.breaker.hold_until(lanes.now) == NOW + FIRST_PAUSE_S


class TestProbes:
    def test_one_at_a_time(self) -> None:
        lanes = Lanes().down()
        lanes.now += FIRST_PAUSE_S
        assert lanes.at_once() == 1
        lanes.now += 60
        assert not lanes.may_call()

    def test_the_pause_grows_with_each_that_fails_and_is_capped(self) -> None:
        lanes = Lanes().down()
        pauses = [lanes.probe(NOT_TAKEN) for _ in range(6)]
        assert pauses == pytest.approx([0.5, 1.0, 2.0, 3.0, 3.0, 3.0])
        assert LONGEST_PAUSE_S <= 3, "the first say comes within 5 s of the API's return"

    @pytest.mark.parametrize("nothing", [LOCAL, STALE, None], ids=["local", "stale", "not made"])
    def test_one_that_tells_nothing_lets_the_next_try(self, nothing: CallResult | None) -> None:
        lanes = Lanes().down()
        lanes.probe(nothing)
        assert lanes.breaker.is_open
        assert lanes.at_once() == 1

    @pytest.mark.parametrize("answer", [OK, REFUSED, GONE], ids=lambda result: result.kind)
    def test_one_that_is_answered_closes_it(self, answer: CallResult) -> None:
        lanes = Lanes().down()
        lanes.probe(answer)
        assert not lanes.breaker.is_open
        assert lanes.may_call()

    def test_a_new_outage_begins_with_a_short_pause_again(self) -> None:
        lanes = Lanes().down()
        for result in (NOT_TAKEN, NOT_TAKEN, NOT_TAKEN, OK):
            lanes.probe(result)
        lanes.down()
        assert lanes.breaker.hold_until(lanes.now) == pytest.approx(lanes.now + FIRST_PAUSE_S)


class TestRamp:
    def test_the_crowd_returns_step_by_step(self) -> None:
        lanes = Lanes().down()
        lanes.probe(OK)
        allowed = []
        for _ in range(5):
            lanes.at_once()
            allowed.append(lanes.breaker._under_way)
            lanes.now += STEP_S
        assert allowed == [1, 2, 4, 8, 16]

    def test_whoever_is_held_asks_again_soon(self) -> None:
        lanes = Lanes().down()
        lanes.probe(OK)
        lanes.at_once()
        assert 0 < lanes.breaker.hold_until(lanes.now) - lanes.now <= STEP_S

    def test_it_is_over_soon(self) -> None:
        lanes = Lanes().down()
        lanes.probe(OK)
        lanes.now += RAMP_S
        assert lanes.at_once() == 1000

    def test_an_api_that_falls_over_again_is_left_alone_at_once(self) -> None:
        lanes = Lanes().down()
        lanes.probe(OK)
        lanes.down()
        assert not lanes.may_call()


class TestTooManyRequests:
    def test_holds_everybody_for_as_long_as_the_api_asks(self) -> None:
        lanes = Lanes().call(limit(7.0))
        assert lanes.breaker.hold_until(lanes.now) == NOW + 7
        assert not lanes.breaker.is_open
        lanes.now += 7
        assert lanes.at_once() == 1000

    def test_a_shorter_wish_does_not_undo_a_longer_one(self) -> None:
        assert Lanes().call(limit(7.0), limit(1.0), OK).breaker.hold_until(NOW) == NOW + 7

    def test_is_no_outage(self) -> None:
        lanes = Lanes().call(limit(7.0))
        assert lanes.breaker.outage_until(lanes.now) <= lanes.now
        assert lanes.breaker.pause_until == NOW + 7
        lanes.down()
        assert lanes.breaker.outage_until(lanes.now) == NOW + FIRST_PAUSE_S
        assert lanes.breaker.hold_until(lanes.now) == NOW + 7

    def test_without_a_wish_it_is_the_lane_alone_that_waits(self) -> None:
        assert Lanes().call(limit(None)).may_call()

    def test_a_probe_may_be_told_so_too(self) -> None:
        lanes = Lanes().down()
        lanes.probe(limit(7.0))
        assert lanes.breaker.hold_until(lanes.now) == lanes.now + 7

    def test_while_the_crowd_returns_it_holds_too(self) -> None:
        lanes = Lanes().down()
        lanes.probe(OK)
        lanes.call(limit(7.0))
        assert lanes.breaker.hold_until(lanes.now) == lanes.now + 7
