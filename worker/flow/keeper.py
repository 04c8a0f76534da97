"""Keeps sessions alive, ends idle ones, and takes over those of workers that died. One scheduler for all sessions.

A keep-alive is put off by any success; a session is the keeper's business only while no lane is calling. One whose
token is about to expire is renewed by its lane, which the keeper wakes; where there can be none, it is ended in time.
"""

import asyncio
import random
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

import structlog

from schemas.events import EndReason
from worker.core import verdict
from worker.core.model import CallKind, CallResult, Session
from worker.core.verdict import Conclusion
from worker.flow.desk import LEASE_S, Desk, Lease
from worker.ops import logs
from worker.ports import Clock, Held, HeldState

_log = structlog.stdlib.get_logger(__name__)

TICK_S = 1.0
RENEW_S = LEASE_S / 3
GRACE_S = 2 * LEASE_S
"""After an outage of the store nothing is adopted for so long: others may take seconds to notice that it is back."""
END_ATTEMPTS = 3
EXPIRY_MARGIN_S = 5.0
"""Before its token expires a session is ended that nobody has renewed: later nobody can end it."""
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
        is_holding: Callable[[], bool],
        submit: Callable[[list[Conclusion]], None],
        renew: Callable[[str], Coroutine[Any, Any, None]],
    ) -> None:
        self._desk = desk
        self._clock = clock
        self._keep_alive_s = keep_alive_s
        self._idle_s = idle_s
        self._is_served = is_served
        self._is_holding = is_holding
        self._submit = submit
        self._renew = renew
        self._busy: dict[str, asyncio.Task[None]] = {}
        self._slots = asyncio.Semaphore(AT_ONCE)
        self._adopts_from = 0.0

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
        desk.in_line = {key: None for key in desk.in_line if self._is_served(key)}
        in_line = _claims(key for key in desk.in_line if not desk.in_use(key))
        renewed = {key: lease.held for key, lease in due.items()} | _claims(desk.creating)
        try:
            for lease in list(desk.leases.values()):
                if not lease.noted:
                    await desk.note(lease)
            lost = await desk.store.renew(renewed, desk.owner, until)
            await desk.store.renew(in_line, desk.owner, now + desk.slots.patience_s)
            if in_line and self._is_holding():
                # The API is out of reach from here: others may find room.
                await desk.store.pardon(desk.owner)
            adopted = await self._adopt(now, until)
        except Exception as error:  # noqa: BLE001 - the store comes back; until then the sessions are kept alive from memory
            _log.error(logs.STORE_FAILED, error=str(error))
            # It may have been out of reach for all: whoever lives renews its leases first.
            self._adopts_from = self._clock() + GRACE_S
            return
        for conversation_id, lease in due.items():
            if conversation_id not in lost:
                lease.until = until
            elif desk.leases.get(conversation_id) is lease and lease.noted:
                del desk.leases[conversation_id]
        for held in adopted:
            if held.conversation_id not in desk.leases:
                desk.hold(held, last_success=0.0).orphan = held.state is HeldState.ENDING
                _log.info(logs.SESSION_ADOPTED, conversation_id=held.conversation_id)

    async def _adopt(self, now: float, until: float) -> list[Held]:
        if now >= self._adopts_from:
            return await self._desk.store.adopt(self._desk.owner, now, until, self._desk.slots)
        await self._desk.store.identity()  # raises as long as the store is out of reach
        return []

    def _mind_sessions(self) -> None:
        now = self._clock()
        for conversation_id, lease in list(self._desk.leases.items()):
            if conversation_id not in self._busy and not self._desk.in_use(conversation_id):
                errand = self._errand(conversation_id, lease, now)
                if errand is not None:
                    self._start(conversation_id, errand)

    def _errand(self, conversation_id: str, lease: Lease, now: float) -> Coroutine[Any, Any, None] | None:
        """What the session needs now."""
        held, served = lease.held, self._is_served(conversation_id)
        if held.state is HeldState.ENDING:
            assert held.reason is not None
            return self._end(conversation_id, lease, held.reason) if lease.orphan else None
        if now - held.last_used >= self._idle_s and not served:
            return self._end(conversation_id, lease, EndReason.IDLE, now - self._idle_s)
        session = held.session
        if session.renew_at is not None and session.expires_at is not None and now >= session.renew_at and not served:
            if now >= session.expires_at - EXPIRY_MARGIN_S:
                return self._end(conversation_id, lease, EndReason.REPLACED)
            return self._renew(conversation_id)
        # Spread, so that sessions opened together are not kept alive together for ever; the look may come a tick late.
        wait_s = self._keep_alive_s * random.uniform(0.9, 0.95)  # noqa: S311 - it spreads, and guards nothing
        if now >= lease.not_before and now - lease.last_success >= wait_s:
            return self._keep_alive(conversation_id, lease)
        return None

    def _start(self, conversation_id: str, errand: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(errand)
        self._busy[conversation_id] = task

        def end(_: asyncio.Task[None]) -> None:
            del self._busy[conversation_id]
            if not task.cancelled() and (error := task.exception()):
                _log.error(logs.STORE_FAILED, conversation_id=conversation_id, error=str(error))

        task.add_done_callback(end)

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
            if result.kind is CallKind.GONE and await self._desk.lose(conversation_id):
                self._tell_end(conversation_id, lease, EndReason.LOST)

    async def _end(
        self, conversation_id: str, lease: Lease, reason: EndReason, unused_since: float | None = None
    ) -> None:
        """The row says so first: whoever takes the conversation over from here on opens a session of its own."""
        async with self._desk.line(conversation_id):
            if self._desk.leases.get(conversation_id) is not lease:
                return
            if self._is_served(conversation_id) and not lease.orphan and reason is not EndReason.SHUTDOWN:
                return
            if not await self._desk.retire(conversation_id, reason, unused_since):
                if unused_since is not None:  # used by then
                    self._desk.use(conversation_id, called=False)
                return
            result = CallResult(CallKind.UNKNOWN)
            for _ in range(END_ATTEMPTS):
                result = await self._desk.api.end(lease.held.session)
                if result.kind not in (CallKind.NOT_TAKEN, CallKind.UNKNOWN):
                    break
            await self._desk.drop(conversation_id, ghost=result.kind in (CallKind.NOT_TAKEN, CallKind.UNKNOWN))
            # Whoever asked for it is told by the command, which comes again.
            if reason is not EndReason.REQUESTED:
                self._tell_end(conversation_id, lease, reason)

    async def end_all(self) -> None:
        """The worker stops, and its sessions with it."""
        busy = list(self._busy.values())
        for task in busy:
            task.cancel()
        await asyncio.gather(*busy, return_exceptions=True)
        leases = list(self._desk.leases.items())
        ends = (self._end(key, lease, lease.held.reason or EndReason.SHUTDOWN) for key, lease in leases)
        for ended in await asyncio.gather(*ends, return_exceptions=True):
            if isinstance(ended, Exception):
                _log.error(logs.STORE_FAILED, error=str(ended))

    def _tell_end(self, conversation_id: str, lease: Lease, reason: EndReason) -> None:
        _log.info(logs.SESSION_ENDED, conversation_id=conversation_id, reason=str(reason))
        self._submit([verdict.session_ended(conversation_id, lease.held.session, reason)])


def _claims(conversation_ids: Iterable[str]) -> dict[str, Held]:
    """What is not a session yet."""
    return {key: Held(key, Session("", ""), 0.0) for key in conversation_ids}
