"""Asks the producers of one conversation to pause, again and again while it lasts; `core.pressure` says when."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from worker.core.pressure import Pressure
from worker.core.verdict import Conclusion
from worker.core.work import Rules
from worker.flow.settler import Settler
from worker.ports import Clock


class Pauses:
    """Looks whenever something has come or gone; `start` runs what repeats a pause meanwhile."""

    def __init__(
        self,
        conversation_id: str,
        rules: Rules,
        settler: Settler,
        clock: Clock,
        start: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]],
    ) -> None:
        self.waiting_chars = 0
        self._pressure = Pressure(conversation_id, rules)
        self._settler = settler
        self._clock = clock
        self._start = start
        self._repeating: asyncio.Task[None] | None = None

    def look(self, waiting_chars: int) -> None:
        """So many characters wait: tell producers, if they should know."""
        self.waiting_chars = waiting_chars
        event = self._pressure.look(waiting_chars, self._clock())
        if event is not None:
            self._settler.submit([Conclusion(event)])
        if self._pressure.again_at is None:
            self.stop()
        elif self._repeating is None:
            self._repeating = self._start(self._repeat())

    def forget(self) -> None:
        """What waited is another worker's to tell of."""
        self._pressure.forget()
        self.stop()

    def stop(self) -> None:
        """Repeat nothing any more."""
        if self._repeating is not None:
            self._repeating.cancel()
            self._repeating = None

    async def _repeat(self) -> None:
        while (again_at := self._pressure.again_at) is not None:
            await asyncio.sleep(max(0.0, again_at - self._clock()))
            self.look(self.waiting_chars)
