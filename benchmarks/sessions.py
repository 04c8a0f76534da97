"""How late the keep-alives of many open sessions are, and what they cost: `python -m benchmarks.sessions`.

A worker finds the sessions in the store of one that died, adopts them and keeps them alive. No broker is needed: its
part would be to bring commands, and there are none. Lateness is by the simulator's own clock.
"""

import argparse
import asyncio
import os
import signal
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from benchmarks.stage import at, quantiles, verdict
from tests.support.simulator import Simulator, process
from worker.avatar.client import Api, AvatarClient
from worker.avatar.credentials import FixedKs
from worker.core.work import Open
from worker.ports import Held
from worker.stores.database import Database
from worker.stores.sessions import SqlSessions

KEEP_ALIVE_S = 10.0
ROOT = Path(__file__).parents[1]


async def main(sessions: int, seconds: float, latency_ms: float) -> int:
    """Measure, print, judge."""
    with process() as url, tempfile.TemporaryDirectory(prefix="avatar-bench-") as folder:
        async with Simulator(url) as simulator:
            await simulator.control("POST", "settings", {"latency_ms": latency_ms})
            store_url = f"sqlite:///{folder}/store.db"
            await _leave_behind(url, store_url, sessions)
            settings = {"AVATAR_BASE_URL": url, "STORE_URL": store_url, "KEEP_ALIVE_S": f"{KEEP_ALIVE_S:g}"}
            async with _worker(Path(folder), settings) as pid:
                begun = time.monotonic()
                await simulator.control("GET", f"wait?route=keep-alive&calls={sessions}&stage=accepted&timeout_s=60")
                adopted_s = time.monotonic() - begun
                cpu_s, since = _cpu_s(pid), time.monotonic()
                await asyncio.sleep(seconds)
                cpu = (_cpu_s(pid) - cpu_s) / (time.monotonic() - since)
                memory = _memory_mb(pid)
                until = time.monotonic()
                transcript = await simulator.control("GET", "transcript")
    late = [lateness for session in transcript["sessions"] for lateness in _lateness(session, since, until)]
    gone = [session for session in transcript["sessions"] if session["ended_by"]]
    p99 = at(sorted(late), 0.99)
    print(f"{sessions} sessions adopted and kept alive once after {adopted_s:.1f} s, API latency {latency_ms:.0f} ms")
    print(
        f"lateness of {len(late)} keep-alives over {seconds:.0f} s: {quantiles(late)}, most {max(late) * 1000:.0f} ms"
    )
    print(f"CPU {cpu * 100:.1f} % of a core, memory {memory:.0f} MB")
    return verdict(
        p99_below_a_second=p99 < 1,
        none_timed_out=not gone,
        all_kept_alive=len(late) >= sessions * (seconds // (KEEP_ALIVE_S + 1)),
    )


async def _leave_behind(url: str, store_url: str, sessions: int) -> None:
    """Open sessions, and a store that knows them, of a worker that is no more."""
    database = await Database.open(store_url)
    store = SqlSessions(database)
    async with AvatarClient(Api(url), FixedKs(SecretStr("demo-ks"))) as client:

        async def open_one(number: int) -> None:
            _, session = await client.create(Open("bench", None, None))
            assert session is not None
            await store.put(Held(f"c{number}", session, time.time()), "dead", 0.0)

        await asyncio.gather(*(open_one(number) for number in range(sessions)))
    await database.close()


@asynccontextmanager
async def _worker(folder: Path, settings: Mapping[str, str]) -> AsyncIterator[int]:
    """A worker without a broker; its process id."""
    env = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "VIRTUAL_ENV")}
    env |= {"AMQP_URL": "amqp://127.0.0.1:1/", "AVATAR_KS": "demo-ks", "OPS_PORT": "0", "LOG_LEVEL": "error"}
    env |= {"PYTHONPATH": str(ROOT), "SESSION_IDLE_S": "86400"} | dict(settings)
    with (folder / "log").open("w") as log:
        command = (sys.executable, "-m", "worker", "run")
        running = await asyncio.create_subprocess_exec(*command, cwd=folder, env=env, stderr=log)
        try:
            yield running.pid
        finally:
            running.send_signal(signal.SIGKILL)
            await running.wait()


def _lateness(session: Mapping[str, Any], since: float, until: float) -> list[float]:
    """By how much each keep-alive came later than `KEEP_ALIVE_S` after the call before it, in seconds.

    One that is overdue in the end counts, too.
    """
    times = [call["begun_s"] for call in session["calls"] if call["effect"]]
    if until - times[-1] > KEEP_ALIVE_S:
        times.append(until)
    return [max(0.0, after - before - KEEP_ALIVE_S) for before, after in pairwise(times) if after >= since]


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _memory_mb(pid: int) -> float:
    (line,) = [line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS:")]
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sessions", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--latency-ms", type=float, default=50.0)
    options = parser.parse_args()
    raise SystemExit(asyncio.run(main(options.sessions, options.seconds, options.latency_ms)))
