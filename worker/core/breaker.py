"""The breaker on the Avatar API: when it fails everybody, nobody calls but one at a time, to see whether it is back.

It holds, and gives nothing up: what waits goes on waiting, and to expire. One for all lanes of a worker, since an
outage, and a 429, is the account's trouble and not a conversation's.

    closed ── FAILURES in a row ──▶ open ── pause over: one probe ──▶ fails: open, a longer pause
      ▲                                                         └──▶ succeeds: ramp
      └──────────────── RAMP_S over ◀── ramp: as many at once as double every STEP_S
"""

from worker.core.model import CallKind, CallResult

FAILURES = 5
"""In a row, over all lanes: fewer may be one session's own trouble."""
FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 3.0
"""Short enough that speech is back within seconds of the API."""
STEP_S = 0.2
RAMP_S = 2.0
LOOK_S = 0.1
"""How soon to ask again where nobody can say when a place is free."""


class Breaker:
    """Closed while calls succeed. Times are epoch seconds.

    Whoever wants to call asks `hold_until`; if that is over, it says `begin`, calls, and says what came of it.
    """

    def __init__(self) -> None:
        self._failures = 0
        self._pause_s = FIRST_PAUSE_S
        self._open_until: float | None = None
        self._back_since: float | None = None
        self.pause_until = 0.0
        """Until then the API has asked to be left alone (429 with `Retry-After`)."""
        self._under_way = 0

    @property
    def is_open(self) -> bool:
        """Whether the API is taken to be down."""
        return self._open_until is not None

    def hold_until(self, now: float) -> float:
        """The time before which no call may begin."""
        return max(self.outage_until(now), self.pause_until)

    def outage_until(self, now: float) -> float:
        """As `hold_until`, but for the pause that a 429 asks for."""
        if self._open_until is not None:
            return self._open_until if self._under_way == 0 else max(self._open_until, now + LOOK_S)
        if self._back_since is not None:
            if now - self._back_since >= RAMP_S:
                self._back_since = None
            elif self._under_way >= 2.0 ** ((now - self._back_since) / STEP_S):
                return now + LOOK_S
        return 0.0

    def begin(self) -> None:
        """A call begins."""
        self._under_way += 1

    def record(self, result: CallResult | None, now: float) -> None:
        """What came of a call; None: it was not made after all."""
        self._under_way -= 1
        if result is None or result.local:
            return
        if result.status == 429:
            self.pause_until = max(self.pause_until, now + (result.retry_after_s or 0.0))
        elif result.kind in (CallKind.NOT_TAKEN, CallKind.UNKNOWN):
            self._fail(now)
        elif result.kind is not CallKind.STALE:
            self._succeed(now)

    def _fail(self, now: float) -> None:
        self._failures += 1
        if self._failures < FAILURES:
            return
        if self._open_until is not None:
            # Calls that were under way when it opened tell nothing new; a probe's failure comes after the pause.
            if now < self._open_until:
                return
            self._pause_s = min(self._pause_s * 2, LONGEST_PAUSE_S)
        self._open_until = now + self._pause_s
        self._back_since = None

    def _succeed(self, now: float) -> None:
        self._failures = 0
        if self._open_until is not None:
            self._open_until, self._pause_s, self._back_since = None, FIRST_PAUSE_S, now
