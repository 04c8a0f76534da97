"""Child processes of the demo: started, waited for until they are ready, and never left behind."""

import asyncio
import contextlib
import os
import re
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from worker.local.broker.base import Guard

_ROOT = Path(__file__).parents[3]
_READY_WITHIN_S = 30.0
_STOP_WITHIN_S = 40.0
_POLL_S = 0.05
_LINE_BYTES = 2**20


class DemoError(Exception):
    """The demo cannot go on. The text is for the person who started it."""


@dataclass(frozen=True, slots=True)
class Child:
    """A running process, and the file that takes its output."""

    name: str
    process: Process
    log: Path

    async def logged(self, pattern: str) -> str:
        """The first group of `pattern` in the output, once it is there.

        Raises:
            DemoError: the process ended, or was not ready in time.
        """
        async with self._patience():
            while not (found := re.search(pattern, self.log.read_text(errors="replace"))):
                await self._pause()
            return found[1]

    async def answers(self, url: str) -> None:
        """Return once `url` answers 200.

        Raises:
            DemoError: the process ended, or was not ready in time.
        """
        async with self._patience(), aiohttp.ClientSession() as http:
            while True:
                with contextlib.suppress(aiohttp.ClientError):
                    async with http.get(url) as response:
                        if response.status == 200:
                            return
                await self._pause()

    async def lines(self) -> AsyncIterator[bytes]:
        """The lines of its stdout, which must be `piped`, until it closes it."""
        if self.process.stdout is not None:
            async for line in self.process.stdout:
                yield line

    def kill(self) -> None:
        """End it at once, if it still runs."""
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()

    def failure(self, what: str) -> DemoError:
        """What went wrong, with the end of the output."""
        tail = self.log.read_text(errors="replace").splitlines()[-20:]
        return DemoError("\n".join([f"the {self.name} {what}", *tail]))

    async def _pause(self) -> None:
        if self.process.returncode is not None:
            raise self.failure(f"ended with exit code {self.process.returncode}")
        await asyncio.sleep(_POLL_S)

    @asynccontextmanager
    async def _patience(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(_READY_WITHIN_S):
                yield
        except TimeoutError:
            raise self.failure(f"was not ready within {_READY_WITHIN_S:.0f} s") from None


@dataclass(frozen=True, slots=True)
class Backstage:
    """Where processes are started.

    `folder` takes their logs. Variables of our environment whose names begin with one of `hidden` are kept from them.
    """

    folder: Path
    hidden: tuple[str, ...]

    @asynccontextmanager
    async def running(
        self,
        name: str,
        *arguments: str | Path,
        settings: Mapping[str, str],
        stop: signal.Signals = signal.SIGTERM,
        piped: bool = False,
    ) -> AsyncIterator[Child]:
        """Python with these arguments, and `settings` in its environment. In `folder`, where no `.env` is.

        At the end it gets the signal `stop`, and 40 s to obey. It has a session of its own: Ctrl-C in the terminal is
        for the demo, which ends its processes in order; should the demo die without a chance to, a guard ends them.
        """
        log = self.folder / f"{name}.log"
        with log.open("wb") as output:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                *arguments,
                env={**self._environment(), **settings},
                cwd=self.folder,
                stdin=DEVNULL,
                stdout=PIPE if piped else output,
                stderr=output,
                limit=_LINE_BYTES,
                start_new_session=True,
            )
        guard = Guard('kill -s TERM -- "-$1"', str(process.pid))
        try:
            yield Child(name, process, log)
        finally:
            try:
                await _end(process, stop)
            finally:
                guard.dismiss()

    def _environment(self) -> dict[str, str]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(self.hidden)}
        path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
        return inherited | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


async def _end(process: Process, stop: signal.Signals) -> None:
    try:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(stop)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), _STOP_WITHIN_S)
    finally:
        # macOS answers EPERM for a group of which only zombies are left.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
