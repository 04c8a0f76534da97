"""The laws of `shaper`, over a corpus in many languages and over text made of everything that is hard."""

import json
import random
from copy import copy
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.core.shaping.clean import Cleaner
from worker.core.shaping.cut import Cutting, Lengths
from worker.core.shaping.markup import Clean
from worker.core.shaping.shaper import NEW_TURN, Piece, Shaper, Shaping, State

CORPUS = {file.stem: file.read_text(encoding="utf-8") for file in (Path(__file__).parent / "corpus").glob("*.md")}
CHOPPINGS = 200  # of each text; 13 texts make 2,600

# Everything that is hard, ␣ for a space and so on.
FRAGMENTS = """
    * ** *** _ __ ~~ ` `` ``` ```py⏎ \\ \\* # #␣ ##␣T - -␣ *␣ >␣ 1.␣ a)␣ ⏎b 12 --- ---- === [␣]␣ | |␣a |--|
    [ ] ( ) ]( ![ (see␣ [x](http://y) [1] [^2] 【1†s】 h w http https://a.b/c www. www.a
    < b> </b> <br> <!-- --> <think> </think> & &amp; ; : ,␣ . .␣ !␣ ?␣ ...␣ … - ␣—␣ — ' " “ ” « » ␣» »A ␣«
    ⏎ ⏎⏎ ␍⏎ ⇥ ␣ ␣␣ word word␣ i I␣ Dr.␣ 3. 14 1␣000␣ z.␣B.␣ U.S.␣ 'em␣ don't␣ Hello␣there.␣ xxxxxxxxxxxxxxxxxxxxxxxxx
    ~~~⏎ ~~~py⏎ ~~~~ ( “ ” ✅ 1\ufe0f\u20e3␣ –␣x ##Y [n]:␣http://c [1]:␣ [^n] &#x1F600; &shy;
    <b␣a <i␣x="y"> T<a␣b> <x>(<c␣d>)␣ "t" \\⏎ :␣ —
    é e\u0301 \u200b \u200d \a 😀 👩\u200d💻 🇩🇪 \ud83d \ude00 你好 今日は 。 ， 、 「 」 สวัสดี␣ ؟␣ ।␣ ¿ { }
""".split()
HARD = [fragment.translate(str.maketrans("␣⏎␍⇥", " \n\r\t")) for fragment in FRAGMENTS]

# Short pieces, so that a short text has many cuts of every kind, forced ones included.
SHORT = Cutting(lengths=(Lengths(3, 5, 8, 20), Lengths(12, 18, 24, 60)), cap=60, defer=20)


def shape(chunks: list[str], shaping: Shaping, state: State = NEW_TURN) -> list[Piece]:
    shaper = Shaper(shaping, state)
    return [piece for chunk in chunks for piece in shaper.push(chunk)] + shaper.finish()


def cleaned(text: str, clean: Clean) -> str:
    cleaner = Cleaner(clean)
    cleaner.feed(text, final=True)
    return cleaner.text


def chop(text: str, rng: random.Random, longest: int) -> list[str]:
    ends = [0]
    while ends[-1] < len(text):
        ends.append(ends[-1] + rng.randint(1, longest))
    return [text[start:end] for start, end in pairwise(ends)]


def assert_laws(text: str, pieces: list[Piece], shaping: Shaping) -> None:
    assert "".join(piece.text for piece in pieces) == cleaned(text, shaping.clean)
    assert [piece.start for piece in pieces] == [0, *(piece.end for piece in pieces)][: len(pieces)]
    assert (pieces[-1].end if pieces else 0) == len(text)
    assert all(len(piece.text) <= shaping.cutting.cap for piece in pieces)
    assert all(piece.state.offset == piece.end for piece in pieces)


def assert_restarts(text: str, pieces: list[Piece], shaping: Shaping, rng: random.Random) -> None:
    for index, piece in enumerate(pieces[:-1]):
        state = State(*json.loads(json.dumps(piece.state)))
        rest = chop(text[piece.end :], rng, rng.choice([1, 4, 100]))
        assert shape(rest, shaping, state) == pieces[index + 1 :]


