"""The avatar session of one conversation: when to open, replace, renew and end it, and who is told.

    no session ── speech, session.start ──▶ Open ── OK ──▶ ready ── another avatar, session.end,
        ▲                                    │                │      token about to expire ──▶ Close ──┐
        │◀── failed, after SESSION_WAIT_S ◀──┘                └── GONE ──▶ lost: another of its kind   │
        └◀─────────────────────────────────────────────────────────────────────────────────────────────┘

`session` is what the lane's owner last knew; a call that finds it gone says so (`GONE`, `STALE`) and it is forgotten.
"""

import math
from dataclasses import replace

from schemas.commands import SessionAttach, SessionStart, Speak
from schemas.events import EndReason, SessionFailure, SpeechFailure
from worker.core import verdict
from worker.core.book import Book
from worker.core.model import CallKind, CallResult, Entry, Session, Viewer
from worker.core.retry import Attempts
from worker.core.speech import Speech
from worker.core.work import Attach, Call, Close, InitClient, Open, Rules, Wait

MAX_LOSSES = 2
"""Sessions that may be lost in a row before anything was said on them: a third would be lost, too."""
PLAYBACK_MARGIN_S = 2.0
"""Before its token expires a session must be ended, whatever is still to be heard: later nobody can end it."""
END_ATTEMPTS = 3
"""Calls of `/end` before a session is given up: the API's own idle time-out ends it then."""
ROOM_AGAIN_S = 0.5
"""How soon to ask for room again where nobody says: of all who wait for it, one asks the API."""

_HELD_BACK = CallResult(CallKind.NOT_TAKEN, error="the Avatar API fails: its calls are held back", local=True)
_NO_AVATAR = CallResult(CallKind.REFUSED, error="no avatar: name one in session.start, or set AVATAR_ID")


