"""The optional numbers of the chunks of a turn: the same one twice is a duplicate, a hole or a step back is noted.

Order is the broker's; nothing is put in order here.
"""

from dataclasses import dataclass
from typing import Literal

from worker.core.book import Book
from worker.core.memory import NUMBERED_TURNS
from worker.core.model import Entry, speak_of


@dataclass(frozen=True, slots=True)
class Disorder:
    """A chunk whose number does not follow that of the chunk before it."""

    turn_id: str
    kind: Literal["gap", "step_back"]
    expected: int
    seq: int


class Sequence:
    """Looks at the number of each chunk that comes; `disorders` are for whoever takes them away."""

    def __init__(self, book: Book) -> None:
        self.disorders: list[Disorder] = []
        self._book = book
        self._last: dict[str, int] = {}

    def is_repeat(self, chunk: Entry) -> bool:
        """Whether its number was used in its turn by another command. What is sent again on purpose repeats nothing."""
        turn_id, seq = speak_of(chunk).turn_id, speak_of(chunk).seq
        if seq is None or chunk.replay:
            return False
        waiting = self._book.numbered(turn_id, seq)
        if waiting is not None:
            return waiting != chunk.key
        if self._book.memory.has_number(turn_id, seq):
            return True
        self._follow(turn_id, seq)
        return False

    def _follow(self, turn_id: str, seq: int) -> None:
        last = self._last.pop(turn_id, self._book.memory.last_number(turn_id))
        self._last[turn_id] = seq
        if len(self._last) > NUMBERED_TURNS:
            del self._last[next(iter(self._last))]
        if last is not None and seq != last + 1:
            self.disorders.append(Disorder(turn_id, "gap" if seq > last else "step_back", last + 1, seq))
