"""The brokers of a test run: each is started once and kept until the run is over."""

import itertools
import os
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, asynccontextmanager, contextmanager
from functools import cache

import aio_pika
import aiohttp
from docker.models.containers import Container
from testcontainers.core.config import testcontainers_config
from testcontainers.core.container import DockerContainer

from worker.local.broker import PLUGINS, Broker, OwnedBroker, docker_answers, find_broker, find_server
from worker.local.broker.base import MANAGEMENT, Guard, enabled_plugins, free_port
from worker.local.broker.container import IMAGE

ENV_VAR = "TEST_AMQP_URL"
LOCAL = "rabbitmq-local"
FOUR = "rabbitmq-4"

TEST_PLUGINS = (*PLUGINS, MANAGEMENT)

_AMQP = "5672/tcp"
_HTTP = "15672/tcp"
_EXCHANGES = ("avatar.commands", "avatar.commands.v1.hash", "avatar.interrupts", "avatar.events", "avatar.dead")
_QUEUES = ("avatar.parked", "avatar.dead", "avatar.topology", *(f"avatar.commands.v1.p{n:02}" for n in range(100)))

# testcontainers' own reaper is one more image, and a container that holds the Docker socket; `Guard` does the same.
testcontainers_config.ryuk_disabled = True


@cache
def kinds() -> tuple[str, ...]:
    """The brokers to test on, never none: where nothing is found, `LOCAL` fails and says why."""
    docker = docker_answers()
    local = bool(os.environ.get(ENV_VAR)) or find_server() is not None or not docker
    return (LOCAL,) * local + (FOUR,) * docker


class Brokers:
    """Hands out the broker of a kind, started at its first use; a failure is remembered and raised at every use."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._started: dict[str, Broker | Exception] = {}

    def start(self, kind: str) -> None:
        """Starts the broker unless that was done or tried before."""
        if kind in self._started:
            return
        source: AbstractContextManager[Broker] = (
            rabbitmq4() if kind == FOUR else find_broker(ENV_VAR, plugins=TEST_PLUGINS)
        )
        try:
            self._started[kind] = self._stack.enter_context(source)
        except Exception as error:  # noqa: BLE001  whatever it is, it fails the tests that need this broker, not pytest
            self._started[kind] = error

    def get(self, kind: str) -> Broker:
        """The running broker.

        Raises:
            Exception: what went wrong when it was started.
        """
        self.start(kind)
        broker = self._started[kind]
        if isinstance(broker, Exception):
            raise broker
        return broker

    def close(self) -> None:
        """Removes every broker that was started here."""
        self._stack.close()


_names = (f"test-{number}" for number in itertools.count(1))
_used: dict[Broker, deque[str]] = {}
_LATER = 8


@asynccontextmanager
async def empty(broker: Broker, also: Iterable[str] = ()) -> AsyncIterator[str]:
    """The address of a virtual host of its own, or, on a broker that was named, of a wiped one.

    RabbitMQ 3.10 does not survive that a queue with at-least-once dead-lettering is deleted while it chooses its
    leader: `rabbit_fifo_dlx_sup` ends, and no such queue can be declared any more. So a virtual host goes some tests
    later, and no name comes twice. `also`: queues to wipe besides those of the contract.
    """
    if broker.management_url is None:
        await _wipe(broker.url, also)
        yield broker.url
        return
    name = next(_names)
    credentials = {"Authorization": aiohttp.encode_basic_auth("guest", "guest")}
    async with aiohttp.ClientSession(headers=credentials, raise_for_status=True) as http:
        await http.put(f"{broker.management_url}/vhosts/{name}")
        yield f"{broker.url}{name}"
        used = _used.setdefault(broker, deque())
        used.append(name)
        while len(used) > _LATER:
            await http.delete(f"{broker.management_url}/vhosts/{used.popleft()}")


def restarted(broker: Broker) -> None:
    """All queues choose their leaders anew: what was used so far stays for good."""
    _used.pop(broker, None)


async def _wipe(url: str, also: Iterable[str]) -> None:
    connection = await aio_pika.connect(url)
    async with connection, connection.channel() as channel:
        for queue in (*_QUEUES, *also):
            await channel.queue_delete(queue)
        for exchange in _EXCHANGES:
            await channel.exchange_delete(exchange)


@contextmanager
def rabbitmq4() -> Iterator[OwnedBroker]:
    """RabbitMQ 4 in a container of this test run."""
    broker = OwnContainer()
    try:
        broker.start()
        yield broker
    finally:
        broker.remove()


class OwnContainer(OwnedBroker):
    """A container by testcontainers."""

    def __init__(self) -> None:
        port, management_port = free_port(), free_port()
        management_url = f"http://127.0.0.1:{management_port}/api"
        super().__init__("docker", f"amqp://guest:guest@127.0.0.1:{port}/", management_url=management_url)
        plugins = enabled_plugins(TEST_PLUGINS).encode()
        self._docker = DockerContainer(IMAGE).with_copy_into_container(plugins, "/etc/rabbitmq/enabled_plugins")
        # Docker takes an address and a port; with_bind_ports takes only a port, and opens it on every address.
        self._docker.ports |= {_AMQP: ("127.0.0.1", port), _HTTP: ("127.0.0.1", management_port)}  # type: ignore[dict-item]
        self._guard: Guard | None = None

    def stop(self) -> None:
        self._container.stop(timeout=30)

    def kill(self) -> None:
        if self._alive():
            self._container.kill()

    def remove(self) -> None:
        self._docker.stop()
        if self._guard is not None:
            self._guard.dismiss()
            self._guard = None

    @property
    def _container(self) -> Container:
        return self._docker.get_wrapped_container()

    def _launch(self) -> None:
        if self._guard is None:
            self._docker.start()
            self._guard = Guard('docker rm --force --volumes "$1" >/dev/null 2>&1', self._docker.get_container_id())
        else:
            self._container.start()

    def _alive(self) -> bool:
        if self._guard is None:
            return False
        self._container.reload()
        return bool(self._container.status == "running")

    def _log_tail(self) -> str:
        return str(self._container.logs(tail=20).decode(errors="replace"))
