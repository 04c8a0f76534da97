"""What a conversation remembers beyond the lane that serves it: how its commands ended, and which turns are silent."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum

from schemas.events import Event


class TurnState(StrEnum):
    """Only an interrupt, a failure or expiry silences a turn; a final merely closes it."""

    OPEN = "open"
    CLOSED = "closed"
    INTERRUPTED = "interrupted"
    FAILED = "failed"
    EXPIRED = "expired"


@dataclass(slots=True)
class Turn:
    """A turn as far as it was handed to the API: `pieces` calls with `text_length` characters."""

    state: TurnState = TurnState.OPEN
    pieces: int = 0
    text_length: int = 0
    touched: float = 0.0

    @property
    def silent(self) -> bool:
        """Whether later chunks are not spoken."""
        return self.state in (TurnState.INTERRUPTED, TurnState.FAILED, TurnState.EXPIRED)


@dataclass(frozen=True, slots=True)
class Ended:
    """How a command ended: the event that said so, and a fingerprint of the body that bore its id."""

    fingerprint: bytes
    event: Event
    at: float


@dataclass(slots=True)
class Memory:
    """The memory of one conversation.

    `spoken`: characters of a chunk that left in earlier pieces, by entry key. `heard_last`: the turn whose text the API
    took last, with those whose text it may have taken since.
    """

    turns: dict[str, Turn] = field(default_factory=dict)
    ended: dict[str, Ended] = field(default_factory=dict)
    spoken: dict[str, int] = field(default_factory=dict)
    playing_until: float = 0.0
    heard_last: frozenset[str] = frozenset()

    def turn(self, turn_id: str, now: float) -> Turn:
        """The turn, new if it was never heard of."""
        turn = self.turns.setdefault(turn_id, Turn())
        turn.touched = now
        return turn

    def is_silent(self, turn_id: str) -> bool:
        """Whether chunks of that turn are not spoken."""
        turn = self.turns.get(turn_id)
        return turn is not None and turn.silent

    def open_turns(self) -> Iterator[str]:
        """Turns that were begun and neither closed nor silenced."""
        return (turn_id for turn_id, turn in self.turns.items() if turn.state is TurnState.OPEN)

    def prune(self, before: float) -> None:
        """Forget what was last touched before that time."""
        self.ended = {key: ended for key, ended in self.ended.items() if ended.at >= before}
        self.turns = {turn_id: turn for turn_id, turn in self.turns.items() if turn.touched >= before}
