"""What tests do to a store."""

import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import sqlalchemy as sa

from tests.support.fakes import DEADLINE_S, until
from worker.stores.database import Database


@asynccontextmanager
async def busy(database: Database) -> AsyncIterator[None]:
    """One transaction of this SQLite takes as long as the block."""
    begun, over = threading.Event(), threading.Event()

    def work(_: sa.Connection) -> None:
        begun.set()
        over.wait(DEADLINE_S)

    written = database.ask(work, "", alone=True)
    await until(begun.is_set)
    try:
        yield
    finally:
        over.set()
        await written
