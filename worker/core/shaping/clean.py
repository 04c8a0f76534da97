"""Raw text of a turn in, text fit for a voice out, however the text was chopped.

A `Cleaner` reads the raw text once, from left to right, and appends what a voice should say to `Cleaner.text`.
Mark-up goes; white space shrinks to one space, or to one line feed where a block ends (paragraph, heading, list item,
row). Otherwise cleaning only removes: a comma stands for the `|` between two table cells, `&amp;` and `\\*` become
what they mean, and nothing else is put in.

**Chopping does not matter**, because what is read depends on text alone: in front of anything that could still grow
beyond the end of what has arrived (`*` before `**`, a link without its `)`, half an emoji) the reader waits; and the
character before the unread text is kept, because some tokens look back at it. What was appended stays, except for
what stands behind the last word: a space, `(` or `!` that turns out to introduce nothing is taken back.

**A restart does not matter**, because all memory is a `MarkUp`, four short strings. `Cleaner.take` hands it out as it
was at the place of the cut, and a new `Cleaner` goes on from there with the raw text behind the cut.

Libraries looked at: markdown-it-py, mistune and mistletoe read whole documents and have no state to keep; the text
filters of Pipecat and LiveKit are parts of large frameworks and look at chunks; `emoji` knows names, but no
sequences.
"""

import html
from bisect import bisect_right
from functools import cache
from operator import itemgetter
from typing import NamedTuple

import regex

from worker.core.shaping.markup import BLOCK_TAGS, CONTROL, INLINE_TAGS, PICTURE, STARTS, WIDE, Clean, Pattern, grammar

_CLOSING = frozenset(".,;:!?…)]}%。、，；：！？）」』】”»")
_AROUND = {"(": ")", "[": "]", "“": "”", "（": "）"}
_STOPS = frozenset(".!?…。！？")
_LEAD: Pattern = regex.compile(r"[ \u00a0\u202f]?[,;:–—]?\ ?\Z")  # of what has vanished: "Look here: https://… ."
_WIDE: Pattern = regex.compile(f"[{WIDE}]")
_MAYBE_FENCE_END: Pattern = regex.compile(r"(?m)^[ \t>]{0,80}[`~]{0,99}[ \t\r]{0,80}\Z")


class MarkUp(NamedTuple):
    """All that the cleaning of the next character depends on."""

    line: str = "start"  # kind of the current line: start (nothing but markers so far), text, heading, table
    open: str = ""  # what ends the stretch we are in: ticks of inline code, "\n```" of a fence, "-->", "</think>"
    last: str = ""  # last clean character, "" at the start of the turn
    before: str = ""  # raw character in front of the next one


LINE_START = MarkUp()


