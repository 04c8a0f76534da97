"""The commands of an operator that look at the broker: each connects, does its work, and prints what it found."""

import sys
from dataclasses import replace

from rich.console import Console
from rich.table import Table

from worker.amqp import inspection, link, topology
from worker.amqp import repartition as repartitioning
from worker.amqp.limit import Limit
from worker.amqp.management import Management
from worker.amqp.topology import Record
from worker.core.finding import Finding, State
from worker.errors import TopologyError
from worker.ops.logs import redacted
from worker.settings import BrokerSettings, TopologySettings
from worker.stores.backlog import SqlBacklog
from worker.stores.database import Database
from worker.stores.sessions import SqlSessions


async def declare_topology(settings: TopologySettings) -> int:
    """Declare what the contract names, check it, and print what stands there; returns the exit code."""
    wanted = await wanted_by(settings)
    management = Management.of(settings.management_url, settings.amqp_url)
    refused: TopologyError | None = None
    async with connected(settings) as connection:
        try:
            await topology.declare(connection, wanted)
        except TopologyError as error:
            refused = error  # after what else there is to say
    async with connected(settings) as connection:
        limit = Limit(settings.amqp_url.get_secret_value(), settings.heartbeat_s)
        wrong = [tell(finding) for finding in await inspection.inspect(connection, wanted, management, limit)]
        if refused is not None:
            raise refused
        rows = await topology.survey(connection, wanted.partitions)
    table = Table("queue", "messages", "consumers")
    for row in rows:
        table.add_row(row.queue, str(row.messages), str(row.consumers))
    show(table)
    return 1 if any(wrong) else 0


async def repartition(settings: TopologySettings, partitions: int) -> int:
    """Change the number of partitions and print what to do next; returns the exit code.

    Raises:
        TopologyError: a worker runs, or commands wait, in a queue or in the store.
    """
    wanted = replace(await wanted_by(settings), partitions=partitions)
    await _demand_no_backlog(settings)
    async with connected(settings) as connection:
        done = await repartitioning.repartition(connection, wanted)
    before = f"{done.before} partitions before, now" if done.before else "now"
    sys.stdout.write(
        f"{before} {partitions}. Set PARTITIONS={partitions} and PREFETCH={wanted.prefetch} for all workers, "
        "and start them.\n"
    )
    return 0


def show(what: Table | str) -> None:
    """Print to a person."""
    # What others chose is shown as it is: rich would take [b] in a routing key for mark-up, and raise at [/b].
    Console(markup=False, emoji=False, highlight=False).print(what)


def connected(settings: BrokerSettings) -> link.Connected:
    """A connection for one errand."""
    return link.Connected(settings.amqp_url.get_secret_value(), heartbeat_s=settings.heartbeat_s)


async def wanted_by(settings: TopologySettings) -> Record:
    """What workers with these settings want the broker to be.

    Raises:
        ConfigurationError: the store cannot be used.
    """
    database = await Database.open(settings.store_url)
    try:
        return Record(settings.partitions, await SqlSessions(database).identity(), settings.prefetch)
    finally:
        await database.close()


async def _demand_no_backlog(settings: TopologySettings) -> None:
    database = await Database.open(settings.store_url)
    try:
        waiting = await SqlBacklog(database).conversations()
    finally:
        await database.close()
    if waiting:
        raise TopologyError(
            f"the store keeps commands of {len(waiting)} conversations that wait to be spoken: run workers until they "
            "have been, stop the workers, and run this again"
        )


def tell(finding: Finding) -> bool:
    """Print one line; returns whether something is wrong."""
    sys.stdout.write(f"{finding.state:<10}{finding.item:<28} {redacted(finding.text)}\n")
    sys.stdout.flush()
    return finding.state is State.WRONG
