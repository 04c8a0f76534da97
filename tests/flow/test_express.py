"""What the inbox makes of what arrives beside the backlog."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from unittest.mock import AsyncMock, MagicMock

import pytest
from aiormq.abc import DeliveredMessage
from pamqp import commands as spec
from pamqp.header import ContentHeader

from tests.support.fakes import FakeClock
from worker.amqp.express import Express
from worker.core.model import Entry
from worker.errors import LinkLost


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
    hear, connection = MagicMock(), AsyncMock()
    async with consuming(Express(hear, MagicMock(), FakeClock()), connection) as (channel, _):
        _, receive = channel.basic_consume.await_args.args
        await receive(message(message_id, body))
    assert [type(call.args[0]) for call in hear.call_args_list] == [Entry] * heard
    assert all(call.args[0].express for call in hear.call_args_list)


async def test_a_consumer_cancelled_by_the_broker_ends_the_session() -> None:
    """The channel stays open, and interrupts would overtake nothing any more."""
    express = Express(MagicMock(), MagicMock(), FakeClock())
    async with consuming(express, AsyncMock()) as (channel, session):
        (cancelled,) = channel.on_consumer_cancel_callbacks
        cancelled(spec.Basic.Cancel("a tag"))
        with pytest.raises(LinkLost, match="cancelled"):
            await session
    assert not express.ready.is_set()


@asynccontextmanager
async def consuming(express: Express, connection: AsyncMock) -> AsyncIterator[tuple[Any, asyncio.Task[None]]]:
    """While it consumes; yields its channel and its session."""
    connection.close_callbacks = MagicMock()
    connection.transport.connection.server_properties = {"version": "4.0.5"}
    outer = connection.channel.return_value
    outer.close_callbacks = MagicMock()
    channel = outer.get_underlay_channel.return_value
    channel.on_consumer_cancel_callbacks = set()
    express.declared.set()
    session = asyncio.create_task(express.session(connection))
    await express.ready.wait()
    yield channel, session
    session.cancel()
    with contextlib.suppress(asyncio.CancelledError, LinkLost):
        await session
