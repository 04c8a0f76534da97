"""One clock for ages and timers."""

import time


class SteadyClock:
    """Epoch seconds, taken once and carried on by the monotonic clock: the core's timers never jump."""

    def __init__(self) -> None:
        self._offset = time.time() - time.monotonic()

    def __call__(self) -> float:
        """Now."""
        return self._offset + time.monotonic()
