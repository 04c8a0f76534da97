"""Carries out conclusions, in order per conversation. THE ORDER OF LINES IS THE GUARANTEE (`_carry_out`).

The only caller of `Delivery.settle`. Speech does not wait for it: a listener cannot stop speech.
"""

import asyncio
import contextvars
from collections import deque
from collections.abc import Awaitable, Iterable
from dataclasses import dataclass
from typing import cast

import structlog

from worker.core.verdict import Conclusion
from worker.ops import logs
from worker.ops.metrics import Metrics
from worker.ports import Delivery, Grant, Outbox

_log = structlog.stdlib.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Submitted:
    conclusion: Conclusion
    recorded: Awaitable[Grant] | None


class Settler:
    """One queue of conclusions per conversation, each emptied by a task that ends with it."""

    def __init__(self, outbox: Outbox, metrics: Metrics | None = None) -> None:
        self._outbox = outbox
        self._metrics = metrics or Metrics()
        self._queues: dict[str, deque[_Submitted | Delivery]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._emptying: dict[str, asyncio.Task[None]] = {}

    def submit(self, conclusions: Iterable[Conclusion], recorded: Awaitable[Grant] | None = None) -> None:
        """Carry these out after all that was submitted for the same conversation before, and when they are recorded."""
        for conclusion in conclusions:
            self._append(conclusion.event.subject, _Submitted(conclusion, recorded))

    def acknowledge(self, conversation_id: str, delivery: Delivery) -> None:
        """Settle what no event tells of, after all that was submitted for the conversation before."""
        self._append(conversation_id, delivery)

    def _append(self, subject: str, one: "_Submitted | Delivery") -> None:
        queue = self._queues.get(subject)
        if queue is not None:
            queue.append(one)
            return
        self._queues[subject] = deque([one])
        # A context of its own: the log context of the delivery that happened to come first is not for the others.
        task = asyncio.create_task(self._empty(subject), context=contextvars.Context())
        self._tasks.add(task)
        self._emptying[subject] = task
        task.add_done_callback(self._tasks.discard)

    async def drain(self) -> None:
        """Return when all that was submitted is carried out."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def settled(self, conversation_ids: Iterable[str]) -> None:
        """Return when all that has been submitted for these conversations by now is carried out."""
        tasks = [self._emptying[one] for one in conversation_ids if one in self._emptying]
        if tasks:
            await asyncio.wait(tasks)

    async def abandon(self) -> None:
        """Stop at once; what was not carried out is delivered again."""
        for task in self._tasks:
            task.cancel()
        await self.drain()

    async def _empty(self, subject: str) -> None:
        queue = self._queues[subject]
        try:
            while queue:
                if isinstance(queue[0], _Submitted):
                    await self._carry_out(queue[0])
                else:
                    await queue[0].settle()
                queue.popleft()
        finally:
            del self._queues[subject], self._emptying[subject]

    async def _carry_out(self, submitted: _Submitted) -> None:
        conclusion = submitted.conclusion
        try:
            if submitted.recorded is not None and await submitted.recorded is not Grant.GRANTED:
                return  # Another worker has taken the conversation over: how this ends is for it to say.
            if conclusion.parked is not None:
                for entry in conclusion.entries:
                    await self._outbox.park(cast(Delivery, entry.delivery), conclusion.parked)
            for one in conclusion.events:
                await self._outbox.tell(one)
            if conclusion.answer is not None:
                for entry in conclusion.entries:
                    if entry.reply_to is not None:
                        await self._outbox.answer(entry.reply_to, conclusion.answer.payload)
            for entry in conclusion.entries:
                await cast(Delivery, entry.delivery).settle()
            self._metrics.conclude(conclusion)
        except Exception:  # noqa: BLE001 - one conversation's trouble must not stop the task of another
            # Not acknowledged, so not lost: it comes again with the next connection, and ends as it ended here.
            _log.exception(
                logs.SETTLE_FAILED, conversation_id=conclusion.event.subject, event_type=conclusion.event.type
            )