class Cleaner:
    """The reader of one turn. `text` is what was cleaned and not yet taken."""

    def __init__(self, clean: Clean, mark_up: MarkUp = LINE_START, offset: int = 0) -> None:
        self.text = ""
        self._clean, self._final, self._grammar = clean, False, grammar(clean, final=False)
        self._line, self._open, self._last, self._raw = mark_up
        self._at = len(self._raw)  # where the unread text begins in `_raw`; the character before it is kept
        self._base = offset - self._at  # offset in the turn of `_raw[0]`
        self._origin: list[int] = []  # per character of `text`: the offset in the turn that it comes from
        self._history = [(offset, self._line, self._open)]  # from which offset on, which line and which stretch
        self._gone = False  # the last thing read was unspeakable, and no visible character came since

    @property
    def offset(self) -> int:
        """How much of the raw text of the turn has been read. What is undecided has not."""
        return self._base + self._at

    def feed(self, raw: str, *, final: bool = False) -> None:
        """Read on. Once `final`, nothing is undecided; line feeds at the end go, and white space alone."""
        if final:
            self._final, self._grammar = True, grammar(self._clean, final=True)
        self._raw += raw
        at = self._at
        while at < len(self._raw) and (after := self._read(at)) > at:
            at = after
        keep = max(0, at - 1)
        self._raw, self._at, self._base = self._raw[keep:], at - keep, self._base + keep
        if final:
            rest = self.text.rstrip("\n")
            self._drop_end(len(self.text) - len(rest if rest.strip(" \n") else ""))

    def take(self, length: int) -> tuple[str, int, MarkUp]:
        """Remove `length` characters of `text`. Returns them, the offset in the turn they reach, the memory there."""
        taken, everything = self.text[:length], length == len(self.text)
        offset = self.offset if everything else self._origin[length]
        del self._history[: bisect_right(self._history, offset, key=itemgetter(0)) - 1]
        _, line, open_ = self._history[0]
        self._last = taken[-1:] or self._last
        self.text = self.text[length:]
        del self._origin[:length]
        before = self._last
        if everything:
            before = self._raw[self._at - 1 : self._at]
            self._gone = False
        return taken, offset, MarkUp(line, open_, self._last, before)

    # -- Reading. A method gets an index in `_raw` and returns the one behind what it read, or the same one to wait.

    def _read(self, at: int) -> int:
        if self._open and self._open[0] != "`":
            return self._read_silent(at)
        if self._line == "start":
            return self._read_marker(at)
        return self._read_inline(at)

    def _read_silent(self, at: int) -> int:
        """Go behind the end of the silent stretch, or as far as its end cannot have begun."""
        if self._open[0] == "\n":
            if close := _fence_end(self._open, final=self._final).search(self._raw, at):
                self._become(close.end(), line="start", open="")
                return close.end()
            rest = None if self._final else _MAYBE_FENCE_END.search(self._raw, at)
            return rest.start() if rest else len(self._raw)
        if (end := self._raw.find(self._open, at)) >= 0:
            end += len(self._open)
            self._become(end, open="")
            return end
        return len(self._raw) if self._final else max(at, len(self._raw) - len(self._open) + 1)

    def _read_marker(self, at: int) -> int:
        """Read what may stand in front of the text of a line."""
        token = self._grammar.block.match(self._raw, at)
        kind = token.lastgroup if token else "text"
        if kind == "wait" or (kind == "digits" and self._end() == " "):  # the number of a list item would end a block
            return at
        if kind in ("newline", "heading", "marker", "row", "number"):
            self._break(at)
        if kind in ("text", "number", "digits"):
            self._become(at, line="text")
            return self._read_inline(at)
        if token and kind == "fence":
            return self._read_token(token)
        if kind in ("heading", "row"):
            self._become(at, line="heading" if kind == "heading" else "table")
        return token.end() if token else at

    def _read_inline(self, at: int) -> int:
        """Read plain text and the token behind it."""
        pattern, probe = self._grammar.code if self._open else self._grammar.inline, at
        while start := STARTS.search(self._raw, probe):
            if token := pattern.match(self._raw, start.start()):
                self._say(self._raw[at : token.start()], at)
                return self._read_token(token)
            probe = start.end()  # plain after all
        self._say(self._raw[at:], at)
        return len(self._raw)

    def _read_token(self, token: regex.Match[str]) -> int:  # noqa: C901, PLR0912 - a table: a case a kind of token
        at, found = token.start(), token[0]
        match token.lastgroup:
            case "wait":
                return at
            case "newline":
                self._newline(at)
            case "space":
                self._say(" ", at)
            case "fence":
                self._break(at)
                self._become(at, open="\n" + token["fence_mark"])
            case "code":
                self._become(at, open=found)
            case "tick" if len(found) == len(self._open):
                self._become(at, open="")
            case "tick":
                self._say(found, at)
            case "link" if self.text.endswith("!") and self._raw[at - 1] == "!":  # an image
                self._drop_end(1)
            case "comment":
                self._become(at, open="-->")
            case "silent":
                self._become(at, open=f"</{token['silent_tag']}>")
            case "tag" if self._is_plain(token):
                self._say("<", at)
                return at + 1
            case "tag" if token["tag_name"].lower() in BLOCK_TAGS:
                self._break(at)
            case "entity":
                said = html.unescape(found)
                return self._decoded(" " if said.isspace() else said, token)
            case "emphasis" if self._is_literal(token):
                self._say(found, at)
            case "escape":
                self._say(self._raw[at + 1], at)
                return at + 2
            case "pair":
                return self._decoded(found.encode("utf-16", "surrogatepass").decode("utf-16"), token)
            case "pipe":
                self._pipe(token)
            case "picture" | "url" | "gone":
                return self._vanish(token)
        return token.end()

    # -- Tokens that need a thought

    def _newline(self, at: int) -> None:
        if self._line == "text":  # one line feed is a space; the marker or blank line that may follow ends the block
            self._say(" ", at)
        else:
            self._break(at)
        self._become(at, line="start", open="")

    def _is_literal(self, token: regex.Match[str]) -> bool:
        """Whether `*` or `_` means itself: `2 * 3`, `2**3`, `a*b`, `snake_case`."""
        mark, before = token[0], self._raw[token.start() - 1 : token.start()]
        after = self._raw[token.end() : token.end() + 1]
        if mark[0] == "_":
            return before.isalnum() and after.isalnum()
        if mark[0] == "~":
            return False
        if not before.strip() and not after.strip():
            return True
        single = len(mark) == 1 and before.isascii() and after.isascii()
        return (before.isdecimal() and after.isdecimal()) or (single and before.isalnum() and after.isalnum())

    def _is_plain(self, tag: regex.Match[str]) -> bool:
        """Whether it is no tag. Directly behind a word only HTML is one: `un<i>believ</i>able`, but not `List<T>`."""
        name = tag["tag_name"]
        known = (name if len(name) == 1 else name.lower()) in INLINE_TAGS | BLOCK_TAGS
        return self._end().isalnum() and not known and not tag["closing_tag"]

    def _decoded(self, said: str, token: regex.Match[str]) -> int:
        if self._clean.emoji and PICTURE.match(said):
            return self._vanish(token)
        if not (self._clean.controls and CONTROL.match(said)):
            self._say(said, token.start())
        return token.end()

    def _pipe(self, token: regex.Match[str]) -> None:
        if self._line != "table":
            self._say("| " if len(token[0]) > 1 else "|", token.start())
        elif self._raw[token.end() : token.end() + 1] not in ("", "\n", "\r"):  # else the row ends here
            if self.text.endswith(" "):
                self._drop_end(1)
            self._say(" " if self._end() in ("", " ", "\n", ",") else ", ", token.start())

    def _vanish(self, token: regex.Match[str]) -> int:
        """Say nothing of the token. Brackets around it go, too, if it is one behind which a character has arrived."""
        self._gone = True
        pairs = _AROUND if token.lastgroup in ("picture", "url", "gone") else {}
        if self.text and self._raw[token.end() : token.end() + 1] == pairs.get(self.text[-1]):
            self._drop_end(1)
            return token.end() + 1
        if token.lastgroup not in ("url", "gone") and self._end().isalnum() and not _WIDE.match(self._end()):
            self._say(" ", token.start())  # "great🎉thanks"
            self._gone = True
        return token.end()

    # -- Writing

    def _end(self) -> str:
        return self.text[-1:] or self._last

    def _say(self, said: str, at: int) -> None:
        if said[:1] == " ":
            if self._end() not in ("", " ", "\n"):
                self._put(" ", at)
            said, at = said[1:], at + 1
        if not said:
            return
        if self._gone and said[0] in _CLOSING:
            if said[0] in _STOPS and (lead := _LEAD.search(self.text)):
                self._drop_end(len(lead[0]))
            elif self.text.endswith(" "):
                self._drop_end(1)  # "see https://example.com ,"
        self._gone = False
        self._put(said, at)

    def _break(self, at: int) -> None:
        """End a block: one line feed, in place of a space if there is one."""
        if self.text.endswith(" "):
            self.text = self.text[:-1] + "\n"
        elif self._end() not in ("", " ", "\n"):
            self._put("\n", at)

    def _put(self, said: str, at: int) -> None:
        self.text += said
        self._origin.extend(range(self._base + at, self._base + at + len(said)))

    def _drop_end(self, count: int) -> None:
        if count:
            self.text = self.text[:-count]
            del self._origin[-count:]

    def _become(self, at: int, *, line: str | None = None, open: str | None = None) -> None:  # noqa: A002 - see MarkUp
        self._line = self._line if line is None else line
        self._open = self._open if open is None else open
        last = self._origin[-1] if self._origin else -1
        while self._history and self._history[-1][0] > last:  # no cut can lie there any more
            self._history.pop()
        self._history.append((self._base + at, self._line, self._open))


@cache
def _fence_end(fence: str, *, final: bool) -> Pattern:
    end = r"(?:\n|\Z)" if final else r"\n"
    return regex.compile(rf"(?m)^[ \t>]{{0,80}}{fence[1]}{{{len(fence) - 1},}}[ \t\r]{{0,80}}{end}")
