"""Interrupts of one conversation. Each comes in two copies, in any order, doubled, late or alone.

The *express* copy overtakes the backlog; the *ordered* copy keeps its place among the commands. Whichever is seen
first acts: what waits is dropped, its turns are silent, the API is told. What the express copy has overtaken is still
to come: until the ordered copy does, a *fence* stands, and speech that meets it ends as interrupted too.

    seen first       then                       the fence
    express          silence, call              stands until the ordered copy comes, or until it is too old
    ordered          silence, call              none
    the other copy   nothing; the ordered one   falls, if the ordered copy is the other one
                     ends as the first did

A say that is under way is not cut: the API is told at once, and told again when that say returns, or when one whose
answer was lost is over.
"""

from collections.abc import Sequence

from schemas.commands import Interrupt
from worker.core import verdict
from worker.core.book import Book
from worker.core.memory import Ended, TurnState
from worker.core.model import CallKind, CallResult, Entry, speak_of
from worker.core.speech import Speech
from worker.core.verdict import Conclusion
from worker.core.work import Rules

FENCE_S = 120.0
"""How long a fence stands at most where speech does not expire."""


class Interrupts:
    """Sees both copies, and says which calls are to be made at once: `take_calls`, then `done` for each."""

    def __init__(self, book: Book, speech: Speech, rules: Rules) -> None:
        attempt = book.memory.state.attempt
        self.tell_again = attempt is not None and book.memory.is_interrupted(attempt.turn_id)
        self._book = book
        self._memory = book.memory
        self._speech = speech
        self._fence_s = rules.max_age_s or FENCE_S
        self._wait_s = rules.ambiguous_wait_s
        self._acting: dict[str, float] = {}
        self._lost_until = 0.0
        self._calls: list[Entry] = []
        self._told: dict[str, bytes] = {}

    @property
    def calling(self) -> bool:
        """Whether the API is being told just now: nothing new is said before it has answered."""
        return bool(self._acting)

    @property
    def busy_until(self) -> float:
        """When the calls that are under way, or whose answer was lost, are over at the latest."""
        return max(self._lost_until, *self._acting.values(), 0.0)

    def see(
        self, entry: Entry, now: float, *, spared: Sequence[Entry], has_session: bool, in_doubt: bool = False
    ) -> None:
        """A copy has come. `spared` chunks are in a call just now; `in_doubt`: one whose answer was lost may be."""
        assert isinstance(entry.command, Interrupt)
        fences, wanted = self._memory.state.fences, entry.command.turn_id
        waiting = any(one.key == entry.key for one in self._book)
        new = not waiting and entry.key not in self._acting and not self._book.known(entry)
        if not entry.express:
            if entry.key in fences:
                self._memory.update(fences={key: raised for key, raised in fences.items() if key != entry.key})
            self._book.add(entry)
        elif new and wanted is None:
            self._memory.update(fences={entry.key: now, **fences})
        if not new:
            return
        attempt = self._memory.state.attempt
        in_doubt = in_doubt and (wanted is None or (attempt is not None and attempt.turn_id == wanted))
        self._silence(entry, wanted, now, spared)
        heard = self._memory.heard_last | {speak_of(chunk).turn_id for chunk in spared if _is_speech(chunk)}
        if has_session and (wanted is None or not heard or wanted in heard):
            self.tell_again |= in_doubt
            self._acting[entry.key] = now + self._wait_s
            self._calls.append(entry)
        else:
            self.done(entry, None, now, has_session=has_session)

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
        until = self._acting.pop(entry.key, 0.0)
        if result is not None and result.kind is CallKind.UNKNOWN:
            self._lost_until = max(self._lost_until, until)
        silenced = self._memory.take_silenced(entry.key)
        if result is not None and result.kind is CallKind.OK:
            self._memory.playing_until = now
        # Without a session nothing can have been silenced but what was waiting for one.
        turn_ids = [turn_id for turn_id, lost in silenced.items() if lost or has_session]
        latency_ms = verdict.milliseconds(now - entry.born)
        told = verdict.interrupt_done(self._book.conversation_id, entry, turn_ids, latency_ms=latency_ms, result=result)
        ordered = tuple(one for one in self._book if (one.key, one.fingerprint) == (entry.key, entry.fingerprint))
        self._book.end([Conclusion(told, ordered)], now)
        if entry.known_as is not None and not ordered:
            self._memory.end(entry.known_as, Ended(entry.fingerprint, told, now))
            self._told[entry.key] = entry.fingerprint

    def was_told(self, entry: Entry) -> bool:
        """Whether this is the ordered copy of an interrupt this lane has just told of: it is only acknowledged."""
        return self._told.pop(entry.key, None) == entry.fingerprint

    def _silence(self, entry: Entry, wanted: str | None, now: float, spared: Sequence[Entry]) -> None:
        # One that a worker left half done has silenced already; it must not silence what came after it.
        if entry.key not in self._memory.state.silenced:
            self._memory.note_silenced(entry.key, self._speech.turns.silence(entry, wanted, now, spared))
            if not spared and self._speech.outdated(now):
                self._speech.drop()


def _is_speech(entry: Entry) -> bool:
    return entry.command.type == "speak"
