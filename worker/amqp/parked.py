"""What lies in `avatar.parked`: copies of commands that were given up, with the reason in headers.

avatar-reason        the word it ended with, e.g. refused, not_json
avatar-error         what was said about it, never a value of the command
avatar-attempts      calls of the API made for it
avatar-first-at-ms   when it was first received, epoch milliseconds
avatar-parked-at-ms  when it was given up
avatar-exchange, avatar-routing-key    where it had been published
avatar-ended         the type of the event it ended with, where the reason does not tell
avatar-replay, avatar-replay-run       how often it was sent again, and with what, see `shelf`
"""

import json
import re
from collections.abc import Mapping

from aio_pika import DeliveryMode, Message
from aio_pika.abc import HeadersType
from pamqp import encode

from schemas import routes
from worker.amqp.delivery import AmqpDelivery
from worker.amqp.lenient import readable
from worker.core.verdict import Parked
from worker.ops.logs import redacted

_SHORT_BYTES = 255
_VALUE_BYTES = 4096
_HEADERS_BYTES = 65_536
"""Of the original headers in all: with ours they must fit into one frame (128 KiB), or the broker hangs up on us."""
_TOKEN = re.compile(rb"""(["']?token["']?\s*[:=]\s*)("(?:[^"\\]|\\.)*"?|[^\s,}]+)""", re.DOTALL | re.IGNORECASE)
REDACTED = "[redacted]"


def parked_copy(delivery: AmqpDelivery, parked: Parked, now: float) -> Message:
    """The message as it is kept: as it came, but for tokens, which are taken out."""
    original, delivered = delivery.message, delivery.delivered
    properties = original.header.properties
    found = properties.headers or {}
    exchange = delivered.exchange or ""
    if exchange == routes.DEAD:
        exchange = str(found.get("x-first-death-exchange", exchange))
    headers: HeadersType = {
        **_kept(found),
        "avatar-reason": parked.reason,
        "avatar-error": redacted(parked.error),
        "avatar-attempts": parked.attempts,
        "avatar-first-at-ms": round(delivery.received * 1000),
        "avatar-parked-at-ms": round(now * 1000),
        "avatar-exchange": _fit(exchange),
        "avatar-routing-key": _fit(delivered.routing_key or ""),
    }
    if parked.ended:
        headers["avatar-ended"] = parked.ended
    return Message(
        without_token(bytes(original.body)),
        headers=headers,
        content_type=_fit(properties.content_type or "") or None,
        delivery_mode=DeliveryMode.PERSISTENT,
        correlation_id=_fit(properties.correlation_id or "") or None,
        reply_to=_fit(properties.reply_to or "") or None,
        message_id=_fit(properties.message_id or "") or None,
        timestamp=properties.timestamp,
    )


def without_token(body: bytes) -> bytes:
    """The body without the value of any field `token`, also where it is no JSON: broken commands hold secrets too."""
    tokens = 0

    def redact(found: dict[str, object]) -> dict[str, object]:
        nonlocal tokens
        for name in found:
            if name.lower() == "token":
                found[name] = REDACTED
                tokens += 1
        return found

    try:
        document = json.loads(body, object_hook=redact)
    except (ValueError, RecursionError):
        return _TOKEN.sub(rb'\1"' + REDACTED.encode() + b'"', body)
    return json.dumps(document).encode() if tokens else body


def _kept(headers: Mapping[str, object]) -> HeadersType:
    """The headers of plain values, as many as fit."""
    kept: HeadersType = {}
    left = _HEADERS_BYTES
    for name, value in headers.items():
        if isinstance(value, str | bool | int | float):
            one: HeadersType = {_fit(name): _fit(value, _VALUE_BYTES) if isinstance(value, str) else value}
            size = len(encode.field_table(one))
            if size <= left:
                kept |= one
                left -= size
    return kept


def _fit(text: str, limit: int = _SHORT_BYTES) -> str:
    """UTF-8, and at most that many bytes long, as AMQP's short strings demand."""
    return readable(text).encode()[:limit].decode(errors="ignore")
