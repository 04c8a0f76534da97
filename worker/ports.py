"""What the flow needs from the world, as Protocols. Each docstring is the contract that its adapters are tested by."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

from schemas.events import EndReason, Event
from worker.core.memory import Changes, Ended, Memory
from worker.core.model import CallResult, Entry, Misfit, Piece, ReplyTo, Session, Viewer
from worker.core.verdict import Parked
from worker.core.work import Open


class Tenure(Protocol):
    """One ownership of a partition by this worker: one channel's life."""

    @property
    def partition(self) -> int:
        """The partition's number."""

    async def epoch(self) -> int:
        """The number of this ownership; it is raised once, when the channel is sure to be the partition's."""

    def refused(self) -> None:
        """The ledger knows a newer epoch: the partition belongs to another worker. Give it up and join again."""

    def unpack(self, key: str, packed: str, remove: Callable[[], None]) -> Entry | Misfit:
        """A command that `KeepableDelivery.pack` packed, as if delivered now; settling it calls `remove`."""


class Delivery(Protocol):
    """The broker's side of one command."""

    @property
    def tenure(self) -> Tenure:
        """The ownership it was delivered under."""

    async def settle(self) -> bool:
        """Acknowledge, once. False: the channel it came through is gone, and the broker will deliver it again."""


class KeepableDelivery(Delivery, Protocol):
    """A delivery that the store can keep in the broker's stead."""

    @property
    def received(self) -> float:
        """When the command came first, in epoch seconds."""

    @property
    def settled(self) -> bool:
        """Whether nothing is left to do about it."""

    def pack(self) -> str:
        """All that is needed to have it again."""

    async def move(self, remove: Callable[[], None]) -> None:
        """The store has it, and the broker is told so; settling it calls `remove`, now if it was settled already."""


@dataclass(frozen=True, slots=True)
class Kept:
    """A command that the store keeps. `key` is its row's, `entry_key` the name it goes by (`Entry.key`)."""

    key: str
    entry_key: str
    packed: str


class Clock(Protocol):
    """Epoch seconds that never jump."""

    def __call__(self) -> float:
        """Now."""


class AvatarApi(Protocol):
    """The Avatar API, one attempt and one time-out a call. Never raises for what the API or the network does."""

    async def create(self, wanted: Open) -> tuple[CallResult, Session | None]:
        """Create a session; there is one exactly if the result is OK."""

    async def say(self, session: Session, piece: Piece, still: Callable[[], bool] = lambda: True) -> CallResult:
        """Hand over a piece, unless it is not to be said any more: asked when nothing can come in between."""

    async def interrupt(self, session: Session) -> CallResult:
        """Stop what is being spoken."""

    async def keep_alive(self, session: Session) -> CallResult:
        """Tell the API that the session is still wanted."""

    async def init_client(self, session: Session) -> tuple[CallResult, Viewer | None]:
        """What a viewer needs; the API allows this once a session."""

    async def end(self, session: Session) -> CallResult:
        """End the session."""


class Outbox(Protocol):
    """What leaves for the broker. Every method returns when the broker has confirmed, and outlives its outages."""

    async def tell(self, event: Event) -> None:
        """Publish a status event. One that a listener's full queue refuses for too long is counted and let go."""

    async def park(self, delivery: Delivery, parked: Parked) -> None:
        """Keep a copy of a command that was given up, without its token, with the reason in headers."""

    async def mark(self, conversation_id: str, old: int, new: int) -> bool:
        """Send a marker of a moved conversation behind all there is in its old partition. False: that one is gone."""

    async def answer(self, reply_to: ReplyTo, payload: Mapping[str, Any]) -> None:
        """Answer whoever asked, once; nobody waiting is normal."""


class HeldState(StrEnum):
    """How far a session in the store has come."""

    READY = "ready"
    ENDING = "ending"
    """The API's end is about to be called, or was: nothing may be said any more."""
    LOST = "lost"
    """The API does not know it any more; kept to have another of its kind."""


@dataclass(frozen=True, slots=True)
class Held:
    """A session in the store. `last_used` is when a command last used it, in epoch seconds; `reason`: why it ends."""

    conversation_id: str
    session: Session
    last_used: float
    state: HeldState = HeldState.READY
    reason: EndReason | None = None


class Refusal(StrEnum):
    """Why a session may not be created now."""

    BUSY = "busy"
    """Another worker is creating or ending one of this conversation."""
    FULL = "full"
    """There are as many as there may be; the conversation stands in line."""
    QUEUED = "queued"
    """The conversation stands in line: behind one the API had no room for, or since the API is not to be asked now."""


@dataclass(frozen=True, slots=True)
class Slots:
    """How many sessions the fleet may have at once, 0: any number; times in seconds.

    One that may exist although nobody knows it counts for `ghost_s`. Whoever stands in line and does not ask again
    within `patience_s` has left it.
    """

    limit: int = 0
    ghost_s: float = 60.0
    patience_s: float = 2.0


