"""What a `Database` needs of the program that keeps it, and what may go wrong there."""

from collections.abc import Callable
from typing import Protocol, TypeVar

import sqlalchemy as sa

T = TypeVar("T")
Work = Callable[[sa.Connection], T]
"""Something to be done in a transaction, without waiting for anything else; it may be done again if that fails."""


class Unreachable(Exception):  # noqa: N818 - it names what happened, as ConnectionReset does
    """The store cannot be used now, whatever is asked of it. Whether what was under way took place is not known."""


class Locked(Unreachable):
    """Another process has held it for long: one that stands still in the middle of a transaction."""


class Contended(Exception):  # noqa: N818 - as above
    """Another worker wrote to the same rows at the same time. Nothing took place; it may be tried again at once."""


class Backend(Protocol):
    """SQLite or PostgreSQL. Each method is done to its end also if its caller is cancelled.

    Raises `Unreachable` and `Contended`, and whatever the work raises.
    """

    async def write(self, work: Work[T]) -> T:
        """In a transaction that is committed when the work returns, and undone if it raises."""

    async def read(self, work: Work[T]) -> T:
        """In a snapshot, beside whatever is written."""

    async def close(self) -> None:
        """Close the connections, after what has been begun."""
