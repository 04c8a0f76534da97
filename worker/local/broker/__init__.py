"""Finds a RabbitMQ for the demo and the tests, or starts one that belongs to this process and goes with it.

The order: the address in an environment variable; a `rabbitmq-server` on the machine, as a private child node, never
the system's; Docker; `apt-get install rabbitmq-server`. Everything here is synchronous: it stands around an event loop,
not in one.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from worker.local.broker.base import Broker, BrokerError, Kind, OwnedBroker, handshake
from worker.local.broker.container import IMAGE, Container, docker_answers
from worker.local.broker.debian import install
from worker.local.broker.node import PrivateNode, find_server

__all__ = ["Broker", "BrokerError", "Kind", "OwnedBroker", "docker_answers", "find_broker", "find_server", "own_broker"]

PLUGINS = ("rabbitmq_sharding",)
"""The plugins of a broker we start: the hash exchange that `PARTITIONS` > 1 needs."""

_OLDEST = (3, 10)
_CONNECT_S = 10.0
_ADVICE = """Install one of these and run the command again:
  Debian, Ubuntu   sudo apt-get install rabbitmq-server
  macOS            brew install rabbitmq
  anywhere         Docker, https://docs.docker.com/get-docker/
or set {env_var} to the address of a RabbitMQ 3.10 or later: amqp://USER:PASSWORD@HOST:5672/"""


@contextmanager
def find_broker(env_var: str = "AMQP_URL", *, plugins: tuple[str, ...] = PLUGINS) -> Iterator[Broker]:
    """The broker whose address is in the environment variable, else one of our own, removed at the end.

    Raises:
        BrokerError: the one that was named does not answer, or none could be started; the text says what to do.
    """
    url = os.environ.get(env_var)
    if url:
        yield _named(url, env_var)
    else:
        with own_broker(env_var, plugins=plugins) as broker:
            yield broker


@contextmanager
def own_broker(env_var: str = "AMQP_URL", *, plugins: tuple[str, ...] = PLUGINS) -> Iterator[OwnedBroker]:
    """A broker of our own, whatever the environment says; `env_var` is only what the error text advises.

    Raises:
        BrokerError: none could be started; the text says what was tried and what to do.
    """
    ways: dict[str, Callable[[tuple[str, ...]], OwnedBroker]] = {
        "rabbitmq-server on this machine": _private_node,
        "Docker": _container,
        "apt-get install rabbitmq-server": _installed_node,
    }
    failures = []
    for name, way in ways.items():
        try:
            broker = _started(way(plugins))
        except BrokerError as reason:
            failures.append(f"  {name}: {reason}")
            continue
        try:
            yield broker
        finally:
            broker.remove()
        return
    raise BrokerError("\n".join(["No RabbitMQ could be found or started.", *failures, _ADVICE.format(env_var=env_var)]))


def _private_node(plugins: tuple[str, ...]) -> OwnedBroker:
    server = find_server()
    if server is None:
        raise BrokerError("not installed")
    return PrivateNode(server, plugins)


def _container(plugins: tuple[str, ...]) -> OwnedBroker:
    if not docker_answers():
        raise BrokerError("no docker command, or no daemon that answers it")
    _tell(f"starting {IMAGE} with Docker; the first time it is downloaded")
    return Container(plugins)


def _installed_node(plugins: tuple[str, ...]) -> OwnedBroker:
    install("rabbitmq-server", find_server)
    return _private_node(plugins)


def _started(broker: OwnedBroker) -> OwnedBroker:
    try:
        broker.start()
        _demand_recent(broker)
    except BaseException:
        broker.remove()
        raise
    return broker


def _named(url: str, env_var: str) -> Broker:
    try:
        broker = Broker("external", url, handshake(url, timeout_s=_CONNECT_S))
        _demand_recent(broker)
    except (OSError, ValueError, BrokerError) as error:
        # The address may hold a password, so it is not repeated.
        raise BrokerError(f"the broker that {env_var} names cannot be used: {error}") from None
    return broker


def _demand_recent(broker: Broker) -> None:
    if broker.version_info < _OLDEST:
        raise BrokerError(f"it is RabbitMQ {broker.version}; 3.10 or later is needed")


def _tell(what: str) -> None:
    print(f"broker: {what}", file=sys.stderr, flush=True)
