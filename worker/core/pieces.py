"""From chunks to pieces: what the next `say-text` carries, and which characters of which chunk that is.

With `SPEECH_SHAPING=sentences` a turn is shaped (`shaping.shaper`) as its chunks come. What was decided is kept while
the chunks stay; otherwise, in another worker too, it is decided again from what the memory keeps, and comes out the
same. With `off` a chunk is a piece, as it is, but for the cap.
"""

from bisect import bisect_left
from collections import deque
from collections.abc import Sequence

from worker.core.memory import Memory
from worker.core.model import Entry, Part, Piece, speak_of
from worker.core.shaping.shaper import NEW_TURN, Shaper, Shaping, State, split
from worker.core.shaping.shaper import Piece as Shaped
from worker.core.work import Rules

SLICE = 1000
"""Characters read at once: a long chunk does not hold up other conversations."""


class Pieces:
    """The pieces of the turn at the head of the book, one at a time."""

    def __init__(self, memory: Memory, rules: Rules) -> None:
        self._memory = memory
        self._rules = rules
        self._draft: _Draft | None = None

    def next(self, run: Sequence[Entry], now: float, *, ends: bool, closes: bool) -> Piece | float | None:
        """The next piece of these chunks of one turn; its text is empty where there is nothing to say.

        `ends`: nothing can join them any more; `closes`: nor comes anything later. Returns until when to wait for more
        text where a piece is not decided yet; None: however long it takes.
        """
        if self._rules.shaping == "off":
            return _untouched(run[0], self._memory.spoken.get(run[0].key, 0), self._rules.speech.cutting.cap)
        draft = self._draft
        turn_id = speak_of(run[0]).turn_id
        if draft is None or not draft.goes_on_with(run, self._memory.shapes.get(turn_id, NEW_TURN)):
            draft = self._draft = _Draft(turn_id, self._memory, self._rules.speech, now)
        draft.read(run, now, ends=ends)
        if not draft.decided:
            due = draft.stall(now, self._rules.stall_first_s, self._rules.stall_s)
            if not draft.decided:
                return due
        return draft.take(closes=closes)


class _Draft:
    """A turn that is being shaped, from what was said of it on."""

    def __init__(self, turn_id: str, memory: Memory, shaping: Shaping, now: float) -> None:
        self.decided: deque[Shaped] = deque()
        self._turn_id = turn_id
        self._spoken = memory.spoken
        self._state = memory.shapes.get(turn_id, NEW_TURN)
        self._shaper = Shaper(shaping, self._state)
        self._cap = shaping.cutting.cap
        self._entries: list[Entry] = []
        self._places: deque[tuple[int, int]] = deque()  # where in the turn each of them begins and ends
        self._unread: deque[str] = deque()
        self._read = self._state.offset
        self._since = now
        self._ended = False
        self._decided_by: Entry | None = None

    def goes_on_with(self, run: Sequence[Entry], state: State) -> bool:
        """Whether these chunks are those it has, or more where more may come, and all it has decided was said."""
        if speak_of(run[0]).turn_id != self._turn_id or state != self._state:
            return False
        return self._entries == (run if self._ended else run[: len(self._entries)])

    def read(self, run: Sequence[Entry], now: float, *, ends: bool) -> None:
        """Take in the chunks that are new, and read on until a piece is decided: no more, however much there is."""
        for entry in run[len(self._entries) :]:
            text, spoken = speak_of(entry).text, self._spoken.get(entry.key, 0)
            self._unread += (text[at : at + SLICE] for at in range(spoken, len(text), SLICE))
            begin = self._read - spoken
            self._read = begin + len(text)
            self._entries.append(entry)
            self._places.append((begin, self._read))
        while self._unread and not self.decided:
            waiting = self._shaper.waiting if self._shaper.pending else -1
            self.decided += self._shaper.push(self._unread.popleft())
            if self.decided or self._shaper.waiting > waiting:
                self._since = now
            if self.decided:
                self._decided_by = self._last_read()
        if ends and not (self._unread or self._ended):
            self._ended = True
            if not self.decided:
                self._decided_by = run[-1] if speak_of(run[-1]).is_final else None
            self.decided += self._shaper.finish()
            self._join_last()

    def stall(self, now: float, first_s: float, later_s: float) -> float | None:
        """Decide what is due because nothing to say came for so long. Returns when the next is due, if any is."""
        while self._shaper.pending:
            due = self._since + (later_s if self._shaper.begun else first_s)
            if now < due:
                return due
            self._since = now
            self.decided += self._shaper.stall()
            if self.decided:
                self._decided_by = None
                break
        return None

    def take(self, *, closes: bool) -> Piece:
        """The next decided piece leaves."""
        shaped = self.decided.popleft()
        self._state = shaped.state
        last = self._ended and not self.decided
        parts: list[Part] = []
        left = 0
        while self._places:
            begin, end = self._places[0]
            if begin >= shaped.end and not last:
                break
            whole = end <= shaped.end
            parts.append(Part(self._entries[left], max(shaped.start - begin, 0), min(shaped.end, end) - begin, whole))
            if not whole:
                break
            self._places.popleft()
            left += 1
        del self._entries[:left]
        text = shaped.text if shaped.speakable else ""
        return Piece(
            self._turn_id,
            text,
            closes and last,
            tuple(parts),
            shapes=shaped.state,
            decided_by=self._decided_by,
        )

    def _last_read(self) -> Entry:
        """The chunk that was read last: those behind it have come, too, but decided nothing yet."""
        upto = self._read - sum(map(len, self._unread))
        place = bisect_left(self._places, upto, key=lambda one: one[1])
        return self._entries[place]

    def _join_last(self) -> None:
        """What has no word goes with the piece before it; there is always a last piece."""
        if not self.decided:
            self.decided.append(Shaped("", self._read, self._read, self._state))
        last = self.decided[-1]
        if not last.speakable and len(self.decided) > 1:
            self.decided.pop()
            before = self.decided.pop()
            text = before.text + last.text if len(before.text + last.text) <= self._cap else before.text
            self.decided.append(Shaped(text, before.start, last.end, last.state))


def _untouched(entry: Entry, spoken: int, cap: int) -> Piece:
    speak = speak_of(entry)
    rest = speak.text[spoken:]
    text = split(rest, cap)[0]
    last = len(text) == len(rest)
    part = Part(entry, spoken, spoken + len(text), last)
    text = text if text.strip() else ""
    return Piece(speak.turn_id, text, speak.is_final and last, (part,), decided_by=entry)