class Prefixes:
    """What a shaper is when it has read so much of a text: the same, whatever the chunks it came in.

    So choppings share the steps they have in common: a chunk leads from one prefix to another, and that is looked at
    once. Whatever a chopping ends in is then what reading one character at a time ends in.
    """

    def __init__(self, text: str, shaping: Shaping) -> None:
        shaper = Shaper(shaping)
        self.pieces: list[Piece] = []
        self._text, self._looked_at = text, set[tuple[int, int]]()
        self._shapers, self._pieces = [copied(shaper)], [0]
        for character in text:
            self.pieces += shaper.push(character)
            self._shapers.append(copied(shaper))
            self._pieces.append(len(self.pieces))
        self.pieces += shaper.finish()

    def assert_same(self, chunks: list[str]) -> None:
        begin = 0
        for chunk in chunks:
            end = begin + len(chunk)
            if (begin, end) not in self._looked_at:
                shaper = copied(self._shapers[begin])
                assert shaper.push(chunk) == self.pieces[self._pieces[begin] : self._pieces[end]]
                assert memory(shaper) == memory(self._shapers[end])
                self._looked_at.add((begin, end))
            begin = end
        assert begin == len(self._text)


def copied(shaper: Shaper) -> Shaper:
    copy_, cleaner = copy(shaper), copy(shaper._cleaner)
    cleaner._origin, cleaner._history = cleaner._origin[:], cleaner._history[:]
    copy_._cleaner, copy_._cutter = cleaner, copy(shaper._cutter)
    return copy_


def memory(shaper: Shaper) -> dict[str, object]:
    return vars(shaper) | {"_cleaner": vars(shaper._cleaner), "_cutter": vars(shaper._cutter)}


@pytest.mark.parametrize("language", sorted(CORPUS))
def test_corpus(language: str) -> None:
    text, shaping, rng = CORPUS[language], Shaping(cutting=Cutting(language=language)), random.Random(language)
    pieces = shape([text], shaping)
    assert_laws(text, pieces, shaping)
    assert all(piece.speakable for piece in pieces)
    prefixes = Prefixes(text, shaping)
    assert prefixes.pieces == pieces
    for _ in range(CHOPPINGS):
        prefixes.assert_same(chop(text, rng, rng.choice([1, 3, 8, 40])))
    assert shape(chop(text, rng, 8), shaping) == pieces
    assert_restarts(text, pieces, shaping, rng)


@pytest.mark.parametrize("language", sorted(CORPUS))
def test_calls_are_few(language: str) -> None:
    """At most an eighth as many calls as chunks, at four characters a token, or two in Chinese, Japanese, Korean."""
    text = CORPUS[language]
    chunks = len(text) / (2 if language in ("zh", "ja", "ko") else 4)
    assert len(shape([text], Shaping(cutting=Cutting(language=language)))) <= chunks / 8


def test_the_corpus_is_large_enough() -> None:
    assert len(CORPUS) >= 8


@settings(max_examples=400, deadline=None)
@given(
    fragments=st.lists(st.sampled_from(HARD), max_size=80),
    off=st.sets(st.sampled_from(sorted(Clean.__slots__)), max_size=3),
    cutting=st.sampled_from([Cutting(), SHORT]),
    seed=st.integers(0, 2**32),
)
def test_anything(fragments: list[str], off: set[str], cutting: Cutting, seed: int) -> None:
    rng = random.Random(seed)
    text, shaping = "".join(fragments), Shaping(Clean(**dict.fromkeys(off, False)), cutting)
    pieces = shape([text], shaping)
    assert_laws(text, pieces, shaping)
    for longest in (1, 3, 30):
        assert shape(chop(text, rng, longest), shaping) == pieces
    assert_restarts(text, pieces, shaping, rng)


@settings(max_examples=200, deadline=None)
@given(
    fragments=st.lists(st.sampled_from(HARD), min_size=1, max_size=60),
    stalls=st.lists(st.booleans(), min_size=60),
    seed=st.integers(0, 2**32),
)
def test_stalls_lose_nothing(fragments: list[str], stalls: list[bool], seed: int) -> None:
    """With stalls anywhere, raw text is covered once, all words are spoken, and a restart changes nothing."""
    rng = random.Random(seed)
    text, shaping = "".join(fragments), Shaping(cutting=SHORT)
    shaper, pieces, restart = Shaper(shaping), list[Piece](), 0
    for chunk, stall in zip(chop(text, rng, 7), stalls * 10, strict=False):
        pieces += shaper.push(chunk)
        if stall and (spoken := shaper.stall()):
            pieces += spoken
            restart = len(pieces)
    pieces += shaper.finish()
    assert [piece.start for piece in pieces] == [0, *(piece.end for piece in pieces)][: len(pieces)]
    assert (pieces[-1].end if pieces else 0) == len(text)
    assert all(len(piece.text) <= SHORT.cap for piece in pieces)
    assert words("".join(piece.text for piece in pieces)) == words(cleaned(text, shaping.clean))
    if restart:
        state = pieces[restart - 1].state
        assert shape(chop(text[state.offset :], rng, 7), shaping, state) == pieces[restart:]


def words(text: str) -> str:
    return "".join(filter(str.isalnum, text))
