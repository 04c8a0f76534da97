"""What older and newer versions left in a store."""

import sys
from typing import Any

import pytest
import sqlalchemy as sa

from tests.contract.test_ledger import STATE, changes, contents, taken
from tests.contract.test_session_store import FULL, held
from tests.support.fakes import FakeClock
from worker.core.memory import State, Turn
from worker.errors import ConfigurationError
from worker.ports import Grant
from worker.stores import database as module
from worker.stores import schema
from worker.stores.database import Database
from worker.stores.ledger import SqlLedger
from worker.stores.sessions import SqlSessions

VERSION_1 = (
    "CREATE TABLE facts (name TEXT NOT NULL, value TEXT NOT NULL, PRIMARY KEY (name))",
    """CREATE TABLE sessions (conversation_id TEXT NOT NULL, session_id TEXT NOT NULL, token TEXT NOT NULL,
    avatar_id TEXT, voice_id TEXT, voice_speed FLOAT, attached BOOLEAN NOT NULL, viewer TEXT, last_used FLOAT NOT NULL,
    owner TEXT NOT NULL, lease_until FLOAT NOT NULL, PRIMARY KEY (conversation_id))""",
    "CREATE INDEX ix_sessions_lease_until ON sessions (lease_until)",
    "INSERT INTO facts VALUES ('schema_version', '1'), ('store_id', 'as it was')",
    """INSERT INTO sessions VALUES ('c1', 's1', 'secret-token', 'ann', 'v1', 1.25, TRUE,
    '{"whepUrl": "https://whep/ü", "turn": {"credential": "c", "n": 1}}', 100.0, 'w0', 150.0)""",
)


async def execute(url: str, *statements: str) -> None:
    """Past the database, as another version would."""
    backend = await module._backend(url)

    def work(connection: sa.Connection) -> None:
        for statement in statements:
            connection.exec_driver_sql(statement)

    try:
        await backend.write(work)
    finally:
        await backend.close()


async def version(database: Database) -> str:
    return await database.fact("schema_version")


async def test_a_store_of_version_1_is_brought_up_to_date(shared_url: str) -> None:
    await execute(shared_url, *VERSION_1)
    for _ in range(2):
        database = await Database.open(shared_url)
        assert await version(database) == str(schema.VERSION)
        assert await database.fact("store_id") == "as it was"
        assert await SqlSessions(database).take("c1", "w1", 200.0) == held(session=FULL)
        await database.close()
    database = await Database.open(shared_url)
    ledger = SqlLedger(database, FakeClock(1000.0))
    assert await ledger.record("c1", changes(0, STATE), outcome=False) is Grant.GRANTED
    assert contents(await ledger.recall("c1")) == (STATE, {}, 1)
    await database.close()


async def test_open_turns_can_be_asked_for_in_a_store_of_version_3(shared_url: str) -> None:
    database = await Database.open(shared_url)
    left = changes(0, State(partition=3), {"t1": Turn(touched=10.0)})
    await SqlLedger(database, FakeClock()).record("c1", left, outcome=False)
    await database.close()
    await execute(
        shared_url,
        "UPDATE facts SET value = '3' WHERE name = 'schema_version'",
        "DROP INDEX ix_turns_open",
        "ALTER TABLE conversations DROP COLUMN partition",
    )
    database = await Database.open(shared_url)
    ledger = SqlLedger(database, FakeClock())
    assert await ledger.unclosed(15.0) == [], "not before something is written of it"
    heir = await ledger.recall("c1")
    heir.update(busy_until=1.0)
    assert await ledger.record("c1", taken(heir), outcome=False) is Grant.GRANTED
    assert await ledger.unclosed(15.0) == [(3, "c1")]
    names = await database.read(lambda one: {index["name"] for index in sa.inspect(one).get_indexes("turns")})
    assert "ix_turns_open" in names
    await database.close()


async def test_a_column_that_a_later_version_added_is_added(shared_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    database = await Database.open(shared_url)
    await SqlSessions(database).put(held(), "w1", 200.0)
    await database.close()
    await execute(shared_url, "ALTER TABLE sessions DROP COLUMN viewer")
    monkeypatch.setattr(schema, "VERSION", schema.VERSION + 1)
    database = await Database.open(shared_url)
    taken = await SqlSessions(database).take("c1", "w1", 200.0)
    assert taken is not None
    assert (taken.session.token, taken.session.viewer) == (FULL.token, None)
    assert await version(database) == str(schema.VERSION)
    await database.close()


async def test_a_newer_one_is_refused_and_left_as_it_is(shared_url: str) -> None:
    await (await Database.open(shared_url)).close()
    await execute(shared_url, "UPDATE facts SET value = '99' WHERE name = 'schema_version'", "DROP TABLE writers")
    with pytest.raises(ConfigurationError, match=r"newer version \(schema 99"):
        await Database.open(shared_url)
    with pytest.raises(Exception, match="writers"):
        await execute(shared_url, "SELECT * FROM writers")


async def test_postgresql_without_its_extra_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "asyncpg", None)
    monkeypatch.delitem(sys.modules, "worker.stores.postgres", raising=False)
    packages: Any = sys.modules["worker.stores"]
    monkeypatch.delattr(packages, "postgres", raising=False)
    with pytest.raises(
        ConfigurationError, match=r"STORE_URL: .*asyncpg: pip install 'avatar-worker\[postgres\]'"
    ) as raised:
        await Database.open("postgresql://u:hush@h/d")
    assert "hush" not in str(raised.value)
