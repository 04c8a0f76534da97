"""A conversation whose commands come from another partition than its row names (law 20)."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable

import structlog

from worker.core.model import Entry, Marker
from worker.core.moved import FIRST_LOOK_S, LONGEST_LOOK_S, Move
from worker.ops import logs
from worker.ports import Clock, Ledger, Tenure

_log = structlog.stdlib.get_logger(__name__)

Mark = Callable[[str, int, int], Awaitable[bool]]
"""See `ports.Outbox.mark`."""


class Moved:
    """Holds what came under one tenure, in order, until the row names its partition."""

    def __init__(self, conversation_id: str, tenure: Tenure, *, ledger: Ledger, mark: Mark, clock: Clock) -> None:
        self.waiting: deque[Entry | Marker] = deque()
        self._conversation_id = conversation_id
        self._tenure = tenure
        self._ledger = ledger
        self._mark = mark
        self._clock = clock

    async def over(self) -> int | None:
        """Return when it may go on. What is returned, unless None, is a partition that is gone: nothing waits there."""
        move, to = Move(self._tenure.partition), self._tenure.partition
        pause_s = FIRST_LOOK_S
        while True:
            try:
                home = await self._ledger.partition_of(self._conversation_id)
                if home is None or move.is_over(home):
                    return None
                if move.must_ask(home, self._clock()):
                    _log.warning(logs.CONVERSATION_MOVED, conversation_id=self._conversation_id, partition=home, to=to)
                    if not await self._mark(self._conversation_id, home, to):
                        return home
                pause_s = move.look_at - self._clock()
            except Exception as error:  # noqa: BLE001 - whatever it was, what is held must not stay so for ever
                _log.error(logs.STORE_FAILED, conversation_id=self._conversation_id, error=str(error))
                pause_s = LONGEST_LOOK_S
            await asyncio.sleep(max(0.0, pause_s))
