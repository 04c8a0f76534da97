from tools import speech_page


def test_the_page_shows_what_the_code_does() -> None:
    page = speech_page.PAGE.read_text("utf-8")
    assert speech_page.filled(page) == page, "run `python -m tools.speech_page`"


def test_each_chunk_of_the_example_ends_once() -> None:
    ended = [int(key) for said in speech_page.play() for key in said.ended]
    assert ended == list(range(1, len(speech_page.tokens()) + 1))
