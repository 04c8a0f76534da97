"""The memory alarm of a broker that belongs to the tests, and its patience with consumers."""

import asyncio
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tests.support.brokers import OwnContainer
from worker.local.broker import OwnedBroker, find_server
from worker.local.broker.container import Container
from worker.local.broker.node import PrivateNode

_CTL_S = 60
_LOOK_MS = 200


@asynccontextmanager
async def alarm(broker: OwnedBroker) -> AsyncIterator[None]:
    """The broker believes that it is out of memory."""
    await asyncio.to_thread(_control, broker, "set_vm_memory_high_watermark", "absolute", "1")
    try:
        yield
    finally:
        await asyncio.to_thread(_control, broker, "set_vm_memory_high_watermark", "0.6")


@asynccontextmanager
async def patience(broker: OwnedBroker, within_s: float) -> AsyncIterator[None]:
    """The broker takes its channel from a consumer that holds a delivery for so long; on channels opened meanwhile."""
    await asyncio.to_thread(_control, broker, "eval", _patience(round(within_s * 1000), _LOOK_MS))
    try:
        yield
    finally:
        await asyncio.to_thread(_control, broker, "eval", _patience(1_800_000, 60_000))


def _patience(timeout_ms: int, look_ms: int) -> str:
    return "".join(
        f"application:set_env(rabbit, {name}, {value}){end}"
        for name, value, end in (("consumer_timeout", timeout_ms, ","), ("channel_tick_interval", look_ms, "."))
    )


def _control(broker: OwnedBroker, *arguments: str) -> None:
    environment = None
    match broker:
        case PrivateNode():
            server = find_server()
            assert server is not None
            program = [str(server.with_name("rabbitmqctl"))]
            environment = broker._environment
        case Container():
            program = ["docker", "exec", broker._name, "rabbitmqctl"]
        case OwnContainer():
            program = ["docker", "exec", str(broker._container.id), "rabbitmqctl"]
        case _:
            raise AssertionError(broker)
    subprocess.run([*program, *arguments], env=environment, timeout=_CTL_S, check=True, capture_output=True)
