"""What a delivery is: a command with its envelope, or a message that is none."""

import hashlib
import re
import uuid
from datetime import datetime

import structlog

from schemas.commands import FieldError, Malformed, RejectReason, parse
from worker.amqp.delivery import AmqpDelivery
from worker.amqp.lenient import printable, readable
from worker.core.model import Entry, Misfit, ReplyTo
from worker.ops import logs

_log = structlog.stdlib.get_logger(__name__)

_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")
_EARLIEST_S = 1_577_836_800.0
"""2020: an older time stamp is a mistake of units, and would let everything expire unspoken."""
_FUTURE_S = 86_400.0
_REPLY_EXPIRES_MS = 30_000
_RUN_CHARS = 64

REPLAY = "avatar-replay"
"""Header: how often the command was sent again on purpose (`parked replay`), from 1. Each time is a life of its own."""
REPLAY_RUN = "avatar-replay-run"
"""Header: the same for all that was sent again together."""


def understand(delivery: AmqpDelivery) -> Entry | Misfit:
    """What a delivery is. Never raises: a message nobody thought of must not stay unanswered."""
    try:
        return read(delivery)
    except Exception:  # noqa: BLE001 - see above
        _log.exception(logs.DELIVERY_UNREADABLE)
        error = FieldError("$", "the message's properties cannot be read")
        malformed = Malformed(RejectReason.INVALID_FIELD, (error,), None)
        return Misfit(malformed, uuid.uuid4().hex, delivery, "")


def read(delivery: AmqpDelivery) -> Entry | Misfit:
    """What a delivery is: a command with its envelope, or a message that is none."""
    message = delivery.message
    properties = message.header.properties
    headers = properties.headers or {}
    routing_key = delivery.delivered.routing_key or ""
    command = parse(bytes(message.body), routing_key)
    message_id = readable(properties.message_id) if properties.message_id else None
    life = _life(headers.get(REPLAY))
    key = (f"{message_id}\nreplay {life}" if life else message_id) if message_id else uuid.uuid4().hex
    traceparent = headers.get("traceparent")
    if not isinstance(traceparent, str) or not _TRACEPARENT.fullmatch(traceparent):
        traceparent = None
    reply_to = _reply_to(properties.reply_to, properties.correlation_id, headers.get("reply-timeout-ms"))
    if isinstance(command, Malformed):
        return Misfit(command, key, delivery, printable(routing_key)[:255], message_id, traceparent, reply_to)
    return Entry(
        command=command,
        key=key,
        born=_born(headers.get("published-at-ms"), properties.timestamp, delivery.received),
        delivery=delivery,
        message_id=message_id,
        fingerprint=hashlib.blake2b(bytes(message.body), digest_size=16).digest(),
        redelivered=bool(delivery.delivered.redelivered),
        traceparent=traceparent,
        reply_to=reply_to,
        replay=readable(str(headers.get(REPLAY_RUN, life)))[:_RUN_CHARS] if life else "",
    )


def _life(replay: object) -> int:
    """Which life of its id a command leads: 0 the first, one more each time it is sent again on purpose."""
    return replay if isinstance(replay, int) and not isinstance(replay, bool) and replay > 0 else 0


def _born(published_at_ms: object, timestamp: datetime | None, received: float) -> float:
    """Where a command's age counts from, in epoch seconds: what the producer says, if it can be true."""
    said: list[float] = []
    if isinstance(published_at_ms, int) and not isinstance(published_at_ms, bool):
        said.append(published_at_ms / 1000)
    if timestamp is not None:
        said.append(timestamp.timestamp())
    for seconds in said:
        if _EARLIEST_S <= seconds <= received + _FUTURE_S:
            return seconds
        _log.warning(logs.TIMESTAMP_IGNORED, hint="published-at-ms is epoch milliseconds, timestamp epoch seconds")
    return received


def _reply_to(queue: str | None, correlation_id: str | None, timeout_ms: object) -> ReplyTo | None:
    if not queue or queue.startswith("avatar.") or readable(queue) != queue:
        return None
    expires_ms = timeout_ms if isinstance(timeout_ms, int) and 0 < timeout_ms <= 3_600_000 else _REPLY_EXPIRES_MS
    if correlation_id is not None and readable(correlation_id) != correlation_id:
        correlation_id = None  # not UTF-8: it cannot be sent back as it was, and escaped it would match nothing
    return ReplyTo(queue, correlation_id, int(expires_ms))
