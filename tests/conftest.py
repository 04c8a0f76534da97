"""The broker that tests run on, empty before each of them.

A test that asks for `amqp_url`, `broker` or `owned_broker` runs once per RabbitMQ of this machine (`brokers.kinds`). It
cannot be skipped: where no broker is to be had, it fails.
"""

from collections.abc import AsyncIterator
from contextlib import ExitStack

import aio_pika
import pytest

from tests.support import brokers
from worker.local.broker import Broker, OwnedBroker, own_broker

_EXCHANGES = ("avatar.commands", "avatar.commands.v1.hash", "avatar.interrupts", "avatar.events", "avatar.dead")
_QUEUES = ("avatar.parked", "avatar.dead", "avatar.topology", *(f"avatar.commands.v1.p{n:02}" for n in range(100)))

_BROKERS = pytest.StashKey[brokers.Brokers]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_BROKERS] = brokers.Brokers()
    config.add_cleanup(config.stash[_BROKERS].close)


def pytest_report_header() -> str:
    kinds = brokers.kinds()
    absent = "" if brokers.FOUR in kinds else f"; {brokers.FOUR} is left out: Docker does not answer"
    return f"brokers: {', '.join(kinds)}{absent}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "broker" in metafunc.fixturenames:
        marks = {brokers.FOUR: [pytest.mark.rabbitmq4]}
        kinds = [pytest.param(kind, id=kind, marks=marks.get(kind, [])) for kind in brokers.kinds()]
        metafunc.parametrize("broker", kinds, indirect=True, scope="session")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Starts the brokers that the chosen tests need: an installation must not eat the first test's time limit."""
    if session.config.option.collectonly:
        return
    parameters: list[dict[str, object]] = [item.callspec.params for item in session.items if hasattr(item, "callspec")]
    capture = session.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        for kind in sorted({str(params["broker"]) for params in parameters if "broker" in params}):
            session.config.stash[_BROKERS].start(kind)


@pytest.fixture(scope="session")
def broker(request: pytest.FixtureRequest) -> Broker:
    """A running RabbitMQ; what other tests left in it may still be there, see `amqp_url`."""
    return request.config.stash[_BROKERS].get(request.param)


@pytest.fixture
async def amqp_url(broker: Broker) -> AsyncIterator[str]:
    """The address of an empty RabbitMQ: a virtual host of its own, or, on a broker that was named, a wiped one."""
    if broker.management_url is None:
        await _wipe(broker.url)
        yield broker.url
    else:
        async with brokers.virtual_host(broker) as url:
            yield url


@pytest.fixture
async def owned_broker(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[OwnedBroker]:
    """An empty RabbitMQ that a test may stop, kill and start; it runs again afterwards."""
    with ExitStack() as stack:
        owned = broker
        if not isinstance(owned, OwnedBroker):
            owned = stack.enter_context(own_broker(brokers.ENV_VAR, plugins=brokers.TEST_PLUGINS))
        async with brokers.virtual_host(owned) as url:
            with monkeypatch.context() as patch:
                patch.setattr(owned, "url", url)
                yield owned
                owned.start()


async def _wipe(url: str) -> None:
    async with await aio_pika.connect(url) as connection, connection.channel() as channel:
        for queue in _QUEUES:
            await channel.queue_delete(queue)
        for exchange in _EXCHANGES:
            await channel.exchange_delete(exchange)
