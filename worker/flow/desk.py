"""The desk where calls on avatar sessions are made, for the lanes and for the keeper.

One call at a time per conversation: whoever calls takes the conversation's *line* first. What is in `held` is ours by
lease; the store has it too, and catches up at the next renewal if it was out of reach.

A session is created only after its row was claimed, and ended only after its row says so: whatever happens in between,
some worker finds the row, and what may exist without anybody knowing it keeps its slot for a while (a *ghost*).
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace

import structlog

from schemas.events import EndReason
from worker.core.model import TOO_LATE, CallKind, CallResult, Session, Viewer
from worker.core.work import Attach, Call, CallInterrupt, Close, InitClient, Open, Say
from worker.ops import logs
from worker.ports import AvatarApi, Clock, Held, HeldState, Refusal, SessionStore, Slots

_log = structlog.stdlib.get_logger(__name__)

LEASE_S = 6.0
"""A worker silent for so long has lost its sessions to whoever adopts them. With a keep-alive that was due just then,
the API hears nothing for 18 s."""

DEFAULT_SLOTS = Slots()

CLAIMS_PER_S = 50
"""How often all that stand in line here may ask for a slot, roughly: the further behind, the more seldom."""

AGAIN_S = 0.5
"""How soon to ask again for a slot, or whether another worker is done with the conversation's session."""

_BUSY = CallResult(
    CallKind.NOT_TAKEN,
    retry_after_s=AGAIN_S,
    error="another worker has the conversation's session in hand",
    local=True,
)
_QUEUED = CallResult(
    CallKind.FULL, 429, error="the Avatar API has no room or wants a pause: who asked first goes first", local=True
)
_ENDS_SESSION = (CallKind.OK, CallKind.GONE, CallKind.REFUSED, CallKind.DENIED)


@dataclass(slots=True)
class Lease:
    """A session held by this worker: `last_success` of a call, `until` when the lease runs, `noted` by the store.

    `not_before`: no keep-alive until then, says the API. `orphan`: whoever was about to end it did not come to it.
    """

    held: Held
    last_success: float
    until: float
    noted: bool = True
    not_before: float = 0.0
    orphan: bool = False


