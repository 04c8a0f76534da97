"""When to look whether a moved conversation may go on, and when to ask for it. Times are epoch seconds.

The broker's hash has moved its key: what comes from the new partition is held until a marker, sent straight to the
queue of the old one, has come through it behind everything older. Whoever owns the old partition moves the row then.
"""

FIRST_LOOK_S = 0.05
LONGEST_LOOK_S = 2.0
ASK_AGAIN_S = 30.0
"""A marker is as durable as a command, but its queue may be deleted with it."""


class Move:
    """One conversation's move to the partition `to`, as seen by whoever holds what comes from there."""

    def __init__(self, to: int) -> None:
        self.look_at = 0.0
        """When to look again which partition the row names."""
        self._to = to
        self._asked: int | None = None
        self._ask_again_at = 0.0
        self._pause_s = FIRST_LOOK_S

    def is_over(self, home: int | None) -> bool:
        """Whether what is held may go on; `home` is the partition that the row names."""
        return home is None or home == self._to

    def must_ask(self, home: int, now: float) -> bool:
        """Whether to send a marker through `home` now: once, and again after long, or where the row moved meanwhile."""
        must = home != self._asked or now >= self._ask_again_at
        if home != self._asked:
            self._pause_s = FIRST_LOOK_S
        if must:
            self._asked, self._ask_again_at = home, now + ASK_AGAIN_S
        self.look_at = now + self._pause_s
        self._pause_s = min(2 * self._pause_s, LONGEST_LOOK_S)
        return must
