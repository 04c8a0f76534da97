"""Names on the broker, as functions and constants. Outsiders rely on every one of them (contract, section 1)."""

import re

COMMANDS = "avatar.commands"
INTERRUPTS = "avatar.interrupts"
EVENTS = "avatar.events"
PARKED = "avatar.parked"
DEAD = "avatar.dead"

MAX_PARTITIONS = 100
"""Two digits name a partition, so that names sort as numbers do."""

MAX_COMMAND_BYTES = 256 * 1024

INVALID_SUBJECT = "$invalid"
"""Stands for the conversation in events about messages that name none."""

_CONVERSATION_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")


def partition_queue(partition: int) -> str:
    """The queue of a partition: `avatar.commands.v1.p00`, then `…p01`, and so on.

    Raises:
        ValueError: the partition is not in 0 … 99.
    """
    if not 0 <= partition < MAX_PARTITIONS:
        raise ValueError(f"partition {partition} is not in 0 … {MAX_PARTITIONS - 1}")
    return f"{COMMANDS}.v1.p{partition:02d}"


def event_routing_key(event_type: str, subject: str) -> str:
    """`<event type>.<conversation id>`; bind with `#`, ids may contain dots."""
    return f"{event_type}.{subject}"


def is_conversation_id(value: str) -> bool:
    """1–128 characters of `A-Z a-z 0-9 . _ : -`."""
    return _CONVERSATION_ID.fullmatch(value) is not None
