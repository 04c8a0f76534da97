"""What a conversation remembers beyond the lane that serves it, and beyond the worker: the ledger keeps it.

A lane changes its memory as it goes; `take_changes` hands over what is new since the last time, to be written.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from itertools import count

from schemas.events import Event
from worker.core.shaping import shaper

KEPT_AT_HAND = 2000
"""Ended commands a lane remembers by itself; of older ones it asks the ledger."""
NAMED = 10_000
"""Ended commands of which a lane knows at least that they have ended."""

NUMBERED_TURNS = 32
"""Of so many turns, the latest, a conversation remembers the numbers of their chunks."""
NUMBER_RANGES = 32

Numbers = Mapping[str, tuple[tuple[int, int], ...]]
"""By turn, in ranges from first to last."""


class TurnState(StrEnum):
    """Only an interrupt, a failure or expiry silences a turn; a final merely closes it."""

    OPEN = "open"
    CLOSED = "closed"
    INTERRUPTED = "interrupted"
    FAILED = "failed"
    EXPIRED = "expired"


@dataclass(slots=True)
class Turn:
    """A turn as far as it was handed to the API: `pieces` calls with `text_length` characters.

    `replay`: with what its chunks were last sent again.
    """

    state: TurnState = TurnState.OPEN
    pieces: int = 0
    text_length: int = 0
    touched: float = 0.0
    replay: str = ""

    @property
    def silent(self) -> bool:
        """Whether later chunks are not spoken."""
        return self.state in (TurnState.INTERRUPTED, TurnState.FAILED, TurnState.EXPIRED)


@dataclass(frozen=True, slots=True)
class Ended:
    """How a command ended: the event that said so, with those that went with it, and a fingerprint of the body."""

    fingerprint: bytes
    event: Event
    at: float
    before: tuple[Event, ...] = ()
    after: tuple[Event, ...] = ()


@dataclass(frozen=True, slots=True)
class SentPart:
    """The characters of one chunk that an attempt carries. The chunk is named by its entry's `key`."""

    key: str
    start: int
    end: int
    last: bool


@dataclass(frozen=True, slots=True)
class Attempt:
    """The piece that was about to be said, as it was sent: the *intent*. Only its outcome tells whether it was.

    `shapes`, `auto_final` and `name` are the piece's, see `model.Piece`.
    """

    turn_id: str
    text: str
    is_final: bool
    parts: tuple[SentPart, ...]
    begun: float
    count: int
    shapes: shaper.State | None = None
    auto_final: bool = False
    name: str = ""


@dataclass(frozen=True, slots=True)
class State:
    """What there is one of per conversation.

    `number` counts attempts, so that an outcome that comes late cannot undo what came after. `attempt` stands as long
    as nobody has said what became of it. `busy_until`: a call whose answer never came counts as running until then.
    `spoken`: characters of a chunk that left in earlier pieces, by entry key. `shapes`: how far each open turn was
    shaped, and what its next piece depends on. `playing_until`: when, by estimate, the
    avatar falls silent. `heard_last`: the turn whose text the API took last, with those whose text it may have taken
    since. `silenced`: what interrupts that have not ended have done, by entry key: turns, and the chunks each has lost.
    `doubtful`: chunks, by entry key, that were perhaps said in an attempt that could not be repeated as it was.
    `fences`: the interrupts whose express copy has acted and whose ordered copy is still to come, and since when.
    `numbers`: of the chunks that have ended.
    `partition`: where the conversation's commands came from last.
    `untold`: events with which no command has ended; nobody can tell whether they were told before a worker died.
    """

    number: int = 0
    attempt: Attempt | None = None
    busy_until: float = 0.0
    spoken: Mapping[str, int] = field(default_factory=dict)
    shapes: Mapping[str, shaper.State] = field(default_factory=dict)
    playing_until: float = 0.0
    heard_last: frozenset[str] = frozenset()
    silenced: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    doubtful: frozenset[str] = frozenset()
    fences: Mapping[str, float] = field(default_factory=dict)
    numbers: Numbers = field(default_factory=dict)
    partition: int | None = None
    untold: tuple[Event, ...] = ()


