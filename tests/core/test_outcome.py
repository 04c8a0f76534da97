"""An outcome over what another owner has written meanwhile changes what the end of its attempt changes, no more."""

from dataclasses import replace

from schemas.events import Event, TurnStarted
from tests.support.conversation import NOW, OK, Conversation, express, interrupt, speak
from worker.core.memory import Changes, State, Turn, TurnState
from worker.core.model import Entry
from worker.core.outcome import merged
from worker.core.shaping.shaper import NEW_TURN
from worker.core.work import INTENT_S


def told(turn_id: str) -> Event:
    return Event("c1", TurnStarted(turn_id=turn_id), turn_id)


def over(before: State, after: State, stands: State) -> State:
    return merged(Changes("1", "2", before, after, {}, {}), stands, {}).state


def handed_over(chunk: Entry) -> tuple[Conversation, Conversation]:
    """One worker is saying the chunk, and another owns the conversation."""
    zombie = Conversation().offer(chunk)
    zombie.say()
    return zombie, Conversation(written=zombie.written, now=zombie.now + 0.5)


class TestBetweenOwners:
    def test_an_interrupt_that_the_next_owner_has_seen_stands(self) -> None:
        zombie, heir = handed_over(speak("t1", "a"))
        heir.offer(express(interrupt("t2", message_id="i")))
        zombie.done(OK)
        memory = heir.written.recall()
        assert memory.state.attempt is None
        assert memory.state.silenced == {"i": {"t2": 0}}
        assert memory.is_silent("t2")
        assert memory.state.busy_until >= heir.now + 2, "the API is being told of it"
        assert memory.turns["t1"].pieces == 1

    def test_the_fence_that_the_next_owner_has_raised_stands(self) -> None:
        zombie, heir = handed_over(speak("t1", "a"))
        heir.memory.update(fences={"i": heir.now})
        heir.next()  # writes it
        zombie.done(OK)
        assert heir.written.recall().state.fences == {"i": heir.now}

    def test_what_the_next_owner_has_told_beside_is_told_again_by_whoever_is_next(self) -> None:
        zombie, heir = handed_over(speak("t1", "a"))
        heir.offer(express(interrupt("t2")))
        zombie.done(OK)
        assert [event.type for event in heir.written.recall().state.untold] == ["avatar.turn.interrupted"]

    def test_nobody_goes_on_from_what_they_knew_before(self) -> None:
        zombie, heir = handed_over(speak("t1", "a"))
        heir.offer(express(interrupt("t2")))
        known = heir.memory.version
        zombie.done(OK)
        assert heir.written.version not in (known, zombie.memory.version)

    def test_the_next_owner_goes_on_with_what_was_said(self) -> None:
        chunk = speak("t1", "One. ", message_id="m1")
        zombie, heir = handed_over(chunk)
        heir.offer(express(interrupt("t2")))
        zombie.done(OK)
        heir.forget().offer(speak("t1", "One. ", message_id="m1"), speak("t1", "Two.", final=True))
        heir.now += INTENT_S + 2
        heir.settle()
        assert [text for _, text, _ in heir.said] == ["Two."]


class TestMerged:
    def test_only_what_has_changed_is_changed(self) -> None:
        before = State(number=3, spoken={"m1": 4}, doubtful=frozenset({"m1", "m9"}), untold=(told("t1"),))
        after = replace(before, spoken={"m2": 7}, doubtful=frozenset({"m9"}), untold=(told("t2"),))
        stands = replace(before, spoken={"m1": 4, "m5": 5}, doubtful=frozenset({"m1", "m7"}), partition=5)
        stands = replace(stands, untold=(told("t1"), told("t7")))
        written = over(before, after, stands)
        assert (written.spoken, written.doubtful) == ({"m5": 5, "m2": 7}, frozenset({"m7"}))
        assert (written.untold, written.partition) == ((told("t7"), told("t2")), 5)

    def test_numbers_of_both_are_remembered(self) -> None:
        before = State(numbers={"t1": ((0, 1),), "t2": ((0, 0),)})
        after = replace(before, numbers={"t2": ((0, 0),), "t1": ((0, 2),)})
        stands = replace(before, numbers={"t1": ((0, 1), (5, 5)), "t2": ((0, 3),), "t3": ((1, 1),)})
        assert over(before, after, stands).numbers == {"t1": ((0, 2), (5, 5)), "t2": ((0, 3),), "t3": ((1, 1),)}

    def test_whose_text_may_be_playing_is_known_of_both(self) -> None:
        after, stands = State(heard_last=frozenset({"t1"})), State(heard_last=frozenset({"t2"}))
        assert over(State(), after, stands).heard_last == {"t1", "t2"}
        assert over(State(), after, State()).heard_last == {"t1"}

    def test_a_turn_that_another_has_silenced_stays_so_and_is_not_shaped_on(self) -> None:
        after = State(number=1, shapes={"t1": NEW_TURN})
        mine = Turn(TurnState.CLOSED, pieces=2, text_length=9, touched=NOW)
        stands = Turn(TurnState.FAILED, pieces=1, text_length=4, touched=NOW + 1, replay="r")
        written = merged(Changes("1", "2", State(), after, {"t1": mine}, {}), State(number=1), {"t1": stands})
        assert written.turns == {"t1": Turn(TurnState.FAILED, 2, 9, NOW + 1, "r")}
        assert written.state.shapes == {}

    def test_an_interrupt_that_was_not_written_does_not_silence(self) -> None:
        mine = Turn(TurnState.INTERRUPTED, pieces=2, text_length=9, touched=NOW)
        written = merged(Changes("1", "2", State(), State(), {"t1": mine}, {}), State(), {"t1": Turn(pieces=1)})
        assert written.turns["t1"].state is TurnState.OPEN
