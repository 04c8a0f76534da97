"""A private RabbitMQ node: a child process with its own name, ports and data folder. The system's node is not touched.

The program is called as `.../rabbitmq/bin/rabbitmq-server`: the wrapper that Debian puts on the path refuses everybody
but root and `rabbitmq`, and would use the system's data folder.
"""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
from pathlib import Path

from worker.local.broker.base import MANAGEMENT, BrokerError, Guard, OwnedBroker, enabled_plugins, free_port, wait_until

_DEBIAN_WRAPPER = Path("/usr/sbin/rabbitmq-server")
_PATTERNS = (
    "/usr/lib/rabbitmq/bin/rabbitmq-server",  # Debian, Ubuntu
    "/usr/lib/rabbitmq/lib/rabbitmq_server-*/sbin/rabbitmq-server",  # RPM
    "/opt/homebrew/opt/rabbitmq/sbin/rabbitmq-server",  # Homebrew on Apple silicon
    "/usr/local/opt/rabbitmq/sbin/rabbitmq-server",  # Homebrew on Intel
    "/home/linuxbrew/.linuxbrew/opt/rabbitmq/sbin/rabbitmq-server",
)
_GRACEFUL_STOP_S = 30.0
_KILL_S = 10.0

# Unlike a broker with a machine of its own, this one shares two cores with the demo or the tests: its schedulers do not
# spin while idle and are not bound to cores, and its distribution port stays on loopback like everything else.
_ERLANG_ARGUMENTS = "+sbwt none +sbwtdcpu none +sbwtdio none -kernel inet_dist_use_interface {127,0,0,1}"


def find_server() -> Path | None:
    """The machine's RabbitMQ start script, or None where RabbitMQ is not installed."""
    found = [path for pattern in _PATTERNS for path in sorted(Path("/").glob(pattern[1:]), reverse=True)]
    if on_path := shutil.which("rabbitmq-server"):
        found.append(Path(on_path))
    return next((path for path in found if path != _DEBIAN_WRAPPER and os.access(path, os.X_OK)), None)


class PrivateNode(OwnedBroker):
    """A node of the given server program, with the given plugins, on free loopback ports."""

    def __init__(self, server: Path, plugins: tuple[str, ...]) -> None:
        self._server = server
        self._port = free_port()
        self._management_port = free_port() if MANAGEMENT in plugins else None
        management_url = None if self._management_port is None else f"http://127.0.0.1:{self._management_port}/api"
        super().__init__("node", f"amqp://guest:guest@127.0.0.1:{self._port}/", management_url=management_url)
        self._home = Path(tempfile.mkdtemp(prefix="avatar-broker-"))
        self._log = self._home / "broker.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._guard: Guard | None = None
        self._environment = self._configure(plugins)

    def stop(self) -> None:
        """See `OwnedBroker.stop`. A node that does not end within 30 s is killed."""
        if self._process is None:
            return
        self._process.terminate()  # the start script hands it on to the Erlang VM and waits
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_GRACEFUL_STOP_S)
        self.kill()

    def kill(self) -> None:
        """See `OwnedBroker.kill`."""
        if self._process is None:
            return
        # macOS answers EPERM for a group of which only zombies are left.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        if self._guard is not None:
            self._guard.dismiss()
        self._process = self._guard = None
        if not wait_until(self._silent, within_s=_KILL_S):
            raise BrokerError(f"port {self._port} is still served {_KILL_S:.0f} s after the private node was killed")

    def remove(self) -> None:
        """See `OwnedBroker.remove`. Erlang's `epmd`, shared by all nodes of a machine, stays."""
        self.kill()
        shutil.rmtree(self._home, ignore_errors=True)

    def _configure(self, plugins: tuple[str, ...]) -> dict[str, str]:
        home = self._home
        extra = home / "conf.d"
        extra.mkdir()
        (home / "enabled_plugins").write_text(enabled_plugins(plugins))
        (home / "advanced.config").write_text("[].\n")
        configuration = [
            f"listeners.tcp.default = 127.0.0.1:{self._port}",
            "raft.wal_max_size_bytes = 33554432",  # the default, 512 MiB, is for a broker with a disk of its own
        ]
        if self._management_port is not None:
            configuration += ["management.tcp.ip = 127.0.0.1", f"management.tcp.port = {self._management_port}"]
        (home / "rabbitmq.conf").write_text("\n".join([*configuration, ""]))
        # Built from nothing: a RABBITMQ_* or ERL_* of the caller's shell would reach into the node.
        return {
            "PATH": os.environ.get("PATH", os.defpath),
            "LANG": "C.UTF-8",
            "HOME": str(home),  # Erlang keeps its cookie there
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODENAME": f"avatar-{secrets.token_hex(4)}@localhost",
            "RABBITMQ_DIST_PORT": str(free_port()),
            "RABBITMQ_MNESIA_BASE": str(home / "data"),
            "RABBITMQ_LOG_BASE": str(home),
            "RABBITMQ_LOGS": "-",
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(home / "enabled_plugins"),
            "RABBITMQ_CONF_ENV_FILE": os.devnull,
            "RABBITMQ_CONFIG_FILE": str(home / "rabbitmq.conf"),
            "RABBITMQ_CONFIG_FILES": str(extra),
            "RABBITMQ_ADVANCED_CONFIG_FILE": str(home / "advanced.config"),
            "RABBITMQ_SCHEDULER_BIND_TYPE": "u",
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": _ERLANG_ARGUMENTS,
        }

    def _launch(self) -> None:
        self.kill()  # of a node that ended by itself, what is left
        with self._log.open("ab") as log:
            # A session of its own: Ctrl-C in the terminal is for us. Its group holds the script and the Erlang VM.
            self._process = subprocess.Popen(
                [self._server],
                env=self._environment,
                cwd=self._home,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        script = 'kill -s KILL -- "-$1"; sleep 1; rm -rf "$2"'
        self._guard = Guard(script, str(self._process.pid), str(self._home))

    def _alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def _silent(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self._port)) != 0

    def _log_tail(self) -> str:
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-20:])
