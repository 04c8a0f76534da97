"""When to try again: exponential backoff with full jitter, the server's `Retry-After` obeyed."""

from dataclasses import dataclass

BASE_S = 0.2
CAP_S = 10.0


def delay_s(attempts: int, jitter: float, retry_after_s: float | None = None) -> float:
    """Seconds to wait after that many failed attempts. `jitter` is in [0, 1), drawn by the caller.

    `Retry-After` is a floor: the jitter comes on top, so that a crowd told the same second does not return as one.
    """
    backoff = min(CAP_S, BASE_S * 2.0 ** min(attempts - 1, 16)) * jitter
    return backoff if retry_after_s is None else retry_after_s + backoff


@dataclass(slots=True)
class Attempts:
    """The calls made for the work at hand, and when the next one may be made. Times are epoch seconds."""

    count: int = 0
    first: float = 0.0
    not_before: float = 0.0

    def begin(self, now: float) -> None:
        """A call starts."""
        self.first = self.first if self.count else now
        self.count += 1

    def again(self, now: float, jitter: float, retry_after_s: float | None = None) -> None:
        """Try again after a pause."""
        self.not_before = now + delay_s(self.count, jitter, retry_after_s)

    def rest(self) -> None:
        """The work is finished or dropped; the next starts afresh."""
        self.count, self.not_before = 0, 0.0
