"""What aiormq raises where a connection dies in an unlucky moment, or the broker refuses something."""

import asyncio

import pytest

from tests.support.proxy import Proxy, proxied
from worker.amqp.link import Connected, named_losses, where
from worker.errors import ConfigurationError, LinkLost


@pytest.mark.parametrize(
    "unlucky",
    [
        pytest.param(Exception("Connection closed"), id="amid a call"),
        pytest.param(asyncio.CancelledError(), id="cancelled by nobody"),
    ],
)
async def test_an_unlucky_death_is_a_loss(unlucky: BaseException) -> None:
    with pytest.raises(LinkLost), named_losses():
        raise unlucky


async def test_a_cancellation_that_was_asked_for_is_none() -> None:
    async def wait() -> None:
        with named_losses():
            await asyncio.Event().wait()

    waiting = asyncio.create_task(wait())
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting


async def test_a_mistake_of_ours_is_none() -> None:
    with pytest.raises(KeyError), named_losses():
        raise KeyError("bug")


async def test_what_the_user_may_not_do_is_told_with_the_remedy(amqp_url: str) -> None:
    with pytest.raises(ConfigurationError, match=r"AMQP_URL: ACCESS_REFUSED.*permissions: `doctor`"):
        async with Connected(amqp_url, heartbeat_s=10) as connection, connection.channel() as channel:
            await channel.declare_exchange("amq.of_the_broker_alone")


async def test_an_errand_whose_connection_goes_says_so(amqp_url: str) -> None:
    async def run(proxy: Proxy) -> None:
        async with Connected(proxy.url, heartbeat_s=10) as connection:
            channel = await connection.channel()
            proxy.cut()
            while True:
                await channel.declare_queue(exclusive=True)

    async with proxied(amqp_url) as proxy:
        with pytest.raises(LinkLost, match=f"127.0.0.1:{proxy.port}/.* went away"):
            await run(proxy)


@pytest.mark.parametrize(("scheme", "port"), [("amqp", 5672), ("amqps", 5671)])
def test_the_port_that_is_called_is_told(scheme: str, port: int) -> None:
    assert where(f"{scheme}://user:secret@host/vhost") == f"host:{port}/vhost"
