"""The broker that tests run on, empty before each of them; and the PostgreSQL.

A test that asks for `amqp_url`, `broker` or `owned_broker` runs once per RabbitMQ of this machine (`brokers.kinds`), or
on the first of them if it is marked `one_broker`. It
cannot be skipped: where no broker is to be had, it fails.
"""

import os
import signal
from collections.abc import AsyncIterator
from contextlib import ExitStack

import pytest

from tests.support import brokers
from tests.support.postgres import Postgres, find_postgres
from worker.local.broker import Broker, OwnedBroker, own_broker

PROCESSES = 3
"""More than two cores have: most tests wait for somebody. Each process has brokers of its own."""

_BROKERS = pytest.StashKey[brokers.Brokers]()
_POSTGRES = pytest.StashKey[Postgres | Exception]()


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """One process where tests were chosen by path, and where all would share a broker that they wipe."""
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    return PROCESSES if whole and not os.environ.get(brokers.ENV_VAR) else 0


def pytest_configure(config: pytest.Config) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # A shell's background job ignores Ctrl-C, and so would every process that tests start and send one.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    config.stash[_BROKERS] = brokers.Brokers()
    config.add_cleanup(config.stash[_BROKERS].close)


def pytest_report_header() -> str:
    kinds = brokers.kinds()
    absent = "" if brokers.FOUR in kinds else f"; {brokers.FOUR} is left out: Docker does not answer"
    return f"brokers: {', '.join(kinds)}{absent}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "broker" in metafunc.fixturenames:
        kinds = brokers.kinds()
        if metafunc.definition.get_closest_marker("one_broker"):
            kinds = kinds[:1]
        marks = {brokers.FOUR: [pytest.mark.rabbitmq4]}
        params = [pytest.param(kind, id=kind, marks=marks.get(kind, [])) for kind in kinds]
        metafunc.parametrize("broker", params, indirect=True, scope="session")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What may take longest begins first, in whatever order the rest is: in the end nobody waits for it alone."""
    items.sort(key=lambda item: -max((mark.args[0] for mark in item.iter_markers("timeout")), default=0))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Starts the brokers that the chosen tests need: an installation must not eat the first test's time limit."""
    if session.config.option.collectonly:
        return
    parameters: list[dict[str, object]] = [item.callspec.params for item in session.items if hasattr(item, "callspec")]
    capture = session.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        for kind in sorted({str(params["broker"]) for params in parameters if "broker" in params}):
            session.config.stash[_BROKERS].start(kind)
        if any("postgres" in params.values() for params in parameters) or any(
            "postgres" in getattr(item, "fixturenames", ()) for item in session.items
        ):
            session.config.stash[_POSTGRES] = _start_postgres(session.config)


def _start_postgres(config: pytest.Config) -> Postgres | Exception:
    stack = ExitStack()
    config.add_cleanup(stack.close)
    try:
        return stack.enter_context(find_postgres())
    except Exception as error:  # noqa: BLE001  whatever it is, it fails the tests that need it, not pytest
        return error


@pytest.fixture(scope="session")
def postgres(request: pytest.FixtureRequest) -> Postgres:
    """A running PostgreSQL; a test takes a schema of it."""
    found = request.config.stash[_POSTGRES]
    if isinstance(found, Exception):
        raise found
    return found


@pytest.fixture(scope="session")
def broker(request: pytest.FixtureRequest) -> Broker:
    """A running RabbitMQ; what other tests left in it may still be there, see `amqp_url`."""
    return request.config.stash[_BROKERS].get(request.param)


@pytest.fixture
async def amqp_url(broker: Broker) -> AsyncIterator[str]:
    """The address of an empty RabbitMQ."""
    async with brokers.empty(broker) as url:
        yield url


@pytest.fixture
async def owned_broker(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[OwnedBroker]:
    """An empty RabbitMQ that a test may stop, kill and start; it runs again afterwards."""
    with ExitStack() as stack:
        owned = broker
        if not isinstance(owned, OwnedBroker):
            owned = stack.enter_context(own_broker(brokers.ENV_VAR, plugins=brokers.TEST_PLUGINS))
        async with brokers.empty(owned) as url:
            with monkeypatch.context() as patch:
                patch.setattr(owned, "url", url)
                yield owned
                owned.start()
                brokers.restarted(owned)
