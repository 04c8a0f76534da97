"""The grammar of what is kept from the voice: patterns only; `clean` reads with them.

Each part of `Clean` owns some tokens; of two tokens that begin at the same place, the one listed first wins. `MORE`
stands for the end of what has arrived while the turn is open, `END` for the end of a final turn. A `wait` token says:
this may become one of the tokens of its part, read no further yet. It reaches at least as far as the longest of them,
so that a construct that grows too long is given up at the same place however the text was chopped. Hence all the
bounds.

Needs `regex` (Apache-2.0): `re` knows no Unicode properties (`Extended_Pictographic`, `Sentence_Terminal`, scripts).
"""

from dataclasses import dataclass, fields
from functools import cache

import regex

Pattern = regex.Pattern[str]


@dataclass(frozen=True, slots=True)
class Clean:
    """What is kept from the voice. White space is normalised and torn surrogates go in any case."""

    emphasis: bool = True  # `*`, `_`, `~~` and escapes, but not in `2 * 3` or `snake_case`
    headings: bool = True  # `## `, rules (`---`) and underlines
    lists: bool = True  # bullets, task boxes, `>` of quotations, pipes of tables; the numbers of a list are spoken
    links: bool = True  # links and images keep their text; footnote marks, citations (`[1]`), definitions (`[1]: …`) go
    code: bool = True  # fenced blocks go with all they contain, of `inline code` only the ticks
    urls: bool = True  # bare and `<angled>` addresses; e-mail addresses stay
    emoji: bool = True  # one in front of a line is a bullet
    html: bool = True  # tags, comments, think, script, style go (not `a<b`, `List<T>`); entities are replaced
    controls: bool = True  # control, zero-width, direction and private-use characters; the joiners of scripts stay


@dataclass(frozen=True, slots=True)
class Grammar:
    """The tokens that may begin at a place: at the start of a line, inside a line, inside inline code."""

    block: Pattern
    inline: Pattern
    code: Pattern


# The no-break spaces are missing on purpose: they are read as letters, and so forbid a cut as they should.
SPACES = r" \t\r\f\v\u1680\u2000-\u2006\u2008-\u200a\u205f\u3000"
LINE_FEEDS = r"\n\x85\u2028\u2029"
WIDE = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Hangul}"

_PICTURE = r"\p{RI}\p{Emoji_Modifier}[\p{Extended_Pictographic}--[©®™‼⁉]]"
_EMOJI = rf"(?:[{_PICTURE}][\ufe0e\ufe0f\u20e3\u200d\U000e0020-\U000e007f]{{0,16}})"
_CONTROL = (
    r"\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\xad\u061c\u180e\u200b\u200e\u200f"
    r"\u202a-\u202e\u2060-\u2069\ufeff\ufff9-\uffff\p{Co}"
)
_WORD_START = rf"(?<![[\p{{L}}\p{{N}}]--[{WIDE}]])"

_TITLE = r"""(?:[ \t]{1,4}["'(][^\n]{0,200}?["')])?[ \t]{0,4}"""
_TITLE_MORE = r"""(?:[ \t]{1,4}(?:["'(][^\n]{0,210})?)?"""
# Destination and title of a link; the parentheses of Wikipedia addresses nest once.
_TARGET = r"(?:<[^<>\n]{0,1000}>|[^()\s]{0,1000}(?:\([^()\s]{0,200}\)[^()\s]{0,200}){0,2})" + _TITLE
_TARGET_MORE = rf"(?:<[^<>\n]{{0,1000}}>?|\S{{0,1900}}){_TITLE_MORE}MORE"
_SCHEME = rf"{_WORD_START}(?i:https?://|www\.)"
_SCHEME_SO_FAR = r"(?i:h|ht|htt|https?:?/?|w{1,3})"
_URL_CHARACTER = (
    rf"""(?:[^\s<>"'“”„«»‘’`|\\^{{}}()\[\]{WIDE}\u3001-\u303f\uff01-\uff0f\uff1a-\uff5e]"""
    r"|\([^\s()<>]{0,200}\))"
)

# `<b and c>` in `a<b and c>d` is no tag: an attribute has a value, or is one of those that need none.
_ATTRIBUTES = (
    r"""(?:\s+(?:[\w:@.-]+=(?:"[^"<>\n]*"|'[^'<>\n]*'|[^\s"'<>=`]+)"""
    r"|(?:async|autoplay|checked|controls|defer|disabled|hidden|loop|multiple|muted|open|required|selected)(?=[\s/>])))*+"
)
_TAG = (
    r"<(?P<closing_tag>/)?(?P<tag_name>[A-Za-z][A-Za-z0-9-]{0,30})(?=[\s/][^<>\n]{0,300}>|>)" + _ATTRIBUTES + r"\s*+/?>"
)

