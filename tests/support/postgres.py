"""The PostgreSQL of a test run: started once, kept until the run is over, with a schema for each test.

The order: the address in `TEST_POSTGRES_URL`; a server on the machine, as a private cluster, never the system's;
Docker; `apt-get install postgresql`.
"""

import asyncio
import contextlib
import os
import pwd
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import asyncpg
from docker.errors import DockerException
from docker.models.containers import Container
from testcontainers.core.config import testcontainers_config
from testcontainers.core.container import DockerContainer

from worker.local.broker import BrokerError, docker_answers
from worker.local.broker.base import READY_WITHIN_S, Guard, free_port
from worker.local.broker.debian import install

ENV_VAR = "TEST_POSTGRES_URL"
IMAGE = "postgres:17"

_USER = "tests"
_PORT = "5432/tcp"
_FOLDERS = (
    "/usr/lib/postgresql/*/bin",
    "/usr/pgsql-*/bin",
    "/opt/homebrew/opt/postgresql*/bin",
    "/usr/local/opt/postgresql*/bin",
)
_ADVICE = f"""Install one of these and run the tests again:
  Debian, Ubuntu   sudo apt-get install postgresql
  macOS            brew install postgresql
  anywhere         Docker, https://docs.docker.com/get-docker/
or set {ENV_VAR} to the address of a PostgreSQL, and of a user who may create schemas there:
postgresql://USER:PASSWORD@HOST:5432/DATABASE"""

# `Guard` does what testcontainers' own reaper would.
testcontainers_config.ryuk_disabled = True


class PostgresError(Exception):
    """No PostgreSQL could be found, started or reached. The text says why and what to do; it holds no password."""


class Postgres:
    """A PostgreSQL to talk to. `url` stays the same, also when it is started again."""

    def __init__(self, url: str) -> None:
        self.url = url

    @asynccontextmanager
    async def schema(self) -> AsyncIterator[str]:
        """An empty schema, dropped at the end; yields its `STORE_URL`."""
        name = f"test_{secrets.token_hex(8)}"
        await self.execute(f"CREATE SCHEMA {name}")
        try:
            yield f"{self.url}{'&' if '?' in self.url else '?'}options=-csearch_path%3D{name}"
        finally:
            await self.execute(f"DROP SCHEMA {name} CASCADE")

    async def execute(self, statement: str) -> None:
        """Run one statement over a connection of its own."""
        connection = await asyncpg.connect(self.url)
        try:
            await connection.execute(statement)
        finally:
            await connection.close()

    def answers(self) -> None:
        """Returns if it takes a login.

        Raises:
            OSError, asyncpg.PostgresError: it does not.
        """
        asyncio.run(self.execute("SELECT 1"))


class OwnedPostgres(Postgres, ABC):
    """A PostgreSQL of this process. Everything here blocks: in a test, `await asyncio.to_thread(postgres.kill)`."""

    def __init__(self, port: int) -> None:
        self._password = secrets.token_hex(8)
        super().__init__(f"postgresql://{_USER}:{self._password}@127.0.0.1:{port}/postgres")
        self._port = port

    def start(self) -> None:
        """Returns once it takes a login; harmless when it runs."""
        if not self._alive():
            self._launch()
        deadline = time.monotonic() + READY_WITHIN_S
        while True:
            try:
                self.answers()
            except (OSError, asyncpg.PostgresError) as no_answer:
                if not self._alive() or time.monotonic() > deadline:
                    raise PostgresError(f"it did not start: {no_answer}\n{self._log_tail()}") from None
                time.sleep(0.1)
            else:
                return

    @abstractmethod
    def kill(self) -> None:
        """Ends it as a crash does. What was committed is there when it starts again."""

    @abstractmethod
    def remove(self) -> None:
        """Ends it and deletes everything it had."""

    @abstractmethod
    def _launch(self) -> None: ...

    @abstractmethod
    def _alive(self) -> bool: ...

    @abstractmethod
    def _log_tail(self) -> str: ...


