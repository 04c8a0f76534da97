"""The rules of one conversation. THE LAW: one thing at a time, in the order it was queued.

A lane is driven in a loop by whoever owns it (`flow.runner`):

    offer(entry)          a command was delivered; it waits its turn. An interrupt silences what waits before it
    step = next(now)      what has ended by now, and the one thing to do next
    done(work, result)    what became of that

    head of the book      next hands out             done leads to
    speak                 Open, if no session;       accepted | again later | failed, with its turn
                          Say(piece)
    interrupt             CallInterrupt              interrupt.done
    session.start         Close, if another avatar;  session.ready | again later | session.failed
                          Open; InitClient
    session.attach        Close, Attach              session.ready
    session.end           Wait (playback); Close     session.ended
    nothing               no work: the lane is idle

`speech` knows the turns, `session_plan` the session, `book` who waits; every end is a word of `verdict`.
What must outlive the lane is `memory`.
"""

from typing import assert_never

from schemas.commands import Interrupt, SessionAttach, SessionEnd, SessionStart, Speak
from worker.core import verdict
from worker.core.book import Book
from worker.core.model import CallKind, CallResult, Entry, Session, Viewer
from worker.core.retry import Attempts
from worker.core.session_plan import SessionPlan
from worker.core.speech import Speech
from worker.core.verdict import Conclusion
from worker.core.work import INTENT_S, Attach, Call, CallInterrupt, InitClient, Open, Rules, Say, Step, Wait, Work


class Lane:
    """One conversation. Commands may be offered at once; `begin` comes before the first `next`."""

    def __init__(self, book: Book, rules: Rules) -> None:
        self._rules = rules
        self._book = book
        self._attempts = Attempts()
        self._speech = Speech(self._book, rules, self._attempts)
        self._sessions = SessionPlan(self._book, rules, self._attempts, self._speech)
        self._calling = False

    def __len__(self) -> int:
        """How many commands have not ended."""
        return len(self._book)

    def begin(self, session: Session | None) -> None:
        """The session that the lane's owner has found, if there is one."""
        self._sessions.session = session

    def offer(self, entry: Entry, now: float) -> tuple[Conclusion, ...]:
        """Queue a command; returns what ends by its mere coming."""
        if isinstance(entry.command, Interrupt) and not self._acted(entry):
            spared = self._in_call() if self._calling else ()
            silenced = self._speech.silence(entry, entry.command.turn_id, now, spared)
            self._book.memory.note_silenced(entry.key, silenced)
            if not spared and self._speech.outdated(now):
                self._speech.drop()
        self._book.add(entry)
        return self._book.take()

    def next(self, now: float, hold_until: float = 0.0) -> Step:
        """What has ended by now, and the next work. Not while a call is under way; no call before `hold_until`."""
        assert not self._calling, "one thing at a time"
        work = self._plan(now)
        if work is not None and not isinstance(work, Wait):
            free_at = max(self._book.memory.state.busy_until, hold_until)
            if free_at > now:
                work = Wait(free_at)
            else:
                self._calling = True
                self._attempts.begin(now)
                # For whoever has to go by the intent alone: the call may have begun as late as this.
                self._book.memory.update(busy_until=now + INTENT_S + self._rules.ambiguous_wait_s)
                if isinstance(work, Say):
                    self._speech.begin(work.piece, now)
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
        assert self._calling
        self._calling = False
        lost = result.kind is CallKind.UNKNOWN
        self._book.memory.update(busy_until=begun + self._rules.ambiguous_wait_s if lost else 0.0)
        match work:
            case _ if result.kind is CallKind.STALE:
                self._sessions.forget()
                self._speech.unsaid()
                self._attempts.rest()
            case Say():
                if result.kind is CallKind.GONE:
                    self._sessions.lose()
                self._speech.said(result, now, jitter)
            case Open():
                self._sessions.opened(result, got if isinstance(got, Session) else None, now, jitter)
            case Attach():
                self._sessions.attached(work.session, now)
            case InitClient():
                self._sessions.initialised(result, got if isinstance(got, Viewer) else None, now, jitter)
            case CallInterrupt():
                self._end_interrupt(self._book.head, result, now)
                if result.kind is CallKind.GONE:
                    self._sessions.lose()
            case _:
                self._sessions.closed(result, now, jitter)
        return self._book.take()

    def _plan(self, now: float) -> Work | None:
        """Work down the book until something has to be done, or waited for."""
        while len(self._book):
            if self._attempts.not_before > now and not self._speech.outdated(now):
                return Wait(self._attempts.not_before)
            head = self._book.head
            if self._book.known(head) and self._speech.piece is None:
                self._book.memory.take_silenced(head.key)
                self._book.repeat(head, self._sessions.session)
                continue
            work = self._plan_head(head, now)
            if work is not None:
                return work
        return None

    def _plan_head(self, head: Entry, now: float) -> Work | None:
        match head.command:
            case Speak():
                piece = self._speech.plan(now)
                if piece is None or isinstance(piece, Wait):
                    return piece
                return Say(piece) if self._sessions.session else self._sessions.plan_for_speech(now)
            case Interrupt(turn_id=wanted):
                heard_last = self._book.memory.heard_last
                if self._sessions.session and (wanted is None or not heard_last or wanted in heard_last):
                    return CallInterrupt()
                self._end_interrupt(head, None, now)
                return None
            case SessionStart() as start:
                return self._sessions.plan_start(head, start, now)
            case SessionAttach() as attach:
                return self._sessions.plan_attach(attach, now)
            case SessionEnd():
                return self._sessions.plan_end(head, now)
            case _ as unreachable:
                assert_never(unreachable)

    def _end_interrupt(self, entry: Entry, result: CallResult | None, now: float) -> None:
        silenced = self._book.memory.take_silenced(entry.key)
        if result is not None and result.kind is CallKind.OK:
            self._book.memory.playing_until = now
        # Without a session nothing can have been silenced but what was waiting for one.
        turn_ids = [turn_id for turn_id, lost in silenced.items() if lost or self._sessions.session]
        latency_ms = verdict.milliseconds(now - entry.born)
        conversation_id = self._book.conversation_id
        done = verdict.interrupt_done(conversation_id, entry, turn_ids, latency_ms=latency_ms, result=result)
        self._book.end([done], now)
        self._attempts.rest()

    def _acted(self, interrupt: Entry) -> bool:
        """Whether this interrupt, delivered before, has silenced already; it must not silence what came after it."""
        return self._book.known(interrupt) or interrupt.key in self._book.memory.state.silenced

    def _in_call(self) -> tuple[Entry, ...]:
        """The entries whose fate hangs on a call that is under way, or may have had its effect."""
        if not self._calling and not self._speech.perhaps_said:
            return ()
        piece = self._speech.piece
        return tuple(part.entry for part in piece.parts) if piece else (self._book.head,)
