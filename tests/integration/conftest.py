"""A worker in this process on a real broker: all of it is real but the Avatar API, the store's file and signals."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from aio_pika.abc import AbstractConnection

from tests.support.bus import Bus, connected, eventually
from worker.amqp.dead import DeadQueue
from worker.amqp.inbox import Inbox
from worker.amqp.link import Link
from worker.amqp.outbox import Outbox
from worker.amqp.topology import Record
from worker.core.model import CallKind, CallResult, Piece, Session, Viewer
from worker.core.work import Open, Rules
from worker.flow.backlog import Backlog
from worker.flow.clock import SteadyClock
from worker.flow.dead_letters import DeadLetters
from worker.flow.desk import Desk
from worker.flow.lanes import Lanes
from worker.flow.settler import Settler
from worker.ops.metrics import Metrics
from worker.stores.backlog import SqlBacklog
from worker.stores.database import Database
from worker.stores.ledger import SqlLedger
from worker.stores.sessions import SqlSessions

Session_ = Callable[[AbstractConnection], Awaitable[None]]
STORE = "the store"
OK = CallResult(CallKind.OK, 200)
REFUSED = CallResult(CallKind.REFUSED, 400, error="not that")


def agreed(partitions: int, store_id: str = STORE, prefetch: int = 200) -> Record:
    """What the workers of a test agree on."""
    return Record(partitions, store_id, prefetch)


@dataclass
class Avatar:
    """`ports.AvatarApi` that remembers what it takes: all but text it `refuses`.

    While `gate` is shut, a say hangs: all of them, or those of the turns in `hanging`.
    """

    said: list[Piece] = field(default_factory=list)
    refuses: set[str] = field(default_factory=set)
    hanging: set[str] = field(default_factory=set)
    gate: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.gate.set()

    async def create(self, wanted: Open) -> tuple[CallResult, Session | None]:
        return OK, Session("s", "t", wanted.avatar_id)

    async def say(self, _: Session, piece: Piece, __: object = None) -> CallResult:
        self.said.append(piece)
        if not self.hanging or piece.turn_id in self.hanging:
            await self.gate.wait()
        return REFUSED if any(text in piece.text for text in self.refuses) else OK

    async def interrupt(self, _: Session) -> CallResult:
        return OK

    async def keep_alive(self, _: Session) -> CallResult:
        return OK

    async def init_client(self, _: Session) -> tuple[CallResult, Viewer | None]:
        return OK, Viewer("https://whep", {})

    async def end(self, _: Session) -> CallResult:
        return OK


class Life:
    """Counts the connections that a session of a link has had."""

    def __init__(self, session: Session_) -> None:
        self.count = 0
        self._session = session

    async def __call__(self, connection: AbstractConnection) -> None:
        self.count += 1
        await self._session(connection)


@dataclass(frozen=True)
class Station:
    """A running worker. Its tasks end only with an error: nothing that happens to a connection may end them."""

    inbox: Inbox
    outbox: Outbox
    avatar: Avatar
    lanes: Lanes
    ledger: SqlLedger
    kept: SqlBacklog
    settler: Settler
    consuming: Life
    publishing: Life
    metrics: Metrics
    tasks: "tuple[asyncio.Task[None], ...]"

    async def ready(self) -> None:
        """Return when it consumes and publishes."""
        ready = asyncio.gather(self.inbox.ready.wait(), self.outbox.ready.wait())
        waiting: set[asyncio.Future[Any]] = {ready, *self.tasks}
        done, _ = await asyncio.wait(waiting, timeout=30, return_when=asyncio.FIRST_COMPLETED)
        if ready not in done:
            ready.cancel()
        for task in self.tasks:
            if task.done():
                task.result()
        assert ready in done, "not ready in 30 s"

    def lives(self) -> tuple[int, int]:
        """How many connections it has had for consuming and for publishing."""
        return self.consuming.count, self.publishing.count

    async def said(self, *texts: str) -> None:
        """Return once the avatar was handed exactly these texts."""
        await eventually(lambda: [piece.text for piece in self.avatar.said] == list(texts))

    async def settled(self) -> None:
        """Return when all that ended was told and acknowledged."""
        async with asyncio.timeout(20):
            await self.settler.drain()

    async def reconnected(self, lives: int = 2) -> None:
        """Return once it consumes over its so manieth connection."""
        await eventually(lambda: self.consuming.count >= lives)
        await self.ready()

    async def gone(self) -> None:
        """Drop everything, as if the process had been killed. What it had not acknowledged is in its queue again."""
        self.inbox.gate()
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        await self.lanes.abandon()


Start = Callable[..., AbstractAsyncContextManager[Station]]


@pytest.fixture
def start(amqp_url: str) -> Start:
    """How a test starts a worker of its own."""

    @asynccontextmanager
    async def start(
        *,
        url: str = amqp_url,
        publish_url: str | None = None,
        heartbeat_s: int = 10,
        name: str = "w1",
        partitions: int = 1,
        event_retry_s: float = 30.0,
        store_url: str = "sqlite://",
        dead: bool = False,
        prefetch: int = 200,
        avatar: Avatar | None = None,
        rules: Rules | None = None,
    ) -> AsyncIterator[Station]:
        clock, avatar = SteadyClock(), avatar or Avatar()
        database = await Database.open(store_url)
        store, ledger = SqlSessions(database), SqlLedger(database, clock)
        metrics = Metrics()
        outbox = Outbox(source="test", worker=name, event_retry_s=event_retry_s, clock=clock, metrics=metrics)
        settler = Settler(outbox, metrics)
        desk = Desk(avatar, store, name, clock)
        wanted = agreed(partitions, prefetch=prefetch)
        kept = SqlBacklog(database)
        lanes = Lanes(
            rules or Rules(default_avatar="a"),
            desk=desk,
            ledger=ledger,
            backlog=Backlog(kept, window=prefetch),
            settler=settler,
            mark=outbox.mark,
            clock=clock,
            metrics=metrics,
        )
        inbox = Inbox(
            lanes, ledger.raise_epoch, outbox.announce, wanted=wanted, worker=name, clock=clock, metrics=metrics
        )
        lanes.tenure_of = inbox.tenure_of
        consuming, publishing = Life(inbox.session), Life(outbox.session)
        links: list[tuple[str, Session_]] = [(url, consuming), (publish_url or url, publishing)]
        links.append((url, inbox.express.session))
        if dead:
            letters = DeadLetters(ledger=ledger, settler=settler, clock=clock)
            links.append((url, DeadQueue(letters.take, clock).session))
        tasks = tuple(
            asyncio.create_task(work)
            for work in (
                *(Link(where, name=name, heartbeat_s=heartbeat_s).run(life) for where, life in links),
                lanes.run(outbox.knock),
            )
        )
        station = Station(inbox, outbox, avatar, lanes, ledger, kept, settler, consuming, publishing, metrics, tasks)
        try:
            await station.ready()
            yield station
        finally:
            await station.gone()
            await database.close()

    return start


@pytest.fixture
async def station(start: Start) -> AsyncIterator[Station]:
    async with start() as station:
        yield station


@pytest.fixture
async def bus(amqp_url: str) -> AsyncIterator[Bus]:
    async with connected(amqp_url) as bus:
        await bus.listen()
        yield bus
