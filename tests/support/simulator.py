"""The shipped simulator as a process, and its control routes."""

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import aiohttp

ROOT = Path(__file__).parents[2]
DEADLINE_S = 10


@contextlib.contextmanager
def process() -> Iterator[str]:
    """A running simulator and its base URL; it must have had nothing to complain about."""
    env = {name: value for name, value in os.environ.items() if name != "AVATAR_KS"}
    command = [sys.executable, "-m", "worker", "simulator"]
    with (
        tempfile.TemporaryFile("w+") as stderr,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True, cwd=ROOT, env=env) as simulator,
    ):
        try:
            assert simulator.stdout is not None
            line = simulator.stdout.readline()
            assert line.startswith("simulator listening on http://"), line
            yield line.split()[-1]
        finally:
            simulator.terminate()
            simulator.wait(DEADLINE_S)
        stderr.seek(0)
        assert stderr.read() == ""


class Simulator:
    """Scripts faults and reads the transcript."""

    def __init__(self, url: str) -> None:
        self.url = url
        origin = url[: url.index("/v1")]
        self._http = aiohttp.ClientSession(origin, timeout=aiohttp.ClientTimeout(DEADLINE_S))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.close()

    async def control(self, method: str, path: str, body: Any = None) -> Any:
        """One control route; it must answer 200."""
        async with self._http.request(method, f"/_control/{path}", json=body) as response:
            answer = await response.json()
            assert response.status == 200, answer
            return answer

    async def fault(self, kind: str, **fields: object) -> None:
        """Queue a fault."""
        await self.control("POST", "faults", {"kind": kind, **fields})

    async def calls(self) -> list[dict[str, Any]]:
        """All calls, in order of arrival."""
        transcript = await self.control("GET", "transcript")
        found = [call for session in transcript["sessions"] for call in session["calls"]] + transcript["strays"]
        return sorted(found, key=lambda call: int(call["number"]))
