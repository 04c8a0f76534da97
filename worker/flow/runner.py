"""Drives one lane: asks what to do, has it done, tells what came of it. The loop of `Runner._serve` is the product.

What a lane knows of its conversation it has from the ledger, and it is true as long as the *tenure* lasts under which
its commands were delivered: one channel's ownership of the partition. A lane whose tenure has ended is dropped, with
all that waits in it, and built anew from the ledger when the commands come again. One that fails (a bug, the store out
of reach) is dropped too, and built again from what it held, after a pause; its neighbours never notice.
"""

import asyncio
import random
from collections import deque
from collections.abc import Coroutine, Sequence
from dataclasses import replace
from itertools import islice, takewhile
from typing import Any

import structlog

from schemas.commands import Interrupt, Speak
from worker.core import verdict
from worker.core.book import Book
from worker.core.breaker import Breaker
from worker.core.lane import Lane
from worker.core.memory import Memory
from worker.core.model import CallKind, CallResult, Entry, Marker, Misfit, Session
from worker.core.verdict import Conclusion
from worker.core.work import INTENT_S, Call, CallInterrupt, InitClient, Rules, Say, Wait
from worker.errors import LinkLost
from worker.flow.backlog import Backlog, Holding
from worker.flow.deliveries import ExpressDelivery, delivery_of, keepable, tenure_of
from worker.flow.desk import Desk
from worker.flow.moved import Mark, Moves
from worker.flow.pauses import Pauses
from worker.flow.settler import Settler
from worker.ops import logs
from worker.ops.metrics import Metrics
from worker.ports import Clock, Grant, Ledger, Tenure

_log = structlog.stdlib.get_logger(__name__)

PAUSE_S = 1.0
LONGEST_PAUSE_S = 30.0
GATHER_S = 0.02
LOOKED_UP = 5000
"""Commands a query of the ledger asks for at most."""
LINGER_S = 2.0
"""How long a lane without work stays: a stream's next token comes soon, and building a lane reads the store."""