class Desk:
    """Makes the calls that lanes ask for, and knows the sessions this worker holds."""

    def __init__(
        self, api: AvatarApi, store: SessionStore, owner: str, clock: Clock, slots: Slots = DEFAULT_SLOTS
    ) -> None:
        self.api = api
        self.store = store
        self.owner = owner
        self.slots = slots
        self.leases: dict[str, Lease] = {}
        self.creating: set[str] = set()
        self.in_line: dict[str, None] = {}
        """In order of arrival."""
        self._clock = clock
        self._lines: dict[str, asyncio.Lock] = {}
        self._users: Counter[str] = Counter()

    async def recall(self, conversation_id: str) -> tuple[Session | None, Session | None]:
        """The session of a conversation this worker begins to serve, ours from now on; or one that was lost."""
        known = self.leases.get(conversation_id)
        if known is not None and not known.noted:
            if await self.note(known):
                return known.held.session, None
            known = None
        held = await self.store.take(conversation_id, self.owner, self._clock() + LEASE_S)
        if held is None or held.state is HeldState.LOST:
            self.leases.pop(conversation_id, None)
            return None, held.session if held else None
        lease = self.hold(held, last_success=known.last_success if known else 0.0)
        if held.state is HeldState.ENDING:
            lease.orphan = True
            return None, None
        lease.held = replace(held, last_used=self._clock())
        return held.session, None

    async def carry_out(
        self, conversation_id: str, call: Call, still: Callable[[], bool]
    ) -> tuple[CallResult, Session | Viewer | None]:
        """Make one call when the line is free, if it is `still` wanted then; returns what came of it."""
        async with self.line(conversation_id):
            if not still():
                return TOO_LATE, None
            try:
                result, got = await self._call(conversation_id, call, still)
            except Exception as error:  # noqa: BLE001 - a bug of ours is no reason to forget that something was sent
                result, got = CallResult(CallKind.UNKNOWN, error=type(error).__name__), None
                _log.exception(logs.CALL_FAILED, conversation_id=conversation_id, call=type(call).__name__)
        if result.kind is CallKind.OK:
            self.use(conversation_id)
        elif result.kind not in (CallKind.STALE, CallKind.FULL):
            level = "warning" if result.kind in (CallKind.NOT_TAKEN, CallKind.UNKNOWN) else "error"
            getattr(_log, level)(
                logs.CALL_FAILED,
                conversation_id=conversation_id,
                call=type(call).__name__,
                outcome=str(result.kind),
                status=result.status,
                error=result.error,
            )
        return result, got

    async def interrupt(self, conversation_id: str) -> CallResult:
        """Tell the API at once, whoever holds the line: it is harmless, and late it is useless."""
        try:
            lease = await self._lease(conversation_id)
        except Exception as error:  # noqa: BLE001 - whose session it is the store cannot tell now
            _log.error(logs.STORE_FAILED, conversation_id=conversation_id, error=str(error))
            lease = None
        if lease is None:
            return CallResult(CallKind.STALE)
        session_id = lease.held.session.session_id
        try:
            result = await self.api.interrupt(lease.held.session)
        except Exception as error:  # noqa: BLE001 - a bug of ours must not leave the lane waiting for an answer
            result = CallResult(CallKind.UNKNOWN, error=type(error).__name__)
            _log.exception(logs.CALL_FAILED, conversation_id=conversation_id, call=CallInterrupt.__name__)
        if result.kind is CallKind.GONE:
            lease = self.leases.get(conversation_id)
            if lease is None or lease.held.session.session_id != session_id:
                return CallResult(CallKind.STALE)
            await self.lose(conversation_id)
        return result

    async def _call(
        self, conversation_id: str, call: Call, still: Callable[[], bool]
    ) -> tuple[CallResult, Session | Viewer | None]:
        match call:
            case Open():
                return await self._create(conversation_id, call)
            case Attach():
                await self.keep(conversation_id, call.session)
                return CallResult(CallKind.OK, local=True), call.session
            case _:
                lease = await self._lease(conversation_id)
                if lease is None:
                    return CallResult(CallKind.STALE), None
                result, viewer = await self._call_on(conversation_id, lease.held.session, call, still)
                if result.kind is CallKind.GONE and not isinstance(call, Close):
                    await self.lose(conversation_id)
                return result, viewer

    async def _lease(self, conversation_id: str) -> Lease | None:
        """The conversation's session, taken back if another worker adopted it while this one was too slow to renew."""
        if conversation_id not in self.leases:
            await self.recall(conversation_id)
        return self.leases.get(conversation_id)

    async def _create(self, conversation_id: str, call: Open) -> tuple[CallResult, Session | None]:
        """Claim, create, keep. Whoever is cut in between leaves a claim, which becomes a ghost."""
        now = self._clock()
        try:
            found = await self.store.claim(
                conversation_id, self.owner, now, now + LEASE_S, self.slots, paused=call.not_before > now
            )
        except Exception as failure:  # noqa: BLE001 - without a claim nothing is created, and nothing was
            return CallResult(CallKind.NOT_TAKEN, error=f"the store: {type(failure).__name__}", local=True), None
        self.in_line.setdefault(conversation_id)
        match found:
            case Held():
                del self.in_line[conversation_id]
                self.hold(found, last_success=0.0)
                return CallResult(CallKind.OK, local=True), found.session
            case Refusal.FULL:
                error = f"all {self.slots.limit} sessions are in use (AVATAR_MAX_SESSIONS)"
                return CallResult(
                    CallKind.FULL, retry_after_s=self._again_s(conversation_id), error=error, local=True
                ), None
            case Refusal.QUEUED:
                return replace(_QUEUED, retry_after_s=self._again_s(conversation_id)), None
            case Refusal.BUSY:
                del self.in_line[conversation_id]
                return _BUSY, None
        self.creating.add(conversation_id)
        try:
            result, session = await self.api.create(call)
            if session is None:
                await self._unclaim(conversation_id, result)
                return result, None
            self.in_line.pop(conversation_id, None)
            if not await self.keep(conversation_id, session):
                return _BUSY, None
        finally:
            self.creating.discard(conversation_id)
        return result, session

    def _again_s(self, conversation_id: str) -> float:
        place = next(place for place, other in enumerate(self.in_line) if other == conversation_id)
        return max(AGAIN_S, place / CLAIMS_PER_S)

    async def _unclaim(self, conversation_id: str, result: CallResult) -> None:
        """What may come to be yet keeps its place; what may exist already keeps a slot."""
        ghost = result.kind is CallKind.UNKNOWN
        try:
            now, full = self._clock(), result.is_full
            await self.store.unclaim(conversation_id, self.owner, now, self.slots, ghost=ghost, full=full)
        except Exception as error:  # noqa: BLE001 - the claim runs out by itself
            _log.error(logs.STORE_FAILED, conversation_id=conversation_id, error=str(error))

    async def leave_line(self, conversation_id: str) -> None:
        """The conversation needs no session any more: whoever stands behind it moves up."""
        if conversation_id in self.in_line:
            del self.in_line[conversation_id]
            try:
                await self.store.leave(conversation_id, self.owner)
            except Exception as error:  # noqa: BLE001 - the place lapses by itself
                _log.error(logs.STORE_FAILED, conversation_id=conversation_id, error=str(error))

    async def _call_on(
        self,
        conversation_id: str,
        session: Session,
        call: Say | CallInterrupt | InitClient | Close,
        still: Callable[[], bool],
    ) -> tuple[CallResult, Viewer | None]:
        match call:
            case Say():
                return await self.api.say(session, call.piece, still), None
            case CallInterrupt():
                return await self.api.interrupt(session), None
            case InitClient():
                result, viewer = await self.api.init_client(session)
                if viewer is not None:
                    await self.keep(conversation_id, replace(session, viewer=viewer))
                return result, viewer
            case Close():
                if not await self.retire(conversation_id, call.reason):
                    # Another worker may have adopted it, and this one not have noticed yet.
                    lease = await self._lease(conversation_id)
                    if lease is None or lease.held.session.session_id != session.session_id:
                        return CallResult(CallKind.STALE), None
                    if not await self.retire(conversation_id, call.reason):
                        return CallResult(CallKind.STALE), None
                result = await self.api.end(session)
                if result.kind in _ENDS_SESSION or call.last_attempt:
                    await self.drop(conversation_id, ghost=result.kind not in _ENDS_SESSION)
                return result, None

    # What is held.

    async def keep(self, conversation_id: str, session: Session) -> bool:
        """Hold a session, new or changed; False as for `note`. The next renewal notes what the store could not."""
        now = self._clock()
        lease = self.hold(Held(conversation_id, session, now), last_success=now)
        try:
            return await self.note(lease)
        except Exception as error:  # noqa: BLE001 - the store's trouble must not cost a session that exists
            lease.noted = False
            _log.error(logs.STORE_FAILED, conversation_id=conversation_id, error=str(error))
            return True

    async def note(self, lease: Lease) -> bool:
        """Have the store know the session.

        False: this worker was out of touch for so long that another one has given the conversation a session. This one
        is of no use to anybody any more.
        """
        conversation_id = lease.held.conversation_id
        lease.noted = await self.store.put(lease.held, self.owner, self._clock() + LEASE_S)
        if not lease.noted:
            if self.leases.get(conversation_id) is lease:
                del self.leases[conversation_id]
            await self.api.end(lease.held.session)
        return lease.noted

    async def retire(self, conversation_id: str, reason: EndReason, unused_since: float | None = None) -> bool:
        """From now on nothing is said on the session. False: it is not ours any more, or was used after that time."""
        lease = self.leases[conversation_id]
        if lease.held.state is HeldState.READY:
            if not await self.store.retire(lease.held, self.owner, reason, unused_since):
                if unused_since is None:
                    del self.leases[conversation_id]
                return False
            lease.held = replace(lease.held, state=HeldState.ENDING, reason=reason)
        return True

    async def lose(self, conversation_id: str) -> bool:
        """The API does not know the session any more. False: it was not ours any more."""
        lease = self.leases.get(conversation_id)
        if lease is None or lease.held.session.attached or lease.held.state is HeldState.ENDING:
            return await self.drop(conversation_id)
        del self.leases[conversation_id]
        return await self._noting(self.store.lose(lease.held, self.owner, self._ghost_until(lease)), conversation_id)

    async def drop(self, conversation_id: str, *, ghost: bool = False) -> bool:
        """Let go of a session that ends; a `ghost` may live on. False: it was not ours any more."""
        lease = self.leases.pop(conversation_id, None)
        if lease is None:
            return False
        until = self._ghost_until(lease, ghost=ghost)
        return await self._noting(self.store.remove(lease.held, self.owner, until), conversation_id)

    def _ghost_until(self, lease: Lease, *, ghost: bool = False) -> float | None:
        """How long a session may live on that nobody has any more: whose token has run out cannot be ended."""
        now, expires_at = self._clock(), lease.held.session.expires_at
        return now + self.slots.ghost_s if ghost or (expires_at is not None and now >= expires_at) else None

    async def _noting(self, change: Awaitable[bool], conversation_id: str) -> bool:
        try:
            return await change
        except Exception as error:  # noqa: BLE001 - a row too many is found out at its next use
            _log.error(logs.STORE_FAILED, conversation_id=conversation_id, error=str(error))
            return True

    def hold(self, held: Held, *, last_success: float) -> Lease:
        """Note a session as ours, as the store has it."""
        lease = self.leases[held.conversation_id] = Lease(held, last_success, self._clock() + LEASE_S)
        return lease

    def use(self, conversation_id: str, *, called: bool = True) -> None:
        """A command used the session: it is not idle, and after a call it needs no keep-alive for a while."""
        lease = self.leases.get(conversation_id)
        if lease is not None:
            now = self._clock()
            lease.held = replace(lease.held, last_used=now)
            lease.last_success = now if called else lease.last_success

    # One call at a time.

    @asynccontextmanager
    async def line(self, conversation_id: str) -> AsyncIterator[None]:
        """Held by whoever makes a call for the conversation."""
        lock = self._lines.setdefault(conversation_id, asyncio.Lock())
        self._users[conversation_id] += 1
        try:
            async with lock:
                yield
        finally:
            self._users[conversation_id] -= 1
            if not self._users[conversation_id]:
                del self._users[conversation_id], self._lines[conversation_id]

    def in_use(self, conversation_id: str) -> bool:
        """Whether somebody calls for the conversation, or waits to."""
        return conversation_id in self._lines
