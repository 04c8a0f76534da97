"""Simulator, worker and examples as the processes they are in production."""

import asyncio
import contextlib
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import aiohttp
import pytest

from tests.support.bus import Bus, connected
from worker.local.broker.base import free_port
from worker.local.demo.processes import Backstage, Child

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
KS = "test-ks"

# Whoever runs the tests may have settings of his own in the environment; none of them may reach the processes.
SETTINGS = (
    *(
        "AMBIGUOUS_",
        "AMQP_",
        "AVATAR_",
        "DRAIN_",
        "EVENT_",
        "FLOW_",
        "HEARTBEAT_",
        "INTERRUPT_",
        "KALTURA_",
        "KEEP_",
        "LEDGER_",
        "LLM_",
    ),
    *("LOG_", "MANAGEMENT_", "OPS_", "PARTITIONS", "PREFETCH", "SESSION_", "SPEECH_", "STORE_", "VOICE_", "WORKER_"),
)


@dataclass(frozen=True, slots=True)
class Simulator:
    """A running simulator."""

    api_url: str

    async def transcript(self) -> dict[str, Any]:
        return await self._ask("GET", "transcript")

    async def spoken(self) -> dict[str, str]:
        """The text of every turn, by turn id."""
        turns: dict[str, str] = {}
        for session in (await self.transcript())["sessions"]:
            turns |= session["turns"]
        return turns

    async def wait(self, route: str, calls: int = 1, *, stage: str = "accepted") -> None:
        """Return once so many calls of the route have come to that stage."""
        await self._ask("GET", f"wait?route={route}&calls={calls}&stage={stage}&timeout_s=30")

    async def fault(self, **fault: object) -> None:
        await self._ask("POST", "faults", fault)

    async def clear(self) -> None:
        """No more faults."""
        await self._ask("DELETE", "faults")

    async def post(self, path: str) -> dict[str, Any]:
        """Any control route that takes nothing."""
        return await self._ask("POST", path)

    async def release(self) -> None:
        """Let all calls that hang go."""
        await self._ask("POST", "release")

    async def change(self, **settings: object) -> None:
        await self._ask("POST", "settings", settings)

    async def sessions(self) -> list[dict[str, Any]]:
        """What the transcript holds of each session, in order of creation."""
        sessions: list[dict[str, Any]] = (await self.transcript())["sessions"]
        return sessions

    async def create(self) -> tuple[str, str]:
        """A session that somebody else created: its id and token."""
        body = {"visualConfig": {"avatarId": "somebody's"}}
        headers = {"Authorization": f"KS {KS}"}
        async with (
            aiohttp.ClientSession(headers=headers) as http,
            http.post(f"{self.api_url}/create", json=body) as answer,
        ):
            created = await answer.json()
            return created["sessionId"], created["token"]

    async def _ask(self, method: str, path: str, body: object = None) -> dict[str, Any]:
        url = urljoin(self.api_url, f"/_control/{path}")
        async with aiohttp.ClientSession() as http, http.request(method, url, json=body) as answer:
            assert answer.status == 200, await answer.text()
            found: dict[str, Any] = await answer.json()
            return found


@dataclass(frozen=True, slots=True)
class Finished:
    """What a process left behind."""

    code: int | None
    out: str
    err: str


@pytest.fixture
def backstage(tmp_path: Path) -> Backstage:
    folder = tmp_path / "processes"
    folder.mkdir()
    return Backstage(folder, hidden=SETTINGS)


@pytest.fixture
async def simulator(backstage: Backstage) -> AsyncIterator[Simulator]:
    arguments = ("-m", "worker", "simulator", "--port", "0", "--latency-ms", "20", "--ks", KS)
    async with backstage.running("simulator", *arguments, settings={}) as child:
        yield Simulator(await child.logged(r"listening on (\S+)"))


@dataclass(frozen=True, slots=True)
class Worker:
    """A worker as a process."""

    child: Child
    ops_url: str

    async def ready(self) -> None:
        """Return once it consumes and publishes."""
        await self.child.answers(f"{self.ops_url}/readyz")

    async def status(self, route: str) -> int:
        """What it answers on a route for orchestrators."""
        async with aiohttp.ClientSession() as http, http.get(f"{self.ops_url}/{route}") as answer:
            return answer.status

    def signal(self, signum: signal.Signals) -> None:
        self.child.process.send_signal(signum)

    async def ended(self, within_s: float = 20.0) -> int:
        """Its exit code, once it has ended."""
        return await asyncio.wait_for(self.child.process.wait(), within_s)

    async def killed(self) -> None:
        """Kill it as `kill -9` does."""
        self.signal(signal.SIGKILL)
        await self.ended()

    @property
    def log(self) -> str:
        return self.child.log.read_text()


StartWorker = Callable[..., Awaitable[Worker]]


@pytest.fixture
async def start_worker(backstage: Backstage, amqp_url: str, simulator: Simulator) -> AsyncIterator[StartWorker]:
    """Starts a worker, with these settings besides or instead of the usual ones; it is stopped at the end."""
    async with AsyncExitStack() as stack:
        numbers = count(1)

        async def start(*, ready: bool = True, **settings: str | None) -> Worker:
            port = free_port()
            usual: dict[str, str | None] = {
                "AMQP_URL": amqp_url,
                "AVATAR_BASE_URL": simulator.api_url,
                "AVATAR_KS": KS,
                "AVATAR_ID": "test-avatar",
                "STORE_URL": f"sqlite:///{backstage.folder / 'store.db'}",
                "OPS_PORT": f"{port}",
                "SESSION_END_WAIT_S": "0",
            }
            given = {name: value for name, value in (usual | settings).items() if value is not None}
            running = backstage.running(f"worker-{next(numbers)}", "-m", "worker", "run", settings=given)
            worker = Worker(await stack.enter_async_context(running), f"http://127.0.0.1:{port}")
            if ready:
                await worker.ready()
            return worker

        yield start


@pytest.fixture
async def worker(start_worker: StartWorker) -> Child:
    return (await start_worker()).child


@pytest.fixture
async def bus(amqp_url: str) -> AsyncIterator[Bus]:
    """A producer, a listener that hears all events, and an operator."""
    async with connected(amqp_url) as bus:
        await bus.listen()
        yield bus


@asynccontextmanager
async def started(*arguments: str | Path, env: Mapping[str, str], cwd: Path) -> AsyncIterator[Process]:
    """Python with these arguments in a session of its own, its output piped; killed at the end if it still runs."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(SETTINGS)}
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *arguments,
        env={**inherited, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **env},
        cwd=cwd,
        stdin=PIPE,
        stdout=PIPE,
        stderr=PIPE,
        limit=2**20,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.communicate()


async def finished(process: Process, given: str = "") -> Finished:
    out, err = await process.communicate(given.encode())
    return Finished(process.returncode, out.decode(), err.decode())