class Runner:
    """One conversation while it has something to do."""

    def __init__(
        self,
        conversation_id: str,
        rules: Rules,
        *,
        breaker: Breaker,
        desk: Desk,
        ledger: Ledger,
        backlog: Backlog,
        settler: Settler,
        mark: Mark,
        clock: Clock,
        turn: asyncio.Lock,
        metrics: Metrics,
    ) -> None:
        self.conversation_id = conversation_id
        self._rules = rules
        self._breaker = breaker
        self._desk = desk
        self._ledger = ledger
        self._backlog = backlog
        self._settler = settler
        self._clock = clock
        self._turn = turn
        self._metrics = metrics
        self._arrived: deque[Entry | Marker] = deque()
        self._moves = Moves(
            conversation_id, self._go_on, ledger=ledger, mark=mark, settler=settler, clock=clock, metrics=metrics
        )
        self._gone: int | None = None
        self._holding = Holding(conversation_id, backlog)
        self._summons: Tenure | None = None
        self._tenure: Tenure | None = None
        self._epoch = 0
        self._memory = Memory()
        self._book = Book(conversation_id, self._memory)
        self._lane = Lane(self._book, rules)
        self._written: asyncio.Future[Grant] | None = None
        self._admitting = asyncio.Lock()
        self._in_call = False
        self._called = asyncio.Event()
        self._errands: set[asyncio.Task[None]] = set()
        self._wake = asyncio.Event()
        self._stopping = asyncio.Event()
        self._pauses = Pauses(conversation_id, rules, settler, clock, self._start)

    def offer(self, entry: Entry) -> None:
        """Take a command; the lane has it as soon as no call is under way, an interrupt at once."""
        self._place(entry)
        if not entry.express:
            self._holding.add(entry)
        self._wake.set()
        if isinstance(entry.command, Interrupt) or (self._in_call and tenure_of(entry) is not self._tenure):
            self._start(self._hear())
        elif self._in_call and isinstance(entry.command, Speak):
            self._pauses.look(self._pauses.waiting_chars + len(entry.command.text))

    def pass_through(self, marker: Marker) -> None:
        """Take a marker; it has passed when all before it has ended."""
        self._place(marker)
        self._wake.set()

    def _place(self, one: Entry | Marker) -> None:
        held = self._moves.held(tenure_of(one))
        (self._arrived if held is None else held).append(one)

    def hear(self, entry: Entry) -> bool:
        """Take the express copy of an interrupt, under whatever tenure the conversation is served. False: it is not."""
        tenure = self._tenure or (tenure_of(self._arrived[0]) if self._arrived else None)
        if tenure is not None:
            self.offer(replace(entry, delivery=ExpressDelivery(tenure)))
        return tenure is not None

    def summon(self, tenure: Tenure) -> None:
        """Serve what the store keeps of the conversation, whether or not something is delivered."""
        if self._tenure is None and not self._arrived and tenure not in self._moves:
            self._summons = tenure
            self._wake.set()

    def keep(self, now: float) -> None:
        """Have the store keep what is held, if there is much of it, or if it has been held for long."""
        tenure = self._holding.due(now)
        if tenure is not None and (tenure is self._tenure or tenure in self._moves):
            self._start(self._keep(tenure))

    async def _keep(self, tenure: Tenure) -> None:
        try:
            granted = await self._holding.keep(tenure)
        except LinkLost:
            self.forget(tenure)
        else:
            if not granted:
                tenure.refused()
                self.forget(tenure)

    def forget(self, tenure: Tenure) -> None:
        """The tenure has ended: what it brought will be delivered again, to whoever owns the partition then."""
        self._arrived = deque(entry for entry in self._arrived if tenure_of(entry) is not tenure)
        self._holding.forget(tenure)
        self._moves.forget(tenure)
        if self._summons is tenure:
            self._summons = None
        if self._tenure is tenure:
            self._tenure = None
            self._pauses.forget()
        self._wake.set()

    @property
    def in_hand(self) -> int:
        """How many commands were delivered, and are neither settled nor kept in the store."""
        return self._holding.in_hand

    @property
    def holds_moved(self) -> bool:
        """Whether commands wait here for what the conversation's old partition still has."""
        return bool(self._moves)

    def serves_under(self, tenure: Tenure) -> bool:
        """Whether the conversation is served under the tenure just now."""
        return self._tenure is tenure

    async def after_call(self) -> None:
        """Return when the call that is under way has ended and its outcome is being recorded."""
        if self._in_call:
            self._called.clear()
            await self._called.wait()

    def stop(self) -> None:
        """Begin nothing new; the call under way ends and is recorded."""
        self._stopping.set()
        self._pauses.stop()
        self._wake.set()

    async def run(self) -> None:
        """Serve the conversation until nothing is left to do."""
        try:
            await self._serve_on()
            if self._errands:
                await asyncio.wait(self._errands)
        finally:
            self._moves.stop()
            for errand in self._errands:
                errand.cancel()

    async def _serve_on(self) -> None:
        pause_s = PAUSE_S
        while not self._stopping.is_set():
            try:
                await self._serve()
                break
            except Exception:  # noqa: BLE001 - whatever it was, it is this conversation's alone
                _log.exception(logs.LANE_CRASHED, conversation_id=self.conversation_id, pause_s=pause_s)
            await _before(self._stopping, pause_s)
            pause_s = min(pause_s * 2, LONGEST_PAUSE_S)
            self._rebuild()

    async def _serve(self) -> None:
        while not self._stopping.is_set():
            if self._memory.state.fences:
                # Behind a fence a backlog is thrown away: a few events that list many commands, not many of one.
                await _before(self._stopping, GATHER_S)
            self._wake.clear()
            async with self._admitting:
                if self._lane.session is not None and not self._lane.tells_interrupts:
                    await self._look_for_session()
                await self._admit()
            self._tell_interrupts()
            now = self._clock()
            step = self._lane.next(now, self._breaker.outage_until(now), self._breaker.pause_until)
            self._pauses.look(self._lane.waiting_chars)
            if step.work is None:
                self._submit(step.conclusions)
                await self._desk.leave_line(self.conversation_id)
                # What has arrived but not been admitted waits for errands, or for the lane, which is empty now.
                if not self._arrived or self._errands:
                    await self._doze(LINGER_S)
                if not self._arrived and not self._errands and not self._moves:
                    return
                await self._look_for_session()
            elif isinstance(step.work, Wait):
                if self._tenure is not None and not self._memory.version:
                    # Should its key move meanwhile, there must be a row that tells where it came from.
                    self._memory.move(self._tenure.partition)
                self._submit(step.conclusions)
                if not self._lane.seeks_session:
                    await self._desk.leave_line(self.conversation_id)
                await self._doze(step.work.until - self._clock())
            else:
                result = None
                self._breaker.begin()
                self._in_call = True
                try:
                    result = await self._call(step.work, step.conclusions)
                finally:
                    self._in_call = False
                    self._called.set()
                    self._breaker.record(result, self._clock())
                async with self._turn:
                    # Cutting the next piece takes a while. The loop looks at the network between any two lanes, so that
                    # an interrupt does not wait for a herd of them.
                    await asyncio.sleep(0)

    async def _look_for_session(self) -> None:
        """What the lane knows of its session is no longer true where its lease is gone: a keep-alive found it lost."""
        if self._tenure is not None and self.conversation_id not in self._desk.leases:
            self._lane.begin(*await self._desk.recall(self.conversation_id))

    async def _doze(self, seconds: float) -> None:
        """Until something wakes it, or that time is over. A time-out would cost more than all else a token costs."""
        timer = asyncio.get_running_loop().call_later(max(0.0, seconds), self._wake.set)
        try:
            await self._wake.wait()
        finally:
            timer.cancel()

    async def _hear(self) -> None:
        """Admit what has arrived although a call is under way: an interrupt is among it, or its key has moved."""
        try:
            async with self._admitting:
                if self._tenure is not None:
                    await self._admit()
        except Exception:  # noqa: BLE001 - it has still arrived, and is admitted after the call
            _log.exception(logs.LANE_CRASHED, conversation_id=self.conversation_id)
        self._tell_interrupts()

    def _tell_interrupts(self) -> None:
        """Call the API's interrupt beside whatever is under way."""
        for entry in self._lane.take_interrupts():
            self._start(self._interrupt(self._lane, entry))

    async def _interrupt(self, lane: Lane, entry: Entry) -> None:
        result = await self._desk.interrupt(self.conversation_id)
        if lane is self._lane:
            told = None if result.kind is CallKind.STALE else result
            self._submit(lane.interrupted(entry, told, self._clock()))
            self._wake.set()

    def _start(self, errand: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(errand)
        self._errands.add(task)

        def end(_: asyncio.Task[None]) -> None:
            self._errands.discard(task)
            self._wake.set()

        task.add_done_callback(end)
        return task

    async def _admit(self) -> None:
        """Hand what has arrived to the lane, once it is known whether it ended before."""
        if self._tenure is None:
            self._set_up(Memory(), None, None)
        if self._summons is not None and self._tenure is None and not self._arrived:
            await self._begin(self._summons)
        self._summons = None
        while self._arrived:
            head = self._arrived[0]
            tenure = tenure_of(head)
            if self._tenure is not None and tenure.partition != self._tenure.partition:
                self._hold(tenure)
            elif tenure is not self._tenure:
                if self._in_call or len(self._lane):
                    return
                await self._begin(tenure)
            elif isinstance(head, Marker):
                if self._in_call or len(self._lane) or self._errands:
                    return
                await self._pass(head)
            else:
                await self._offer_arrived(tenure)

    async def _offer_arrived(self, tenure: Tenure) -> None:
        here = list(takewhile(lambda one: isinstance(one, Entry), islice(self._arrived, LOOKED_UP)))
        await self._look_up({one.known_as for one in here if isinstance(one, Entry) and one.known_as is not None})
        # No more than was looked up: others may have arrived, or the tenure may have ended, meanwhile.
        for one in here:
            if not isinstance(one, Entry) or tenure_of(one) is not tenure or self._tenure is not tenure:
                break
            self._submit(self._lane.offer(one, self._clock()))
            self._arrived.popleft()
            self._note_disorder()

    def _note_disorder(self) -> None:
        for one in self._lane.take_disorders():
            self._metrics.disorders.labels(one.kind).inc()
            _log.warning(
                logs.CHUNKS_OUT_OF_ORDER,
                conversation_id=self.conversation_id,
                turn_id=one.turn_id,
                kind=one.kind,
                expected=one.expected,
                seq=one.seq,
            )

    async def _look_up(self, message_ids: set[str]) -> None:
        self._memory.trim()
        unknown = self._memory.to_look_up(message_ids)
        if unknown:
            self._memory.ended |= await self._ledger.known(self.conversation_id, list(unknown))

    async def _begin(self, tenure: Tenure) -> None:
        """A lane for this tenure, with what the ledger and the store know of the conversation."""
        self._tenure = tenure
        try:
            # First of all: whoever owned the partition before begins nothing after this that is not found below.
            self._epoch = await tenure.epoch()
        except LinkLost:
            self.forget(tenure)
            return
        memory = await self._ledger.recall(self.conversation_id)
        if memory.state.partition not in (None, tenure.partition, self._gone):
            # What has ended may not be out of the store yet; a marker for its sake would move the conversation back.
            waits = await self._backlog.waits(self.conversation_id, tenure)
            if self._tenure is tenure:
                self._tenure = None
                if waits or any(tenure_of(one) is tenure for one in self._arrived):
                    self._hold(tenure)
            return
        self._gone = None
        session, lost = await self._desk.recall(self.conversation_id)
        # Last: what is taken must not be dropped by something that fails.
        kept = await self._backlog.take(self.conversation_id, tenure)
        memory.settle_in(tenure.partition)
        self._set_up(memory, session, lost)
        self._arrived.extendleft(entry for entry in reversed(kept) if isinstance(entry, Entry))
        self._settler.submit(verdict.rejected(misfit) for misfit in kept if isinstance(misfit, Misfit))

    def _hold(self, tenure: Tenure) -> None:
        """The key has moved: what comes under this tenure waits until all from the old partition has ended."""
        came = deque(one for one in self._arrived if tenure_of(one) is tenure)
        self._arrived = deque(one for one in self._arrived if tenure_of(one) is not tenure)
        self._moves.hold(tenure, came)

    def _go_on(self, tenure: Tenure, came: deque[Entry | Marker], gone: int | None) -> None:
        """What was held may go on. `gone`: a partition that there is no more, so that nothing waits there."""
        self._gone = gone
        self._arrived.extend(came)
        if not came:
            self._summons = tenure
        self._wake.set()

    async def _pass(self, marker: Marker) -> None:
        """All that came before the marker has ended: the conversation moves."""
        tenure = self._tenure
        assert tenure is not None
        self._memory.move(marker.to)
        changes = self._memory.take_changes()
        if changes is not None:
            grant = await self._ledger.intend(self.conversation_id, changes, tenure.partition, self._epoch)
            if self._tenure is not tenure:
                return
            if grant is Grant.OUTDATED:
                self._rebuild()
                return
            if grant is Grant.REFUSED:
                tenure.refused()
                self.forget(tenure)
                return
            _log.info(
                logs.CONVERSATION_PASSED,
                conversation_id=self.conversation_id,
                partition=tenure.partition,
                to=marker.to,
            )
        self._arrived.popleft()
        self._settler.acknowledge(self.conversation_id, delivery_of(marker))
        self._tenure = None

    def _set_up(self, memory: Memory, session: Session | None, lost: Session | None) -> None:
        self._memory = memory
        self._book = Book(self.conversation_id, memory)
        self._lane = Lane(self._book, self._rules)
        self._lane.begin(session, lost)
        self._written = None

    async def _call(self, call: Call, ended: Sequence[Conclusion]) -> CallResult | None:
        """The intent is written, the call made, its outcome recorded: in this order, or not at all.

        What has `ended` before the call is written with the intent, and told if that is granted.
        """
        asked, tenure, lane = self._clock(), self._tenure, self._lane
        if tenure is None:
            return None
        changes = self._memory.take_changes()
        intent = asyncio.ensure_future(
            self._ledger.intend(self.conversation_id, changes, tenure.partition, self._epoch, self._meant_for(call))
        )
        self._settler.submit(ended, intent)
        assert changes is not None, "until when the call may run is new"
        self._written = intent
        grant = await intent
        if grant is Grant.OUTDATED:
            if self._tenure is tenure:
                self._rebuild(ended)
            return None
        if grant is Grant.REFUSED:
            tenure.refused()
            self.forget(tenure)
            return None

        begun = asked

        def still() -> bool:
            nonlocal begun
            begun = self._clock()
            if isinstance(call, Say) and self._memory.is_silent(call.piece.turn_id):
                return False
            return self._tenure is tenure and begun - asked < INTENT_S

        chunk = self._opening(call)
        result, got = await self._desk.carry_out(self.conversation_id, call, still)
        if chunk is not None and not result.local and result.kind is not CallKind.STALE:
            self._metrics.first_words.observe(max(0.0, begun - keepable(chunk).received))
        jitter = random.random()  # noqa: S311 - spreads retries, guards nothing
        told = lane.done(call, result, self._clock(), begun=begun, got=got, jitter=jitter)
        self._submit(told, outcome=isinstance(call, Say))
        return result

    def _opening(self, call: Call) -> Entry | None:
        """The chunk that decided it, if this is the first call for the first piece of a turn."""
        attempt = self._memory.state.attempt
        if not isinstance(call, Say) or attempt is None or attempt.count > 1:
            return None
        return None if self._memory.turns[call.piece.turn_id].pieces else call.piece.decided_by

    def _meant_for(self, call: Call) -> str | None:
        """The session that must be ready for the call."""
        session = self._lane.session
        return (
            session.session_id if session is not None and isinstance(call, Say | InitClient | CallInterrupt) else None
        )

    def _rebuild(self, untold: Sequence[Conclusion] = ()) -> None:
        """Put what the lane holds, and what ended there `untold`, back in front: another lane will begin with it."""
        if self._tenure is not None:
            told = (*untold, *self._book.take())
            ended = [entry for one in told for entry in one.entries if isinstance(entry, Entry)]
            self._arrived.extendleft(reversed((*ended, *self._book)))
            self._tenure = None

    def _submit(self, conclusions: Sequence[Conclusion], *, outcome: bool = False) -> None:
        """Have what is new written, and the conclusions carried out if that is granted.

        What changes nothing stands on what was written last: an interrupt's second copy is only acknowledged, but not
        if what was to tell of the first was refused.
        """
        changes, tenure = self._memory.take_changes(), self._tenure
        if changes is not None:
            self._written = asyncio.ensure_future(self._ledger.record(self.conversation_id, changes, outcome=outcome))
        elif not conclusions:
            return
        written = self._written

        def look(written: asyncio.Future[Grant]) -> None:
            # What ends here is not told, and must come again: to whoever has the conversation now.
            if tenure is not None and not written.cancelled() and written.result() is not Grant.GRANTED:
                tenure.refused()
                self.forget(tenure)

        if written is not None:
            written.add_done_callback(look)
        self._settler.submit(conclusions, written)


async def _before(event: asyncio.Event, seconds: float) -> None:
    """Until the event is set, or that time is over."""
    try:
        async with asyncio.timeout(max(0.0, seconds)):
            await event.wait()
    except TimeoutError:
        pass
