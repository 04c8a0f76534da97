"""From chunks to pieces: what the next `say-text` carries."""

import unicodedata
from collections.abc import Sequence

from worker.core.model import Entry, Part, Piece, speak_of

CAP = 1000
"""Characters a call may carry: the vendor's advice; no limit of the server is documented."""


def compose(entries: Sequence[Entry], spoken: int, cap: int = CAP) -> Piece:
    """Join chunks of one turn into one piece of at most `cap` characters; blank if they are.

    `spoken` characters of the first chunk have left in earlier pieces. Takes whole chunks as long as they fit; only
    a chunk that exceeds the cap by itself is split, and white space around the cuts is left out: it is not speech.
    """
    first = speak_of(entries[0])
    if len(first.text) - spoken > cap:
        return _first_piece_of(entries[0], spoken, cap)
    texts: list[str] = []
    parts: list[Part] = []
    length = 0
    for entry in entries:
        text = speak_of(entry).text
        start = 0 if parts else spoken
        if length + len(text) - start > cap:
            break
        texts.append(text[start:])
        parts.append(Part(entry, start, len(text), last=True))
        length += len(text) - start
    return Piece(first.turn_id, "".join(texts), speak_of(parts[-1].entry).is_final, tuple(parts))


def _first_piece_of(entry: Entry, spoken: int, cap: int) -> Piece:
    speak = speak_of(entry)
    text = speak.text[spoken:]
    start = spoken + len(text) - len(text.lstrip())
    text = text.lstrip()
    if len(text.rstrip()) <= cap:
        text, end, last = text.rstrip(), len(speak.text), True
    else:
        cut = best_cut(text, cap)
        text, end, last = text[:cut], start + cut, False
    return Piece(speak.turn_id, text, speak.is_final and last, (Part(entry, start, end, last),))


def best_cut(text: str, cap: int) -> int:
    """Where to cut a text longer than `cap`: after the last white space, else where no character is torn apart."""
    for at in range(cap, cap // 2, -1):
        if text[at - 1].isspace():
            return at
    at = cap
    while at > 1 and _clings(text[at - 1], text[at]):
        at -= 1
    return at if at > 1 else cap


def _clings(before: str, after: str) -> bool:
    """Whether `after` continues the character a reader sees in `before`: marks, joiners, skin tones, flags."""
    return (
        unicodedata.category(after) in ("Mn", "Me", "Mc", "Cf")
        or before == "\u200d"
        or "\U0001f3fb" <= after <= "\U0001f3ff"
        or ("\U0001f1e6" <= before <= "\U0001f1ff" and "\U0001f1e6" <= after <= "\U0001f1ff")
    )
