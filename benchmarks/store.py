"""How fast the ledger writes: `python -m benchmarks.store [STORE_URL] [LANES] [SECONDS] [PAUSE]`.

Each lane does what a say does: an intent, which it waits for, and the outcome, which it does not; then it pauses for so
many seconds, 0 to see what the store can bear. Without an address a SQLite file in a temporary folder is measured.
"""

import asyncio
import random
import sys
import tempfile
import time
from collections.abc import Awaitable
from pathlib import Path

import uvloop

from worker.core.memory import Attempt
from worker.ports import Grant
from worker.stores.database import Database
from worker.stores.ledger import SqlLedger

TEXT = "A sentence of a length that is usual for an avatar to say, and no longer. " * 2


async def measure(url: str, lanes: int, seconds: float, pause_s: float) -> None:
    """Prints writes per second, waits for an intent in milliseconds, and processor time per say."""
    database = await Database.open(url)
    ledger = SqlLedger(database, time.time)
    epoch = await ledger.raise_epoch(0)
    over, waits = time.monotonic() + seconds, list[float]()

    async def lane(conversation_id: str) -> None:
        last: Awaitable[Grant] | None = None
        memory, number = await ledger.recall(conversation_id), 0
        await asyncio.sleep(random.random() * pause_s)
        while time.monotonic() < over:
            number += 1
            attempt = Attempt("t1", TEXT, is_final=False, parts=(), begun=time.time(), count=1)
            memory.update(number=number, attempt=attempt)
            intent = memory.take_changes()
            assert intent is not None
            asked = time.perf_counter()
            assert await ledger.intend(conversation_id, intent, 0, epoch) is Grant.GRANTED
            waits.append(time.perf_counter() - asked)
            memory.turn("t1", time.time()).pieces += 1
            memory.update(attempt=None)
            outcome = memory.take_changes()
            assert outcome is not None
            last = ledger.record(conversation_id, outcome, outcome=True)
            await asyncio.sleep(pause_s)
        assert last is None or await last is Grant.GRANTED

    begun, used = time.monotonic(), time.process_time()
    await asyncio.gather(*(lane(f"lane-{n}") for n in range(lanes)))
    took, used = time.monotonic() - begun, time.process_time() - used
    await database.close()
    waits.sort()
    p50, p99 = (waits[int(len(waits) * share)] * 1000 for share in (0.5, 0.99))
    print(f"{lanes} lanes: {2 * len(waits) / took:,.0f} writes/s, intent p50 {p50:.1f} ms, p99 {p99:.1f} ms, ", end="")
    print(f"{used / len(waits) * 1000:.2f} ms processor time per say")


if __name__ == "__main__":
    given = dict(enumerate(sys.argv[1:]))
    with tempfile.TemporaryDirectory() as folder:
        address = given.get(0, f"sqlite:///{Path(folder) / 'store.db'}")
        uvloop.run(measure(address, int(given.get(1, "200")), float(given.get(2, "10")), float(given.get(3, "0"))))
