import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from threading import Thread

import aio_pika
import pytest
from aio_pika.exceptions import AMQPError

from tests.support import brokers
from worker.local import broker as finder
from worker.local.broker import PLUGINS, Broker, BrokerError, OwnedBroker, find_broker, own_broker
from worker.local.broker.base import free_port, handshake, wait_until
from worker.local.broker.container import Container

pytestmark = pytest.mark.timeout(180)  # longer than a broker may take to start

ENV_VAR = "SOME_AMQP_URL"
QUEUE = "kept"


@pytest.fixture(autouse=True)
def temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv(ENV_VAR, raising=False)
    return tmp_path


def silent(url: str) -> bool:
    try:
        handshake(url, timeout_s=1)
    except OSError:
        return True
    return False


async def put(url: str, body: bytes) -> None:
    async with await aio_pika.connect(url) as connection, connection.channel() as channel:
        await channel.declare_queue(QUEUE, durable=True)
        message = aio_pika.Message(body, delivery_mode=aio_pika.DeliveryMode.PERSISTENT)
        await channel.default_exchange.publish(message, routing_key=QUEUE)


async def take(url: str) -> bytes:
    async with await aio_pika.connect(url) as connection, connection.channel() as channel:
        queue = await channel.get_queue(QUEUE)
        message = await queue.get()
        await message.ack()
        return message.body


async def declare_hash_exchange(url: str) -> None:
    async with await aio_pika.connect(url) as connection, connection.channel() as channel:
        await channel.declare_exchange("hash", "x-modulus-hash", durable=True)


@contextmanager
def docker_broker() -> Iterator[OwnedBroker]:
    broker = Container(PLUGINS)
    try:
        broker.start()
        yield broker
    finally:
        broker.remove()


SOURCES = [pytest.param(own_broker, id="first-found")]
if brokers.FOUR in brokers.kinds():
    SOURCES.append(pytest.param(docker_broker, id="docker", marks=pytest.mark.rabbitmq4))


@pytest.mark.parametrize("source", SOURCES)
async def test_our_own_broker_keeps_address_and_data_over_restart_and_kill(
    source: Callable[[], AbstractContextManager[OwnedBroker]], temporary_folder: Path
) -> None:
    with source() as broker:
        url = broker.url
        assert broker.version_info >= (3, 10)
        await declare_hash_exchange(url)

        await put(url, b"over a restart")
        broker.restart()
        assert broker.url == url
        assert await take(url) == b"over a restart"

        await put(url, b"over a kill")
        broker.kill()
        assert silent(url)
        broker.start()
        assert broker.url == url
        assert await take(url) == b"over a kill"

        broker.stop()
        assert silent(url)
        broker.stop()
        broker.kill()

    assert silent(url)
    assert list(temporary_folder.iterdir()) == []


async def test_a_broker_without_plugins_has_no_hash_exchange() -> None:
    with own_broker(plugins=()) as broker:
        with pytest.raises(AMQPError):
            await declare_hash_exchange(broker.url)
        await put(broker.url, b"otherwise it is whole")


def test_an_exception_removes_the_broker(temporary_folder: Path) -> None:
    with pytest.raises(ZeroDivisionError), own_broker() as broker:
        raise ZeroDivisionError
    assert silent(broker.url)
    assert list(temporary_folder.iterdir()) == []


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_however_its_process_ends_the_broker_goes_with_it(how: signal.Signals, temporary_folder: Path) -> None:
    program = """if True:
        import sys
        from worker.local.broker import own_broker

        with own_broker() as broker:
            print(broker.url, flush=True)
            sys.stdin.read()
    """
    environment = os.environ | {"TMPDIR": str(temporary_folder)}
    command = [sys.executable, "-c", program]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, env=environment, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True
    ) as owner:
        assert owner.stdout is not None
        url = owner.stdout.readline().strip()
        assert not silent(url)
        owner.send_signal(how)
        assert owner.wait(timeout=30) != 0
    assert wait_until(lambda: silent(url) and not any(temporary_folder.iterdir()), within_s=30)


def test_a_named_broker_is_used_as_it_is(
    broker: Broker, monkeypatch: pytest.MonkeyPatch, temporary_folder: Path
) -> None:
    monkeypatch.setenv(ENV_VAR, broker.url)
    with find_broker(ENV_VAR) as named:
        assert (named.kind, named.url, named.version) == ("external", broker.url, broker.version)
        assert not isinstance(named, OwnedBroker)
        assert list(temporary_folder.iterdir()) == []
    assert not silent(broker.url)


@pytest.mark.parametrize("address", ["amqp://me:secret@127.0.0.1:{port}/", "amqp://me:secret@127.0.0.1:none/"])
def test_a_named_broker_that_does_not_answer_is_an_error_without_the_password(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ENV_VAR, address.format(port=free_port()))
    with pytest.raises(BrokerError, match=ENV_VAR) as caught, find_broker(ENV_VAR):
        pytest.fail("there is no broker")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", b"AMQP\x00\x01\x00\x00"])
def test_what_does_not_speak_amqp_is_no_broker(answer: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            stream, _ = server.accept()
            with stream:
                stream.recv(8)
                stream.sendall(answer)

        peer = Thread(target=serve)
        peer.start()
        with pytest.raises(OSError, match="AMQP 0-9-1"):
            handshake(f"amqp://127.0.0.1:{server.getsockname()[1]}/", timeout_s=5)
        peer.join()


def test_an_old_broker_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENV_VAR, "amqp://127.0.0.1/")
    monkeypatch.setattr(finder, "handshake", lambda _url, timeout_s: "3.9.13")  # noqa: ARG005  called by keyword
    with pytest.raises(BrokerError, match=r"3\.9\.13; 3\.10 or later"), find_broker(ENV_VAR):
        pytest.fail("it is too old")


def test_every_way_is_tried_and_the_last_word_is_what_to_install(
    monkeypatch: pytest.MonkeyPatch, temporary_folder: Path
) -> None:
    broken = temporary_folder / "rabbitmq-server"
    broken.write_text("#!/bin/sh\necho 'the disk is on fire'\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(finder, "find_server", lambda: broken)
    monkeypatch.setattr(finder, "docker_answers", lambda: False)

    with pytest.raises(BrokerError) as caught, find_broker(ENV_VAR):
        pytest.fail("there is no broker")

    text = str(caught.value)
    for part in (
        "the disk is on fire",
        "Docker: no docker",
        "apt-get install rabbitmq-server",
        "brew install",
        ENV_VAR,
    ):
        assert part in text
    broken.unlink()
    assert list(temporary_folder.iterdir()) == []
