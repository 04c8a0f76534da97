"""When producers of a conversation should hold back: more waits for the API than is good."""

from schemas.events import Event, FlowPaused, FlowResumed
from worker.core.work import Rules


class Pressure:
    """Two marks: above the upper one producers are asked to pause, below the lower one to go on.

    Asking is repeated while it lasts, twice in the time for which it is valid.
    """

    def __init__(self, conversation_id: str, rules: Rules) -> None:
        self.again_at: float | None = None
        """When to look again although nothing has changed; None: producers are not asked to pause."""
        self._conversation_id = conversation_id
        self._rules = rules

    def look(self, waiting_chars: int, now: float) -> Event | None:
        """What to tell now that so many characters wait."""
        asked = self.again_at is not None
        if waiting_chars >= (self._rules.resume_chars + 1 if asked else self._rules.pause_chars):
            if self.again_at is not None and now < self.again_at:
                return None
            self.again_at = now + self._rules.pause_valid_s / 2
            data = FlowPaused(waiting_chars=waiting_chars, valid_s=self._rules.pause_valid_s)
            return self._event(data, now)
        if not asked:
            return None
        self.again_at = None
        return self._event(FlowResumed(waiting_chars=waiting_chars), now)

    def forget(self) -> None:
        """Somebody else looks from now on; what was asked lapses by itself."""
        self.again_at = None

    def _event(self, data: FlowPaused | FlowResumed, now: float) -> Event:
        # It is about this moment, and never told again.
        return Event(self._conversation_id, data, f"{now:.6f}")
