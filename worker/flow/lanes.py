"""All conversations this worker serves: the one place that starts and ends their runners."""

import asyncio
import contextlib
import contextvars
from collections import defaultdict
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import replace
from typing import Any

import structlog

from worker.core import verdict
from worker.core.breaker import Breaker
from worker.core.model import Entry, Marker, Misfit
from worker.core.work import Rules
from worker.flow.backlog import LOOK_S, TICK_S, Backlog
from worker.flow.deliveries import ExpressDelivery
from worker.flow.desk import Desk
from worker.flow.moved import Mark
from worker.flow.runner import Runner
from worker.flow.settler import Settler
from worker.ops import logs
from worker.ops.metrics import Metrics
from worker.ports import Clock, Ledger, Tenure

KNOCK_AGAIN_S = 30.0
"""How soon again the owner of a partition is looked for because of turns that should have closed: it may be busy."""

_log = structlog.stdlib.get_logger(__name__)

SETTLE_S = 1.0
"""How long a partition that is left waits for events to be confirmed."""


class Lanes:
    """Routes what is delivered to the runner of its conversation, by a plain call: no await between broker and lane."""

    def __init__(
        self,
        rules: Rules,
        *,
        desk: Desk,
        ledger: Ledger,
        backlog: Backlog,
        settler: Settler,
        mark: Mark,
        clock: Clock,
        metrics: Metrics | None = None,
    ) -> None:
        self.tenure_of: Callable[[int], Tenure | None] = lambda _: None
        """The tenure under which this worker owns a partition just now, if it does: the inbox knows."""
        self._rules = rules
        self._breaker = Breaker()
        self._desk = desk
        self._ledger = ledger
        self._backlog = backlog
        self._settler = settler
        self._mark = mark
        self._clock = clock
        self._turn = asyncio.Lock()
        self._metrics = metrics or Metrics()
        self._runners: dict[str, Runner] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._knocked: dict[int, float] = {}
        self._stopping = False

    def offer(self, entry: Entry) -> None:
        """Take a command. While stopping it is left alone: unacknowledged, it goes to another worker."""
        if self._stopping:
            return
        conversation_id = entry.command.conversation_id
        runner = self._runners.get(conversation_id)
        if runner is None:
            runner = self._start(conversation_id)
        runner.offer(entry)

    def pass_through(self, marker: Marker) -> None:
        """Take a marker: it has passed when all that came before it has ended."""
        if not self._stopping:
            (self._runners.get(marker.conversation_id) or self._start(marker.conversation_id)).pass_through(marker)

    def hear(self, entry: Entry) -> None:
        """Take the express copy of an interrupt; whoever does not own its conversation lets it pass."""
        if self._stopping:
            return
        runner = self._runners.get(entry.command.conversation_id)
        if runner is None or not runner.hear(entry):
            task = asyncio.create_task(self._hear_idle(entry), context=contextvars.Context())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _hear_idle(self, entry: Entry) -> None:
        """Nobody serves the conversation here; it is ours if its partition is, and it may be speaking still."""
        conversation_id = entry.command.conversation_id
        try:
            partition = await self._ledger.partition_of(conversation_id)
        except Exception as error:  # noqa: BLE001 - whatever keeps us from knowing, the ordered copy comes
            _log.error(logs.STORE_FAILED, conversation_id=conversation_id, error=str(error))
            return
        tenure = None if partition is None else self.tenure_of(partition)
        if tenure is not None and not self._stopping:
            runner = self._runners.get(conversation_id) or self._start(conversation_id)
            runner.offer(replace(entry, delivery=ExpressDelivery(tenure)))

    async def renew(self, conversation_id: str) -> None:
        """The conversation's session is to be renewed: its lane does that, if its partition is ours."""
        partition = await self._ledger.partition_of(conversation_id)
        tenure = None if partition is None else self.tenure_of(partition)
        if tenure is not None and not self._stopping and conversation_id not in self._runners:
            self._start(conversation_id).summon(tenure)

    async def run(self, knock: Callable[[int], Awaitable[None]]) -> None:
        """Have the store keep what is held for long, and see to conversations nobody serves that have something to do.

        `knock` makes the owner of a partition learn that it is: where nothing is delivered, it cannot know.
        """
        looked = self._clock()
        while not self._stopping:
            await asyncio.sleep(TICK_S)
            now = self._clock()
            # While the API is down intake stops by holding: what is kept would be followed by more.
            if self._breaker.hold_until(now) <= now:
                for runner in self._runners.values():
                    runner.keep(now)
            if now - looked >= LOOK_S:
                looked = now
                try:
                    await self._summon(knock)
                except Exception as error:  # noqa: BLE001 - whatever it was, the next look is a second away
                    _log.error(logs.STORE_FAILED, error=str(error))

    async def _summon(self, knock: Callable[[int], Awaitable[None]]) -> None:
        """Those of which commands are kept, and those with a turn that has been left open for too long."""
        wanted: defaultdict[int, set[str]] = defaultdict(set)
        kept, now = await self._backlog.conversations(), self._clock()
        unclosed = await self._ledger.unclosed(now - self._rules.auto_final_s) if self._rules.auto_final_s else []
        for partition, conversation_id in (*kept, *unclosed):
            wanted[partition].add(conversation_id)
        urgent = {partition for partition, _ in kept}
        for partition, conversation_ids in wanted.items():
            tenure = self.tenure_of(partition)
            if tenure is not None:
                for conversation_id in conversation_ids if not self._stopping else ():
                    (self._runners.get(conversation_id) or self._start(conversation_id)).summon(tenure)
            elif partition in urgent or now >= self._knocked.get(partition, 0.0) + KNOCK_AGAIN_S:
                self._knocked[partition] = now
                await knock(partition)

    def reject(self, misfit: Misfit) -> None:
        """Take a message that is no command."""
        self._settler.submit([verdict.rejected(misfit)])

    def forget(self, tenure: Tenure) -> None:
        """The tenure has ended: what came under it and has not ended will be delivered again."""
        self._backlog.forget(tenure)
        for runner in self._runners.values():
            runner.forget(tenure)

    async def leave(self, tenure: Tenure) -> None:
        """Begin nothing more under the tenure; return when what was under way has ended and is acknowledged."""
        mine = [runner for runner in self._runners.values() if runner.serves_under(tenure)]
        self.forget(tenure)
        await asyncio.gather(*(runner.after_call() for runner in mine))
        # A listener's full queue must not hold up the partition: what is not settled is told again, as it was.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SETTLE_S):
                await self._settler.settled(runner.conversation_id for runner in mine)

    @property
    def hold_moved(self) -> bool:
        """Whether any conversation waits here for what its old partition still has."""
        return any(runner.holds_moved for runner in self._runners.values())

    @property
    def conversations(self) -> int:
        """How many conversations have something to do here."""
        return len(self._runners)

    @property
    def in_hand(self) -> int:
        """How many commands were delivered, and are neither settled nor kept in the store."""
        return sum(runner.in_hand for runner in self._runners.values())

    @property
    def is_holding(self) -> bool:
        """Whether calls are held since the API is taken to be down."""
        return self._breaker.is_open

    def is_served(self, conversation_id: str) -> bool:
        """Whether the conversation has something to do here."""
        return conversation_id in self._runners

    async def stop(self, last: Callable[[], Coroutine[Any, Any, None]] | None = None) -> None:
        """Begin nothing new; return when what was under way has ended and is settled. `last`: what to do before."""
        self._stopping = True
        for runner in self._runners.values():
            runner.stop()
        if self._tasks:
            await asyncio.wait(self._tasks)
        if last is not None:
            await last()
        await self._settler.drain()

    async def abandon(self) -> None:
        """Stop at once. What was under way is not recorded, and delivered again."""
        self._stopping = True
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        await self._settler.abandon()

    def _start(self, conversation_id: str) -> Runner:
        runner = Runner(
            conversation_id,
            self._rules,
            breaker=self._breaker,
            desk=self._desk,
            ledger=self._ledger,
            backlog=self._backlog,
            settler=self._settler,
            mark=self._mark,
            clock=self._clock,
            turn=self._turn,
            metrics=self._metrics,
        )
        self._runners[conversation_id] = runner
        # A context of its own: the log context of the delivery that happened to come first is not for the others.
        task = asyncio.create_task(self._serve(conversation_id, runner), context=contextvars.Context())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return runner

    async def _serve(self, conversation_id: str, runner: Runner) -> None:
        try:
            await runner.run()
        finally:
            # No await between the runner's last look and this: a later command finds no runner, and starts one.
            del self._runners[conversation_id]
