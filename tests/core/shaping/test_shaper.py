"""When pieces come, stalls, restarts, limits."""

import json
from itertools import accumulate

import pytest

from worker.core.shaping.cut import Cutting, Lengths
from worker.core.shaping.shaper import Piece, Shaper, Shaping, State, split


def texts(pieces: list[Piece]) -> list[str]:
    return [piece.text for piece in pieces]


def tokens(text: str) -> list[str]:
    """As a language model sends them: a word with the space in front of it."""
    return [text[:1], *text[1:].replace(" ", "\0 ").split("\0")]


# -- early, but not too early


LONG_START = "If you do not mind waiting for just a little while longer,"


@pytest.mark.parametrize(
    ("sent", "piece"),
    [
        (["Sure, I can help with that", ".", " Let"], ""),
        (["Sure, I can help with that", ".", " Let", " me"], "Sure, I can help with that. "),
        (["Yes. No. Well.", " I", " am", " here. And", " you?"], "Yes. No. Well. I am here. "),
        (["Here is what I found there:", " one", " two"], ""),
        (["Here is all that I found for you:", " one", " two"], "Here is all that I found for you: "),
        (["If you do not mind waiting for a while,", " we", " go"], ""),
        ([LONG_START, " we", " go"], f"{LONG_START} "),
        (["当然可以，我很乐意帮您！", "请"], "当然可以，我很乐意帮您！"),
        (["Overview of the trip", "\n\n", "The", " first"], "Overview of the trip\n"),
    ],
)
def test_the_first_piece_leaves_with_the_word_behind_its_cut(sent: list[str], piece: str) -> None:
    shaper = Shaper(Shaping())
    assert not any(shaper.push(chunk) for chunk in sent[:-1])
    assert "".join(texts(shaper.push(sent[-1]))) == piece


def test_pieces_grow() -> None:
    shaper = Shaper(Shaping())
    pieces = [piece for chunk in tokens("This sentence has thirty letters. " * 60) for piece in shaper.push(chunk)]
    weights = [len(piece.text) for piece in pieces]
    assert weights[:4] == [34, 136, 170, 272]
    assert set(weights[4:]) == {272}


def test_a_clause_ends_a_long_piece_and_a_word_a_longer_one() -> None:
    shaper = Shaper(Shaping())
    first, clause, comma, *_ = shaper.push(
        "This is the first sentence. I " + "walk on " * 25 + "on; " + "walk on, " * 60
    )
    assert (first.text[-4:], clause.text[-4:], comma.text[-4:]) == ("ce. ", "on; ", "on, ")
    assert [len(text) for text in texts(Shaper(Shaping()).push("word " * 400))] == [250, 800, 800]


def test_an_open_quotation_puts_off_a_cut_but_not_for_ever() -> None:
    shaper = Shaper(Shaping())
    first = shaper.push('He began to read: "' + "It was a dark night. " * 30)[0].text
    assert 200 <= len(first) <= 19 + 200 + 21


X = "x"
NO_WORDS = Shaping(cutting=Cutting(lengths=(Lengths(5000, 5000, 5000, 5000),)))


@pytest.mark.parametrize(
    ("text", "shaping", "lengths"),
    [
        (X * 2500, Shaping(), [1000, 1000, 500]),
        (X * 1500 + ". Next one.", Shaping(), [1000, 502, 9]),
        (X * 1000 + " next one.", Shaping(), [999, 11]),  # a piece does not begin with a space
        (X * 999 + "e\u0301 and so on", Shaping(), [999, 12]),  # nor with half a letter
        (X * 998 + "2**3 and so on", Shaping(), [999, 13]),  # nor with half a sign
        ("我" * 500, Shaping(), [333, 167]),  # a third of the characters, as long to speak
        ("word " * 400, NO_WORDS, [900, 900, 200]),  # near the cap any break will do,
        ("word " * 175 + "(" + "word " * 100, NO_WORDS, [901, 475]),  # in brackets, too
        (
            "This sentence is good. " + "=" * 1500 + " Next",
            Shaping(),
            [1000, 528],
        ),  # no word near enough behind the stop
        (X * 950 + ". " + "=" * 60 + "Next", Shaping(), [952, 64]),  # just near enough, though behind the cap
        ("?! " * 12 + "Well then, go on. Now.", Shaping(), [54, 4]),  # punctuation alone is no piece
    ],
)
def test_nothing_is_longer_than_the_cap(text: str, shaping: Shaping, lengths: list[int]) -> None:
    whole, chopped = Shaper(shaping), Shaper(shaping)
    pieces = whole.push(text) + whole.finish()
    assert [len(piece.text) for piece in pieces] == lengths
    assert [piece for character in text for piece in chopped.push(character)] + chopped.finish() == pieces


# -- stalls


@pytest.mark.parametrize(
    ("waiting", "first", "second"),
    [
        ("Let me check that.", "Let me check that.", ""),
        ("Let me check that. ", "Let me check that. ", ""),
        ("Let me check th", "Let me check ", "th"),
        ("Let", "", "Let"),
        ("The answer is 42.", "The answer is ", "42."),
        ("Ask for Dr.", "Ask for ", "Dr."),
        ("It is open (", "It is open ", ""),
        ("**Done.**", "Done.", ""),
        ("Look at [the page](http", "Look at ", ""),
        ("请稍等", "请稍等", ""),
        ("```python\nx = 1", "", ""),
        ("- ", "", ""),
    ],
)
def test_a_stall_speaks_whole_words_and_the_next_one_the_rest(waiting: str, first: str, second: str) -> None:
    shaper = Shaper(Shaping())
    assert shaper.push(waiting) == []
    for spoken in (first, second):
        assert "".join(piece.text for piece in shaper.stall() if piece.speakable) == spoken
    assert not shaper.pending or waiting in ("Look at [the page](http", "- ")


