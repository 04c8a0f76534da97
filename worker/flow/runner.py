"""Drives one lane: asks it what to do, has it done, tells it what came of it. The loop of `Runner.run` is the product.

A lane that fails (a bug, the store out of reach) is built again from what it held, after a pause; its neighbours never
notice.
"""

import asyncio
import random
from collections.abc import Callable

import structlog

from worker.core.lane import Lane
from worker.core.model import Entry
from worker.core.work import Wait
from worker.flow.desk import Desk
from worker.flow.settler import Settler
from worker.ops import logs
from worker.ports import Clock

_log = structlog.stdlib.get_logger(__name__)

PAUSE_S = 1.0
LONGEST_PAUSE_S = 30.0
LINGER_S = 2.0


class Runner:
    """One conversation while it has something to do."""

    def __init__(self, conversation_id: str, lane: Lane, desk: Desk, settler: Settler, clock: Clock) -> None:
        self.conversation_id = conversation_id
        self._lane = lane
        self._desk = desk
        self._settler = settler
        self._clock = clock
        self._wake = asyncio.Event()
        self._stopping = asyncio.Event()

    def offer(self, entry: Entry) -> None:
        """Hand a command to the lane."""
        self._settler.submit(self._lane.offer(entry, self._clock()))
        self._wake.set()

    def forget(self, is_gone: Callable[[Entry], bool]) -> None:
        """Drop what will be delivered again."""
        self._lane.forget(is_gone)
        self._wake.set()

    def stop(self) -> None:
        """Begin nothing new; the call under way ends and is recorded."""
        self._stopping.set()
        self._wake.set()

    async def run(self) -> None:
        """Serve the conversation until nothing is left to do."""
        pause_s = PAUSE_S
        while not self._stopping.is_set():
            try:
                self._lane.begin(await self._desk.recall(self.conversation_id))
                await self._serve()
            except Exception:  # noqa: BLE001 - whatever it was, it is this conversation's alone
                _log.exception(logs.LANE_CRASHED, conversation_id=self.conversation_id, pause_s=pause_s)
            else:
                return
            await _before(self._stopping, pause_s)
            pause_s = min(pause_s * 2, LONGEST_PAUSE_S)
            self._lane = self._lane.rebuilt()

    async def _serve(self) -> None:
        while not self._stopping.is_set():
            self._wake.clear()
            step = self._lane.next(self._clock())
            self._settler.submit(step.conclusions)
            if step.work is None:
                # A stream's next token comes soon; starting anew for each would ask the store each time.
                await _before(self._wake, LINGER_S)
                if not len(self._lane):
                    return
                if self.conversation_id not in self._desk.leases:
                    self._lane.begin(await self._desk.recall(self.conversation_id))
                continue
            if isinstance(step.work, Wait):
                await _before(self._wake, step.work.until - self._clock())
                continue
            result, got = await self._desk.carry_out(self.conversation_id, step.work)
            jitter = random.random()  # noqa: S311 - spreads retries, guards nothing
            self._settler.submit(self._lane.done(step.work, result, self._clock(), got=got, jitter=jitter))


async def _before(event: asyncio.Event, seconds: float) -> None:
    """Until the event is set, or that time is over."""
    try:
        async with asyncio.timeout(max(0.0, seconds)):
            await event.wait()
    except TimeoutError:
        pass
