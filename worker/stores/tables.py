"""The tables. Times are epoch seconds; JSON is text. Whoever changes them raises `schema.VERSION`."""

from typing import Any

import sqlalchemy as sa


class Words(sa.TypeDecorator[str]):
    """Text that others chose. PostgreSQL takes every character but NUL, and one bad name must not stop a store."""

    impl = sa.Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Any) -> str | None:  # noqa: ARG002 - SQLAlchemy's
        """As it is kept."""
        return value and value.replace("\x1b", "\x1be").replace("\0", "\x1b0")

    def process_result_value(self, value: str | None, dialect: Any) -> str | None:  # noqa: ARG002 - the same
        """As it was."""
        return value and value.replace("\x1b0", "\0").replace("\x1be", "\x1b")


metadata = sa.MetaData()

facts = sa.Table(
    "facts",
    metadata,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("value", sa.Text, nullable=False),
)

sessions = sa.Table(
    "sessions",
    metadata,
    sa.Column("conversation_id", sa.Text, primary_key=True),
    sa.Column("session_id", Words, nullable=False),
    sa.Column("token", Words, nullable=False),
    sa.Column("avatar_id", Words),
    sa.Column("voice_id", Words),
    sa.Column("voice_speed", sa.Float),
    sa.Column("attached", sa.Boolean, nullable=False),
    sa.Column("viewer", sa.Text),
    sa.Column("last_used", sa.Float, nullable=False),
    sa.Column("owner", sa.Text, nullable=False),
    sa.Column("lease_until", sa.Float, nullable=False, index=True),
    # See `sessions`; no id and no token yet while it waits for a slot, or is being created.
    sa.Column("state", sa.Text, nullable=False, server_default="ready"),
    sa.Column("reason", sa.Text),
    sa.Column("since", sa.Float),
    sa.Column("renew_at", sa.Float),
    sa.Column("expires_at", sa.Float),
)

# Sessions that may exist although nobody knows them: each takes a slot for a while.
ghosts = sa.Table(
    "ghosts",
    metadata,
    sa.Column("conversation_id", sa.Text, primary_key=True),
    sa.Column("since", sa.Float, primary_key=True),
    sa.Column("until", sa.Float, nullable=False),
)

partitions = sa.Table(
    "partitions",
    metadata,
    sa.Column("partition", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("epoch", sa.Integer, nullable=False),
)

conversations = sa.Table(
    "conversations",
    metadata,
    sa.Column("conversation_id", sa.Text, primary_key=True),
    sa.Column("version", sa.Text, nullable=False),
    # These two are in the state, too, and stand here to be asked for.
    sa.Column("attempt", sa.Integer),
    sa.Column("partition", sa.Integer),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("touched", sa.Float, nullable=False, index=True),
)

turns = sa.Table(
    "turns",
    metadata,
    sa.Column("conversation_id", sa.Text, primary_key=True),
    sa.Column("turn_id", Words, primary_key=True),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("pieces", sa.Integer, nullable=False),
    sa.Column("text_length", sa.Integer, nullable=False),
    sa.Column("replay", Words, nullable=False),
    sa.Column("touched", sa.Float, nullable=False, index=True),
)

OPEN = turns.c.state == sa.literal_column("'open'")
"""Written out, as in the index: a planner does not know what a parameter will be."""
sa.Index("ix_turns_open", turns.c.touched, sqlite_where=OPEN, postgresql_where=OPEN)

# One event may end many commands.
endings = sa.Table(
    "endings",
    metadata,
    sa.Column("ending_id", sa.Text, primary_key=True),
    sa.Column("event", sa.Text, nullable=False),
    sa.Column("touched", sa.Float, nullable=False, index=True),
)

commands = sa.Table(
    "commands",
    metadata,
    sa.Column("conversation_id", sa.Text, primary_key=True),
    sa.Column("message_id", Words, primary_key=True),
    sa.Column("fingerprint", sa.LargeBinary, nullable=False),
    sa.Column("ending_id", sa.Text, nullable=False),
    sa.Column("touched", sa.Float, nullable=False, index=True),
)

# The last transaction of each process, to tell whether one took place whose answer was lost.
writers = sa.Table(
    "writers",
    metadata,
    sa.Column("writer", sa.Text, primary_key=True),
    sa.Column("number", sa.BigInteger, nullable=False),
    sa.Column("touched", sa.Float, nullable=False),
)

# Commands kept in the broker's stead: the durable inbox. `position` never comes twice.
backlog = sa.Table(
    "backlog",
    metadata,
    sa.Column("position", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True, autoincrement=True),
    sa.Column("key", sa.Text, nullable=False, unique=True),
    sa.Column("conversation_id", sa.Text, nullable=False, index=True),
    sa.Column("partition", sa.Integer, nullable=False),
    sa.Column("entry_key", Words, nullable=False),
    sa.Column("packed", sa.Text, nullable=False),
    sqlite_autoincrement=True,
)
