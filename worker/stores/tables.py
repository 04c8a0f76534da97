"""The tables. Times are epoch seconds; JSON is text."""

import sqlalchemy as sa

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
    sa.Column("session_id", sa.Text, nullable=False),
    sa.Column("token", sa.Text, nullable=False),
    sa.Column("avatar_id", sa.Text),
    sa.Column("voice_id", sa.Text),
    sa.Column("voice_speed", sa.Float),
    sa.Column("attached", sa.Boolean, nullable=False),
    sa.Column("viewer", sa.Text),
    sa.Column("last_used", sa.Float, nullable=False),
    sa.Column("owner", sa.Text, nullable=False),
    sa.Column("lease_until", sa.Float, nullable=False, index=True),
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
    sa.Column("attempt", sa.Integer),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("touched", sa.Float, nullable=False, index=True),
)

turns = sa.Table(
    "turns",
    metadata,
    sa.Column("conversation_id", sa.Text, primary_key=True),
    sa.Column("turn_id", sa.Text, primary_key=True),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("pieces", sa.Integer, nullable=False),
    sa.Column("text_length", sa.Integer, nullable=False),
    sa.Column("replay", sa.Text, nullable=False),
    sa.Column("touched", sa.Float, nullable=False, index=True),
)

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
    sa.Column("message_id", sa.Text, primary_key=True),
    sa.Column("fingerprint", sa.LargeBinary, nullable=False),
    sa.Column("ending_id", sa.Text, nullable=False),
    sa.Column("touched", sa.Float, nullable=False, index=True),
)

# Commands kept in the broker's stead: the durable inbox. `position` never comes twice.
backlog = sa.Table(
    "backlog",
    metadata,
    sa.Column("position", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("key", sa.Text, nullable=False, unique=True),
    sa.Column("conversation_id", sa.Text, nullable=False, index=True),
    sa.Column("partition", sa.Integer, nullable=False),
    sa.Column("entry_key", sa.Text, nullable=False),
    sa.Column("packed", sa.Text, nullable=False),
    sqlite_autoincrement=True,
)
