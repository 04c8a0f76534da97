"""The rules of one conversation. THE LAW: one thing at a time, in the order it was queued.

A lane is driven in a loop by whoever owns it (`flow.runner`):

    offer(entry)          a command was delivered; it waits its turn. An interrupt silences what waits before it,
                          a chunk sent again on purpose lifts the mark of its failed turn
    step = next(now)      what has ended by now, and the one thing to do next
    done(work, result)    what became of that

    head of the book      next hands out             done leads to
    speak                 Open, if no session;       accepted | again later | failed, with its turn
                          Say(piece)
    interrupt             nothing: it acts when seen
    session.start         Close, if another avatar;  session.ready | again later | session.failed
                          Open; InitClient
    session.attach        Close, Attach              session.ready
    session.end           Wait (playback); Close     session.ended
    nothing               no work: the lane is idle

`speech` knows the turns, `session_plan` the session, `book` who waits; every end is a word of `verdict`.
What must outlive the lane is `memory`.
"""

from dataclasses import replace
from itertools import islice
from typing import assert_never

from schemas.commands import Interrupt, SessionAttach, SessionEnd, SessionStart, Speak
from worker.core.book import Book
from worker.core.interrupts import Interrupts
from worker.core.model import CallKind, CallResult, Entry, Session, Viewer
from worker.core.retry import Attempts
from worker.core.sequence import Disorder, Sequence
from worker.core.session_plan import SessionPlan
from worker.core.speech import Speech
from worker.core.verdict import Conclusion
from worker.core.work import INTENT_S, Attach, Call, CallInterrupt, InitClient, Open, Rules, Say, Step, Wait, Work

INTERRUPT_S = 5.0
"""Longer than the API is given to answer an interrupt; the answer ends the wait."""


