"""Chunks of a turn become pieces that a voice can speak. Pure: no clock, no randomness, no I/O.

    raw chunks ──▶ Cleaner (what is said) ──▶ Cutter (where it is cut) ──▶ Piece(text, start, end, state)

The laws:

1. The texts of all pieces, joined with nothing in between, are the cleaned text of the turn. A piece keeps the white
   space it ends with.
2. The ranges `start` to `end` follow each other without gap or overlap and cover the raw text of the turn, mark-up
   too.
3. As long as nothing stalls, pieces depend on the text alone: not on how it was chopped, not on time.
4. No piece is longer than the cap, and speakable text stands behind every piece but the last.
5. A new `Shaper` with the `state` of a piece, fed with the raw text from its `end` on, goes on just as the old one
   would.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import regex

from worker.core.shaping.clean import LINE_START, Cleaner, MarkUp
from worker.core.shaping.cut import Cutter, Cutting, last_boundary
from worker.core.shaping.markup import Clean, Pattern

_SLICE = 1024  # characters read at once, so that one huge chunk costs no more than many small ones
_LAST_SPACE: Pattern = regex.compile(r"[ \n](?=[^ \n]+\Z)")


@dataclass(frozen=True, slots=True)
class Shaping:
    """How turns are shaped: what is kept from the voice, and where the rest is cut."""

    clean: Clean = field(default_factory=Clean)
    cutting: Cutting = field(default_factory=Cutting)


class State(NamedTuple):
    """All that the next piece depends on, besides the raw text of the turn from `offset` on.

    Numbers and short strings: `json.dumps(state)` writes it, `State(*json.loads(dumped))` reads it.
    """

    offset: int = 0  # raw characters of the turn that are in finished pieces
    pieces: int = 0  # finished pieces: the first ones are shorter
    line: str = LINE_START.line  # these four: see `MarkUp`
    open: str = LINE_START.open
    last: str = LINE_START.last
    before: str = LINE_START.before


NEW_TURN = State()


@dataclass(frozen=True, slots=True)
class Piece:
    """What one call says."""

    text: str
    start: int  # the first raw character of the turn that it covers
    end: int  # the one behind the last
    state: State  # behind it

    @property
    def speakable(self) -> bool:
        """Whether a call is due. Only the last piece of a turn may have no letter or digit, or no text at all."""
        return _is_speakable(self.text)


class Shaper:
    """Shapes one turn. Each method returns the pieces that it decided, to be spoken in this order."""

    def __init__(self, shaping: Shaping, state: State = NEW_TURN) -> None:
        offset, pieces, *mark_up = state
        self._cleaner = Cleaner(shaping.clean, MarkUp(*mark_up), offset)
        self._cutter = Cutter(shaping.cutting, pieces)
        self._end = offset
        self._stalled = False

    @property
    def waiting(self) -> int:
        """Clean characters in no piece yet. The clock of a stall begins anew when they grow."""
        return len(self._cleaner.text)

    @property
    def pending(self) -> bool:
        """Whether anything was read that is in no piece yet, be it without a word: the clock of a stall runs."""
        return self._end < self._cleaner.offset

    @property
    def begun(self) -> bool:
        """Whether there was a piece to speak."""
        return self._cutter.pieces > 0

    def push(self, text: str) -> list[Piece]:
        """Read the raw text of a chunk, wherever it was cut out of the turn."""
        pieces, waiting = [], self.waiting
        for begin in range(0, len(text), _SLICE):
            self._cleaner.feed(text[begin : begin + _SLICE])
            while length := self._cutter.find(self._cleaner.text):
                pieces.append(self._take(length))
        if pieces or self.waiting > waiting:
            self._stalled = False
        return pieces

    def stall(self) -> list[Piece]:
        """Nothing to say came for a while: speak what waits, up to the end of a word. Called again: all of it.

        What has no word goes, too, in one piece that is not speakable: nothing is held for long. Only mark-up whose end
        is missing (`[a link](htt`) goes on waiting for it, at most for some hundred characters.
        """
        text = self._cleaner.text
        length, again = len(text), self._stalled
        if not again and not self._cutter.is_whole(text):
            space = _LAST_SPACE.search(text)
            length = space.end() if space else 0
        self._stalled = True
        if _is_speakable(text[:length]):
            return list(self._take_all(length))
        if self.pending and (again or not text):
            self._cutter.skip()
            return [self._take(len(text))]
        return []

    def finish(self) -> list[Piece]:
        """The turn is final: the rest, so that all raw text is covered. Its last piece may have nothing to say."""
        self._cleaner.feed("", final=True)
        pieces = list(self._take_all(self.waiting))
        if self._end < self._cleaner.offset:
            pieces.append(self._take(0))
        return pieces

    def _take_all(self, length: int) -> Iterator[Piece]:
        while length:
            cut = self._cutter.find(self._cleaner.text[:length], final=True) or self._cutter.cut(length)
            yield self._take(cut)
            length -= cut

    def _take(self, length: int) -> Piece:
        text, end, mark_up = self._cleaner.take(length)
        piece = Piece(text, self._end, end, State(end, self._cutter.pieces, *mark_up))
        self._end = end
        return piece


def _is_speakable(text: str) -> bool:
    return any(map(str.isalnum, text))


# For `SPEECH_SHAPING=off`: where a text that is too long is split, the best places first, searched from its end.
_PLACES: tuple[Pattern, ...] = tuple(
    regex.compile(place, regex.REVERSE)
    for place in (
        r"\n+",
        r"""[\p{STerm}…]["'”’»)\]]*\s+|[。！？｡][」』”’）]*""",
        r"[;:,،؛]\s+|[，、；：—]",
        r"\s+",
    )
)


def split(text: str, cap: int) -> list[str]:
    """Parts of at most `cap` characters that join to `text`. Nothing is cleaned, and what fits is not split."""
    parts = []
    while len(text) > cap:
        found = (place.search(text, cap // 2, cap) for place in _PLACES)
        end = next((place.end() for place in found if place), 0) or last_boundary(text, cap)
        parts.append(text[:end])
        text = text[end:]
    return [*parts, text]