class SessionPlan:
    """Plans what the head of the book needs of its session."""

    def __init__(self, book: Book, rules: Rules, attempts: Attempts, speech: Speech) -> None:
        self.session: Session | None = None
        self.lost: Session | None = None
        """One that had to be given up; the next is of its kind."""
        self._losses = 0
        self._book = book
        self._rules = rules
        self._attempts = attempts
        self._speech = speech
        self._retiring: EndReason | None = None
        self._waiting_since: float | None = None
        self._why = _HELD_BACK
        self._unasked = False

    # What to do.

    @property
    def deadline(self) -> float:
        """When the `session.start` at the head, which waits for a session, has waited long enough."""
        return math.inf if self._waiting_since is None else self._waiting_since + self._rules.session_wait_s

    def give_up(self, now: float) -> bool:
        """End the `session.start` whose time is over: whoever asked waits for an answer, whatever the API does."""
        if now < self.deadline:
            return False
        self._fail(None, SessionFailure.CAPACITY if self._why.is_full else SessionFailure.UNAVAILABLE, self._why, now)
        return True

    def plan_for_speech(self, now: float) -> Call | None:
        """A session for the piece under way."""
        return self._open_again() or self._open(self._rules.default_avatar, self._rules.default_voice, None, now)

    def plan_renewal(self, now: float) -> Call | Wait | None:
        """Between two turns: replace the session whose token is about to expire, while it can still be ended."""
        session = self.session
        if session is None:
            return self._open_again() if self._retiring is EndReason.REPLACED and not len(self._book) else None
        if session.attached or session.renew_at is None or now < session.renew_at or self._speech.in_a_turn:
            return None
        wait = self._close(EndReason.REPLACED, now)
        if isinstance(wait, Wait) and session.expires_at is not None:
            until = min(wait.until, session.expires_at - PLAYBACK_MARGIN_S)
            return Wait(until) if until > now else self._closing(EndReason.REPLACED)
        return wait

    def _open_again(self) -> Open | None:
        """Another of the kind that had to be given up."""
        if self.lost is None or self.lost.avatar_id is None:
            return None
        return Open(self.lost.avatar_id, self.lost.voice_id, self.lost.voice_speed)

    def plan_start(self, entry: Entry, start: SessionStart, now: float) -> Call | Wait | None:
        """Open a session, replace the one of another avatar or voice, or answer with the one that is live."""
        live = self.session
        if live is None:
            if self._waiting_since is None:
                self._waiting_since, self._why = now, _HELD_BACK
            again = self._open_again()
            if (
                again is not None
                and start.avatar_id in (None, again.avatar_id)
                and start.voice_id in (None, again.voice_id)
            ):
                return again
            voice_id = start.voice_id or (None if start.avatar_id else self._rules.default_voice)
            return self._open(start.avatar_id or self._rules.default_avatar, voice_id, start.voice_speed, now)
        if start.avatar_id not in (None, live.avatar_id) or start.voice_id not in (None, live.voice_id):
            return self._close(EndReason.REPLACED, now)
        if renewal := self.plan_renewal(now):
            return renewal
        if start.handoff == "viewer" and live.viewer is None:
            return InitClient()
        self._book.end([verdict.session_ready(self._book.conversation_id, live, entry)], now)
        return None

    def plan_attach(self, attach: SessionAttach, now: float) -> Call | Wait:
        """Use the foreign session; one of our own is ended first."""
        if self.session is not None and self.session.session_id != attach.session_id:
            return self._close(EndReason.REPLACED, now)
        return Attach(Session(attach.session_id, attach.token, attached=True))

    def plan_end(self, entry: Entry, now: float) -> Call | Wait | None:
        """Let what was said be heard, end the session."""
        if self.session is not None:
            return self._close(EndReason.REQUESTED, now)
        self._book.end([verdict.session_ended(self._book.conversation_id, None, EndReason.REQUESTED, entry)], now)
        return None

    def _open(self, avatar_id: str | None, voice_id: str | None, voice_speed: float | None, now: float) -> Open | None:
        if avatar_id is not None:
            return Open(avatar_id, voice_id, voice_speed)
        self._fail(SpeechFailure.NO_SESSION, SessionFailure.REFUSED, _NO_AVATAR, now)
        return None

    def _close(self, reason: EndReason, now: float) -> Close | Wait:
        memory = self._book.memory
        if self._retiring is not reason:
            self._retiring = reason
            memory.playing_until = min(memory.playing_until, now + self._rules.session_end_wait_s)
        if memory.playing_until > now:
            return Wait(memory.playing_until)
        return self._closing(reason)

    def _closing(self, reason: EndReason) -> Close:
        return Close(self._attempts.count + 1 >= END_ATTEMPTS, reason)

    # What became of it.

    def opening(self) -> None:
        """A create is about to be called; what comes while it is has not asked for it."""
        self._unasked = not len(self._book)

    def opened(self, wanted: Open, result: CallResult, session: Session | None, now: float, jitter: float) -> None:
        """A create was answered, or not."""
        if self._unasked:
            self._renewed(session)
            return
        for_speech = isinstance(self._book.head.command, Speak)
        self._why = result
        waited_enough = now - self._attempts.first >= self._rules.session_wait_s
        match result.kind:
            case CallKind.OK:
                self._waiting_since = None
                self.begin(session)
                assert session is not None
                if for_speech:
                    self._book.tell(verdict.session_ready(self._book.conversation_id, session, None))
                self._attempts.rest()
            case CallKind.DENIED:
                self._fail(SpeechFailure.CREDENTIALS, SessionFailure.CREDENTIALS, result, now)
            case _ if result.is_full:
                self._wait_for_room(wanted, result, now, waited_enough=waited_enough)
            # Speech goes on trying until it expires: nothing healthy is given up because the API was down.
            case CallKind.NOT_TAKEN | CallKind.UNKNOWN if for_speech or not waited_enough:
                self._attempts.again(now, jitter, result.retry_after_s)
            case CallKind.NOT_TAKEN | CallKind.UNKNOWN:
                self._fail(None, SessionFailure.UNAVAILABLE, result, now)
            case _:
                self._fail(SpeechFailure.REFUSED, SessionFailure.REFUSED, result, now)

    def _wait_for_room(self, wanted: Open, result: CallResult, now: float, *, waited_enough: bool) -> None:
        if wanted.not_before and result.kind is CallKind.FULL:
            # It has its place. How long it waits for a session counts from when it may first ask for one.
            if self._attempts.count == 1:
                self._attempts.rest()
            self._attempts.not_before = wanted.not_before
        elif waited_enough:
            self._fail(SpeechFailure.CAPACITY, SessionFailure.CAPACITY, result, now)
        else:
            self._attempts.not_before = now + (result.retry_after_s or ROOM_AGAIN_S)

    def begin(self, session: Session | None, lost: Session | None = None) -> None:
        """What the lane's owner knows of the session, and of one that was lost."""
        self.session, self._retiring = session, None
        self.lost = lost if self._rules.on_lost == "recreate" else None

    def _renewed(self, session: Session | None) -> None:
        """Nobody asked for it: without one, the next command that needs one opens it."""
        self._attempts.rest()
        self._retiring = None
        if session is not None:
            self.begin(session)
            self._book.tell(verdict.session_ready(self._book.conversation_id, session, None))

    def proved(self) -> None:
        """The session works."""
        self._losses = 0

    def attached(self, result: CallResult, session: Session, now: float, jitter: float) -> None:
        """The foreign session is ours to use, or was not taken over yet: its intent was written too late."""
        if result.kind is not CallKind.OK:
            self._attempts.again(now, jitter)
            return
        self.begin(session)
        self._book.end([verdict.session_ready(self._book.conversation_id, session, self._book.head)], now)
        self._attempts.rest()

    def initialised(self, result: CallResult, viewer: Viewer | None, now: float, jitter: float) -> None:
        """The viewer's hand-off was fetched, or not."""
        if self.session is None:  # an interrupt beside has found it gone
            self._attempts.rest()
            return
        waited_enough = now - self._attempts.first >= self._rules.session_wait_s
        match result.kind:
            case CallKind.OK:
                self.session = replace(self.session, viewer=viewer)
                self._attempts.rest()
            case CallKind.GONE if self._losses < MAX_LOSSES:
                self.lose()
                self._attempts.rest()
            case CallKind.GONE:
                self.lose()
                self._fail(None, SessionFailure.UNAVAILABLE, result, now)
            case CallKind.NOT_TAKEN if not waited_enough:
                self._attempts.again(now, jitter, result.retry_after_s)
            case CallKind.NOT_TAKEN | CallKind.UNKNOWN:
                self._fail(None, SessionFailure.UNAVAILABLE, result, now)
            case _:
                self._fail(SpeechFailure.REFUSED, SessionFailure.REFUSED, result, now)

    def closed(self, result: CallResult, now: float, jitter: float) -> None:
        """The session has ended, or tries again to."""
        unsure = result.kind in (CallKind.NOT_TAKEN, CallKind.UNKNOWN)
        if unsure and self._attempts.count < END_ATTEMPTS:
            self._attempts.again(now, jitter, result.retry_after_s)
            return
        if self._retiring is None:  # as above
            self._attempts.rest()
            return
        asked = self._retiring is EndReason.REQUESTED
        renewed = self._retiring is EndReason.REPLACED and self._is_to_be_renewed(now)
        conclusion = verdict.session_ended(
            self._book.conversation_id, self.session, self._retiring, self._book.head if asked else None
        )
        self._book.end([conclusion], now)
        if renewed:
            self.session, self.lost = None, self.session
        else:
            self.forget()
        self._attempts.rest()

    def _is_to_be_renewed(self, now: float) -> bool:
        session = self.session
        return session is not None and session.renew_at is not None and now >= session.renew_at

    def lose(self) -> bool:
        """The API does not know the session any more. True: another may take its place."""
        session = self.session
        if session is not None:
            self._losses += 1
            self._book.tell(verdict.session_ended(self._book.conversation_id, session, EndReason.LOST))
            self.begin(None, None if session.attached else session)
        return self.lost is not None and self._losses <= MAX_LOSSES

    def forget(self) -> None:
        """There is no session; whoever ended it has told."""
        self.session, self.lost, self._retiring = None, None, None

    def _fail(self, speech: SpeechFailure | None, start: SessionFailure, why: CallResult, now: float) -> None:
        """Whoever needs the session ends: the piece under way with its turn, or the `session.start`."""
        head, conversation_id = self._book.head, self._book.conversation_id
        if isinstance(head.command, SessionStart):
            self._book.end([verdict.session_failed(conversation_id, start, why, head, ends=True)], now)
            self._attempts.rest()
            self._waiting_since = None
            return
        assert speech is not None
        if speech is not SpeechFailure.NO_SESSION:
            self._book.tell(verdict.session_failed(conversation_id, start, why, head, ends=False))
        self._speech.fail(speech, why, now)
