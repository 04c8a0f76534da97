"""The commands of an operator that look at the broker: each connects, does its work, and prints what it found."""

import json
import sys
from dataclasses import asdict
from datetime import UTC, datetime

from rich.console import Console
from rich.table import Table

from worker.amqp import link, parked, topology
from worker.amqp.topology import Record
from worker.errors import ConfigurationError
from worker.settings import BrokerSettings, TopologySettings
from worker.stores.database import Database
from worker.stores.sessions import SqlSessions


async def declare_topology(settings: TopologySettings) -> int:
    """Declare what the contract names and print what stands there; returns the exit code."""
    database = await Database.open(settings.store_url)
    try:
        wanted = Record(settings.partitions, await SqlSessions(database).identity())
    finally:
        await database.close()
    async with _connected(settings) as connection:
        await topology.declare(connection, wanted)
        rows = await topology.survey(connection, wanted.partitions)
    table = Table("queue", "messages", "consumers")
    for row in rows:
        table.add_row(row.queue, str(row.messages), str(row.consumers))
    _print(table)
    return 0


async def list_parked(settings: BrokerSettings, *, limit: int, as_json: bool) -> int:
    """Print the oldest parked commands; returns the exit code."""
    async with _connected(settings) as connection:
        try:
            found = [row async for row in parked.browse(connection, limit)]
        except topology.QueueMissing:
            raise ConfigurationError("the broker has no queue avatar.parked: has a worker ever run on it?") from None
    if as_json:
        for row in found:
            sys.stdout.write(json.dumps(asdict(row), ensure_ascii=False) + "\n")
        return 0
    table = Table("parked at", "reason", "routing key", "message id", "attempts", "error", title=f"{len(found)} parked")
    for row in found:
        at = datetime.fromtimestamp(row.parked_at_ms / 1000, UTC).isoformat(timespec="seconds")
        table.add_row(at, row.reason, row.routing_key, row.message_id, str(row.attempts), row.error)
    _print(table)
    return 0


def _print(table: Table) -> None:
    # What others chose is shown as it is: rich would take [b] in a routing key for mark-up, and raise at [/b].
    Console(markup=False, emoji=False, highlight=False).print(table)


def _connected(settings: BrokerSettings) -> link.Connected:
    return link.Connected(settings.amqp_url.get_secret_value(), heartbeat_s=settings.heartbeat_s)
