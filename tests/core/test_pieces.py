"""Chunks into pieces: joined up to the cap, cut where it hurts least, every character accounted for."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.conversation import speak
from worker.core.model import Entry, Piece, speak_of
from worker.core.pieces import CAP, best_cut, compose


def cut_up(entries: list[Entry], cap: int) -> list[Piece]:
    """All pieces of a turn, one after the other, as `Speech` takes them."""
    pieces, spoken = [], 0
    while entries:
        piece = compose(entries, spoken, cap)
        pieces.append(piece)
        entries = entries[len(piece.ending) :]
        spoken = 0 if piece.parts[-1].last else piece.parts[-1].end
    return pieces


def test_chunks_are_joined_as_they_are() -> None:
    chunks = [speak("t1", text) for text in ("Hel", "lo", " ", "you.")]
    piece = compose([*chunks, speak("t1", "", final=True)], 0)
    assert (piece.text, piece.is_final, piece.turn_id) == ("Hello you.", True, "t1")
    assert [(part.start, part.end, part.last) for part in piece.parts] == [
        (0, 3, True),
        (0, 2, True),
        (0, 1, True),
        (0, 4, True),
        (0, 0, True),
    ]


def test_a_chunk_that_does_not_fit_waits_for_the_next_piece() -> None:
    texts = ["a" * 600, "b" * 400, "c"]
    pieces = cut_up([speak("t1", text, final=text == "c") for text in texts], CAP)
    assert [(piece.text, piece.is_final) for piece in pieces] == [("a" * 600 + "b" * 400, False), ("c", True)]


def test_only_a_chunk_over_the_cap_is_split_and_only_its_last_part_ends_it() -> None:
    text = "word " * 500
    pieces = cut_up([speak("t1", text, final=True)], CAP)
    assert [len(piece.text) for piece in pieces] == [1000, 1000, 500]
    assert [piece.is_final for piece in pieces] == [False, False, True]
    assert [len(piece.ending) for piece in pieces] == [0, 0, 1]
    assert len({piece.key for piece in pieces}) == 3


def test_the_age_of_a_piece_is_that_of_its_oldest_chunk() -> None:
    assert compose([speak("t1", "a", born=9.0), speak("t1", "b", born=7.0)], 0).born == 7.0


@pytest.mark.parametrize(
    ("text", "cap", "cut"),
    [
        ("one two three", 8, 8),
        ("one two three", 9, 8),
        ("abcdefghij", 4, 4),
        ("a bcdefghij", 8, 8),  # a space too far back would make a crumb
        ("abcde\u0301f", 5, 4),  # e + combining acute
        ("abc👍🏽d", 4, 3),  # skin tone
        ("abc👩\u200d🚀d", 4, 3),
        ("abc👩\u200d🚀d", 5, 3),  # after the joiner
        ("abc🇩🇪d", 4, 3),
        ("abc❤\ufe0fd", 4, 3),  # variation selector
        ("e" + "\u0301" * 9, 5, 5),  # nothing but marks: no cut is good
    ],
)
def test_best_cut(text: str, cap: int, cut: int) -> None:
    assert best_cut(text, cap) == cut


_texts = st.text(st.sampled_from("ab \n\u0301👍🏽\u200d🇩ü"), max_size=40)


@given(texts=st.lists(_texts, min_size=1, max_size=6), cap=st.integers(2, 12))
def test_every_character_is_in_one_piece_or_is_white_space_at_a_cut(texts: list[str], cap: int) -> None:
    chunks = [speak("t1", text, final=n == len(texts) - 1 or not text) for n, text in enumerate(texts)]
    pieces = cut_up(chunks, cap)

    assert all(len(piece.text) <= cap for piece in pieces)
    assert [entry for piece in pieces for entry in piece.ending] == chunks
    for chunk in chunks:
        text = speak_of(chunk).text
        at = 0
        for piece in pieces:
            for part in piece.parts:
                if part.entry is chunk:
                    assert text[at : part.start].strip() == ""
                    assert part.end > part.start or part.last
                    at = part.end
        assert at == len(text)
    assert "".join("".join(piece.text for piece in pieces).split()) == "".join("".join(texts).split())


@given(text=st.text(st.sampled_from("abcdefg\u0301"), min_size=30, max_size=60))
def test_a_mark_stays_with_its_letter(text: str) -> None:
    cut = best_cut(text, 20)
    assert 0 < cut <= 20
    if "\u0301" * 10 not in text:
        assert not unicodedata.combining(text[cut])
