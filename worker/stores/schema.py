"""Makes the tables, and brings those of older versions up to date."""

import uuid

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert

from worker.errors import ConfigurationError
from worker.stores.tables import facts, metadata

VERSION = 4
"""1: sessions only. 2: the ledger too. 3: a session's life cycle, and ghosts. 4: open turns can be asked for."""

_LOCK = 0x6176617461722D77
"""Held while the tables are made: workers may start all at once."""


def prepare(connection: sa.Connection) -> None:
    """Make what is missing, and write down the version and, once, the store's identity.

    Raises:
        ConfigurationError: a newer version made the tables.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK)))
    facts.create(connection, checkfirst=True)
    found = connection.execute(sa.select(facts.c.value).where(facts.c.name == "schema_version")).scalar_one_or_none()
    if found is not None and int(found) > VERSION:
        raise ConfigurationError(f"STORE_URL: made by a newer version (schema {found}, wanted {VERSION})")
    if found is not None and int(found) == VERSION:
        return
    metadata.create_all(connection)
    _add_what_is_new(connection)
    identity = "memory" if _is_in_memory(connection) else uuid.uuid4().hex
    connection.execute(insert(facts).values(name="store_id", value=identity).on_conflict_do_nothing())
    version = insert(facts).values(name="schema_version", value=str(VERSION))
    connection.execute(version.on_conflict_do_update(index_elements=["name"], set_={"value": str(VERSION)}))


def _add_what_is_new(connection: sa.Connection) -> None:
    """What a later version added to a table: columns that may be null, or have a default in the database; indices."""
    inspector = sa.inspect(connection)
    for table in metadata.tables.values():
        known = {column["name"] for column in inspector.get_columns(table.name)}
        for column in table.columns:
            if column.name not in known:
                definition = sa.schema.CreateColumn(column).compile(dialect=connection.dialect)
                connection.exec_driver_sql(f"ALTER TABLE {table.name} ADD COLUMN {definition}")
        for index in table.indexes:
            index.create(connection, checkfirst=True)


def _is_in_memory(connection: sa.Connection) -> bool:
    return connection.dialect.name == "sqlite" and not connection.engine.url.database
