"""Chunks through a lane become pieces: however chopped, and wherever a worker dies, the same as if nothing happened."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest

from tests.support.conversation import OK, RULES, Conversation, speak, wire
from worker.core.model import Entry, speak_of
from worker.core.shaping.cut import Cutting, Lengths
from worker.core.shaping.shaper import Piece, Shaper, Shaping, split
from worker.core.work import Rules, Say, Wait

CORPUS = {file.stem: file.read_text("utf-8") for file in (Path(__file__).parent / "shaping" / "corpus").glob("*.md")}
PATIENT = replace(RULES, stall_first_s=3600, stall_s=3600)
SHORT = Shaping(cutting=Cutting(lengths=(Lengths(3, 5, 8, 20), Lengths(12, 18, 24, 60)), cap=60, defer=20))
HARD = (
    "# Well, **this is it**:\n\n- one [link](http://example.com/a_(b)) and `code, too`;\n- two 😀👩\u200d💻. Then\n"
    "```python\nprint('Never. Said.')\n```\nDr. Smith paid 3.14 “or so, he said. Did he?” <b>Yes</b>&amp;no. "
    f"他说：「好的。」对吧？ {'x' * 70} end."  # noqa: RUF001 - as they write it
)


def chop(text: str, rng: random.Random, longest: int) -> list[str]:
    ends = [0]
    while ends[-1] < len(text):
        ends.append(ends[-1] + rng.randint(1, longest))
    return [text[start:end] for start, end in pairwise(ends)]


@dataclass
class Telling:
    """A turn that is being told to a worker, chunk by chunk: `coming` are not sent yet, `held` not acknowledged."""

    talk: Conversation
    coming: list[Entry]
    held: list[Entry] = field(default_factory=list)

    def go_on(self, happens: Callable[["Telling"], None]) -> "Telling":
        """Tell the rest; `happens` is called before and after each thing that happens, also with a call under way."""
        self._say(happens)
        while self.coming:
            self.held.append(self.coming[0])
            self.talk.offer(self.coming.pop(0))
            happens(self)
            self._say(happens)
        return self

    def _say(self, happens: Callable[["Telling"], None]) -> None:
        while (work := self.talk.next()) is not None:
            happens(self)
            if isinstance(work, Say) and self.talk.calling:
                self.talk.done(OK)
                happens(self)
            elif isinstance(work, Wait):
                if work.until - self.talk.now > 10:
                    break
                self.talk.now = work.until

    def die(self) -> None:
        """The worker dies: another one gets what was not acknowledged."""
        ended = {one.key for told in self.talk.conclusions for one in told.entries if isinstance(one, Entry)}
        self.held = [replace(one, redelivered=True) for one in self.held if one.key not in ended]
        self.talk.forget().offer(*self.held)

    def fork(self) -> "Telling":
        """The same turn, told from here on to a worker that dies now."""
        written = replace(self.talk.written, turns=dict(self.talk.written.turns), ended=dict(self.talk.written.ended))
        talk = replace(self.talk, written=written, conclusions=list(self.talk.conclusions), works=[])
        fork = Telling(talk, list(self.coming), self.held)
        fork.die()
        return fork


def telling_of(chunks: list[str], rules: Rules) -> Telling:
    entries = [speak("t1", text, final=number == len(chunks)) for number, text in enumerate(chunks, 1)]
    return Telling(Conversation(rules), entries)


def dying(rng: random.Random) -> Callable[[Telling], None]:
    return lambda telling: telling.die() if rng.random() < 0.1 else None


@cache
def shaped(text: str, shaping: Shaping) -> list[Piece]:
    shaper = Shaper(shaping)
    return [piece for piece in (*shaper.push(text), *shaper.finish()) if piece.speakable]


def assert_as_shaped(talk: Conversation, text: str, chunks: list[str], shaping: Shaping) -> None:
    wanted = shaped(text, shaping)
    events = {event.id(""): wire(event) for event in talk.events if event.type == "avatar.speech.accepted"}
    accepted = list(events.values())
    assert [data["text"] for data in accepted] == [piece.text for piece in wanted]
    assert [data["isFinal"] for data in accepted] == [*[False] * (len(wanted) - 1), True]
    # Each chunk is listed with the piece that covers its last character.
    ends, at = list[int](), 0
    for chunk in chunks:
        at += len(chunk)
        ends.append(next((number for number, piece in enumerate(wanted) if piece.end >= at), len(wanted) - 1))
    listed = [(number, command) for number, data in enumerate(accepted) for command in data["commandIds"]]
    assert [number for number, _ in listed] == ends
    assert len({command for _, command in listed}) == len(chunks)
    (completed,) = [wire(event) for event in talk.events if event.type == "avatar.turn.completed"][-1:]
    assert (completed["pieces"], completed["finalSent"]) == (len(wanted), True)
    state = talk.written.recall().state
    assert (state.attempt, state.spoken, state.shapes) == (None, {}, {})


@pytest.mark.parametrize("language", sorted(CORPUS))
@pytest.mark.parametrize("seed", range(4))
def test_workers_die_all_the_time(language: str, seed: int) -> None:
    rng, text = random.Random(f"{language} {seed}"), CORPUS[language]
    shaping = Shaping(cutting=Cutting(language=language))
    chunks = chop(text, rng, rng.choice([4, 12, 60]))
    talk = telling_of(chunks, replace(PATIENT, speech=shaping)).go_on(dying(rng)).talk
    assert_as_shaped(talk, text, chunks, shaping)


@pytest.mark.parametrize("longest", [3, 9, 40, 500])
def test_a_worker_dies_at_each_point(longest: int) -> None:
    chunks = chop(HARD, random.Random(longest), longest)
    forks = list[Telling]()
    undisturbed = telling_of(chunks, replace(PATIENT, speech=SHORT)).go_on(lambda telling: forks.append(telling.fork()))
    assert_as_shaped(undisturbed.talk, HARD, chunks, SHORT)
    for fork in forks:
        assert_as_shaped(fork.go_on(lambda _: None).talk, HARD, chunks, SHORT)


@pytest.mark.parametrize("seed", range(30))
def test_off_covers_each_character_once_within_the_cap(seed: int) -> None:
    rng = random.Random(seed)
    chunks = [chunk for chunk in chop(HARD * 3, rng, 200) if chunk.strip()]
    rules = replace(PATIENT, shaping="off", speech=SHORT)
    talk = telling_of(chunks, rules).go_on(dying(rng)).talk
    events = {event.id(""): wire(event) for event in talk.events if event.type == "avatar.speech.accepted"}
    assert [data["text"] for data in events.values()] == [part for chunk in chunks for part in split(chunk, 60)]
    assert [len(data["commandIds"]) for data in events.values()].count(1) == len(chunks)


def test_the_age_of_a_piece_is_that_of_its_oldest_chunk() -> None:
    talk = Conversation().offer(speak("t1", "a", born=RULES.max_age_s), speak("t1", "b", born=7.0))
    assert {speak_of(one).text for one in talk.book.chunks()} == {"a", "b"}
    talk.now = 9.0
    assert talk.say().piece.born == 7.0


def test_a_piece_knows_the_chunk_that_decided_it() -> None:
    talk = Conversation(rules=PATIENT)
    chunks = [speak("t1", text) for text in ("This is the first sentence. And", " then", " comes", " more.")]
    talk.offer(*chunks[:1])
    assert isinstance(talk.next(), Wait)
    talk.offer(*chunks[1:])
    assert talk.say().piece.decided_by is chunks[1]
    talk.done(OK)
    talk.offer(end := speak("t1", "", final=True))
    assert talk.say().piece.decided_by is end