BLOCK_TAGS = frozenset(
    "br p li ul ol tr td th div h1 h2 h3 h4 h5 h6 hr table blockquote pre dl dt dd details summary".split()
)
INLINE_TAGS = frozenset(
    "a abbr b big cite code del em font i img ins kbd mark q s samp small span strike strong sub sup tt u var".split()
)
PICTURE: Pattern = regex.compile(rf"(?V1)[{_PICTURE}]")
CONTROL: Pattern = regex.compile(rf"[{_CONTROL}]")
# The one search that every chunk pays for: where something else than plain text could begin.
STARTS: Pattern = regex.compile(
    rf"(?V1)[*_~`<\[\]【&|\\{LINE_FEEDS}{SPACES[1:]}\ufe0e\ufe0f\u20e3\ud800-\udfff{_CONTROL}{_PICTURE}]"
    rf"|{_WORD_START}[hHwW]|  "
)

_Tokens = tuple[tuple[str, str], ...]

_ALWAYS: _Tokens = (
    ("newline", rf"[{LINE_FEEDS}]"),
    ("space", rf"[{SPACES}]+"),
    ("pair", r"[\ud800-\udbff][\udc00-\udfff]"),  # torn by a producer that counts in UTF-16
    ("wait", r"[\ud800-\udbff]MORE"),
    ("drop", r"[\ud800-\udfff]"),
)
_EMOJI_TOKENS: _Tokens = (
    ("wait", rf"{_EMOJI}{{1,64}}MORE"),
    ("picture", rf"{_EMOJI}{{1,64}}"),
    ("drop", r"[\ufe0e\ufe0f\u20e3]+"),
)
_CONTROL_TOKENS: _Tokens = (("drop", rf"[{_CONTROL}]+"),)

_INLINE: dict[str, _Tokens] = {
    "code": (
        ("fence", r"(?P<fence_mark>`{3,16}+)[^`\n]{0,240}\n"),
        ("code", r"(?P<ticks>`{1,16}+)(?=[^`\n](?:[^\n]{0,198}?[^`\n])??(?P=ticks)(?:[^`]|END))"),
        ("wait", r"`{1,16}+[^\n]{0,240}MORE"),
        ("drop", r"`{1,16}"),
    ),
    "links": (
        ("link", rf"\[(?=[^\[\]\n]{{0,200}}\]\({_TARGET}\))"),
        ("wait", rf"\[[^\[\]\n]{{0,200}}(?:\]MORE|\]\({_TARGET_MORE}|MORE)"),
        ("gone", r"\[(?:\d{1,3}|\^[^\[\]\s]{1,60})\](?!\()"),
        ("drop", rf"\]\({_TARGET}\)"),
        ("wait", rf"\](?:\({_TARGET_MORE}|MORE)"),
        ("wait", r"【[^】\n]{0,161}】?MORE"),
        ("gone", r"【[^】\n]{0,80}†[^】\n]{0,80}】"),  # as some assistants cite
    ),
    "html": (
        ("comment", r"<!--"),
        ("silent", r"<(?P<silent_tag>(?i:think|thinking|script|style))(?:\s[^<>\n]{0,300})?>"),
        ("tag", _TAG),
        ("wait", r"<(?:!-?|/?(?:[A-Za-z][A-Za-z0-9-]{0,30}(?:[\s/][^<>\n]{0,300})?)?)MORE"),
        ("entity", r"&(?:#\d{1,7}|#[xX][0-9A-Fa-f]{1,6}|[A-Za-z][A-Za-z0-9]{1,30});"),
        ("wait", r"&(?:#?[0-9A-Za-z]{0,31})MORE"),
    ),
    "urls": (
        ("wait", rf"<?{_WORD_START}{_SCHEME_SO_FAR}MORE|<MORE"),
        ("wait", rf"<?{_SCHEME}{_URL_CHARACTER}{{0,2000}}(?:\([^\s()<>]{{0,200}})?MORE"),
        (
            "url",
            rf"<{_SCHEME}{_URL_CHARACTER}{{1,2000}}>|{_SCHEME}{_URL_CHARACTER}{{1,2000}}(?<![.,;:!?…*_~])",
        ),
    ),
    "emphasis": (
        ("wait", r"(?:\*{1,99}|_{1,99}|~{1,99}|\\)MORE"),
        ("emphasis", r"\*{1,99}|_{1,99}|~{2,99}"),
        ("escape", r"\\(?=[!-/:-@\[-`{-~])"),
        ("drop", r"\\(?=\n)"),
    ),
    "lists": (("wait", r"\|[ \t]{0,99}MORE"), ("pipe", r"\|[ \t]{0,99}")),
    "emoji": _EMOJI_TOKENS,
    "controls": _CONTROL_TOKENS,
}

