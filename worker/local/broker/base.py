"""What a broker is to the demo and the tests: an address, and for one we own also start, stop and kill."""

import secrets
import socket
import ssl
import struct
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Literal
from urllib.parse import urlsplit

Kind = Literal["external", "node", "docker"]

READY_WITHIN_S = 120.0
"""A cold start takes 4 to 6 s on an idle machine; a busy two-core CI machine gets twenty times that."""

# Below the ephemeral ranges of Linux and macOS: a client that keeps dialling a stopped broker on an ephemeral loopback
# port can end up connected to itself, and then the broker cannot have its port back.
_PORTS = range(20_000, 32_000)

MANAGEMENT = "rabbitmq_management"

_PROTOCOL_HEADER = b"AMQP\x00\x00\x09\x01"
_VERSION_FIELD = b"\x07versionS"


class BrokerError(Exception):
    """No broker could be found, started or reached. The text says why and what to do; it holds no password."""


class Broker:
    """A RabbitMQ to talk to.

    `url` stays the same for as long as the object lives, also across restarts. `version` is what the broker says of
    itself, such as `3.10.8`. `management_url` is where its HTTP API is, if we started it with the plugin `MANAGEMENT`.
    """

    def __init__(self, kind: Kind, url: str, version: str = "", *, management_url: str | None = None) -> None:
        self.kind: Kind = kind
        self.url = url
        self.version = version
        self.management_url = management_url

    @property
    def version_info(self) -> tuple[int, int]:
        """Major and minor version, for comparing."""
        major, minor = self.version.split(".")[:2]
        return int(major), int(minor)


class OwnedBroker(Broker, ABC):
    """A broker that this process started. Its durable data lives until `remove`."""

    def start(self) -> None:
        """Starts the broker, with the data it had, and returns once it answers AMQP; harmless when it runs.

        Raises:
            BrokerError: it ended or did not answer in time; the text holds the end of its log.
        """
        if not self._alive():
            self._launch()
        deadline = time.monotonic() + READY_WITHIN_S
        while True:
            try:
                self.version = handshake(self.url, timeout_s=5)
            except OSError as no_answer:
                if not self._alive() or time.monotonic() > deadline:
                    raise BrokerError(
                        f"RabbitMQ ({self.kind}) did not start: {no_answer}\n{self._log_tail()}"
                    ) from None
                time.sleep(0.1)
            else:
                return

    def restart(self) -> None:
        """Stops and starts; durable queues and persistent messages are kept."""
        self.stop()
        self.start()

    @abstractmethod
    def stop(self) -> None:
        """Shuts the broker down in an orderly way and waits for it. Harmless when it does not run."""

    @abstractmethod
    def kill(self) -> None:
        """Ends the broker as `kill -9` does, and returns once nobody listens."""

    @abstractmethod
    def remove(self) -> None:
        """Ends the broker and deletes everything it had. May be called at any time and more than once."""

    @abstractmethod
    def _launch(self) -> None: ...

    @abstractmethod
    def _alive(self) -> bool: ...

    @abstractmethod
    def _log_tail(self) -> str: ...


class Guard:
    """Runs a shell script once this process is gone, however it died: `finally` does not see SIGTERM or SIGKILL."""

    def __init__(self, script: str, *arguments: str) -> None:
        command = ["sh", "-c", f"read -r _; {script}", "guard", *arguments]
        # Only this process holds the other end of the pipe, so `read` returns when it is gone.
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)

    def dismiss(self) -> None:
        """Ends the guard without running its script."""
        self._process.kill()
        self._process.communicate()


def handshake(url: str, *, timeout_s: float) -> str:
    """The version a RabbitMQ gives in the first frame of a connection, before any login.

    Raises:
        OSError: nobody listens there, or whoever does, does not speak AMQP 0-9-1.
    """
    parts = urlsplit(url)
    tls = parts.scheme == "amqps"
    address = (parts.hostname or "127.0.0.1", parts.port or (5671 if tls else 5672))
    with socket.create_connection(address, timeout=timeout_s) as plain:
        # Certificates are the worker's to judge, with its own settings; here only the version is read.
        stream = _unverified().wrap_socket(plain, server_hostname=address[0]) if tls else plain
        stream.settimeout(timeout_s)
        stream.sendall(_PROTOCOL_HEADER)
        with stream.makefile("rb") as answer:
            size = struct.unpack(">xxxL", answer.read(7).ljust(7, b"\x00"))[0]
            _, found, rest = answer.read(size).partition(_VERSION_FIELD)
    if not found:
        raise ConnectionError("the answer is not that of an AMQP 0-9-1 broker")
    (length,) = struct.unpack_from(">L", rest)
    return rest[4 : 4 + length].decode()


def free_port() -> int:
    """A TCP port on loopback that nobody listens on now."""
    while True:
        port = secrets.choice(_PORTS)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def wait_until(condition: Callable[[], bool], *, within_s: float) -> bool:
    """Whether the condition came true in time; it is looked at every 50 ms."""
    deadline = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def enabled_plugins(plugins: tuple[str, ...]) -> str:
    """The text of RabbitMQ's `enabled_plugins` file."""
    return f"[{','.join(plugins)}].\n"


def _unverified() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context
