"""Makes pamqp decode whatever the broker hands over.

A routing key, a `message_id` or a header name that is not UTF-8, or a timestamp beyond the calendar, makes pamqp raise.
The connection dies of it, again at every redelivery, and so does every standby in turn: one message stops the fleet.
Decoded leniently, the message is a command like any other, or is rejected like any other. Undecodable bytes become
lone surrogates (`surrogateescape`), which `readable` turns into `\\xNN`. Of tables within tables only a few levels are
read: twenty thousand fit into one header.
"""

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from pamqp import decode

_EPOCH = datetime.fromtimestamp(0, tz=UTC)
_DEEPEST = 8
_UNREADABLE = (ValueError, IndexError, OverflowError)


def install() -> None:
    """Replace pamqp's decoders of short strings, time stamps and tables, for the whole process. May be called again."""
    decode.METHODS.update(shortstr=_short_string, timestamp=_timestamp, table=_table)
    table, array = _Nested(_table, dict), _Nested(decode.field_array, list)
    decode.TABLE_MAPPING.update({b"T": _timestamp, b"F": table, b"A": array})


def readable(text: str) -> str:
    """The text with undecodable bytes escaped, so that it can be encoded; anything else is as it was."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def printable(text: str) -> str:
    """The text with undecodable bytes and control characters escaped, safe to show to a person."""
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in readable(text))


def _short_string(value: bytes) -> tuple[int, str]:
    length = value[0]
    return length + 1, value[1 : length + 1].decode("utf-8", "surrogateescape")


def _timestamp(value: bytes) -> tuple[int, datetime]:
    """What pamqp reads where there is one, else 1970: the inbox takes an absurd time for none."""
    try:
        return _pamqp_timestamp(value)
    except (ValueError, OverflowError, OSError):
        return 8, _EPOCH


def _table(value: bytes) -> tuple[int, dict[str, Any]]:
    """A field table; what stands behind a field that cannot be read is left out."""
    end = 4 + int.from_bytes(value[:4], "big")
    found: dict[str, Any] = {}
    offset = 4
    try:
        while offset < end:
            consumed, name = _short_string(value[offset:end])
            offset += consumed
            consumed, found[name] = decode.embedded_value(value[offset:end])
            offset += consumed
    except _UNREADABLE:
        pass
    return end, found


class _Nested:
    """A decoder of a table or an array within another: where it lies too deep or cannot be read, it is empty."""

    _depth = 0

    def __init__(self, decoder: Callable[[bytes], tuple[int, Any]], empty: Callable[[], Any]) -> None:
        self._decoder = decoder
        self._empty = empty

    def __call__(self, value: bytes) -> tuple[int, Any]:
        end = 4 + int.from_bytes(value[:4], "big")
        if _Nested._depth == _DEEPEST:
            return end, self._empty()
        _Nested._depth += 1
        try:
            return self._decoder(value[:end])
        except _UNREADABLE:
            return end, self._empty()
        finally:
            _Nested._depth -= 1


_pamqp_timestamp = decode.timestamp
