"""How chunks become calls: the next piece, and what its outcome means."""

from dataclasses import replace
from itertools import takewhile

from schemas.events import Event, SpeechFailure
from worker.core import verdict
from worker.core.book import Book
from worker.core.closing import Closing
from worker.core.memory import Attempt, SentPart, TurnState
from worker.core.model import CallKind, CallResult, Entry, Part, Piece, speak_of
from worker.core.pieces import Pieces
from worker.core.retry import Attempts
from worker.core.turns import Turns
from worker.core.verdict import Conclusion
from worker.core.work import Rules, Wait

CHARS_PER_S = 14.0
"""How fast an avatar speaks, to estimate when it has finished: the API does not tell (KALTURA.md)."""
RESUME_WAIT_S = 5.0
"""How long the chunks of a piece whose outcome is unknown may take to be delivered again."""
LOOK_S = 60.0
"""How long a lane waits for more text at a stretch, where nothing else bounds it."""


class Speech:
    """Plans one piece at a time from the chunks at the head of the book; `piece` is the one that is under way.

    It stays the same from its first attempt to its last: what is repeated is repeated exactly as it was sent.
    `perhaps_said`: an answer was lost, so that saying it again may repeat it.
    """

    def __init__(self, book: Book, rules: Rules, attempts: Attempts) -> None:
        self.piece: Piece | None = None
        self.perhaps_said = False
        self.turns = Turns(book, rules.max_age_s)
        self._book = book
        self._memory = book.memory
        self._rules = rules
        self._attempts = attempts
        self._pieces = Pieces(book.memory, rules)
        self._closing = Closing(book, rules.auto_final_s)
        self._missing_since: float | None = None

    def hear(self, chunk: Entry, now: float) -> None:
        """A chunk has come."""
        self._closing.hear(speak_of(chunk).turn_id, now)

    def plan(self, now: float) -> Piece | Wait | None:
        """The piece to say now; None when the head of the book has ended instead."""
        if self.piece is None:
            if self.turns.end_unspeakable(now):
                return None
            if self._memory.state.attempt is None:
                return self._cut(now)
            resumed = self._resume(self._memory.state.attempt, now)
            if self.piece is None:
                return resumed
        piece = self.piece
        if not self.outdated(now):
            return piece
        self.drop()
        # Its oldest chunk need not be the first: clocks differ. What was perhaps said must not be cut anew.
        ended = self.turns.end_unspeakable(now, piece.born)
        assert ended, "it is silent or too old"
        return None

    def plan_closing(self, now: float, *, has_session: bool) -> Piece | None:
        """Close the turns that have been silent for long, or say what closes one: a piece without chunks."""
        attempt = self._memory.state.attempt
        if self.piece is None and attempt is not None and not attempt.parts:
            if self.outdated(now):
                self.drop()
            else:
                self._resume(attempt, now)
        if self.piece is not None:
            if self.piece.parts:
                return None
            if has_session and not self.outdated(now):
                return self.piece
            self.fail(SpeechFailure.NO_SESSION, CallResult(CallKind.STALE), now)
        for turn_id in self._closing.due(now):
            if self._is_awaited(turn_id, now):
                continue
            self._close_unheard(turn_id, f"auto {self._memory.state.number}", now, has_session=has_session, auto=True)
            if self.piece is not None:
                break
        return self.piece

    def plan_end(self, entry: Entry, now: float, *, has_session: bool) -> Piece | None:
        """Close the open turns because the session ends, or say what closes the first of them."""
        for turn_id in list(self._memory.open_turns()):
            self._close_unheard(turn_id, entry, now, has_session=has_session)
            if self.piece is not None:
                break
        return self.piece

    def rest(self) -> Wait | None:
        """Nothing waits; an open turn may close by itself later."""
        due = self._closing.next_due()
        return None if due is None else Wait(due)

    def outdated(self, now: float) -> bool:
        """Whether what was attempted is not to be tried again: its turn went silent, or it is too old."""
        if self.piece is None:
            attempt = self._memory.state.attempt
            return attempt is not None and self._memory.is_silent(attempt.turn_id)
        return self._memory.is_silent(self.piece.turn_id) or self.turns.has_expired(self.piece.born, now)

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
        attempt = Attempt(
            piece.turn_id,
            piece.text,
            piece.is_final,
            parts,
            begun=now,
            count=self._attempts.count,
            shapes=piece.shapes,
            auto_final=piece.auto_final,
            name=piece.name,
        )
        self._memory.update(attempt=attempt, number=self._memory.state.number + 1)

    def _cut(self, now: float) -> Piece | Wait | None:
        """The next piece of the turn at the head, once it is decided."""
        run, followed = self._run(now)
        turn_id, final = speak_of(run[0]).turn_id, speak_of(run[-1]).is_final
        auto = not (final or followed) and self._closing.is_due(turn_id, now)
        piece = self._pieces.next(run, now, ends=final or followed or auto, closes=final or auto)
        if not isinstance(piece, Piece):
            times = [time for time in (piece, self._closing.next_due()) if time is not None and time > now]
            return Wait(min(times, default=now + LOOK_S))
        piece = replace(piece, auto_final=auto and piece.is_final)
        if not piece.text:
            if not (piece.is_final and self._is_heard(turn_id)):
                self.turns.end_empty(piece, now)
                return None
            piece = replace(piece, text=self._rules.final_text)
        self.piece = piece
        return piece

    def _run(self, now: float) -> tuple[list[Entry], bool]:
        """The chunks at the head that may share pieces, up to a final, and whether anything stands behind them.

        If shaping is off, one alone.
        """
        run = self._book.run(speak_of(self._book.head).turn_id)
        # Each chunk of a turn asks, and hundreds may wait: no look at each of them but where one has expired.
        chunks = run.chunks[: 1 if self._rules.shaping == "off" else run.closes]
        if self.turns.has_expired(run.oldest, now):
            young = takewhile(lambda chunk: not self.turns.has_expired(chunk.born, now), chunks[1:])
            chunks = [chunks[0], *young]
        return chunks, run.followed or len(chunks) < len(run.chunks)

    def _close_unheard(
        self, turn_id: str, by: Entry | str, now: float, *, has_session: bool, auto: bool = False
    ) -> None:
        """Close a turn no chunk of which waits; or have something said for that, if there is something to say."""
        if has_session and self._is_heard(turn_id):
            name = by if isinstance(by, str) else by.key
            self.piece = Piece(turn_id, self._rules.final_text, is_final=True, parts=(), auto_final=auto, name=name)
        else:
            closed = self.turns.close(turn_id, by, now, final_sent=False, auto_final=auto)
            self._book.tell(Conclusion(closed))

    def _is_heard(self, turn_id: str) -> bool:
        """Whether the API is to be told of the end of that turn: it has heard of it, and there is a text for that."""
        return bool(self._rules.final_text) and self.turns.is_open(turn_id) and self._memory.turns[turn_id].pieces > 0

    def _resume(self, attempt: Attempt, now: float) -> Piece | Wait | None:
        """Say again, exactly as it was sent, what another worker was saying; its chunks come back first of all."""
        waiting = {entry.key: entry for entry in self._book.chunks()}
        if all(part.key in waiting for part in attempt.parts):
            self.piece = Piece(
                attempt.turn_id,
                attempt.text,
                attempt.is_final,
                tuple(Part(waiting[sent.key], sent.start, sent.end, sent.last) for sent in attempt.parts),
                shapes=attempt.shapes,
                auto_final=attempt.auto_final,
                name=attempt.name,
            )
            self.perhaps_said = True
            self._attempts.count = attempt.count
            if self._rules.ambiguous == "repeat":
                return self.piece
            self.fail(SpeechFailure.UNKNOWN_OUTCOME, CallResult(CallKind.UNKNOWN, error="the worker died"), now)
            return None
        until = self._await(attempt, now)
        return None if until is None else Wait(until)

    def _await(self, attempt: Attempt, now: float) -> float | None:
        """Until when chunks of it may come again; None: it is given up."""
        self._missing_since = self._missing_since or now
        if now < self._missing_since + RESUME_WAIT_S:
            return self._missing_since + RESUME_WAIT_S
        # Chunks without an id cannot be recognised. What is left of the piece is said as it comes, and flagged.
        doubtful = self._memory.state.doubtful.union(part.key for part in attempt.parts)
        self._memory.update(attempt=None, doubtful=doubtful)
        return None

    def _is_awaited(self, turn_id: str, now: float) -> bool:
        """Whether what another worker was saying of the turn may come again: it is not over then."""
        attempt = self._memory.state.attempt
        if attempt is None or not attempt.parts or attempt.turn_id != turn_id:
            return False
        until = self._await(attempt, now)
        if until is not None:
            self._closing.put_off(turn_id, until)
        return until is not None

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
            case CallKind.GONE if again and piece.parts:
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
            by = piece.parts[-1].entry if piece.parts else piece.name
            after = (self.turns.close(piece.turn_id, by, now, final_sent=True, auto_final=piece.auto_final),)
        self.turns.go_on_behind(piece)
        self._book.end([replace(accepted, before=before, after=after)], now)
        self.drop()

    def fail(self, reason: SpeechFailure, why: CallResult, now: float) -> None:
        """The piece under way cannot be spoken."""
        assert self.piece is not None
        self.turns.fail(self.piece, reason, why, self._attempts.count, now)
        self.drop()
