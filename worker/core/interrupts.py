"""Interrupts of one conversation. Each comes in two copies, in any order, doubled, late or alone.

The *express* copy overtakes the backlog; the *ordered* copy keeps its place among the commands. Whichever is seen
first acts: what waits is dropped, its turns are silent, the API is told. What the express copy has overtaken is still
to come: until the ordered copy does, a *fence* stands, and speech that meets it ends as interrupted too.

    seen first       then                       the fence
    express          silence, call              stands until the ordered copy comes, or until it is too old
    ordered          silence, call              none
    the other copy   nothing; the ordered one   falls, if the ordered copy is the other one
                     ends as the first did

A say that is under way is not cut: the API is told at once, and told again when that say returns.
"""

from collections.abc import Sequence

from schemas.commands import Interrupt
from worker.core import verdict
from worker.core.book import Book
from worker.core.memory import Ended, TurnState
from worker.core.model import CallKind, CallResult, Entry, speak_of
from worker.core.speech import Speech
from worker.core.verdict import Conclusion

FENCE_S = 120.0
"""How long a fence stands at most where speech does not expire."""


class Interrupts:
    """Sees both copies, and says which calls are to be made at once: `take_calls`, then `done` for each."""

    def __init__(self, book: Book, speech: Speech, max_age_s: float) -> None:
        self.tell_again = False
        self._book = book
        self._memory = book.memory
        self._speech = speech
        self._fence_s = max_age_s or FENCE_S
        self._acting: set[str] = set()
        self._calls: list[Entry] = []
        self._told: set[str] = set()

    @property
    def calling(self) -> bool:
        """Whether the API is being told just now: nothing new is said before it has answered."""
        return bool(self._acting)

    def see(self, entry: Entry, now: float, *, spared: Sequence[Entry], has_session: bool) -> None:
        """A copy has come. `spared` chunks are in a call just now."""
        assert isinstance(entry.command, Interrupt)
        fences = dict(self._memory.state.fences)
        new = entry.key not in fences and entry.key not in self._acting and not self._book.known(entry)
        if entry.express and new and entry.command.turn_id is None:
            self._memory.update(fences=fences | {entry.key: now})
        elif not entry.express and fences.pop(entry.key, None) is not None:
            self._memory.update(fences=fences)
        if not entry.express:
            self._book.add(entry)
        if new:
            self._act(entry, entry.command.turn_id, now, spared, has_session=has_session)

    def meet(self, chunk: Entry, now: float) -> None:
        """A chunk has come: if it came before an interrupt that overtook it, its turn is silent."""
        fences = self._memory.state.fences
        if not fences:
            return
        standing = {key: raised for key, raised in fences.items() if now - raised < self._fence_s}
        if len(standing) != len(fences):
            self._memory.update(fences=standing)
        turn_id = speak_of(chunk).turn_id
        if standing and not self._book.known(chunk) and not self._memory.is_silent(turn_id):
            self._memory.turn(turn_id, now).state = TurnState.INTERRUPTED
            key = next(iter(standing))
            self._book.tell(verdict.turn_fenced(self._book.conversation_id, turn_id, key))

    def take_calls(self) -> list[Entry]:
        """The interrupts to tell the API of now, whatever else is under way."""
        calls, self._calls = self._calls, []
        return calls

    def done(self, entry: Entry, result: CallResult | None, now: float, *, has_session: bool) -> None:
        """The API was told, or need not be (`result` None)."""
        self._acting.discard(entry.key)
        silenced = self._memory.take_silenced(entry.key)
        if result is not None and result.kind is CallKind.OK:
            self._memory.playing_until = now
        # Without a session nothing can have been silenced but what was waiting for one.
        turn_ids = [turn_id for turn_id, lost in silenced.items() if lost or has_session]
        latency_ms = verdict.milliseconds(now - entry.born)
        told = verdict.interrupt_done(self._book.conversation_id, entry, turn_ids, latency_ms=latency_ms, result=result)
        self._told.add(entry.key)
        ordered = tuple(one for one in self._book if one.key == entry.key)
        self._book.end([Conclusion(told, ordered)], now)
        if entry.message_id is not None:
            self._memory.end(entry.message_id, Ended(entry.fingerprint, told, now))

    def was_told(self, entry: Entry) -> bool:
        """Whether this lane has told of that interrupt: the copy that comes later is only acknowledged."""
        return entry.key in self._told

    def _act(self, entry: Entry, wanted: str | None, now: float, spared: Sequence[Entry], *, has_session: bool) -> None:
        self._acting.add(entry.key)
        # One that a worker left half done has silenced already; it must not silence what came after it.
        if entry.key not in self._memory.state.silenced:
            self._memory.note_silenced(entry.key, self._speech.silence(entry, wanted, now, spared))
            if not spared and self._speech.outdated(now):
                self._speech.drop()
        heard = self._memory.heard_last | {speak_of(chunk).turn_id for chunk in spared if _is_speech(chunk)}
        if has_session and (wanted is None or not heard or wanted in heard):
            self._calls.append(entry)
        else:
            self.done(entry, None, now, has_session=has_session)


def _is_speech(entry: Entry) -> bool:
    return entry.command.type == "speak"