@dataclass(frozen=True, slots=True)
class Changes:
    """What is to be written of a conversation: its state, the turns that changed, the commands that ended.

    `base`: the version of what this was decided on, "" if there was nothing; `version`: of what it makes of that.
    `before`: the state that this changes, as far as whoever changes it knows.
    """

    base: str
    version: str
    before: State
    state: State
    turns: Mapping[str, Turn]
    ended: Mapping[str, Ended]


def with_numbers(numbers: Numbers, turn_id: str, ranges: Iterable[tuple[int, int]]) -> Numbers:
    """With these of one turn, which is the latest; what is more than may be remembered is forgotten."""
    merged: list[tuple[int, int]] = []
    for first, last in sorted([*numbers.get(turn_id, ()), *ranges]):
        if merged and first <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(last, merged[-1][1]))
        else:
            merged.append((first, last))
    others = [item for item in numbers.items() if item[0] != turn_id]
    return dict([*others[-NUMBERED_TURNS + 1 :], (turn_id, tuple(merged[-NUMBER_RANGES:]))])


class Memory:
    """The memory of one conversation.

    `ended` holds what was looked up and what has ended since, not all that ever did. `elsewhere` names the others, None
    if they are too many: how they ended, only the ledger can tell. `version`: of what was recalled, and then of what
    was changed since; it begins with `writer`, which no other memory has, so that no version is ever taken for another.
    """

    def __init__(
        self,
        state: State | None = None,
        turns: Mapping[str, Turn] | None = None,
        *,
        elsewhere: Iterable[str] | None = (),
        version: str = "",
        writer: str = "",
    ) -> None:
        self.version = version
        self.elsewhere = None if elsewhere is None else set(elsewhere)
        self.state = state or State()
        self.turns: dict[str, Turn] = dict(turns or {})
        self.ended: dict[str, Ended] = {}
        self._written = self.state
        self._touched: set[str] = set()
        self._new: dict[str, Ended] = {}
        self._versions = (f"{writer} {number}" for number in count(1))

    def settle_in(self, partition: int) -> None:
        """The conversation's commands come from there; that is written with whatever is written next."""
        self.state = self._written = replace(self.state, partition=partition)

    def move(self, partition: int) -> None:
        """The conversation's commands come from there; that is to be written."""
        self.update(partition=partition)

    def turn(self, turn_id: str, now: float) -> Turn:
        """The turn, to be changed; new if it was never heard of."""
        turn = self.turns.setdefault(turn_id, Turn())
        turn.touched = now
        self._touched.add(turn_id)
        return turn

    def reopen(self, turn_id: str, now: float) -> None:
        """The turn begins anew."""
        self.turns[turn_id] = Turn(touched=now, replay=self.turns[turn_id].replay)
        self._touched.add(turn_id)
        self.shape(turn_id, None)

    def is_silent(self, turn_id: str) -> bool:
        """Whether chunks of that turn are not spoken."""
        turn = self.turns.get(turn_id)
        return turn is not None and turn.silent

    def is_interrupted(self, turn_id: str) -> bool:
        """Whether that is because of an interrupt: then what was said of it is not to be heard either."""
        turn = self.turns.get(turn_id)
        return turn is not None and turn.state is TurnState.INTERRUPTED

    def open_turns(self) -> Iterator[str]:
        """Turns that were begun and neither closed nor silenced."""
        return (turn_id for turn_id, turn in self.turns.items() if turn.state is TurnState.OPEN)

    def end(self, message_id: str, ended: Ended) -> None:
        """A command has ended."""
        self.ended[message_id] = ended
        self._new[message_id] = ended

    def trim(self) -> None:
        """Leave it to the ledger to remember what ended long ago."""
        surplus = len(self.ended) - KEPT_AT_HAND
        if surplus > KEPT_AT_HAND:
            oldest = list(self.ended)[:surplus]
            for message_id in oldest:
                del self.ended[message_id]
            if self.elsewhere is not None:
                self.elsewhere = None if len(self.elsewhere) > NAMED else self.elsewhere | set(oldest)

    def to_look_up(self, message_ids: set[str]) -> set[str]:
        """Which of these commands may have ended in a way that only the ledger knows."""
        unknown = {one for one in message_ids if one not in self.ended}  # `-` would walk through all that have ended
        return unknown if self.elsewhere is None else unknown & self.elsewhere

    @property
    def spoken(self) -> Mapping[str, int]:
        """See `State`, here and below."""
        return self.state.spoken

    @property
    def playing_until(self) -> float:
        """When the avatar falls silent."""
        return self.state.playing_until

    @playing_until.setter
    def playing_until(self, time: float) -> None:
        self.update(playing_until=time)

    @property
    def heard_last(self) -> frozenset[str]:
        """Whose text may be playing."""
        return self.state.heard_last

    @heard_last.setter
    def heard_last(self, turn_ids: frozenset[str]) -> None:
        self.update(heard_last=turn_ids)

    def speak_up_to(self, key: str, end: int | None) -> None:
        """So many characters of the chunk have left; None: it has ended."""
        if end is not None:
            self.update(spoken={**self.state.spoken, key: end})
        elif key in self.state.spoken or key in self.state.doubtful:
            spoken = {other: count for other, count in self.state.spoken.items() if other != key}
            self.update(spoken=spoken, doubtful=self.state.doubtful - {key})

    @property
    def shapes(self) -> Mapping[str, shaper.State]:
        """See `State`."""
        return self.state.shapes

    def shape(self, turn_id: str, state: shaper.State | None) -> None:
        """The turn was shaped so far; None: it is over, or begins anew."""
        if state is not None:
            self.update(shapes={**self.state.shapes, turn_id: state})
        elif turn_id in self.state.shapes:
            self.update(shapes={other: shape for other, shape in self.state.shapes.items() if other != turn_id})

    def has_number(self, turn_id: str, seq: int) -> bool:
        """Whether a chunk of that turn with that number has ended."""
        return any(first <= seq <= last for first, last in self.state.numbers.get(turn_id, ()))

    def last_number(self, turn_id: str) -> int | None:
        """The highest number of a chunk of that turn that has ended."""
        ranges = self.state.numbers.get(turn_id)
        return ranges[-1][1] if ranges else None

    def note_number(self, turn_id: str, seq: int) -> None:
        """A chunk with that number has ended."""
        if not self.has_number(turn_id, seq):
            self.update(numbers=with_numbers(self.state.numbers, turn_id, [(seq, seq)]))

    def note_silenced(self, key: str, turns: Mapping[str, int]) -> None:
        """The interrupt has acted."""
        self.update(silenced={**self.state.silenced, key: turns})

    def take_silenced(self, key: str) -> Mapping[str, int]:
        """What the interrupt has done; it ends."""
        silenced = dict(self.state.silenced)
        turns = silenced.pop(key, {})
        if len(silenced) < len(self.state.silenced):
            self.update(silenced=silenced)
        return turns

    def update(self, **changes: object) -> None:
        """Change the state."""
        self.state = replace(self.state, **changes)  # type: ignore[arg-type]  # fields of State, by name

    def take_changes(self) -> Changes | None:
        """What is new since the last time; None if nothing is."""
        if not self._touched and not self._new and self.state is self._written:
            return None
        turns = {turn_id: replace(self.turns[turn_id]) for turn_id in self._touched}
        base, self.version = self.version, next(self._versions)
        changes = Changes(base, self.version, self._written, self.state, turns, self._new)
        self._touched, self._new, self._written = set(), {}, self.state
        return changes
