"""What becomes of turns and of chunks that are not spoken: who is silent, what closes, how the rest ends."""

import math
from collections.abc import Sequence
from dataclasses import replace

from schemas.events import DiscardReason, Event, SpeechFailure
from worker.core import verdict
from worker.core.book import Book
from worker.core.memory import Turn, TurnState
from worker.core.model import CallResult, Entry, Piece, speak_of
from worker.core.verdict import Conclusion


class Turns:
    """The turns of one conversation. `max_age_s` 0: nothing expires."""

    def __init__(self, book: Book, max_age_s: float) -> None:
        self._book = book
        self._memory = book.memory
        self._max_age_s = max_age_s

    def is_open(self, turn_id: str) -> bool:
        """Whether something of it was said, or had nothing to say, and it was neither closed nor silenced."""
        turn = self._memory.turns.get(turn_id)
        return turn is not None and turn.state is TurnState.OPEN

    def has_expired(self, born: float, now: float) -> bool:
        """Whether speech of that age is too old."""
        return self._max_age_s > 0 and now - born > self._max_age_s

    def close(
        self, turn_id: str, closing: Entry | str, now: float, *, final_sent: bool, auto_final: bool = False
    ) -> Event:
        """All of the turn was handed over; `closing` is the command that said so, or names what else did.

        Returns the event to tell it by.
        """
        turn = self._leave_open(turn_id, TurnState.CLOSED, now)
        return verdict.turn_completed(
            self._book.conversation_id, turn_id, turn, closing, final_sent=final_sent, auto_final=auto_final
        )

    def go_on_behind(self, piece: Piece) -> None:
        """The piece has left, or had nothing to say: note what the next one of an open turn begins with."""
        for part in piece.parts:
            if not part.last:
                self._memory.speak_up_to(part.entry.key, part.end)
        if self.is_open(piece.turn_id):
            self._memory.shape(piece.turn_id, piece.shapes)

    def end_empty(self, piece: Piece, now: float) -> None:
        """There is nothing to say in it; if it is the last one of its turn, the turn closes without a call."""
        turn = self._memory.turn(piece.turn_id, now)
        by = piece.parts[-1].entry
        after: tuple[Event, ...] = ()
        if piece.is_final and turn.state is not TurnState.CLOSED:
            after = (self.close(piece.turn_id, by, now, final_sent=False, auto_final=piece.auto_final),)
        self.go_on_behind(piece)
        if piece.ending:
            self._discard(piece.ending, DiscardReason.EMPTY, now, after=after)

    def fail(self, piece: Piece, reason: SpeechFailure, why: CallResult, attempts: int, now: float) -> None:
        """The piece cannot be spoken: its chunks end here, the rest of the turn will as they come up."""
        conversation_id, entries = self._book.conversation_id, [part.entry for part in piece.parts]
        if self._memory.turn(piece.turn_id, now).silent:
            return
        if not entries:  # all that had a word was said before
            self._book.tell(Conclusion(self.close(piece.turn_id, piece.name, now, final_sent=False)))
            return
        self._leave_open(piece.turn_id, TurnState.FAILED, now)
        failed = verdict.failed(conversation_id, entries, reason, attempts=attempts, why=why)
        after = (verdict.turn_failed(conversation_id, entries[0], reason),)
        self._book.end([replace(failed, after=after)], now)

    def discard_repeat(self, chunk: Entry, now: float) -> None:
        """Another command has, or had, its number."""
        self._discard([chunk], DiscardReason.DUPLICATE, now)

    def silence(self, interrupt: Entry, wanted: str | None, now: float, spared: Sequence[Entry]) -> dict[str, int]:
        """An interrupt: end the chunks it is about and mark their turns. `spared` chunks are in a call just now.

        Returns the turns that are silent from here on, with the number of chunks each has lost; `wanted` None means
        all turns that are open or lose a chunk. A turn that is silent already stays what it is.
        """
        doomed: dict[str, list[Entry]] = {}
        if wanted is not None and not self._memory.is_silent(wanted):
            doomed[wanted] = []
        for entry in self._book.chunks():
            turn_id = speak_of(entry).turn_id
            if wanted in (None, turn_id) and not self._memory.is_silent(turn_id):
                doomed.setdefault(turn_id, []).extend([] if entry in spared else [entry])
        if wanted is None:
            doomed |= {turn_id: [] for turn_id in self._memory.open_turns() if turn_id not in doomed}
        conversation_id = self._book.conversation_id
        for turn_id, entries in doomed.items():
            self._leave_open(turn_id, TurnState.INTERRUPTED, now)
            silent = verdict.turn_interrupted(conversation_id, turn_id, interrupt, len(entries))
            if entries:
                self._discard(entries, DiscardReason.INTERRUPTED, now, after=(silent,))
            else:
                self._book.tell(Conclusion(silent))
        return {turn_id: len(entries) for turn_id, entries in doomed.items()}

    def revive(self, entry: Entry, now: float) -> None:
        """A chunk is sent again on purpose: if its turn has failed, it begins anew, behind what of it still waits.

        Once for all that is sent again together: where one of those chunks fails, the rest fails with it.
        """
        turn_id = speak_of(entry).turn_id
        turn = self._memory.turn(turn_id, now)
        if turn.state is TurnState.FAILED and turn.replay != entry.replay:
            waiting = [one for one in self._book.chunks() if speak_of(one).turn_id == turn_id]
            if waiting:
                failed = verdict.failed(self._book.conversation_id, waiting, SpeechFailure.TURN_FAILED, why=None)
                self._book.end([failed], now)
            self._memory.reopen(turn_id, now)
        self._memory.turn(turn_id, now).replay = entry.replay

    def end_unspeakable(self, now: float, born: float = math.inf) -> bool:
        """End the chunks at the head if their turn is silent, or the first, or what was `born` then, is too old."""
        head, conversation_id = self._book.head, self._book.conversation_id
        turn_id = speak_of(head).turn_id
        before: tuple[Event, ...] = ()
        if not self._memory.is_silent(turn_id):
            if not self.has_expired(min(head.born, born), now):
                return False
            self._leave_open(turn_id, TurnState.EXPIRED, now)
            before = (verdict.turn_failed(conversation_id, head, "expired"),)
        attempt = self._memory.state.attempt
        if attempt is not None and attempt.turn_id == turn_id:
            self._memory.update(attempt=None)
        run = self._book.run(turn_id).chunks
        match self._memory.turn(turn_id, now).state:
            case TurnState.FAILED:
                self._book.end([verdict.failed(conversation_id, run, SpeechFailure.TURN_FAILED, why=None)], now)
            case TurnState.EXPIRED:
                self._discard(run, DiscardReason.EXPIRED, now, before=before)
            case _:
                self._discard(run, DiscardReason.INTERRUPTED, now)
        return True

    def _leave_open(self, turn_id: str, state: TurnState, now: float) -> Turn:
        turn = self._memory.turn(turn_id, now)
        turn.state = state
        self._memory.shape(turn_id, None)
        return turn

    def _discard(
        self,
        entries: Sequence[Entry],
        reason: DiscardReason,
        now: float,
        *,
        before: tuple[Event, ...] = (),
        after: tuple[Event, ...] = (),
    ) -> None:
        """End chunks of one turn unspoken; the events go with the first and the last of what tells it."""
        told = list(verdict.discarded(self._book.conversation_id, entries, reason))
        told[0] = replace(told[0], before=before)
        told[-1] = replace(told[-1], after=after)
        self._book.end(told, now)
