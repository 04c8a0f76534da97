"""Keeps sessions alive, ends idle ones, and takes over those of workers that died. One scheduler for all sessions.

A keep-alive is put off by any success; a session is the keeper's business only while no lane is calling.
"""

import asyncio
import random
from collections.abc import Callable

import structlog

from schemas.events import EndReason
from worker.core import verdict
from worker.core.model import CallKind
from worker.core.verdict import Conclusion
from worker.flow.desk import LEASE_S, Desk, Lease
from worker.ops import logs
from worker.ports import Clock

_log = structlog.stdlib.get_logger(__name__)

TICK_S = 1.0
RENEW_S = LEASE_S / 3
END_ATTEMPTS = 3
AT_ONCE = 64
"""Keep-alives under way at the same time."""


class Keeper:
    """Runs beside the lanes: `await keeper.run()` until cancelled."""

    def __init__(
        self,
        desk: Desk,
        clock: Clock,
        *,
        keep_alive_s: float,
        idle_s: float,
        is_served: Callable[[str], bool],
        submit: Callable[[list[Conclusion]], None],
    ) -> None:
        self._desk = desk
        self._clock = clock
        self._keep_alive_s = keep_alive_s
        self._idle_s = idle_s
        self._is_served = is_served
        self._submit = submit
        self._busy: dict[str, asyncio.Task[None]] = {}
        self._slots = asyncio.Semaphore(AT_ONCE)

    async def run(self) -> None:
        """Look at every session once a second."""
        try:
            while True:
                await self._mind_leases()
                self._mind_sessions()
                await asyncio.sleep(TICK_S)
        finally:
            for task in self._busy.values():
                task.cancel()
            await asyncio.gather(*self._busy.values(), return_exceptions=True)

    async def _mind_leases(self) -> None:
        """Renew ours, drop what others took over, adopt what nobody holds."""
        desk, now = self._desk, self._clock()
        due = {key: lease for key, lease in desk.leases.items() if lease.until - now < LEASE_S - RENEW_S}
        until = now + LEASE_S
        try:
            for lease in list(desk.leases.values()):
                if not lease.noted:
                    await desk.store.put(lease.held, desk.owner, until)
                    lease.noted = True
            lost = await desk.store.renew({key: lease.held for key, lease in due.items()}, desk.owner, until)
            adopted = await desk.store.adopt(desk.owner, now, until)
        except Exception as error:  # noqa: BLE001 - the store comes back; until then the sessions are kept alive from memory
            _log.error(logs.STORE_FAILED, error=str(error))
            return
        for conversation_id, lease in due.items():
            if conversation_id not in lost:
                lease.until = until
            elif desk.leases.get(conversation_id) is lease:
                del desk.leases[conversation_id]
        for held in adopted:
            if held.conversation_id not in desk.leases:
                desk.hold(held, last_success=0.0)
                _log.info(logs.SESSION_ADOPTED, conversation_id=held.conversation_id)

    def _mind_sessions(self) -> None:
        now = self._clock()
        for conversation_id, lease in list(self._desk.leases.items()):
            if conversation_id in self._busy or self._desk.in_use(conversation_id):
                continue
            if now - lease.held.last_used >= self._idle_s and not self._is_served(conversation_id):
                self._start(conversation_id, self._end_idle(conversation_id, lease))
            # Spread, so that sessions opened together are not kept alive together for ever.
            elif now >= lease.not_before and now - lease.last_success >= self._keep_alive_s * random.uniform(0.9, 1.0):  # noqa: S311
                self._start(conversation_id, self._keep_alive(conversation_id, lease))

    def _start(self, conversation_id: str, errand: "asyncio._CoroutineLike[None]") -> None:
        task = asyncio.create_task(errand)
        self._busy[conversation_id] = task
        task.add_done_callback(lambda _: self._busy.pop(conversation_id))

    async def _keep_alive(self, conversation_id: str, lease: Lease) -> None:
        async with self._slots, self._desk.line(conversation_id):
            if self._desk.leases.get(conversation_id) is not lease:
                return
            result = await self._desk.api.keep_alive(lease.held.session)
            if result.kind is CallKind.OK:
                lease.last_success = self._clock()
                return
            _log.warning(
                logs.CALL_FAILED,
                conversation_id=conversation_id,
                call="KeepAlive",
                outcome=str(result.kind),
                status=result.status,
                error=result.error,
            )
            lease.not_before = self._clock() + (result.retry_after_s or 0.0)
            if result.kind is CallKind.GONE and await self._desk.drop(conversation_id):
                self._tell_end(conversation_id, lease, EndReason.LOST)

    async def _end_idle(self, conversation_id: str, lease: Lease) -> None:
        async with self._desk.line(conversation_id):
            served = self._is_served(conversation_id)
            # The row goes first: whoever takes the conversation over from here on opens a session of its own.
            if (
                served
                or self._desk.leases.get(conversation_id) is not lease
                or not await self._desk.drop(conversation_id)
            ):
                return
            for _ in range(END_ATTEMPTS):
                result = await self._desk.api.end(lease.held.session)
                if result.kind not in (CallKind.NOT_TAKEN, CallKind.UNKNOWN):
                    break
            self._tell_end(conversation_id, lease, EndReason.IDLE)

    def _tell_end(self, conversation_id: str, lease: Lease, reason: EndReason) -> None:
        _log.info(logs.SESSION_ENDED, conversation_id=conversation_id, reason=str(reason))
        self._submit([verdict.session_ended(conversation_id, lease.held.session, reason)])
