"""RabbitMQ in a Docker container of our own, by the `docker` command."""

import io
import secrets
import shutil
import subprocess
import tarfile

from worker.local.broker.base import MANAGEMENT, BrokerError, Guard, OwnedBroker, enabled_plugins, free_port

IMAGE = "rabbitmq:4-management"
_ANSWER_S = 20.0
_PULL_S = 900.0


def docker_answers() -> bool:
    """Whether there is a `docker` command here and a daemon behind it."""
    if shutil.which("docker") is None:
        return False
    try:
        return subprocess.run(["docker", "info"], capture_output=True, timeout=_ANSWER_S, check=False).returncode == 0
    except subprocess.TimeoutExpired:
        return False


class Container(OwnedBroker):
    """A container of the official image with the given plugins, its ports on loopback ports that never change."""

    def __init__(self, plugins: tuple[str, ...], image: str = IMAGE) -> None:
        port = free_port()
        self._publish = ["--publish", f"127.0.0.1:{port}:5672"]
        management_url = None
        if MANAGEMENT in plugins:
            management_port = free_port()
            self._publish += ["--publish", f"127.0.0.1:{management_port}:15672"]
            management_url = f"http://127.0.0.1:{management_port}/api"
        super().__init__("docker", f"amqp://guest:guest@127.0.0.1:{port}/", management_url=management_url)
        self._plugins = plugins
        self._image = image
        self._name = f"avatar-broker-{secrets.token_hex(4)}"
        self._guard: Guard | None = None

    def stop(self) -> None:
        """See `OwnedBroker.stop`."""
        _docker("stop", "--time", "30", self._name)

    def kill(self) -> None:
        """See `OwnedBroker.kill`."""
        if self._alive():
            _docker("kill", self._name)

    def remove(self) -> None:
        """See `OwnedBroker.remove`. The image stays."""
        if self._guard is None:
            return
        _docker("rm", "--force", "--volumes", self._name)
        self._guard.dismiss()
        self._guard = None

    def _launch(self) -> None:
        if self._guard is None:
            self._create()
        _docker("start", self._name)

    def _create(self) -> None:
        self._guard = Guard('docker rm --force --volumes "$1" >/dev/null 2>&1', self._name)
        _docker("create", "--name", self._name, *self._publish, self._image)
        # Copied in rather than mounted: a daemon in a virtual machine does not see our temporary folder.
        _docker("cp", "-", f"{self._name}:/etc/rabbitmq", given=_tar("enabled_plugins", enabled_plugins(self._plugins)))

    def _alive(self) -> bool:
        return (
            self._guard is not None
            and _docker("inspect", "--format", "{{.State.Running}}", self._name).strip() == b"true"
        )

    def _log_tail(self) -> str:
        return _docker("logs", "--tail", "20", self._name).decode(errors="replace")


def _docker(*arguments: str, given: bytes | None = None) -> bytes:
    try:
        done = subprocess.run(
            ["docker", *arguments],
            input=given,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=_PULL_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BrokerError(f"docker {arguments[0]}: {error}") from None
    if done.returncode:
        raise BrokerError(f"docker {arguments[0]}: {done.stdout.decode(errors='replace').strip()}")
    return done.stdout


def _tar(name: str, text: str) -> bytes:
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        entry = tarfile.TarInfo(name)
        entry.size = len(text)
        tar.addfile(entry, io.BytesIO(text.encode()))
    return archive.getvalue()
