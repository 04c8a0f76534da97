"""`parked list`, `replay` and `drop`: what was given up is shown, sent again, thrown away."""

import json
import sys
from collections.abc import AsyncIterator, Iterable
from dataclasses import asdict
from datetime import UTC, datetime

from rich.table import Column, Table

from worker.amqp import shelf, topology
from worker.amqp.lenient import printable
from worker.amqp.shelf import ParkedCommand, Wanted
from worker.errors import ConfigurationError, LinkLost
from worker.operate import connected, show
from worker.settings import BrokerSettings


async def list_parked(settings: BrokerSettings, wanted: Wanted, *, limit: int, as_json: bool) -> int:
    """Print the oldest parked commands; returns the exit code."""
    rows = await _shelved(settings, wanted, limit=limit)
    title = f"the oldest {limit} (--limit shows more)" if len(rows) == limit else f"{len(rows)} parked"
    _print(rows, title, as_json=as_json)
    return 0


async def replay_parked(settings: BrokerSettings, wanted: Wanted, *, yes: bool, as_json: bool) -> int:
    """Send parked commands again, with the whole of their turns; without `yes`, only show what would be."""
    rows: list[ParkedCommand] = []
    trouble = ""
    async with connected(settings) as connection:
        try:
            if yes:
                trouble = await _gather(shelf.replay(connection, wanted), rows)
            else:
                rows = await shelf.plan(connection, wanted)
        except topology.QueueMissing:
            raise ConfigurationError(_NO_QUEUE) from None
    staying = sum(bool(row.stays_because) for row in rows)
    done = "sent again" if yes else "would be sent again (nothing was done: add --yes)"
    _print(rows, f"{len(rows) - staying} {done}, {staying} stay", as_json=as_json)
    return _told(trouble)


async def drop_parked(settings: BrokerSettings, wanted: Wanted, *, yes: bool, as_json: bool) -> int:
    """Throw parked commands away; without `yes`, only show which."""
    if not yes:
        rows = await _shelved(settings, wanted, limit=None)
        _print(rows, f"{len(rows)} would be dropped (nothing was done: add --yes)", as_json=as_json)
        return 0
    rows = []
    async with connected(settings) as connection:
        try:
            trouble = await _gather(shelf.drop(connection, wanted), rows)
        except topology.QueueMissing:
            raise ConfigurationError(_NO_QUEUE) from None
    _print(rows, f"{len(rows)} dropped", as_json=as_json)
    return _told(trouble)


def parked_table(rows: Iterable[ParkedCommand], title: str) -> Table:
    """Parked commands for a person to read."""
    headings = ("parked at", "reason", "routing key", "turn", "message id", "attempts", "replays", "error")
    # Folded, not cut: an id is there to be copied.
    table = Table(*(Column(heading, overflow="fold") for heading in headings), title=title)
    for row in rows:
        at = datetime.fromtimestamp(row.parked_at_ms / 1000, UTC).isoformat(timespec="seconds")
        stays = f"stays: {row.stays_because}" if row.stays_because else ""
        told = "; ".join(filter(None, (row.error, stays)))
        numbers = (str(row.attempts), str(row.replays))
        table.add_row(at, row.reason, row.routing_key, printable(row.turn_id), row.message_id, *numbers, told)
    return table


_NO_QUEUE = "the broker has no queue avatar.parked, or no exchange avatar.commands: has a worker ever run on it?"


async def _shelved(settings: BrokerSettings, wanted: Wanted, *, limit: int | None) -> list[ParkedCommand]:
    async with connected(settings) as connection:
        try:
            return await shelf.find(connection, wanted, limit)
        except topology.QueueMissing:
            raise ConfigurationError(_NO_QUEUE) from None


async def _gather(done: AsyncIterator[ParkedCommand], rows: list[ParkedCommand]) -> str:
    """What is done goes into `rows`; returns what stopped it, if anything did."""
    try:
        async for row in done:
            rows.append(row)  # noqa: PERF401 - what was done before it stopped counts
    except LinkLost as error:
        return f"stopped: {error}"
    return ""


def _print(rows: Iterable[ParkedCommand], title: str, *, as_json: bool) -> None:
    if as_json:
        for row in rows:
            sys.stdout.write(json.dumps(asdict(row), ensure_ascii=False) + "\n")
    else:
        show(parked_table(rows, title))


def _told(trouble: str) -> int:
    if trouble:
        sys.stderr.write(f"avatar-worker: {trouble}\n")
    return 1 if trouble else 0
