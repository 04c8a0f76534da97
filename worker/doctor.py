"""`doctor`: looks at everything a worker needs, one line each, and says what to do. Changes nothing on the broker."""

import asyncio
import sys
from collections.abc import AsyncIterator
from urllib.parse import urlsplit

from worker import app, operate
from worker.amqp import inspection, link
from worker.amqp.limit import Limit
from worker.amqp.management import Management
from worker.amqp.topology import Record
from worker.avatar import rehearsal
from worker.avatar.client import AvatarClient
from worker.avatar.credentials import KsSource, NoKs
from worker.core.finding import Finding
from worker.core.work import Open
from worker.errors import ConfigurationError
from worker.flow.clock import SteadyClock
from worker.ops.logs import redacted
from worker.settings import Settings, TopologySettings, load

_QUESTION = (
    "This opens sessions of the avatar {avatar} at {url}, one after the other, at most seven, has it speak a sentence "
    "in two of them, and ends each at once. Go on? [y/N] "
)


async def run(*, live: bool, unasked: bool) -> int:
    """Print what is found; 1 if anything is wrong. `unasked`: take the answer to the question for a yes."""
    wrong = 0
    async for finding in _examine():
        wrong += operate.tell(finding)
    if live:
        async for finding in _rehearse(unasked=unasked):
            wrong += operate.tell(finding)
    return 1 if wrong else 0


async def _examine() -> AsyncIterator[Finding]:
    settings: Settings | None = None
    try:
        settings = load(Settings)
        yield Finding.ok("settings", "complete")
    except ConfigurationError as error:
        for line in str(error).splitlines()[1:]:
            yield Finding.wrong("settings", line)
    try:
        shared: TopologySettings = settings or load(TopologySettings)
    except ConfigurationError:
        return
    wanted: Record | None = None
    try:
        wanted = await operate.wanted_by(shared)
        yield Finding.ok("store", f"{_where(shared.store_url)} opens and takes writes")
    except ConfigurationError as error:
        yield Finding.wrong("store", str(error))
    async for finding in _broker(shared, wanted):
        yield finding
    if settings is not None:
        async for finding in _avatar(settings):
            yield finding


async def _broker(settings: TopologySettings, wanted: Record | None) -> AsyncIterator[Finding]:
    url = settings.amqp_url.get_secret_value()
    try:
        async with link.Connected(url, heartbeat_s=settings.heartbeat_s) as connection:
            yield Finding.ok("broker", f"answers at {link.where(url)}")
            yield await inspection.permissions(connection)
            if wanted is None:
                yield Finding.unchecked("topology", "not without the store")
                return
            management = Management.of(settings.management_url, settings.amqp_url)
            limit = Limit(settings.amqp_url.get_secret_value(), settings.heartbeat_s)
            for finding in await inspection.inspect(connection, wanted, management, limit):
                yield finding
    except ConfigurationError as error:
        yield Finding.wrong("broker", str(error))
    except link.LOSSES as error:
        yield Finding.wrong("broker", str(error))


async def _avatar(settings: Settings) -> AsyncIterator[Finding]:
    try:
        async with app.credentials(settings, SteadyClock()) as ks:
            await ks.current()
            yield Finding.ok("credentials", f"{_source(settings)}; whether it is accepted, `doctor --live` tells")
            async with AvatarClient(app.api_of(settings), ks) as client:
                yield await rehearsal.reach(client)
    except (ConfigurationError, NoKs) as error:
        yield Finding.wrong("credentials", str(error))


def _where(store_url: str) -> str:
    """The store without what may be a password: libpq takes one as a parameter, too."""
    parts = urlsplit(store_url)
    return store_url if parts.scheme == "sqlite" else f"{parts.netloc.rpartition('@')[2]}{parts.path}"


def _source(settings: Settings) -> str:
    if settings.avatar_ks_file is not None:
        return "AVATAR_KS_FILE holds a Kaltura Session"
    return "AVATAR_KS holds a Kaltura Session" if settings.avatar_ks else "the KS service made a Kaltura Session"


async def _rehearse(*, unasked: bool) -> AsyncIterator[Finding]:
    try:
        settings = load(Settings)
        async with app.credentials(settings, SteadyClock()) as ks:
            async for finding in _rehearse_with(settings, ks, unasked=unasked):
                yield finding
    except ConfigurationError:
        yield Finding.unchecked("live", "not before the settings and credentials are right")


async def _rehearse_with(settings: Settings, ks: KsSource, *, unasked: bool) -> AsyncIterator[Finding]:
    if settings.avatar_id is None:
        yield Finding.unchecked("live", "set AVATAR_ID to the avatar that is to speak")
        return
    question = _QUESTION.format(avatar=settings.avatar_id, url=redacted(settings.avatar_base_url))
    if not unasked and not await asyncio.to_thread(_agrees, question):
        yield Finding.unchecked("live", "not agreed to")
        return
    async for finding in rehearsal.rehearse(
        app.api_of(settings), ks, Open(settings.avatar_id, settings.voice_id, None)
    ):
        yield finding


def _agrees(question: str) -> bool:
    sys.stdout.write(question)
    sys.stdout.flush()
    answer = sys.stdin.readline()
    if not sys.stdin.isatty():
        sys.stdout.write("\n")  # as a person's Enter does
    return answer.strip().lower() in ("y", "yes")
