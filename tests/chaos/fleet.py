"""The processes of a run: the simulator and the workers, and what may be done to them."""

import asyncio
import os
import signal
import sys
import time
from asyncio.subprocess import DEVNULL, Process
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp

from tests.chaos.proxy import Proxy
from worker.local.broker.base import Guard, free_port

ROOT = Path(__file__).resolve().parents[2]
_READY_S = 60.0
_POLL_S = 0.05


class Child:
    """A Python process, started as often as needed. Its output is added to one file."""

    def __init__(self, name: str, folder: Path, *arguments: str, settings: Mapping[str, str]) -> None:
        self.name = name
        self.log = folder / f"{name}.log"
        self._folder = folder
        self._arguments = arguments
        self._settings = settings
        self._process: Process | None = None
        self._guard: Guard | None = None

    async def start(self) -> None:
        """Start it. Should we die without a chance to end it, a guard does."""
        inherited = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
        with self.log.open("ab") as output:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                *self._arguments,
                env={**inherited, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **self._settings},
                cwd=self._folder,
                stdin=DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self._guard = Guard('kill -s KILL -- "$1"', str(self._process.pid))

    def send(self, one: signal.Signals) -> None:
        """Send a signal."""
        assert self._process is not None
        with suppress(ProcessLookupError):
            self._process.send_signal(one)

    async def ended(self, within_s: float) -> int:
        """Its exit code, once it has ended; it is killed when that takes too long."""
        assert self._process is not None
        assert self._guard is not None
        try:
            async with asyncio.timeout(within_s):
                code = await self._process.wait()
        except TimeoutError:
            self.send(signal.SIGKILL)
            await self._process.wait()
            code = -signal.SIGKILL
        self._guard.dismiss()
        return code

    @property
    def runs(self) -> bool:
        """Whether it has been started and has not ended."""
        return self._process is not None and self._process.returncode is None

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self._process is not None
        return self._process.pid

    async def remove(self) -> None:
        """End it at once."""
        if self.runs:
            self.send(signal.SIGKILL)
        if self._process is not None:
            await self.ended(10)

    def fail(self, what: str) -> RuntimeError:
        """What went wrong, with the end of the log."""
        tail = self.log.read_text(errors="replace").splitlines()[-15:]
        return RuntimeError("\n".join([f"{self.name} {what}", *tail]))


class Worker(Child):
    """A worker behind a proxy of its own. `free`: nothing is being done to it, and it consumes."""

    def __init__(self, name: str, folder: Path, proxy: Proxy, amqp_url: str, settings: Mapping[str, str]) -> None:
        self.proxy = proxy
        self.busy = False
        self._ops_port = free_port()
        broker = urlsplit(amqp_url)
        own = {
            "AMQP_URL": broker._replace(netloc=f"{broker.username}:{broker.password}@127.0.0.1:{proxy.port}").geturl(),
            "WORKER_NAME": name,
            "OPS_HOST": "127.0.0.1",
            "OPS_PORT": str(self._ops_port),
        }
        super().__init__(name, folder, "-m", "worker", "run", settings={**settings, **own})

    async def ready(self, http: aiohttp.ClientSession, within_s: float = _READY_S) -> bool:
        """Wait until it consumes and publishes. False: not in time, or it has ended by itself."""
        deadline = time.monotonic() + within_s
        while time.monotonic() < deadline:
            if not self.runs:
                return False
            with suppress(aiohttp.ClientError, TimeoutError):
                timeout = aiohttp.ClientTimeout(total=1)
                async with http.get(f"http://127.0.0.1:{self._ops_port}/readyz", timeout=timeout) as answer:
                    if answer.status == 200:
                        return True
            await asyncio.sleep(_POLL_S)
        return False


class Simulator(Child):
    """The Avatar API."""

    def __init__(self, folder: Path, http: aiohttp.ClientSession, latency_ms: float) -> None:
        self._http = http
        self._port_file = folder / "simulator.port"
        options = ("--port-file", str(self._port_file), "--latency-ms", str(latency_ms), "--ks", "chaos-ks")
        super().__init__("simulator", folder, "-m", "worker", "simulator", *options, settings={})

    async def listening(self) -> None:
        """Wait until it answers."""
        deadline = time.monotonic() + _READY_S
        while not self._port_file.exists():
            if not self.runs or time.monotonic() > deadline:
                raise self.fail("did not start")
            await asyncio.sleep(_POLL_S)

    @property
    def base_url(self) -> str:
        """What workers call."""
        return f"http://127.0.0.1:{self._port_file.read_text().strip()}/v1/avatar-session"

    async def control(self, method: str, route: str, body: object = None) -> Any:
        """One call of `worker.local.simulator.control`."""
        url = f"http://127.0.0.1:{self._port_file.read_text().strip()}/_control/{route}"
        async with self._http.request(method, url, json=body) as answer:
            document = await answer.json()
            assert answer.status == 200, document
            return document


@asynccontextmanager
async def running(child: Child) -> AsyncIterator[None]:
    """Start it, and remove it at the end."""
    try:
        await child.start()
        yield
    finally:
        await child.remove()
