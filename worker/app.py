"""The composition root: settings → adapters → flow, in one stack.

`run` reads as the order of starting; `_stop`, and the stack unwinding behind it, as the order of stopping.
"""

import asyncio
import gc
import signal
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Self

import structlog

from worker.amqp.dead import DeadQueue
from worker.amqp.inbox import Demand, Inbox
from worker.amqp.limit import Limit
from worker.amqp.link import Link, where
from worker.amqp.management import Management, demand_harmless_policies
from worker.amqp.outbox import Outbox
from worker.amqp.topology import Record
from worker.amqp.watchdog import Watchdog
from worker.avatar.client import Api, AvatarClient
from worker.avatar.credentials import FixedKs, KsFile, KsSource, MintedKs
from worker.avatar.ks_service import Account, AdminSecret, AppToken, KsService
from worker.flow.backlog import Backlog
from worker.flow.clock import SteadyClock
from worker.flow.dead_letters import DeadLetters
from worker.flow.desk import Desk
from worker.flow.keeper import Keeper
from worker.flow.lanes import Lanes
from worker.flow.settler import Settler
from worker.ops import logs
from worker.ops.health import Health
from worker.ops.metrics import Metrics
from worker.ports import Clock, Ledger, SessionStore, Slots
from worker.settings import Settings
from worker.stores.backlog import SqlBacklog
from worker.stores.database import Database
from worker.stores.ledger import SqlLedger
from worker.stores.sessions import SqlSessions

PRUNE_S = 60.0

_log = structlog.stdlib.get_logger(__name__)