def test_text_after_a_stall_is_again_cut_at_words() -> None:
    shaper = Shaper(Shaping())
    shaper.push("One mo")
    assert texts(shaper.stall()) == ["One "]
    shaper.push("re thi")
    assert texts(shaper.stall()) == ["more "]


def test_what_waits_is_counted_for_the_clock() -> None:
    shaper = Shaper(Shaping())
    shaper.push("Here it is:\n```python\n")
    waiting = shaper.waiting
    shaper.push("print('silent')\n")
    assert shaper.waiting == waiting == len("Here it is:\n")


# -- ranges, the end


def test_each_raw_character_belongs_to_one_piece() -> None:
    chunks = ["**Yes, it is", " here:** ", "```\ncode\n", "```\n", "\n", "Take ", "it", " ", "🎉"]
    shaper = Shaper(Shaping())
    pieces = [piece for chunk in chunks for piece in shaper.push(chunk)] + shaper.finish()
    ends = list(accumulate(map(len, chunks)))
    ending = [next(index for index, piece in enumerate(pieces) if piece.end >= end) for end in ends]
    assert "".join(texts(pieces)) == "Yes, it is here:\nTake it "
    assert pieces[-1].end == ends[-1]
    assert ending == sorted(ending)


@pytest.mark.parametrize("silent", ["```\ncode\n```", "   \n", "🎉", "<!-- x -->", "https://example.com", "---", "!"])
def test_a_turn_without_words_ends_in_one_unspeakable_piece(silent: str) -> None:
    shaper = Shaper(Shaping())
    pieces = shaper.push(silent) + shaper.finish()
    assert [(piece.start, piece.end, piece.speakable) for piece in pieces] == [(0, len(silent), False)]


def test_an_empty_turn_has_no_pieces() -> None:
    assert Shaper(Shaping()).finish() == []


# -- restart


def test_the_state_is_small_json() -> None:
    shaper = Shaper(Shaping())
    shaper.push("# A heading with quite `some words and code`")
    (piece,) = shaper.stall()
    dumped = json.dumps(piece.state)
    assert State(*json.loads(dumped)) == piece.state
    assert len(dumped) < 100


def test_an_open_fence_survives_a_restart() -> None:
    shaper = Shaper(Shaping())
    shaper.push("Look here:\n```py\nx = 1\n")
    (piece,) = shaper.stall()
    again = Shaper(Shaping(), State(*json.loads(json.dumps(piece.state))))
    assert again.push("y = 2\n```\nThat was all of it.") == []
    (last,) = again.finish()
    assert (last.text, last.start) == ("That was all of it.", piece.end)


@pytest.mark.parametrize(
    ("spoken", "rest"),
    [
        ("It is 2 <b>", "* 3 or so"),  # what looks back at the raw text sees the tag, not the space
        ("That is so[1]<b>", " . Good"),  # the space stays: what it stood behind is spoken
        ("One\n", "- two"),
        ("| a | b", " | c |\n|---|---|"),
        ("Say `a b", " c*d*` now"),
        ("Word <!-- b", " -- c --> and *more*"),
        ("Word <think>hm", "</think>Word"),
    ],
)
def test_a_restart_after_a_stall_goes_on_as_if_there_was_none(spoken: str, rest: str) -> None:
    shaper = Shaper(Shaping())
    pieces = [*shaper.push(spoken), *shaper.stall(), *shaper.stall()]
    again = Shaper(Shaping(), pieces[-1].state)
    tail = spoken[pieces[-1].end :]
    assert again.push(tail + rest) + again.finish() == shaper.push(rest) + shaper.finish()


# -- limits


@pytest.mark.parametrize(
    "evil",
    [
        *"*_`[<-#(|\\&.!»'\"，。」😀\nx我\ud83d",
        *"http://a [a]( <!-- ```\n".split(" "),
        "<a ",
        "😀\n",
        " .",
        "| ",
        "'a ",
    ],
)
def test_nothing_grows_without_bound(evil: str) -> None:
    shaper = Shaper(Shaping())
    for _ in range(3600 // len(evil)):
        shaper.push(evil)
        assert shaper.waiting <= 1200
        assert len(shaper._cleaner._raw) <= 2400
        assert len(shaper._cleaner._history) <= shaper.waiting + 2


# -- SPEECH_SHAPING=off


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", [""]),
        ("**as is** 🎉", ["**as is** 🎉"]),
        ("One two three. Four five six.", ["One two three. ", "Four five six."]),
        ("One two three, four five six", ["One two three, ", "four five six"]),
        ("One two three four five six", ["One two three four ", "five six"]),
        ("One two three\nfour five six. Seven", ["One two three\n", "four five six. Seven"]),
        ("x" * 45, ["x" * 20, "x" * 20, "x" * 5]),
        ("x" * 18 + "e\u0301\u0301 y", ["x" * 18, "e\u0301\u0301 y"]),
    ],
)
def test_without_shaping_only_what_is_too_long_is_split(text: str, parts: list[str]) -> None:
    assert split(text, 20) == parts


@pytest.mark.parametrize("word", ["word{} ", "c{}-w0 ", "{} ", "5{}% "])
def test_words_that_hold_digits_are_not_torn(word: str) -> None:
    words = [word.format(number) for number in range(700)]
    shaper = Shaper(Shaping())
    cut = texts([*(piece for one in words for piece in shaper.push(one)), *shaper.finish()])
    assert max(map(len, cut)) <= 1000
    assert all(text.endswith(" ") for text in cut)
    assert "".join(cut) == "".join(words)
