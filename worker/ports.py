"""What the flow needs from the world, as Protocols. Each docstring is the contract that its adapters are tested by."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from schemas.events import Event
from worker.core.model import CallResult, Piece, ReplyTo, Session, Viewer
from worker.core.verdict import Parked
from worker.core.work import Open


@runtime_checkable
class Delivery(Protocol):
    """The broker's side of one command. Deliveries of one connection's life share their `origin`."""

    @property
    def origin(self) -> object:
        """The connection's life it came through."""

    async def settle(self) -> bool:
        """Acknowledge, once. False: the channel it came through is gone, and the broker will deliver it again."""


class Clock(Protocol):
    """Epoch seconds that never jump."""

    def __call__(self) -> float:
        """Now."""


class AvatarApi(Protocol):
    """The Avatar API, one attempt and one time-out a call. Never raises for what the API or the network does."""

    async def create(self, wanted: Open) -> tuple[CallResult, Session | None]:
        """Create a session; there is one exactly if the result is OK."""

    async def say(self, session: Session, piece: Piece) -> CallResult:
        """Hand over a piece."""

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

    async def answer(self, reply_to: ReplyTo, payload: Mapping[str, Any]) -> None:
        """Answer whoever asked, once; nobody waiting is normal."""


@dataclass(frozen=True, slots=True)
class Held:
    """A session in the store. `last_used` is when a command last used it, in epoch seconds."""

    conversation_id: str
    session: Session
    last_used: float


class SessionStore(Protocol):
    """Who has which session, kept over restarts and shared by all workers.

    A session is *held* by one worker at a time, under a lease it renews; whoever serves the conversation takes it, and
    any worker adopts one whose lease has run out. Times are epoch seconds.
    """

    async def identity(self) -> str:
        """An id made with the store, to tell whether workers share one; `memory` for any store in memory."""

    async def take(self, conversation_id: str, owner: str, until: float) -> Held | None:
        """The conversation's session, if there is one; it is held by `owner` from now on, whoever held it before."""

    async def put(self, held: Held, owner: str, until: float) -> None:
        """Keep a session, in place of any other of its conversation."""

    async def renew(self, held: Mapping[str, Held], owner: str, until: float) -> set[str]:
        """Extend leases and note last uses, by conversation id; returns those that `owner` does not hold any more."""

    async def adopt(self, owner: str, now: float, until: float) -> list[Held]:
        """Hold every session whose lease has run out; returns them."""

    async def remove(self, held: Held, owner: str) -> bool:
        """Forget the session. False, and nothing is changed: `owner` does not hold it, or it is another one by now."""

    async def release(self, owner: str) -> None:
        """Let go of all that `owner` holds: anybody may adopt it at once."""

    async def close(self) -> None:
        """No call may follow."""
