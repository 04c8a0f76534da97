"""How chunks become calls: the next piece, what its outcome means, and what becomes of its turn."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from schemas.events import DiscardReason, Event, SpeechFailure
from worker.core import pieces, verdict
from worker.core.book import Book
from worker.core.memory import Attempt, SentPart, TurnState
from worker.core.model import CallKind, CallResult, Entry, Part, Piece, speak_of
from worker.core.retry import Attempts
from worker.core.verdict import Conclusion
from worker.core.work import Rules, Wait

CHARS_PER_S = 14.0
"""How fast an avatar speaks, to estimate when it has finished: the API does not tell (KALTURA.md)."""
BLANK_WAIT_S = 1.0
"""How long white space waits for the word it belongs to."""
RESUME_WAIT_S = 5.0
"""How long the chunks of a piece whose outcome is unknown may take to be delivered again."""


class Speech:
    """Plans one piece at a time from the chunks at the head of the book; `piece` is the one that is under way.

    It stays the same from its first attempt to its last: what is repeated is repeated exactly as it was sent.
    `perhaps_said`: an answer was lost, so that saying it again may repeat it.
    """

    def __init__(self, book: Book, rules: Rules, attempts: Attempts) -> None:
        self.piece: Piece | None = None
        self.perhaps_said = False
        self._book = book
        self._memory = book.memory
        self._rules = rules
        self._attempts = attempts
        self._blank_since: float | None = None
        self._missing_since: float | None = None

    def plan(self, now: float) -> Piece | Wait | None:
        """The piece to say now; None when the head of the book has ended instead."""
        if self.piece is not None:
            if not self.outdated(now):
                return self.piece
            self.drop()
        if self._end_unspeakable(now):
            return None
        if self._memory.state.attempt is not None:
            return self._resume(self._memory.state.attempt, now)
        run = list(self._run(now))
        piece = pieces.compose(run, self._memory.spoken.get(run[0].key, 0))
        if not piece.text.strip():
            return self._plan_blank([part.entry for part in piece.parts], now)
        self._blank_since = None
        self.piece = piece
        return piece

    def outdated(self, now: float) -> bool:
        """Whether what was attempted is not to be tried again: its turn went silent, or it is too old."""
        if self.piece is None:
            attempt = self._memory.state.attempt
            return attempt is not None and self._memory.is_silent(attempt.turn_id)
        return self._memory.is_silent(self.piece.turn_id) or self._expired(self.piece.parts[0].entry, now)

    @property
    def in_a_turn(self) -> bool:
        """Whether the avatar is in the middle of a turn, or may have heard a piece whose answer was lost."""
        begun = any(self._memory.turns[turn_id].pieces for turn_id in self._memory.open_turns())
        return begun or self._memory.state.attempt is not None

    def drop(self) -> None:
        """No piece is under way any more."""
        self.piece, self.perhaps_said = None, False
        self._attempts.rest()
        self._settle_attempt()

    def begin(self, piece: Piece, now: float) -> None:
        """The piece is about to leave: its turn is open, again if it was closed, and the intent is noted."""
        if self._memory.turn(piece.turn_id, now).state is TurnState.CLOSED:
            self._memory.reopen(piece.turn_id, now)
        parts = tuple(SentPart(part.entry.key, part.start, part.end, part.last) for part in piece.parts)
        count = self._attempts.count
        attempt = Attempt(piece.turn_id, piece.text, piece.is_final, parts, begun=now, count=count)
        self._memory.update(attempt=attempt, number=self._memory.state.number + 1)

    def _resume(self, attempt: Attempt, now: float) -> Piece | Wait | None:
        """Say again, exactly as it was sent, what another worker was saying; its chunks come back first of all."""
        waiting = {entry.key: entry for entry in self._book.chunks()}
        if all(part.key in waiting for part in attempt.parts):
            parts = tuple(Part(waiting[sent.key], sent.start, sent.end, sent.last) for sent in attempt.parts)
            self.piece = Piece(attempt.turn_id, attempt.text, attempt.is_final, parts)
            self.perhaps_said = True
            self._attempts.count = attempt.count
            if self._rules.ambiguous == "repeat":
                return self.piece
            self.fail(SpeechFailure.UNKNOWN_OUTCOME, CallResult(CallKind.UNKNOWN, error="the worker died"), now)
            return None
        self._missing_since = self._missing_since or now
        if now < self._missing_since + RESUME_WAIT_S:
            return Wait(self._missing_since + RESUME_WAIT_S)
        # Chunks without an id cannot be recognised. What is left of the piece is said as it comes, and flagged.
        doubtful = self._memory.state.doubtful.union(part.key for part in attempt.parts)
        self._memory.update(attempt=None, doubtful=doubtful)
        return None

    def _settle_attempt(self) -> None:
        """Nothing is being attempted: it has an outcome, or surely had no effect."""
        if self._memory.state.attempt is not None:
            self._memory.update(attempt=None)

    # What became of it.

    def unsaid(self) -> None:
        """The call was not made, or surely had no effect; one before it may have had."""
        if not self.perhaps_said:
            self._settle_attempt()

    def said(self, result: CallResult, now: float, jitter: float, *, again: bool = False) -> None:
        """Record the outcome of one call. A session that is gone is the caller's to lose, before this.

        `again`: then the piece is said on another. Nobody knows what of it was heard.
        """
        piece = self.piece
        assert piece is not None
        if result.kind is CallKind.UNKNOWN:
            self.perhaps_said = True
            self._memory.heard_last |= {piece.turn_id}
        match result.kind:
            case CallKind.OK:
                self._accept(piece, now)
            case CallKind.NOT_TAKEN:
                self._attempts.again(now, jitter, result.retry_after_s)
                self.unsaid()
            case CallKind.UNKNOWN if self._rules.ambiguous == "repeat":
                self._attempts.again(now, jitter)
            case CallKind.UNKNOWN:
                self.fail(SpeechFailure.UNKNOWN_OUTCOME, result, now)
            case CallKind.GONE if again:
                self.perhaps_said = True
            case CallKind.GONE:
                self.fail(SpeechFailure.SESSION_LOST, result, now)
            case _:
                self.fail(SpeechFailure.REFUSED, result, now)

    def _accept(self, piece: Piece, now: float) -> None:
        memory, conversation_id = self._memory, self._book.conversation_id
        turn = memory.turn(piece.turn_id, now)
        turn.pieces += 1
        turn.text_length += len(piece.text)
        memory.heard_last = frozenset({piece.turn_id})
        memory.playing_until = max(memory.playing_until, now) + len(piece.text) / CHARS_PER_S
        told_blindly = any(
            (part.entry.redelivered and part.entry.message_id is None) or part.entry.key in memory.state.doubtful
            for part in piece.parts
        )
        accepted = verdict.accepted(
            conversation_id,
            piece,
            attempts=self._attempts.count,
            latency_ms=verdict.milliseconds(now - piece.born),
            repeated=self.perhaps_said or told_blindly,
        )
        before: tuple[Event, ...] = ()
        after: tuple[Event, ...] = ()
        if turn.pieces == 1 and not turn.silent:
            before = (verdict.turn_started(conversation_id, piece),)
        if piece.is_final and not turn.silent:
            after = (self.close(piece.turn_id, piece.parts[-1].entry, now, final_sent=True),)
        self._book.end([replace(accepted, before=before, after=after)], now)
        for part in piece.parts:
            if not part.last:
                memory.speak_up_to(part.entry.key, part.end)
        self.drop()

    def fail(self, reason: SpeechFailure, why: CallResult, now: float) -> None:
        """The piece under way cannot be spoken: its chunks end here, the rest of the turn will as they come up."""
        piece, conversation_id = self.piece, self._book.conversation_id
        assert piece is not None
        turn = self._memory.turn(piece.turn_id, now)
        entries = [part.entry for part in piece.parts]
        if not turn.silent:
            turn.state = TurnState.FAILED
            failed = verdict.failed(conversation_id, entries, reason, attempts=self._attempts.count, why=why)
            after = (verdict.turn_failed(conversation_id, entries[0], reason),)
            self._book.end([replace(failed, after=after)], now)
        self.drop()

    def close(self, turn_id: str, closing: Entry, now: float, *, final_sent: bool) -> Event:
        """All of the turn was handed over; `closing` is the command that said so. Returns the event to tell it by."""
        turn = self._memory.turn(turn_id, now)
        turn.state = TurnState.CLOSED
        return verdict.turn_completed(self._book.conversation_id, turn_id, turn, closing, final_sent=final_sent)

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
            if wanted in (None, turn_id) and self._speakable(entry):
                doomed.setdefault(turn_id, []).extend([] if entry in spared else [entry])
        if wanted is None:
            doomed |= {turn_id: [] for turn_id in self._memory.open_turns() if turn_id not in doomed}
        conversation_id = self._book.conversation_id
        for turn_id, entries in doomed.items():
            self._memory.turn(turn_id, now).state = TurnState.INTERRUPTED
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

    # What is not said.

    def _plan_blank(self, run: list[Entry], now: float) -> Wait | None:
        """Nothing but white space: it waits for its word, closes the turn, or ends as empty."""
        final = speak_of(run[-1]).is_final
        if not final and len(run) == len(self._book) and self._rules.shaping == "sentences":
            self._blank_since = self._blank_since or now
            if now < self._blank_since + BLANK_WAIT_S:
                return Wait(self._blank_since + BLANK_WAIT_S)
        self._blank_since = None
        turn_id = speak_of(run[-1]).turn_id
        after: tuple[Event, ...] = ()
        if final and self._memory.turn(turn_id, now).state is not TurnState.CLOSED:
            after = (self.close(turn_id, run[-1], now, final_sent=False),)
        self._discard(run, DiscardReason.EMPTY, now, after=after)
        return None

    def _end_unspeakable(self, now: float) -> bool:
        """End the chunks at the head if their turn is silent, or the first of them is too old."""
        head, conversation_id = self._book.head, self._book.conversation_id
        turn_id = speak_of(head).turn_id
        before: tuple[Event, ...] = ()
        if self._speakable(head) and self._expired(head, now):
            self._memory.turn(turn_id, now).state = TurnState.EXPIRED
            before = (verdict.turn_failed(conversation_id, head, "expired"),)
        if self._speakable(head):
            return False
        attempt = self._memory.state.attempt
        if attempt is not None and attempt.turn_id == turn_id:
            self._settle_attempt()
        run = list(self._book.run(turn_id))
        match self._memory.turn(turn_id, now).state:
            case TurnState.FAILED:
                self._book.end([verdict.failed(conversation_id, run, SpeechFailure.TURN_FAILED, why=None)], now)
            case TurnState.EXPIRED:
                self._discard(run, DiscardReason.EXPIRED, now, before=before)
            case _:
                self._discard(run, DiscardReason.INTERRUPTED, now)
        return True

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

    def _run(self, now: float) -> Iterator[Entry]:
        """The chunks at the head that may share a piece: of one turn, up to its final; one alone if shaping is off."""
        for entry in self._book.run(speak_of(self._book.head).turn_id):
            if self._expired(entry, now):
                return
            yield entry
            if speak_of(entry).is_final or self._rules.shaping == "off":
                return

    def _speakable(self, entry: Entry) -> bool:
        return not self._memory.is_silent(speak_of(entry).turn_id)

    def _expired(self, entry: Entry, now: float) -> bool:
        return self._rules.max_age_s > 0 and now - entry.born > self._rules.max_age_s