async def run(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT; a second one stops at once.

    Raises:
        ConfigurationError: the settings do not fit this machine or this broker.
        LinkSilent: the broker is there, and passes nothing on.
    """
    signals: asyncio.Queue[signal.Signals] = asyncio.Queue()
    for one in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(one, signals.put_nowait, one)
    clock = SteadyClock()
    name, metrics = settings.worker_name, Metrics()
    async with AsyncExitStack() as stack:
        ks = await stack.enter_async_context(credentials(settings, clock))
        database = await Database.open(settings.store_url)
        stack.push_async_callback(database.close)
        database.on_failure = metrics.store_failures.inc
        store, ledger = SqlSessions(database), SqlLedger(database, clock)
        api = await stack.enter_async_context(AvatarClient(api_of(settings), ks, metrics))
        outbox = Outbox(
            source=settings.event_source,
            worker=name,
            event_retry_s=settings.event_retry_s,
            clock=clock,
            metrics=metrics,
        )
        settler = Settler(outbox, metrics)
        slots = Slots(settings.avatar_max_sessions, settings.session_ghost_s)
        desk = Desk(api, store, name, clock, slots)
        stack.push_async_callback(_release, store, name)
        backlog = Backlog(SqlBacklog(database), window=settings.prefetch)
        lanes = Lanes(
            settings.rules,
            desk=desk,
            ledger=ledger,
            backlog=backlog,
            settler=settler,
            mark=outbox.mark,
            clock=clock,
            metrics=metrics,
        )
        keeper = Keeper(
            desk,
            clock,
            keep_alive_s=settings.keep_alive_s,
            idle_s=settings.session_idle_s,
            is_served=lanes.is_served,
            is_holding=lambda: lanes.is_holding,
            submit=settler.submit,
            renew=lanes.renew,
        )
        wanted = Record(settings.partitions, await store.identity(), settings.prefetch)
        inbox = Inbox(
            lanes,
            ledger.raise_epoch,
            outbox.announce,
            wanted=wanted,
            worker=name,
            clock=clock,
            metrics=metrics,
            demand=_harmless_policies(settings),
        )
        lanes.tenure_of = inbox.tenure_of
        _read(metrics, lanes, backlog, desk, inbox)
        dead = DeadQueue(DeadLetters(ledger=ledger, settler=settler, clock=clock).take, clock)
        watchdog = Watchdog()
        checks = {
            "consuming": inbox.ready.is_set,
            "publishing": outbox.ready.is_set,
            "passing": watchdog.ready.is_set,
            "authorized": lambda: ks.ready,
        }
        health = await stack.enter_async_context(Health(settings.ops_host, settings.ops_port, checks, metrics))
        url = settings.amqp_url.get_secret_value()
        _log.info(logs.WORKER_STARTING, worker=name, broker=where(url), partitions=settings.partitions)
        tasks = await stack.enter_async_context(
            _Background(
                Link(url, name=f"{name} publish", heartbeat_s=settings.heartbeat_s).run(
                    watchdog.publishing(outbox.session)
                ),
                Link(url, name=f"{name} consume", heartbeat_s=settings.heartbeat_s).run(
                    watchdog.consuming(inbox.session)
                ),
                Link(url, name=f"{name} interrupts", heartbeat_s=settings.heartbeat_s).run(inbox.express.session),
                Link(url, name=f"{name} dead letters", heartbeat_s=settings.heartbeat_s).run(dead.session),
                watchdog.run(),
                keeper.run(),
                lanes.run(outbox.knock),
                _prune(ledger, clock, settings.ledger_keep_s),
            )
        )
        _stay_responsive()
        await tasks.until(signals.get())
        health.stopping = True
        dead.stop()
        ending = keeper.end_all if settings.session_on_stop == "end" else None
        await _stop(lanes, inbox, signals, settings.drain_timeout_s, ending)
    _log.info(logs.WORKER_STOPPED, worker=name)


def _harmless_policies(settings: Settings) -> Demand:
    """What the broker's policies must not do, looked at whenever it is reached; without its API, tried out at first."""
    management = Management.of(settings.management_url, settings.amqp_url)
    tried = False

    async def demand() -> None:
        nonlocal tried
        if management is not None:
            await demand_harmless_policies(management, settings.partitions)
        elif not tried:
            await Limit(settings.amqp_url.get_secret_value(), settings.heartbeat_s).demand_none()
            tried = True

    return demand


def _stay_responsive() -> None:
    """Keep what else runs in this process from stopping the loop for long.

    Python's garbage collector does, for as long as there is much to look through: half a second where 20,000 commands
    wait. Hardly anything here is garbage that only a full collection finds. And so do the store's threads: whenever the
    loop touches a socket, one of them may take the interpreter, and would keep it for 5 ms.
    """
    gc.freeze()
    gc.set_threshold(5_000, 100, 100)
    sys.setswitchinterval(0.0005)


def _read(metrics: Metrics, lanes: Lanes, backlog: Backlog, desk: Desk, inbox: Inbox) -> None:
    """Where the gauges are read."""
    metrics.in_hand.set_function(lambda: lanes.in_hand)
    metrics.kept.set_function(lambda: backlog.in_hand)
    metrics.conversations.set_function(lambda: lanes.conversations)
    metrics.breaker_open.set_function(lambda: lanes.is_holding)
    metrics.sessions.set_function(lambda: len(desk.leases))
    metrics.partitions.set_function(lambda: inbox.owned)


async def _release(store: SessionStore, owner: str) -> None:
    """Let go of the sessions; where the store is out of reach, their leases run out."""
    try:
        await store.release(owner)
    except Exception as error:  # noqa: BLE001 - the worker stops all the same
        _log.error(logs.STORE_FAILED, error=str(error))


async def _prune(ledger: Ledger, clock: Clock, keep_s: float) -> None:
    """Forget, now and then, what is older than anybody may rely on."""
    while True:
        await ledger.prune(clock() - keep_s)
        await asyncio.sleep(PRUNE_S)


async def _stop(
    lanes: Lanes,
    inbox: Inbox,
    signals: "asyncio.Queue[signal.Signals]",
    timeout_s: float,
    ending: Callable[[], Coroutine[Any, Any, None]] | None,
) -> None:
    """Nothing new is begun; what is under way ends, is told and acknowledged, until the deadline or a second signal."""
    _log.info(logs.WORKER_STOPPING, drain_timeout_s=timeout_s)
    draining = asyncio.create_task(_drain(lanes, inbox, ending))
    impatient = asyncio.create_task(signals.get())
    await asyncio.wait({draining, impatient}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    impatient.cancel()
    if not draining.done():
        draining.cancel()
        await lanes.abandon()
    inbox.gate()


async def _drain(lanes: Lanes, inbox: Inbox, ending: Callable[[], Coroutine[Any, Any, None]] | None) -> None:
    await asyncio.gather(lanes.stop(ending), inbox.leave())


@asynccontextmanager
async def credentials(settings: Settings, clock: Clock) -> AsyncIterator[KsSource]:
    """Where the Kaltura Session comes from; what is stored goes before what is asked for.

    Raises:
        ConfigurationError: the file with it cannot be read.
    """
    if settings.avatar_ks_file is not None:
        yield KsFile(settings.avatar_ks_file)
    elif settings.avatar_ks is not None:
        yield FixedKs(settings.avatar_ks)
    else:
        async with KsService(_account(settings)) as service:
            ks = MintedKs(service.mint, clock)
            async with _Background(ks.run()):
                yield ks


def _account(settings: Settings) -> Account:
    assert settings.kaltura_partner_id is not None
    by: AppToken | AdminSecret
    if settings.kaltura_app_token is not None:
        assert settings.kaltura_app_token_id is not None
        token = settings.kaltura_app_token.get_secret_value()
        by = AppToken(settings.kaltura_app_token_id, token, settings.kaltura_app_token_hash)
    else:
        assert settings.kaltura_admin_secret is not None
        by = AdminSecret(settings.kaltura_admin_secret.get_secret_value(), settings.kaltura_ks_privileges)
    return Account(
        settings.kaltura_service_url,
        settings.kaltura_partner_id,
        by,
        expiry_s=settings.kaltura_ks_expiry_s,
        timeout_s=settings.avatar_timeout_s,
    )


def api_of(settings: Settings) -> Api:
    """Where the Avatar API is, and its forms."""
    return Api(
        base_url=settings.avatar_base_url,
        create_path=settings.avatar_create_path,
        avatar_field=settings.avatar_id_field,
        create_extra=settings.avatar_create_extra,
        timeout_s=settings.avatar_timeout_s,
        create_timeout_s=settings.avatar_create_timeout_s,
        interrupt_timeout_s=settings.interrupt_timeout_s,
    )


class _Background:
    """Tasks that run for as long as the worker does; cancelled, and waited for, at the end."""

    def __init__(self, *work: Coroutine[Any, Any, None]) -> None:
        self._work = work
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        self._tasks = [asyncio.create_task(one) for one in self._work]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def until(self, event: Coroutine[Any, Any, Any]) -> None:
        """Wait for the event. Raises what ends one of the tasks before: none of them should end."""
        awaited = asyncio.create_task(event)
        try:
            done, _ = await asyncio.wait({awaited, *self._tasks}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            awaited.cancel()
        for task in done - {awaited}:
            task.result()
            raise RuntimeError("a part of the worker ended by itself")
