"""A conversation whose commands come from another partition than its row names (law 20)."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable

import structlog

from worker.core.model import Entry, Marker
from worker.core.moved import FIRST_LOOK_S, LONGEST_LOOK_S, Move
from worker.flow.deliveries import delivery_of
from worker.flow.settler import Settler
from worker.ops import logs
from worker.ops.metrics import Metrics
from worker.ports import Clock, Ledger, Tenure

_log = structlog.stdlib.get_logger(__name__)

Mark = Callable[[str, int, int], Awaitable[bool]]
"""See `ports.Outbox.mark`."""


class Moved:
    """Holds what came under one tenure, in order, until the row names its partition."""

    def __init__(
        self, conversation_id: str, tenure: Tenure, *, ledger: Ledger, mark: Mark, clock: Clock, metrics: Metrics
    ) -> None:
        self.waiting: deque[Entry | Marker] = deque()
        self._conversation_id = conversation_id
        self._tenure = tenure
        self._ledger = ledger
        self._mark = mark
        self._clock = clock
        self._metrics = metrics

    async def over(self) -> int | None:
        """Return when it may go on. What is returned, unless None, is a partition that is gone: nothing waits there."""
        move, to = Move(self._tenure.partition), self._tenure.partition
        pause_s = FIRST_LOOK_S
        counted = False
        while True:
            try:
                home = await self._ledger.partition_of(self._conversation_id)
                if home is None or move.is_over(home):
                    return None
                if move.must_ask(home, self._clock()):
                    self._metrics.moved.inc(not counted)
                    counted = True
                    _log.warning(logs.CONVERSATION_MOVED, conversation_id=self._conversation_id, partition=home, to=to)
                    if not await self._mark(self._conversation_id, home, to):
                        return home
                pause_s = move.look_at - self._clock()
            except Exception as error:  # noqa: BLE001 - whatever it was, what is held must not stay so for ever
                _log.error(logs.STORE_FAILED, conversation_id=self._conversation_id, error=str(error))
                pause_s = LONGEST_LOOK_S
            await asyncio.sleep(max(0.0, pause_s))


class Moves:
    """What of one conversation is held because its key has moved, by tenure. `go_on` takes it when it may go on."""

    def __init__(
        self,
        conversation_id: str,
        go_on: Callable[[Tenure, deque[Entry | Marker], int | None], None],
        *,
        ledger: Ledger,
        mark: Mark,
        settler: Settler,
        clock: Clock,
        metrics: Metrics,
    ) -> None:
        self._conversation_id = conversation_id
        self._go_on = go_on
        self._ledger = ledger
        self._mark = mark
        self._settler = settler
        self._clock = clock
        self._metrics = metrics
        self._moved: dict[Tenure, Moved] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._moved)

    def __contains__(self, tenure: Tenure) -> bool:
        return tenure in self._moved

    def held(self, tenure: Tenure) -> deque[Entry | Marker] | None:
        """What is held under the tenure, to add to; None: nothing has to be."""
        moved = self._moved.get(tenure)
        return None if moved is None else moved.waiting

    def hold(self, tenure: Tenure, came: deque[Entry | Marker]) -> None:
        """Hold what came, but for markers in front of it: nothing stands before them, so they have passed."""
        had = len(came)
        while came and isinstance(came[0], Marker):
            self._settler.acknowledge(self._conversation_id, delivery_of(came.popleft()))
        if had and not came:
            return
        moved = Moved(
            self._conversation_id,
            tenure,
            ledger=self._ledger,
            mark=self._mark,
            clock=self._clock,
            metrics=self._metrics,
        )
        moved.waiting = came
        self._moved[tenure] = moved
        task = asyncio.create_task(self._release(tenure, moved))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def forget(self, tenure: Tenure) -> None:
        """It will be delivered again."""
        self._moved.pop(tenure, None)

    def stop(self) -> None:
        """Wait for nothing any more."""
        for task in self._tasks:
            task.cancel()

    async def _release(self, tenure: Tenure, moved: Moved) -> None:
        gone = await moved.over()
        if self._moved.get(tenure) is moved:
            del self._moved[tenure]
            self._go_on(tenure, moved.waiting, gone)
