"""Where clean text may be cut into pieces for a voice, and where it is.

Clean text is a row of words and gaps, and a gap may hold a *break*: the place behind a sentence end, a line end, a
clause end (`;`, `:`, a dash), a comma, or just a word. Each kind of break asks for a piece of some length in front of
it (`Lengths`), and the first break that has it becomes the cut: a sentence end is welcome early, a comma when no
better place came, a mere word end when the piece gets long. So there is nothing to go back to: **a cut depends only
on the text from the start of the piece to the end of the word behind the cut**, and is known as soon as that word is
complete.

Whether a stop ends a sentence, says `sentencex` (MIT, by Wikimedia, 300 languages, no dependencies, 1–3 µs a call),
asked about the piece so far and the word behind it. In the middle of a text that takes some care: in an open
quotation or bracket nothing is cut (for `defer` characters, it might never be closed), nor in front of a lower-case
word (sentencex looks at a–z only), nor behind the few short forms below, which its lists lack. A cut too few is not
heard, a cut too many is.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import regex
import sentencex  # type: ignore[import-untyped]  # compiled, without stubs

from worker.core.shaping.markup import WIDE, Pattern


class Lengths(NamedTuple):
    """How long a piece must be to end at each kind of break, in weighed characters."""

    sentence: int  # also for a line end
    clause: int
    comma: int
    word: int


@dataclass(frozen=True, slots=True)
class Cutting:
    """The numbers of cutting. Lengths are in weighed characters; a voice speaks about 15 a second."""

    # ISO 639 code, a region is ignored. Nothing is detected: the cuts would depend on what was detected so far.
    language: str = "en"
    # A row per piece, the last one for all that follow. The first piece decides how soon the avatar speaks: 20–30
    # characters take two seconds to speak, time enough for the next piece; at a comma below 50 it sounds torn; 250
    # bounds the wait where there is no punctuation. Later pieces are made while the avatar speaks: the longer, the
    # better they sound, and the fewer the calls.
    lengths: tuple[Lengths, ...] = (
        Lengths(sentence=20, clause=30, comma=50, word=250),
        Lengths(sentence=120, clause=180, comma=240, word=800),
        Lengths(sentence=160, clause=240, comma=320, word=800),
        Lengths(sentence=250, clause=375, comma=500, word=800),
    )
    cap: int = 1000  # what the vendor advises per call; from nine tenths on any break will do, in brackets too
    defer: int = 200  # characters for which an open quotation or bracket puts off a cut
    han: int = 3  # what a Chinese character weighs: a syllable of some 200 ms
    syllable: int = 2  # the same for kana and hangul


# Languages that write ordinals with a dot: "3. Oktober", "Ludwig XIV. war".
_ORDINAL_DOT = frozenset("bs cs da de et fi fo hr hu is lb lt lv nb nn no pl sk sl sr tr".split())
# Short forms that end no sentence and behind which sentencex 1.0 cuts: in any language, and in one.
_SHORT = frozenset("approx col dr fig figs gen lt mme mr mrs ms prof rev sgt sr sra डॉ प्रो श्री".split())
_SHORT_IN = {
    language: frozenset(words.split())
    for language, words in {
        "bn": "ডা ড মো",
        "cs": "doc ing mgr mudr judr např tzv",
        "de": "abb abs abzgl allg anm aufl bd bspw dt einschl engl entspr exkl fa fam frz geb gem griech hrn hrsg ing"
        " inkl insb insbes jew kap lat max min mind pfr resp sek tab tel verh zzgl",
        "el": "αγ αρ αριθ βλ δηλ εικ καθ κκ λεωφ οδ πίν σελ τηλ τόμ",
        "en": "eds eq est incl vol",
        "es": "aprox cía dña excmo gral ilmo mons profa srta sto sta",
        "fr": "env éd mgr mlle réf ste st tél vol",
        "hi": "कु पं श्रीमती सं",
        "id": "hj ir jl jln kab kec ny prov tn",
        "it": "circa pag pagg",
        "nl": "excl incl ing mevr mw tel",
        "pl": "al hab im inż ks mgr np os pl pn por tj ul ust zob św",
        "pt": "aprox arq av cap cia máx mín pág págs profª pç srta sta sto tel vol",
        "ru": "гл доц им инж коп обл оз пл прим рис св ср табл тел ул",
        "sv": "jfr kl resp",
        "th": "ดร ผศ รศ ศ นพ พญ",
        "tr": "apt av bkz cad doç mah müh org sk sn sok yrd",
        "uk": "вул ім пан просп св тов",
        "vi": "bs gs pgs ths tp tr ts",
    }.items()
}

_STOP = r"[\p{STerm}…‥]"
_CLOSER = r"""["'”’“»›)\]}」』）】》〉〕］]"""
_WORDY = r"\p{L}\p{N}\p{M}\u200c\u200d"
_OTHER = (
    rf"[^\s,;:،؛，、；：–—\p{{STerm}}…‥{_WORDY}]*+"  # between a word and its punctuation: `%`, `++`, closing brackets
)
_THIN = r"[\ \u00a0\u202f]"  # the space of French in front of punctuation
_SPACED = r"[\p{Thai}\p{Lao}\p{Khmer}]"  # scripts in which a space is what a comma is elsewhere
# Behind a break there is neither more punctuation of the same words (a spaced `»` closes, `»Wort` opens) nor half a
# letter.
_NEXT = rf"(?!\n|{_STOP}|[,;:)\]}}%]|[»›]\s|[\p{{M}}\u200d])"

_GAP: Pattern = regex.compile(rf"[^{_WORDY}]+")
_WORD: Pattern = regex.compile(rf"(?V1)[{WIDE}]|[[{_WORDY}]--[{WIDE}]]{{1,64}}+")
# The break of a gap, matched where the gap begins.
_BREAK: Pattern = regex.compile(
    rf"""(?V1)
      (?P<line>     [^\n{_WORDY}]*+\n )
    | (?P<sentence> {_OTHER}{_THIN}?(?P<stop>{_STOP}++(?:\ {_STOP}++)*+){_CLOSER}*+(?:{_THIN}[»›](?=\s))?+\  {_NEXT}
                  | {_OTHER}(?=[!?…]*[。！？｡])(?P<stop>{_STOP}++){_CLOSER}*+\ ?+ {_NEXT}
                  | (?<=[{WIDE}])(?P<stop>[!?]++){_CLOSER}*+(?=[{WIDE}]) )
    | (?P<clause>   {_OTHER}(?:{_THIN}?[;:؛]{_CLOSER}*+\ | {_THIN}?[–—]\ | \ -\ ) {_NEXT}
                  | {_OTHER}[；：](?!(?<=\d.)\d){_CLOSER}*+\ ?+ {_NEXT}
                  | (?<=\p{{L}})—(?=\p{{L}}) )
    | (?P<comma>    {_OTHER}(?:[,،]{_CLOSER}*+\ | [，、](?!(?<=\d.)\d){_CLOSER}*+\ ?+) {_NEXT}
                  | (?<=[{WIDE}]),(?=[{WIDE}])
                  | (?<={_SPACED})\ (?={_SPACED}) )
    | (?P<word>     [^\s{_WORDY}]*+(?<!(?:\A|[^{_WORDY}])\d+)\  {_NEXT} )  # not in "1 000" or "5 km"
    """,
    regex.VERBOSE,
)
_FAR = 64  # behind a break, a word must begin within as many characters: a row of dashes keeps nothing waiting
_SPEAKABLE: Pattern = regex.compile(r"[\p{L}\p{N}]")
_WORD_BEFORE: Pattern = regex.compile(r"[\p{L}\p{N}\p{M}]{0,40}\Z")
_ROMAN: Pattern = regex.compile(r"[IVXLCDM]+")
_WIDE_END: Pattern = regex.compile(rf"[{WIDE}]\Z")
_HAN: Pattern = regex.compile(r"\p{Han}")
_HIRAGANA: Pattern = regex.compile(r"\p{Hiragana}")
_SYLLABLE: Pattern = regex.compile(r"[\p{Hiragana}\p{Katakana}\p{Hangul}]")
_GERSHAYIM: Pattern = regex.compile(r"\p{Hebrew}{2}")  # around a `"` inside a word: ד"ר
_GRAPHEME: Pattern = regex.compile(r"[`*_~]++|\X")  # literal mark-up stays together, too

_PAIRS = {
    '"': '"', "'": "'", "“": "”", "„": "“”", "”": "”", "‘": "’", "‚": "‘’", "«": "»", "»": "«", "‹": "›",
    "(": ")", "[": "]", "{": "}", "（": "）", "【": "】", "「": "」", "『": "』", "《": "》", "〈": "〉",
}  # fmt: skip
_MARKS = frozenset("".join((*_PAIRS, *_PAIRS.values())))
_EITHER = frozenset("\"'”»")  # these open or close, depending on what stands before
_OPENERS = frozenset(_PAIRS) - _EITHER


class _Open(NamedTuple):
    """The outermost quotation or bracket that is open."""

    at: int
    mark: str
    depth: int = 1


class Cutter:
    """Finds the cuts of one turn. Across a cut it remembers nothing but how many there were."""

    def __init__(self, cutting: Cutting, pieces: int = 0) -> None:
        self.pieces = pieces
        self._cutting = cutting
        self._language = cutting.language.replace("_", "-").partition("-")[0].lower()
        self._near_cap = cutting.cap * 9 // 10
        self._scan = self._weight = 0  # the gaps of `text[:_scan]`, which weighs `_weight`, are done with
        self._open: _Open | None = None

    def find(self, text: str, *, final: bool = False) -> int:
        """The length of the next piece of `text`, which begins at the last cut; 0 while it is not decided.

        Unless `final`, nothing is concluded from a gap at the end: it may grow, or shrink (see `Cleaner`).
        """
        shortest = min(*self._lengths, self._near_cap)
        while (gap := _GAP.search(text, self._scan)) and gap.end() < len(text):
            weight = self._weight + self._weigh(text[self._scan : gap.end()])
            if self._open and gap.start() - self._open.at > self._cutting.defer:
                self._open = None
            if weight >= shortest:
                cut = self._cut_in(text, gap, weight, final=final)
                if cut is None:
                    return 0
                if cut:
                    return self.cut(cut)
            self._open = _follow(text, gap.start(), gap.end(), self._open)
            self._scan, self._weight = gap.end(), weight
        if self._weight + self._weigh(text[self._scan :]) > self._cutting.cap + (0 if final else _FAR):
            end = last_boundary(text, self._cutting.cap, self._weigh)  # no break within the cap
            return self.cut(text.rfind(" ", end // 2, end) + 1 or end)
        return 0

    def cut(self, length: int) -> int:
        """Begin a new piece behind `length` characters. Returns them."""
        self.pieces += 1
        self.skip()
        return length

    def skip(self) -> None:
        """Begin anew; what was there is no piece."""
        self._scan = self._weight = 0
        self._open = None

    def is_whole(self, text: str) -> bool:
        """Whether `text`, however it goes on, seems to end with a whole word. For stalls, which cannot wait and see."""
        last, stop = text[-1:], len(text) - 1
        if last.isalnum() or last in _OPENERS:
            return bool(_WIDE_END.search(text))
        return last not in (".", ",") or not (text[stop - 1].isdecimal() or self._is_short(text, stop, ""))

    @property
    def _lengths(self) -> Lengths:
        return self._cutting.lengths[min(self.pieces, len(self._cutting.lengths) - 1)]

    def _weigh(self, text: str) -> int:
        if text.isascii():
            return len(text)
        han, syllables = len(_HAN.findall(text)), len(_SYLLABLE.findall(text))
        return len(text) + (self._cutting.han - 1) * han + (self._cutting.syllable - 1) * syllables

    def _cut_in(self, text: str, gap: regex.Match[str], weight: int, *, final: bool) -> int | None:
        """Where to cut in this gap, up to the end of which `text` weighs `weight`.

        0 for nowhere, None while the word behind it is not complete.
        """
        found = _BREAK.match(text, gap.start())
        if not found or found.end() > gap.end() or gap.end() - found.end() > _FAR:
            return 0
        at, kind, lengths = found.end(), found.lastgroup or "", self._lengths
        weight -= gap.end() - at
        near_cap = weight >= self._near_cap
        need = {"clause": lengths.clause, "comma": lengths.comma, "word": lengths.word}.get(kind, lengths.sentence)
        if not near_cap and (weight < need or _follow(text, gap.start(), at, self._open)):
            return 0
        if weight > self._cutting.cap or not _SPEAKABLE.search(text, 0, at):
            return 0
        word = _WORD.match(text, gap.end())
        if not word or (word.end() == len(text) and not final and len(word[0]) < _FAR and not _WIDE_END.match(word[0])):
            return None
        return at if near_cap or kind != "sentence" or self._ends_sentence(text, found, word) else 0

    def _ends_sentence(self, text: str, found: regex.Match[str], word: regex.Match[str]) -> bool:
        stop, at, first = found.start("stop"), found.end(), word[0][0]
        if first.islower() or (text[stop] == "." and self._is_short(text, stop, first)):
            return False
        if text[at - 1] in "」』" and _HIRAGANA.match(text, at):
            return False  # 「行くよ。」と言った。
        length = 0
        for sentence in sentencex.segment(self._language, text[: word.end()]):
            length += len(sentence)
            if length > stop:
                return length <= word.start()
        return False

    def _is_short(self, text: str, stop: int, first: str) -> bool:
        """Whether the dot at `stop` belongs to a short form, an initial, an ordinal or the number of a list item."""
        before = _WORD_BEFORE.search(text, max(0, stop - 40), stop)
        word = before[0] if before else ""
        ordinals = self._language in _ORDINAL_DOT
        if word.isdecimal():
            item = stop == len(word) or text[stop - len(word) - 1] == "\n"
            return len(word) <= 3 and (ordinals or item)
        return (
            (len(word) == 1 and word.isalpha() and self._language != "en")  # sentencex knows English initials
            or word.casefold() in _SHORT
            or word.casefold() in _SHORT_IN.get(self._language, ())
            or (first.isdecimal() and 0 < len(word) < 5)  # No. 5, Figs. 3, рис. 2
            or (ordinals and _ROMAN.fullmatch(word) is not None)
        )


def last_boundary(text: str, room: int, weigh: Callable[[str], int] = len) -> int:
    """The last place within `room` between characters as people see them, and not in front of a space."""
    at = end = 0
    left = room
    for grapheme in _GRAPHEME.finditer(text):
        if grapheme[0][0] not in " \n":
            at = end
        left -= weigh(grapheme[0])
        if left < 0:
            break
        end = grapheme.end()
    return at or room


def _follow(text: str, begin: int, end: int, open_: _Open | None) -> _Open | None:
    """The outermost quotation or bracket that is open behind `text[begin:end]`, given the one in front of it."""
    for at in range(begin, end):
        mark, before, after = text[at], text[at - 1 : at], text[at + 1 : at + 2]
        if (
            mark not in _MARKS
            or (mark == "’" and after.isalpha())
            or (mark == '"' and _GERSHAYIM.match(before + after))
        ):
            continue
        if open_:
            if mark in _PAIRS[open_.mark] and not (mark == "'" and after.isalpha()):
                open_ = open_._replace(depth=open_.depth - 1) if open_.depth > 1 else None
            elif mark == open_.mark and mark not in _EITHER:
                open_ = open_._replace(depth=open_.depth + 1)
        elif mark in _OPENERS or (mark in _EITHER and before in ("", *" \n([{—–-…") and _may_open(mark, after)):
            open_ = _Open(at, mark)
    return open_


def _may_open(mark: str, after: str) -> bool:
    """Not the apostrophe of `'90s` and not a closing `»` with a space in front of it."""
    return after.isalpha() if mark == "'" else not after.isspace()