class Lane:
    """One conversation. Commands may be offered at once; `begin` comes before the first `next`."""

    def __init__(self, book: Book, rules: Rules) -> None:
        self._rules = rules
        self._book = book
        self._attempts = Attempts()
        self._speech = Speech(self._book, rules, self._attempts)
        self._sessions = SessionPlan(self._book, rules, self._attempts, self._speech)
        self._interrupts = Interrupts(self._book, self._speech, rules)
        self._sequence = Sequence(book)
        self._holds = False
        self._seeks_session = False
        self._calling: Call | None = None
        self._at_stake: tuple[Entry, ...] = ()
        self._busy_until = book.memory.state.busy_until

    def __len__(self) -> int:
        """How many commands have not ended."""
        return len(self._book)

    @property
    def session(self) -> Session | None:
        """The session as the lane knows it."""
        return self._sessions.session

    def begin(self, session: Session | None, lost: Session | None = None) -> None:
        """The session that the lane's owner has found, if there is one; or that it was lost."""
        self._sessions.begin(session, lost)

    def offer(self, entry: Entry, now: float) -> tuple[Conclusion, ...]:
        """Queue a command; returns what ends by its mere coming. Interrupts act: see `take_interrupts`."""
        if isinstance(entry.command, Interrupt):
            self._interrupts.see(
                entry,
                now,
                spared=self._at_stake if self._calling is not None else (),
                has_session=self._sessions.session is not None,
                in_doubt=self._calling is None and self._busy_until > now,
            )
            self._note_busy()
        elif isinstance(entry.command, Speak):
            self._offer_chunk(entry, now)
        else:
            self._book.add(entry)
        return self._book.take()

    def _offer_chunk(self, entry: Entry, now: float) -> None:
        new = not self._book.known(entry)
        repeat = new and self._sequence.is_repeat(entry)
        if new and not repeat:
            self._speech.hear(entry, now)
            if entry.replay:
                self._speech.turns.revive(entry, now)
        self._interrupts.meet(entry, now)
        self._book.add(entry)
        if repeat:
            self._speech.turns.discard_repeat(entry, now)

    def take_disorders(self) -> list[Disorder]:
        """Where the numbers of chunks that came were not in order."""
        disorders, self._sequence.disorders = self._sequence.disorders, []
        return disorders

    @property
    def waiting_chars(self) -> int:
        """Characters of speech that wait for the API; none where the lane waits for more text."""
        if self._holds:
            return 0
        piece = self._speech.piece
        return self._book.waiting_chars() - sum(part.end - part.start for part in (piece.parts if piece else ()))

    @property
    def seeks_session(self) -> bool:
        """Whether the lane waits for a session, and has to keep its place in the line."""
        return self._seeks_session

    @property
    def tells_interrupts(self) -> bool:
        """Whether the API is being told of an interrupt just now."""
        return self._interrupts.calling

    def take_interrupts(self) -> list[Entry]:
        """The interrupts to tell the API of now, beside any call that is under way; `interrupted` says how it went."""
        return self._interrupts.take_calls()

    def interrupted(self, entry: Entry, result: CallResult | None, now: float) -> tuple[Conclusion, ...]:
        """The API was told of the interrupt; None: the session had ended meanwhile."""
        self._interrupts.done(entry, result, now, has_session=result is not None)
        self._note_busy()
        if result is not None and result.kind is CallKind.GONE:
            self._sessions.lose()
        return self._book.take()

    def next(self, now: float, hold_until: float = 0.0, pause_until: float = 0.0) -> Step:
        """What has ended by now, and the next work. Not while a call is under way.

        No call before `hold_until`, nor before `pause_until`; but during a pause whoever wants a session gets in line.
        """
        assert self._calling is None, "one thing at a time"
        work = self._plan(now)
        head = self._book.head if len(self._book) else None
        speaks = head is None or isinstance(head.command, Speak)
        self._holds = speaks and isinstance(work, Wait) and self._speech.piece is None
        opens = isinstance(work, Open) or (isinstance(work, Wait) and self._attempts.not_before > now)
        self._seeks_session = opens and self._sessions.session is None
        if work is not None and not isinstance(work, Wait):
            if isinstance(work, Open) and head is not None and pause_until > now:
                work = replace(work, not_before=pause_until)
            else:
                hold_until = max(hold_until, pause_until)
            free_at = max(self._book.memory.state.busy_until, hold_until)
            if free_at > now:
                work = Wait(min(free_at, self._sessions.deadline))
            elif self._interrupts.calling:
                work = Wait(now + INTERRUPT_S)
            else:
                self._calling, self._at_stake = work, self._what_hangs_on(work)
                # For whoever has to go by the intent alone: the call may have begun as late as this.
                self._busy_until = now + INTENT_S + self._rules.ambiguous_wait_s
                self._note_busy()
                if not isinstance(work, CallInterrupt):
                    self._attempts.begin(now)
                if isinstance(work, Say):
                    self._speech.begin(work.piece, now)
                elif isinstance(work, Open):
                    self._sessions.opening()
        return Step(self._book.take(), work)

    def done(
        self,
        work: Call,
        result: CallResult,
        now: float,
        *,
        begun: float,
        got: Session | Viewer | None = None,
        jitter: float = 1.0,
    ) -> tuple[Conclusion, ...]:
        """Record the outcome of the call handed out last, which was `begun` then.

        `got` is the session that Open created, or the Viewer that InitClient fetched. `jitter` is chance in [0, 1).
        """
        assert self._calling is not None
        self._calling = None
        lost = result.kind is CallKind.UNKNOWN
        self._busy_until = begun + self._rules.ambiguous_wait_s if lost else 0.0
        self._note_busy()
        match work:
            case _ if result.kind is CallKind.STALE:
                self._sessions.forget()
                self._speech.unsaid()
                self._attempts.rest()
            case Say():
                again = result.kind is CallKind.GONE and self._sessions.lose()
                if result.kind is CallKind.OK:
                    self._sessions.proved()
                # What was under way when an interrupt came may have been taken after it.
                heard = result.kind in (CallKind.OK, CallKind.UNKNOWN)
                self._interrupts.tell_again = heard and self._book.memory.is_silent(work.piece.turn_id)
                self._speech.said(result, now, jitter, again=again)
            case Open():
                self._sessions.opened(work, result, got if isinstance(got, Session) else None, now, jitter)
            case Attach():
                self._sessions.attached(result, work.session, now, jitter)
            case InitClient():
                self._sessions.initialised(result, got if isinstance(got, Viewer) else None, now, jitter)
            case CallInterrupt():
                self._interrupts.tell_again = False
                if result.kind is CallKind.GONE:
                    self._sessions.lose()
            case _:
                self._sessions.closed(result, now, jitter)
        return self._book.take()

    def _plan(self, now: float) -> Work | None:
        """Work down the book until something has to be done, or waited for."""
        if self._interrupts.tell_again:
            if self._sessions.session:
                return CallInterrupt()
            self._interrupts.tell_again = False
        has_session = self._sessions.session is not None
        while True:
            self._sessions.give_up(now)
            if self._attempts.not_before > now and not self._speech.outdated(now):
                return Wait(min(self._attempts.not_before, self._sessions.deadline))
            if closing := self._speech.plan_closing(now, has_session=has_session):
                return Say(closing)
            if not len(self._book):
                return self._sessions.plan_renewal(now) or self._speech.rest()
            head = self._book.head
            if self._book.known(head) and self._speech.piece is None:
                if self._interrupts.was_told(head):
                    self._book.leave(head)
                else:
                    self._book.repeat(head, self._sessions.session)
                continue
            work = self._plan_head(head, now)
            if work is not None:
                return work

    def _plan_head(self, head: Entry, now: float) -> Work | None:
        match head.command:
            case Speak():
                piece = self._speech.plan(now)
                if piece is None or isinstance(piece, Wait):
                    return piece
                if renewal := self._sessions.plan_renewal(now):
                    return renewal
                return Say(piece) if self._sessions.session else self._sessions.plan_for_speech(now)
            case Interrupt():
                return Wait(now + INTERRUPT_S)  # It ends when the API has answered; its call is under way.
            case SessionStart() as start:
                return self._sessions.plan_start(head, start, now)
            case SessionAttach() as attach:
                return self._sessions.plan_attach(attach, now)
            case SessionEnd():
                closing = self._speech.plan_end(head, now, has_session=self._sessions.session is not None)
                return Say(closing) if closing else self._sessions.plan_end(head, now)
            case _ as unreachable:
                assert_never(unreachable)

    def _what_hangs_on(self, call: Call) -> tuple[Entry, ...]:
        """The entries whose fate hangs on the call; none where nobody waits for it."""
        if isinstance(call, CallInterrupt):
            return ()
        piece = self._speech.piece
        return tuple(part.entry for part in piece.parts) if piece else tuple(islice(self._book, 1))

    def _note_busy(self) -> None:
        """Whoever serves the conversation next waits until what is under way now is surely over."""
        busy_until = max(self._busy_until, self._interrupts.busy_until)
        if busy_until != self._book.memory.state.busy_until:
            self._book.memory.update(busy_until=busy_until)
