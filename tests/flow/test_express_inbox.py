"""What the inbox makes of what arrives beside the backlog."""

import json
from typing import Any
from unittest.mock import AsyncMock, MagicMock

import pytest
from aiormq.abc import DeliveredMessage
from pamqp import commands as spec
from pamqp.header import ContentHeader

from tests.support.fakes import FakeClock
from worker.amqp.inbox import Inbox
from worker.core.model import Entry


def message(message_id: str | None, body: dict[str, Any]) -> DeliveredMessage:
    """A message as the queue of express copies delivers it."""
    properties = spec.Basic.Properties(message_id=message_id)
    return DeliveredMessage(
        delivery=spec.Basic.Deliver("tag", 1, False, "avatar.interrupts", "c1"),
        header=ContentHeader(properties=properties),
        body=json.dumps(body).encode(),
        channel=MagicMock(),
    )


@pytest.mark.parametrize(
    ("message_id", "body", "heard"),
    [
        ("i", {"type": "interrupt"}, True),
        ("i", {"type": "interrupt", "turnId": "t1"}, True),
        (None, {"type": "interrupt"}, False),
        ("i", {"type": "interrupt", "turnId": 1}, False),
        ("i", {"turnId": "t1", "text": "no interrupt"}, False),
    ],
    ids=["all", "one", "without an id", "malformed", "speech"],
)
async def test_only_interrupts_with_an_id_are_heard_and_nothing_is_rejected(
    message_id: str | None, body: dict[str, Any], heard: bool
) -> None:
    receiver = MagicMock()
    inbox = Inbox(receiver, AsyncMock(), AsyncMock(), wanted=MagicMock(), worker="w1", clock=FakeClock())
    connection = AsyncMock()
    outer = connection.channel.return_value
    outer.close_callbacks = MagicMock()
    outer.get_underlay_channel.return_value.on_consumer_cancel_callbacks = set()
    await inbox._join_express(connection, MagicMock())
    consume = outer.get_underlay_channel.return_value.basic_consume
    _, receive = consume.await_args.args
    await receive(message(message_id, body))
    assert [type(call.args[0]) for call in receiver.hear.call_args_list] == [Entry] * heard
    assert all(call.args[0].express for call in receiver.hear.call_args_list)
    receiver.offer.assert_not_called()
    receiver.reject.assert_not_called()


async def test_a_consumer_cancelled_by_the_broker_ends_the_session() -> None:
    """The channel stays open, and interrupts would overtake nothing any more."""
    inbox = Inbox(MagicMock(), AsyncMock(), AsyncMock(), wanted=MagicMock(), worker="w1", clock=FakeClock())
    connection, lose = AsyncMock(), MagicMock()
    outer = connection.channel.return_value
    outer.close_callbacks = MagicMock()
    channel = outer.get_underlay_channel.return_value
    channel.on_consumer_cancel_callbacks = set()
    await inbox._join_express(connection, lose)
    (cancelled,) = channel.on_consumer_cancel_callbacks
    cancelled(spec.Basic.Cancel("a tag"))
    lose.assert_called_once()