class SessionStore(Protocol):
    """Who has which session, kept over restarts and shared by all workers.

    A session is *held* by one worker at a time, under a lease it renews; whoever serves the conversation takes it, and
    any worker adopts one whose lease has run out. Times are epoch seconds.

        (waiting) → creating → ready → ending → (gone)
                        │         └──→ lost
                        └→ a ghost, if its worker died or the answer was lost
    """

    async def identity(self) -> str:
        """An id made with the store, to tell whether workers share one; `memory` for any store in memory."""

    async def take(self, conversation_id: str, owner: str, until: float) -> Held | None:
        """The conversation's session, if there is one; it is held by `owner` from now on, whoever held it before."""

    async def claim(
        self, conversation_id: str, owner: str, now: float, until: float, slots: Slots, *, paused: bool = False
    ) -> Held | Refusal | None:
        """Before a session is created: None, `owner` may, and nobody else. Or the one that somebody has made.

        It may when a slot is free that nobody in front waits for, and nobody is in front whom the API had no room for.
        `paused`: it may not; it only takes its place in the line.
        """

    async def unclaim(
        self, conversation_id: str, owner: str, now: float, slots: Slots, *, ghost: bool, full: bool = False
    ) -> None:
        """It was not created, or nobody knows (`ghost`). The conversation keeps its place in the line for a while.

        `full`: the API has no room. Whoever comes later waits until this one has a session or has left the line.
        """

    async def pardon(self, owner: str) -> None:
        """That the API had no room for conversations of this worker holds nobody up any more: it cannot ask again."""

    async def leave(self, conversation_id: str, owner: str) -> None:
        """Give up the conversation's place in the line."""

    async def put(self, held: Held, owner: str, until: float) -> bool:
        """Keep a session, in place of another of its conversation that `owner` holds, or nobody.

        False, and nothing is changed: another worker was faster. One that is attached takes the place of any. After one
        that was created, a few of those who wait for room may ask for it, too.
        """

    async def renew(self, held: Mapping[str, Held], owner: str, until: float) -> set[str]:
        """Extend leases and note last uses, by conversation id; returns those that `owner` does not hold any more.

        A session that is being created, or stands in line to be, has no id yet.
        """

    async def adopt(self, owner: str, now: float, until: float, slots: Slots) -> list[Held]:
        """Hold every session whose lease has run out; returns them. What was being created then is a ghost."""

    async def retire(self, held: Held, owner: str, reason: EndReason, unused_since: float | None = None) -> bool:
        """From ready to ending. False, and nothing is changed: `owner` does not hold it, or it is another one by now.

        Or it has been used after `unused_since`: no call that was intended meanwhile meets a session that ends.
        """

    async def lose(self, held: Held, owner: str, ghost_until: float | None = None) -> bool:
        """The API does not know it any more, or not its token; False as for `retire`. `ghost_until` as for `remove`."""

    async def remove(self, held: Held, owner: str, ghost_until: float | None = None) -> bool:
        """Forget the session; False as for `retire`. It may live on until then if nobody knows whether it ended."""

    async def release(self, owner: str) -> None:
        """Let go of all that `owner` holds: anybody may adopt it at once."""


class Grant(StrEnum):
    """Whether something was written."""

    GRANTED = "granted"
    OUTDATED = "outdated"
    """Somebody else has written about the conversation, or its session has ended: look again."""
    REFUSED = "refused"
    """The partition has another owner."""


class Ledger(Protocol):
    """What every conversation remembers, kept over restarts and shared by all workers.

    Writes take effect in the order in which the methods were called, whenever they are awaited, and wait out an outage
    of the store.
    """

    async def recall(self, conversation_id: str) -> Memory:
        """What is known of the conversation, after all writes asked for here; not how its commands ended."""

    async def partition_of(self, conversation_id: str) -> int | None:
        """Where the conversation's commands came from last."""

    async def unclosed(self, before: float) -> list[tuple[int, str]]:
        """The conversations with an open turn that was last touched before that time, in epoch seconds.

        With the partition they come from, where it is known.
        """

    async def known(self, conversation_id: str, message_ids: Sequence[str]) -> dict[str, Ended]:
        """Which of these commands have ended, and how."""

    def intend(
        self, conversation_id: str, changes: Changes | None, partition: int, epoch: int, session_id: str | None = None
    ) -> Awaitable[Grant]:
        """Write before a call is made, if the partition is still owned and nobody else has written meanwhile.

        A call on a session demands that it be ready, too.
        """

    def record(self, conversation_id: str, changes: Changes, *, outcome: bool) -> Awaitable[Grant]:
        """Write what has happened; if that is not granted, nothing is written, and what happens is another's to say.

        The `outcome` of an attempt is a fact, and is written whoever owns the partition, as long as nobody has tried
        again or decided without it; what others have written meanwhile stands (`core.outcome`). Anything else is
        written only if nobody else has written meanwhile.
        """

    async def end(self, entry: Entry, ended: Ended) -> Ended:
        """A command has ended beside its lane: note it, and its turn as failed, unless it has ended before.

        Returns what stands, see `core.undelivered.note`.
        """

    async def raise_epoch(self, partition: int) -> int:
        """Begin a new ownership of the partition; all before it may intend nothing any more."""

    async def prune(self, before: float) -> None:
        """Forget what was last touched before that time, in epoch seconds, a batch at a time."""


class BacklogStore(Protocol):
    """The durable inbox: commands that the store keeps in the broker's stead, shared by all workers.

    Writes take effect in the order in which the methods were called, and wait out an outage of the store.
    """

    def keep(self, conversation_id: str, commands: Sequence[Kept], partition: int, epoch: int) -> Awaitable[Grant]:
        """Keep commands behind those kept before, if the partition is still owned: all of them or none."""

    def let_go(self, key: str) -> asyncio.Future[None]:
        """A command that was kept is settled: it is removed, soon, also if nobody waits for that."""

    async def kept(self, conversation_id: str, partition: int) -> list[Kept]:
        """The commands that are kept of the conversation and came from that partition, in order."""

    async def conversations(self) -> list[tuple[int, str]]:
        """The conversations of which commands are kept, with the partition they came from."""
