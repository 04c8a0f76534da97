"""Commands that an operator sends again: a life of their own, and a turn that begins anew."""

from dataclasses import replace

from tests.support.conversation import REFUSED, Conversation, interrupt, speak
from worker.core.model import Entry


def again(one: Entry, *, life: int = 1, run: str = "run") -> Entry:
    """The command as an operator sends it again."""
    return replace(one, key=f"{one.message_id}\nreplay {life}", replay=run)


class TestSentAgain:
    def failed(self) -> tuple[Conversation, list[Entry]]:
        """A turn whose first chunk was refused, the second failed with it."""
        talk, chunks = Conversation(), [speak("t1", "one "), speak("t1", "two", final=True)]
        talk.offer(chunks[0]).say()
        talk.offer(chunks[1]).done(REFUSED).settle()
        assert [talk.ends(chunk) for chunk in chunks] == [["speech.failed refused"], ["speech.failed turn_failed"]]
        return talk, chunks

    def test_the_turn_is_spoken_and_each_life_has_its_own_end(self) -> None:
        talk, chunks = self.failed()
        before = {event.id("") for event in talk.events}
        talk.offer(*map(again, chunks)).settle()
        assert talk.said[1:] == [("t1", "one two", True)]
        (accepted,) = talk.of("speech.accepted")
        assert accepted["commandIds"] == [chunk.message_id for chunk in chunks]
        assert talk.types[-2:] == ["speech.accepted", "turn.completed"]
        assert talk.conclusions[-1].event.id("") not in before

    def test_the_same_life_twice_ends_once(self) -> None:
        talk, chunks = self.failed()
        talk.offer(*map(again, chunks)).settle()
        told = talk.conclusions[-1].event.id("")
        repeated = again(chunks[0], run="another")
        talk.offer(repeated).settle()
        assert talk.ends(repeated) == ["speech.accepted"]
        assert talk.conclusions[-1].event.id("") == told
        assert len(talk.said) == 2

    def test_what_fails_again_takes_the_rest_of_its_turn_with_it_once_more(self) -> None:
        talk, chunks = self.failed()
        first, second = map(again, chunks)
        talk.offer(first).say()
        talk.done(REFUSED).offer(second).settle()
        assert talk.ends(second) == ["speech.failed turn_failed"]
        talk.offer(again(chunks[1], life=2, run="later")).settle()
        assert talk.said[-1] == ("t1", "two", True)

    def test_what_waits_of_the_failed_turn_is_not_spoken_for_it(self) -> None:
        talk, chunks = self.failed()
        late = speak("t1", "late ")
        talk.offer(speak("t2", "other", final=True)).say()
        talk.offer(late, again(chunks[0])).done().settle()
        assert talk.ends(late) == ["speech.failed turn_failed"]
        assert talk.said[-2:] == [("t2", "other", True), ("t1", "one ", False)]

    def test_an_interrupt_silences_it_like_any_other(self) -> None:
        talk, chunks = self.failed()
        talk.offer(speak("t2", "other", final=True)).say()
        once_more = again(chunks[0])
        talk.offer(once_more, interrupt()).done().settle()
        assert talk.ends(once_more) == ["speech.discarded interrupted"]

    def test_only_the_failed_mark_is_lifted(self) -> None:
        talk = Conversation().offer(interrupt("t1")).settle()
        chunk = again(speak("t1", "x"))
        talk.offer(chunk).settle()
        assert talk.ends(chunk) == ["speech.discarded interrupted"]

    def test_a_turn_that_was_closed_still_knows_with_what_it_was_sent_again(self) -> None:
        talk, chunks = self.failed()
        talk.offer(*map(again, chunks)).settle()
        third, fourth = (again(speak("t1", text)) for text in ("three ", "four"))
        talk.offer(third).say()
        talk.done(REFUSED).offer(fourth).settle()
        assert talk.ends(fourth) == ["speech.failed turn_failed"]
