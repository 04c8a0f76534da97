"""When a turn closes although no chunk said that it is the last: some time after the last one came."""

from collections.abc import Iterator

from worker.core.book import Book
from worker.core.memory import TurnState
from worker.core.model import speak_of


class Closing:
    """Knows when each open turn was last heard of. `after_s` 0: turns stay open."""

    def __init__(self, book: Book, after_s: float) -> None:
        self._book = book
        self._turns = book.memory.turns
        self._after_s = after_s
        self._heard = {turn_id: self._turns[turn_id].touched for turn_id in book.memory.open_turns()} if after_s else {}

    def hear(self, turn_id: str, now: float) -> None:
        """A chunk of the turn has come."""
        if self._after_s:
            self._heard[turn_id] = now

    def put_off(self, turn_id: str, until: float) -> None:
        """Not before that time, though it was due."""
        self._heard[turn_id] = until - self._after_s

    def is_due(self, turn_id: str, now: float) -> bool:
        """Whether it has been silent for long enough."""
        return turn_id in self._heard and now >= self._heard[turn_id] + self._after_s

    def next_due(self) -> float | None:
        """When the next turn may be."""
        if not len(self._book):
            self._heard = {turn_id: heard for turn_id, heard in self._heard.items() if self._is_open(turn_id)}
        return min(self._heard.values()) + self._after_s if self._heard else None

    def due(self, now: float) -> Iterator[str]:
        """The open turns to close now: those of which nothing waits any more. Each is named once."""
        for turn_id in [turn_id for turn_id in self._heard if self.is_due(turn_id, now)]:
            if any(speak_of(chunk).turn_id == turn_id for chunk in self._book.chunks()):
                continue
            del self._heard[turn_id]
            if self._is_open(turn_id):
                yield turn_id

    def _is_open(self, turn_id: str) -> bool:
        return turn_id in self._turns and self._turns[turn_id].state is TurnState.OPEN