class PrivateCluster(OwnedPostgres):
    """A cluster of the installed programs in a temporary folder, on a socket and a loopback port of its own.

    It does not wait for the disk: only a crash of the machine would tell.
    """

    def __init__(self, programs: Path) -> None:
        super().__init__(free_port())
        self._programs = programs
        self._home = Path(tempfile.mkdtemp(prefix="avatar-pg-", dir="/tmp"))  # a socket's path is short
        entry = _unprivileged()
        self._user = None if entry is None else entry.pw_uid
        self._group = None if entry is None else entry.pw_gid
        self._groups: list[int] | None = None if entry is None else []
        self._process: subprocess.Popen[bytes] | None = None
        self._guard: Guard | None = None

    def kill(self) -> None:
        if self._process is None:
            return
        # The postmaster ends its children and takes no time to tidy up: "immediate shutdown".
        self._process.send_signal(signal.SIGQUIT)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._guard is not None:
            self._guard.dismiss()
        self._process = self._guard = None

    def remove(self) -> None:
        self.kill()
        shutil.rmtree(self._home, ignore_errors=True)

    def _launch(self) -> None:
        if not (self._home / "data").exists():
            self._make()
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": str(self._port),
            "unix_socket_directories": str(self._home),
            "fsync": "off",
            "max_connections": "200",
            "shared_buffers": "32MB",
            "dynamic_shared_memory_type": "mmap",
            "restart_after_crash": "off",
        }
        options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        with (self._home / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [self._programs / "postgres", "-D", self._home / "data", *options],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self._home,
                start_new_session=True,
                user=self._user,
                group=self._group,
                extra_groups=self._groups,
            )
        script = 'kill -s QUIT "$1"; sleep 1; kill -s KILL "$1" 2>/dev/null; rm -rf "$2"'
        self._guard = Guard(script, str(self._process.pid), str(self._home))

    def _make(self) -> None:
        secret = self._home / "password"
        secret.write_text(self._password)
        if self._user is not None:
            for path in (self._home, secret):
                shutil.chown(path, self._user, self._group)
        options: list[str | Path] = ["-A", "scram-sha-256", "--pwfile", secret, "-E", "UTF8", "--locale=C", "--no-sync"]
        done = subprocess.run(
            [self._programs / "initdb", "-D", self._home / "data", "-U", _USER, *options],
            capture_output=True,
            text=True,
            cwd=self._home,
            check=False,
            user=self._user,
            group=self._group,
            extra_groups=self._groups,
        )
        if done.returncode:
            raise PostgresError(f"initdb failed: {done.stderr.strip()[-1000:]}")

    def _alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def _log_tail(self) -> str:
        return "\n".join((self._home / "log").read_text(errors="replace").splitlines()[-20:])


class DockerPostgres(OwnedPostgres):
    """A container by testcontainers."""

    def __init__(self) -> None:
        super().__init__(free_port())
        self._docker = DockerContainer(IMAGE).with_env("POSTGRES_USER", _USER).with_env("POSTGRES_DB", "postgres")
        self._docker = self._docker.with_env("POSTGRES_PASSWORD", self._password)
        self._docker.ports[_PORT] = ("127.0.0.1", self._port)  # type: ignore[assignment]
        self._guard: Guard | None = None

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
            try:
                self._docker.start()
            except DockerException as error:
                raise PostgresError(str(error)) from None
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


@contextmanager
def find_postgres() -> Iterator[Postgres]:
    """The one that the environment names, else one of our own, removed at the end.

    Raises:
        PostgresError: there is none; the text says what was tried and what to do.
    """
    url = os.environ.get(ENV_VAR)
    if not url:
        with own_postgres() as postgres:
            yield postgres
        return
    named = Postgres(url)
    try:
        named.answers()
    except (OSError, ValueError, asyncpg.PostgresError) as error:
        raise PostgresError(f"the PostgreSQL that {ENV_VAR} names cannot be used: {type(error).__name__}") from None
    yield named


@contextmanager
def own_postgres() -> Iterator[OwnedPostgres]:
    """One of our own, whatever the environment says.

    Raises:
        PostgresError: none could be started; the text says what was tried and what to do.
    """
    ways: dict[str, Callable[[], OwnedPostgres]] = {
        "PostgreSQL on this machine": _private_cluster,
        "Docker": _container,
        "apt-get install postgresql": _installed_cluster,
    }
    failures = []
    for name, way in ways.items():
        try:
            postgres = _started(way())
        except (PostgresError, BrokerError) as reason:
            failures.append(f"  {name}: {reason}")
            continue
        try:
            yield postgres
        finally:
            postgres.remove()
        return
    raise PostgresError("\n".join(["No PostgreSQL could be found or started.", *failures, _ADVICE]))


def _private_cluster() -> OwnedPostgres:
    programs = _find_programs()
    if programs is None:
        raise PostgresError("not installed")
    return PrivateCluster(programs)


def _container() -> OwnedPostgres:
    if not docker_answers():
        raise PostgresError("no docker command, or no daemon that answers it")
    return DockerPostgres()


def _installed_cluster() -> OwnedPostgres:
    install("postgresql", _find_programs)
    return _private_cluster()


def _started(postgres: OwnedPostgres) -> OwnedPostgres:
    try:
        postgres.start()
    except BaseException:
        postgres.remove()
        raise
    return postgres


def _find_programs() -> Path | None:
    """The folder with `postgres` and `initdb`; of several versions the newest."""
    found = [path for pattern in _FOLDERS for path in Path("/").glob(pattern[1:])]
    found.sort(key=lambda path: [int(part) for part in "".join(c if c.isdigit() else " " for c in str(path)).split()])
    if on_path := shutil.which("initdb"):
        found.append(Path(on_path).resolve().parent)
    return next((path for path in reversed(found) if (path / "postgres").exists() and (path / "initdb").exists()), None)


def _unprivileged() -> pwd.struct_passwd | None:
    """Whom to run it as: PostgreSQL refuses to run as root."""
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)
    raise PostgresError("PostgreSQL does not run as root, and there is no user postgres or nobody to run it as")
