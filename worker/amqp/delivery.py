"""One message the broker has delivered, and the way it is kept in the store instead (law 7: the durable inbox)."""

import base64
import json
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Protocol, Self

from aiormq.abc import AbstractChannel, DeliveredMessage
from aiormq.exceptions import ChannelInvalidStateError, ConnectionClosed
from pamqp import commands as spec
from pamqp.header import ContentHeader

from worker.ports import Tenure

_PLAIN = str | bool | int | float


class OpenTenure(Tenure, Protocol):
    """A tenure that knows whether it has ended."""

    open: bool


class AmqpDelivery:
    """`ports.KeepableDelivery` of a RabbitMQ message; `message` is what is parked if it comes to that.

    `received` is when this command first came to a worker, in epoch seconds.
    """

    def __init__(
        self, tenure: OpenTenure, channel: AbstractChannel | None, message: DeliveredMessage, received: float
    ) -> None:
        assert isinstance(message.delivery, spec.Basic.Deliver)
        self.tenure = tenure
        self.message = message
        self.delivered = message.delivery
        self.received = received
        self.settled = False
        self._channel = channel
        self._remove: Callable[[], None] | None = None

    async def settle(self) -> bool:
        """Acknowledge, or remove from the store what is kept there. False: stale."""
        if self._remove is not None:
            self.settled = True
            self._remove()
            return True
        if not self.tenure.open:
            return False
        self.settled = True
        return await self._acknowledge()

    async def move(self, remove: Callable[[], None]) -> None:
        """See `ports.KeepableDelivery`."""
        if self.settled:
            remove()
            return
        self._remove = remove
        if self.tenure.open:
            await self._acknowledge()

    async def _acknowledge(self) -> bool:
        tag = self.delivered.delivery_tag
        if tag is None or self._channel is None:
            return False
        try:
            await self._channel.basic_ack(tag, wait=False)
        except (ChannelInvalidStateError, ConnectionClosed):
            return False
        return True

    def pack(self) -> str:
        """The message as JSON: its body and routing, and of its properties and headers those that anybody reads."""
        properties = self.message.header.properties
        return json.dumps(
            {
                "body": base64.b64encode(bytes(self.message.body)).decode(),
                "exchange": self.delivered.exchange,
                "routing_key": self.delivered.routing_key,
                "received": self.received,
                "timestamp": properties.timestamp.timestamp() if properties.timestamp else None,
                "headers": {name: value for name, value in (properties.headers or {}).items() if _is_plain(value)},
                **{name: getattr(properties, name) for name in _PROPERTIES},
            }
        )

    @classmethod
    def unpack(cls, packed: str, tenure: OpenTenure, remove: Callable[[], None]) -> Self:
        """The message again, as one that was delivered before."""
        document: dict[str, Any] = json.loads(packed)
        body = base64.b64decode(document["body"])
        seconds = document["timestamp"]
        properties = spec.Basic.Properties()
        properties.headers = document["headers"]
        properties.timestamp = None if seconds is None else datetime.fromtimestamp(seconds, UTC)
        for name in _PROPERTIES:
            setattr(properties, name, document[name])
        delivered = spec.Basic.Deliver(
            "", None, redelivered=True, exchange=document["exchange"], routing_key=document["routing_key"]
        )
        header = ContentHeader(0, len(body), properties)
        message = DeliveredMessage(delivered, header, body, None)  # type: ignore[arg-type]  # nobody asks it
        delivery = cls(tenure, None, message, document["received"])
        delivery._remove = remove
        return delivery


_PROPERTIES = ("content_type", "correlation_id", "reply_to", "message_id")


def _is_plain(value: object) -> bool:
    return isinstance(value, _PLAIN)
