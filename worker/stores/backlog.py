"""The durable inbox in SQL."""

import asyncio
from collections.abc import Awaitable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import sqlalchemy as sa

from worker.ports import Grant, Kept
from worker.stores.database import Database, among
from worker.stores.tables import backlog, partitions

_KEPT = "backlog"
_SETTLED = "backlog settled"


@dataclass(frozen=True, slots=True)
class _Move:
    conversation_id: str
    commands: Sequence[Kept]
    partition: int
    epoch: int


class SqlBacklog:
    """`ports.BacklogStore` in a `Database`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def keep(self, conversation_id: str, commands: Sequence[Kept], partition: int, epoch: int) -> Awaitable[Grant]:
        """Granted while that epoch is the partition's newest."""
        return self._database.ask_together(_insert, _Move(conversation_id, commands, partition, epoch), _KEPT)

    def let_go(self, key: str) -> asyncio.Future[None]:
        """See `ports.BacklogStore`, here and below."""
        return self._database.ask_together(_delete, key, _SETTLED)

    async def kept(self, conversation_id: str, partition: int) -> list[Kept]:
        """In order of `position`."""
        mine = sa.and_(backlog.c.conversation_id == conversation_id, backlog.c.partition == partition)
        query = sa.select(backlog.c.key, backlog.c.entry_key, backlog.c.packed)
        query = query.where(mine).order_by(backlog.c.position)
        return await self._database.read(
            lambda connection: [Kept(*row) for row in connection.execute(query)], patient=True
        )

    async def conversations(self) -> list[tuple[int, str]]:
        """Each once."""
        query = sa.select(backlog.c.partition, backlog.c.conversation_id).distinct()
        return await self._database.read(
            lambda connection: [(row.partition, row.conversation_id) for row in connection.execute(query)]
        )


def _insert(connection: sa.Connection, moves: Sequence[_Move]) -> list[Grant]:
    """The epochs are locked against being raised meanwhile."""
    numbers = {move.partition for move in moves}
    owned = sa.select(partitions).where(among(connection, partitions.c.partition, numbers))
    owned = owned.order_by(partitions.c.partition).with_for_update(read=True)
    epochs = {row.partition: row.epoch for row in connection.execute(owned)}
    granted = [move for move in moves if epochs.get(move.partition) == move.epoch]
    rows: list[dict[str, Any]] = [
        {"conversation_id": move.conversation_id, "partition": move.partition} | asdict(command)
        for move in granted
        for command in move.commands
    ]
    if rows:
        connection.execute(sa.insert(backlog), rows)
    return [Grant.GRANTED if move in granted else Grant.REFUSED for move in moves]


def _delete(connection: sa.Connection, keys: Sequence[str]) -> list[None]:
    connection.execute(sa.delete(backlog).where(among(connection, backlog.c.key, keys)))
    return [None] * len(keys)