_CODE: dict[str, _Tokens] = {
    "code": (("wait", r"`{1,16}MORE"), ("tick", r"`{1,16}")),
    "emoji": _EMOJI_TOKENS,
    "controls": _CONTROL_TOKENS,
}

_BLOCK_ALWAYS: _Tokens = (
    ("newline", rf"[{LINE_FEEDS}]"),
    ("space", rf"[{SPACES}]+"),
    ("digits", r"(?:\d{1,3}(?:[.)]|\ufe0f)?|[A-Za-z]\)?)MORE"),
    ("number", r"(?=(?:\d{1,3}[.)]|[A-Za-z]\))[ \t])"),
)
_BULLETS = r"\-*+•‣⁃◦▪■□●○·➤➢–—"
_BLOCK: dict[str, _Tokens] = {
    "headings": (
        ("wait", r"#{1,6}MORE|(?P<rule_so_far>[-*_=])(?:[ \t]{0,9}(?P=rule_so_far)){0,199}[ \t]{0,99}MORE"),
        ("heading", r"#{1,6}[ \t]|#{2,6}(?=[^\s#])"),
        ("marker", rf"(?P<rule>[-*_=])(?:[ \t]{{0,9}}(?P=rule)){{2,199}}[ \t]{{0,99}}(?=[{LINE_FEEDS}]|END)"),
    ),
    "lists": (
        ("wait", rf"[{_BULLETS}](?:[ \t]{{1,9}}(?:\[(?:[ xX]\]?)?)?)?MORE"),
        ("marker", rf"[{_BULLETS}][ \t]{{1,9}}(?:\[[ xX]\][ \t])?|>"),
        ("wait", r"\|[-:| \t]{0,800}MORE"),
        ("marker", rf"\|[-:| \t]{{1,800}}(?=[{LINE_FEEDS}]|END)"),
        ("row", r"\|"),
    ),
    "links": (
        ("marker", rf"\[[^\[\]\n]{{1,100}}\]:[ \t]{{1,9}}<?{_SCHEME}\S{{0,1000}}{_TITLE}(?=[{LINE_FEEDS}]|END)"),
        (
            "wait",
            rf"\[[^\[\]\n]{{1,100}}\]:[ \t]{{0,9}}<?(?:{_SCHEME}\S{{0,1000}}{_TITLE_MORE}|{_SCHEME_SO_FAR})?MORE",
        ),
        ("wait", r"\[[^\[\]\n]{0,100}\]?MORE"),
        ("marker", r"\[(?:\d{1,3}|\^[^\[\]\s]{1,60})\]:"),
    ),
    "code": (
        ("wait", r"~{1,2}MORE|~{3,16}+[^~\n]{0,240}MORE"),
        ("fence", r"(?P<fence_mark>~{3,16}+)[^~\n]{0,240}\n"),
    ),
    "emoji": (
        ("wait", rf"{_EMOJI}{{1,64}}MORE"),
        ("marker", rf"{_EMOJI}{{1,64}}"),
        ("number", r"(?=\d{1,3}\ufe0f?\u20e3)"),
    ),
}


@cache
def grammar(clean: Clean, *, final: bool) -> Grammar:
    """The tokens of the parts that are on, for an open or a final turn."""
    return Grammar(
        block=_compile(_BLOCK_ALWAYS, _BLOCK, clean, final=final),
        inline=_compile(_ALWAYS, _INLINE, clean, final=final),
        code=_compile(_ALWAYS, _CODE, clean, final=final),
    )


def _compile(always: _Tokens, parts: dict[str, _Tokens], clean: Clean, *, final: bool) -> Pattern:
    tokens = [token for part in fields(clean) if getattr(clean, part.name) for token in parts.get(part.name, ())]
    pattern = "|".join(f"(?P<{kind}>{token})" for kind, token in (*always, *tokens))
    more, end = (r"(?!)", r"\Z") if final else (r"\Z", r"(?!)")
    return regex.compile("(?V1)" + pattern.replace("MORE", more).replace("END", end))
