"""Simulator, worker and examples as the processes they are in production."""

import asyncio
import contextlib
import os
import signal
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

import aiohttp
import pytest

from worker.local.broker.base import free_port
from worker.local.demo.processes import Backstage, Child

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
KS = "test-ks"

# Whoever runs the tests may have settings of his own in the environment; none of them may reach the processes.
SETTINGS = (
    *("AMBIGUOUS_", "AMQP_", "AVATAR_", "DRAIN_", "EVENT_", "HEARTBEAT_", "INTERRUPT_", "KEEP_", "LEDGER_", "LLM_"),
    *("LOG_", "OPS_", "PARTITIONS", "PREFETCH", "SESSION_", "SPEECH_", "STORE_", "VOICE_", "WORKER_"),
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

    async def wait(self, route: str, calls: int = 1) -> None:
        """Return once so many calls of the route were accepted."""
        await self._ask("GET", f"wait?route={route}&calls={calls}&timeout_s=20")

    async def fault(self, **fault: object) -> None:
        await self._ask("POST", "faults", fault)

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


@pytest.fixture
async def worker(backstage: Backstage, amqp_url: str, simulator: Simulator) -> AsyncIterator[Child]:
    port = free_port()
    settings = {
        "AMQP_URL": amqp_url,
        "AVATAR_BASE_URL": simulator.api_url,
        "AVATAR_KS": KS,
        "AVATAR_ID": "test-avatar",
        "STORE_URL": f"sqlite:///{backstage.folder / 'store.db'}",
        "OPS_PORT": f"{port}",
        "SESSION_END_WAIT_S": "0",
    }
    async with backstage.running("worker", "-m", "worker", "run", settings=settings) as child:
        await child.answers(f"http://127.0.0.1:{port}/readyz")
        yield child


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
