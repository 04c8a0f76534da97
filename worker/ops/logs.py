"""Logging: structlog to the console on a terminal, else JSON lines. Names of log events are constants here.

Never logged: the Kaltura Session, tokens, TURN credentials, speech text, bodies.
"""

import logging
import re
import sys
from collections.abc import MutableMapping
from typing import Any, Literal

import structlog

WORKER_STARTING = "worker_starting"
WORKER_STOPPING = "worker_stopping"
WORKER_STOPPED = "worker_stopped"
BROKER_CONNECTED = "broker_connected"
BROKER_LOST = "broker_lost"
BROKER_BLOCKED = "broker_blocked"
BROKER_UNBLOCKED = "broker_unblocked"
POLICIES_UNCHECKED = "policies_unchecked"
LINKS_SILENT = "links_silent"
PARTITION_LOST = "partition_lost"
CHUNKS_OUT_OF_ORDER = "chunks_out_of_order"
PARTITION_HANDED_OVER = "partition_handed_over"
CONVERSATION_MOVED = "conversation_moved"
CONVERSATION_PASSED = "conversation_passed"
DELIVERY_UNREADABLE = "delivery_unreadable"
TIMESTAMP_IGNORED = "timestamp_ignored"
COMMAND_PARKED = "command_parked"
EVENT_LET_GO = "event_let_go"
PARKING_FAILED = "parking_failed"
ANSWER_FAILED = "answer_failed"
KS_RENEWED = "ks_renewed"
KS_FAILED = "ks_failed"
CALL_FAILED = "call_failed"
LANE_CRASHED = "lane_crashed"
SETTLE_FAILED = "settle_failed"
STORE_FAILED = "store_failed"
SESSION_ENDED = "session_ended"
SESSION_ADOPTED = "session_adopted"

_SECRETS = re.compile(
    r"(?i)\b(bearer|ks)\s+[\w.~+/=|-]{8,}|(?<=://)[^/@\s:]*:[^/@\s]*(?=@)"
    # A Kaltura Session and a JWT, wherever they stand.
    r"|(?-i:djJ8[\w+/=-]{8,}|eyJ[\w-]{8,}(\.[\w-]*){0,2})"
)


def redacted(text: str) -> str:
    """The text without what looks like a credential: a last line of defence for other people's error texts."""
    return _SECRETS.sub("[redacted]", text)


def configure(level: str, log_format: Literal["auto", "console", "json"]) -> None:
    """Set up logging for the process, the libraries' logs included (warnings and worse, as they speak a lot)."""
    console = log_format == "console" or (log_format == "auto" and sys.stderr.isatty())
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
    ]
    renderer: structlog.typing.Processor
    if console:
        renderer = structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
    else:
        renderer = structlog.processors.JSONRenderer(ensure_ascii=False)
    formatter = structlog.stdlib.ProcessorFormatter(
        foreign_pre_chain=shared,
        processors=[
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.format_exc_info,  # before the redaction: texts of exceptions may hold anything
            _redact,
            renderer,
        ],
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("worker").setLevel(level.upper())
    # The link tells of losses itself, once and with the remedy.
    for library in ("aio_pika.connection", "aiormq.connection"):
        logging.getLogger(library).setLevel(logging.CRITICAL)
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )


def _redact(_logger: object, _name: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    for key, value in event.items():
        if isinstance(value, str):
            event[key] = redacted(value)
    return event
