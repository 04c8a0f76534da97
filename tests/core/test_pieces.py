"""Chunks through a lane become pieces: however chopped, and wherever a worker dies, the same as if nothing happened."""

import random
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from tests.support.conversation import OK, RULES, Conversation, speak, wire
from worker.core.model import Entry, speak_of
from worker.core.shaping.cut import Cutting, Lengths
from worker.core.shaping.shaper import Shaper, Shaping, split
from worker.core.work import Rules, Say, Wait

CORPUS = {file.stem: file.read_text("utf-8") for file in (Path(__file__).parent / "shaping" / "corpus").glob("*.md")}
PATIENT = replace(RULES, stall_first_s=3600, stall_s=3600)
SHORT = Shaping(cutting=Cutting(lengths=(Lengths(3, 5, 8, 20), Lengths(12, 18, 24, 60)), cap=60, defer=20))
HARD = (
    "# Well, **this is it**:\n\n- one [link](http://example.com/a_(b)) and `code, too`;\n- two 😀👩\u200d💻. Then\n"
    "```python\nprint('Never. Said.')\n```\nDr. Smith paid 3.14 “or so, he said. Did he?” <b>Yes</b>&amp;no. "
    f"他说：「好的。」对吧？ {'x' * 130} end."  # noqa: RUF001 - as they write it
)


def chop(text: str, rng: random.Random, longest: int) -> list[str]:
    ends = [0]
    while ends[-1] < len(text):
        ends.append(ends[-1] + rng.randint(1, longest))
    return [text[start:end] for start, end in pairwise(ends)]


def speak_through(chunks: list[str], rules: Rules, dies: Callable[[], bool]) -> Conversation:
    """Say the turn; before and after each thing that happens the worker may die, also with a call under way."""
    talk = Conversation(rules)
    unacked: list[Entry] = []

    def perhaps_die() -> None:
        nonlocal unacked
        if dies():
            ended = {one.key for conclusion in talk.conclusions for one in conclusion.entries if isinstance(one, Entry)}
            unacked = [replace(one, redelivered=True) for one in unacked if one.key not in ended]
            talk.forget().offer(*unacked)

    for number, text in enumerate(chunks, 1):
        chunk = speak("t1", text, final=number == len(chunks))
        unacked.append(chunk)
        talk.offer(chunk)
        perhaps_die()
        while (work := talk.next()) is not None:
            perhaps_die()
            if isinstance(work, Say) and talk.calling:
                talk.done(OK)
                perhaps_die()
            elif isinstance(work, Wait):
                if work.until - talk.now > 10:
                    break
                talk.now = work.until
    return talk


def assert_as_shaped(talk: Conversation, text: str, chunks: list[str], shaping: Shaping) -> None:
    shaper = Shaper(shaping)
    wanted = [piece for piece in (*shaper.push(text), *shaper.finish()) if piece.speakable]
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
    talk = speak_through(chunks, replace(PATIENT, speech=shaping), lambda: rng.random() < 0.1)
    assert_as_shaped(talk, text, chunks, shaping)


@pytest.mark.parametrize("longest", [3, 9, 40, 500])
def test_a_worker_dies_at_each_point(longest: int) -> None:
    chunks = chop(HARD, random.Random(longest), longest)
    rules, steps = replace(PATIENT, speech=SHORT), 0

    def counting() -> bool:
        nonlocal steps
        steps += 1
        return False

    assert_as_shaped(speak_through(chunks, rules, counting), HARD, chunks, SHORT)
    for point in range(steps):
        left = iter(range(point, -1, -1))
        talk = speak_through(chunks, rules, lambda left=left: next(left, -1) == 0)  # type: ignore[misc]
        assert_as_shaped(talk, HARD, chunks, SHORT)


@pytest.mark.parametrize("seed", range(30))
def test_off_covers_each_character_once_within_the_cap(seed: int) -> None:
    rng = random.Random(seed)
    chunks = [chunk for chunk in chop(HARD * 3, rng, 200) if chunk.strip()]
    rules = replace(PATIENT, shaping="off", speech=SHORT)
    talk = speak_through(chunks, rules, lambda: rng.random() < 0.1)
    events = {event.id(""): wire(event) for event in talk.events if event.type == "avatar.speech.accepted"}
    assert [data["text"] for data in events.values()] == [part for chunk in chunks for part in split(chunk, 60)]
    assert [len(data["commandIds"]) for data in events.values()].count(1) == len(chunks)


def test_the_age_of_a_piece_is_that_of_its_oldest_chunk() -> None:
    talk = Conversation().offer(speak("t1", "a", born=RULES.max_age_s), speak("t1", "b", born=7.0))
    assert {speak_of(one).text for one in talk.book.chunks()} == {"a", "b"}
    talk.now = 9.0
    assert talk.say().piece.born == 7.0
