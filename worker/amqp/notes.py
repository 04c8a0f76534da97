"""What workers send each other that is no command: no event tells of it. Through a partition, straight to its queue.

knock     you own this partition: for an owner that nothing is delivered to
marker    all that stood before me has passed: for a conversation whose key has moved (law 20)

and, over an exchange of their own,

joined    I consume all partitions now: for owners whom I outrank
"""

import uuid

from aio_pika import DeliveryMode, Message

from worker.amqp.delivery import AmqpDelivery
from worker.amqp.topology import WORKERS
from worker.core.model import Marker

KNOCK = "avatar.knock"
MARKER = "avatar.marker"
JOINED = "avatar.joined"
_CONVERSATION = "avatar-conversation"
_TO = "avatar-partition"


def knock() -> Message:
    """A knock."""
    return Message(b"", type=KNOCK, message_id=uuid.uuid4().hex)


def marker(conversation_id: str, to: int) -> Message:
    """A marker of a conversation whose commands come from partition `to` now; it lasts as long as a command."""
    return Message(
        b"",
        type=MARKER,
        headers={_CONVERSATION: conversation_id, _TO: to},
        delivery_mode=DeliveryMode.PERSISTENT,
        message_id=uuid.uuid4().hex,
    )


def joined(worker: str) -> Message:
    """A worker's announcement of itself."""
    return Message(worker.encode(), type=JOINED, message_id=uuid.uuid4().hex)


def read_joined(delivery: AmqpDelivery) -> str | None:
    """The worker that has announced itself, if it is that."""
    if delivery.message.header.properties.message_type != JOINED or delivery.delivered.exchange != WORKERS:
        return None
    return bytes(delivery.message.body).decode(errors="replace")


def is_note(delivery: AmqpDelivery) -> bool:
    """Whether it is from another worker, and no command."""
    # Through our exchanges anybody can send anything.
    return _looks_like_one(delivery) and delivery.delivered.exchange == ""


def was_note(delivery: AmqpDelivery) -> bool:
    """Whether it was one, before the broker gave it up."""
    headers = delivery.message.header.properties.headers or {}
    return _looks_like_one(delivery) and headers.get("x-first-death-exchange") == ""


def _looks_like_one(delivery: AmqpDelivery) -> bool:
    return delivery.message.header.properties.message_type in (KNOCK, MARKER)


def read_marker(delivery: AmqpDelivery) -> Marker | None:
    """The marker that a note is, if it is one."""
    headers = delivery.message.header.properties.headers or {}
    conversation_id, to = headers.get(_CONVERSATION), headers.get(_TO)
    if isinstance(conversation_id, str) and isinstance(to, int):
        return Marker(conversation_id, to, delivery)
    return None
