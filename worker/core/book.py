"""The book of one conversation: what waits, how what waited has ended, and what is to be told of it."""

import math
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from schemas.commands import Interrupt, Speak
from worker.core import verdict
from worker.core.memory import Ended, Memory
from worker.core.model import Entry, Session, speak_of
from worker.core.verdict import Conclusion


@dataclass(slots=True)
class Run:
    """The chunks of one turn at the head of the queue: nothing but what is added later can change them.

    `followed`: any other command stands behind them. `closes`: how many there are up to the first final, if there is
    one. `oldest`: the earliest any of them was born.
    """

    turn_id: str
    chunks: list[Entry] = field(default_factory=list)
    followed: bool = False
    closes: int | None = None
    oldest: float = math.inf
    seen: set[str] = field(default_factory=set)
    looked: int = 0

    def add(self, chunk: Entry) -> None:
        """The next one of the turn."""
        self.chunks.append(chunk)
        self.oldest = min(self.oldest, chunk.born)
        if self.closes is None and speak_of(chunk).is_final:
            self.closes = len(self.chunks)


@dataclass(slots=True)
class _Tally:
    """What `Book.waiting_chars` has counted so far, in the same way."""

    chars: int = 0
    seen: set[str] = field(default_factory=set)
    looked: int = 0


class Book:
    """Entries come in by `add`, in queue order, and go out by `end`, exactly once each; `take` hands over what to tell.

    An entry whose command has ended before is *known*: `repeat` ends it with the event that told it then.
    """

    def __init__(self, conversation_id: str, memory: Memory) -> None:
        self.conversation_id = conversation_id
        self.memory = memory
        self._queue: deque[Entry] = deque()
        self._numbered: dict[tuple[str, int], str] = {}
        self._run: Run | None = None
        self._tally: _Tally | None = None
        # Whoever served the conversation before may not have come to it.
        self._out = [Conclusion(event) for event in memory.state.untold]

    def __len__(self) -> int:
        return len(self._queue)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._queue)

    @property
    def head(self) -> Entry:
        """The oldest entry that has not ended."""
        return self._queue[0]

    def add(self, entry: Entry) -> None:
        """Queue an entry behind all others."""
        self._queue.append(entry)
        if isinstance(entry.command, Speak) and entry.command.seq is not None:
            self._numbered.setdefault((entry.command.turn_id, entry.command.seq), entry.key)

    def numbered(self, turn_id: str, seq: int) -> str | None:
        """The key of the chunk that waits under this number of its turn."""
        return self._numbered.get((turn_id, seq))

    def known(self, entry: Entry) -> bool:
        """Whether a command with this id has ended, in this life of it."""
        return entry.known_as in self.memory.ended

    def chunks(self) -> Iterator[Entry]:
        """All speech that waits, each command once: of two deliveries under one id the first counts."""
        seen: set[str] = set()
        for entry in self._queue:
            if isinstance(entry.command, Speak) and entry.key not in seen and not self.known(entry):
                yield entry
            seen.add(entry.key)

    def run(self, turn_id: str) -> Run:
        """The chunks of that turn at the head of the queue; the same object until something leaves.

        Repeats are not for speech, and interrupts end by themselves: neither parts what belongs together.
        """
        if self._run is None or self._run.turn_id != turn_id:
            self._run = Run(turn_id)
        run = self._run
        # Looked through once: a turn comes in hundreds of chunks, and each of them asks.
        while not run.followed and run.looked < len(self._queue):
            entry = self._queue[run.looked]
            if isinstance(entry.command, Interrupt) or entry.key in run.seen or self.known(entry):
                pass
            elif isinstance(entry.command, Speak) and entry.command.turn_id == turn_id:
                run.add(entry)
            else:
                run.followed = True
            run.seen.add(entry.key)
            run.looked += 1
        return run

    def waiting_chars(self) -> int:
        """How many characters of `chunks` have not left in earlier pieces."""
        if self._tally is None:
            self._tally = _Tally()
        tally = self._tally
        # Looked through once, too: while the API is down, each chunk that comes asks.
        while tally.looked < len(self._queue):
            entry = self._queue[tally.looked]
            if isinstance(entry.command, Speak) and entry.key not in tally.seen and not self.known(entry):
                tally.chars += len(entry.command.text)
            tally.seen.add(entry.key)
            tally.looked += 1
        return tally.chars - sum(count for key, count in self.memory.spoken.items() if key in tally.seen)

    def tell(self, conclusion: Conclusion) -> None:
        """Something happened with which no entry ends; the next one that does repeats it, should it come again."""
        self._out.append(conclusion)
        self.memory.update(untold=(*self.memory.state.untold, *conclusion.events))

    def end(self, conclusions: Iterable[Conclusion], now: float) -> None:
        """The entries of these conclusions end; their ids are remembered."""
        for conclusion in conclusions:
            if not conclusion.entries:
                self.tell(conclusion)
                continue
            self._out.append(conclusion)
            before = (*self.memory.state.untold, *conclusion.before)
            if self.memory.state.untold:
                self.memory.update(untold=())
            for entry in conclusion.entries:
                assert isinstance(entry, Entry)
                self._leave(entry)
                if isinstance(entry.command, Speak) and entry.command.seq is not None:
                    self.memory.note_number(entry.command.turn_id, entry.command.seq)
                if entry.known_as is not None:
                    ended = Ended(entry.fingerprint, conclusion.event, now, before, conclusion.after)
                    self.memory.end(entry.known_as, ended)

    def leave(self, entry: Entry) -> None:
        """End a known entry silently: how its command ended was told a moment ago."""
        assert entry.known_as is not None
        self._leave(entry)
        self._out.append(Conclusion(self.memory.ended[entry.known_as].event, (entry,), told=True))

    def repeat(self, entry: Entry, session: Session | None) -> None:
        """End a known entry: as its command ended, or as rejected if the body is another one."""
        assert entry.known_as is not None
        ended = self.memory.ended[entry.known_as]
        self._leave(entry)
        if ended.fingerprint == entry.fingerprint:
            self._out.append(verdict.repeated(ended, entry, session))
        else:
            self._out.append(verdict.message_id_reused(self.conversation_id, entry))

    def take(self) -> tuple[Conclusion, ...]:
        """What is to be told and settled, in order."""
        out, self._out = tuple(self._out), []
        return out

    def _leave(self, entry: Entry) -> None:
        self._run = self._tally = None
        if self._queue[0] is entry:
            self._queue.popleft()
        else:
            self._queue.remove(entry)
        if isinstance(entry.command, Speak) and entry.command.seq is not None:
            number = entry.command.turn_id, entry.command.seq
            if self._numbered.get(number) == entry.key:
                del self._numbered[number]
        self.memory.speak_up_to(entry.key, None)
