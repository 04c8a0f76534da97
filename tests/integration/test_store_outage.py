"""The store goes away in the middle of everything: a worker waits, loses nothing, and says nothing twice."""

import asyncio
from collections.abc import Iterator

import pytest

from tests.integration.conftest import Start
from tests.support.bus import Bus
from tests.support.postgres import OwnedPostgres, own_postgres

DOWN_S = 3.0

pytestmark = pytest.mark.one_broker


@pytest.fixture(scope="module")
def store() -> Iterator[OwnedPostgres]:
    with own_postgres() as one:
        yield one


async def test_postgresql_is_killed_under_load(start: Start, bus: Bus, store: OwnedPostgres) -> None:
    async with store.schema() as url, start(store_url=url, partitions=2) as station:
        ids, words = [], {f"c{n}": [f"word{n}-{i} " for i in range(30)] for n in range(8)}
        down: asyncio.Task[None] | None = None
        for i in range(30):
            if i == 10:
                down = asyncio.create_task(asyncio.to_thread(interrupted, store))
            # Conversations that begin while it is down, and those that began before.
            for conversation_id, those in words.items():
                if conversation_id < "c4" or i >= 12:
                    ids.append(await bus.say(conversation_id, "t", those[i], final=i == 29))
        assert down is not None
        await bus.all_ended(ids, within_s=40)
        await down
        said = "".join(piece.text for piece in station.avatar.said)
        for conversation_id, those in words.items():
            mine = [word for word in said.split() if word.startswith(f"word{conversation_id[1:]}-")]
            assert mine == [word.strip() for word in those[0 if conversation_id < "c4" else 12 :]]
        accepted = bus.of("speech.accepted")
        assert accepted
        assert not [event for event in accepted if "possibleDuplicate" in event["data"]]
        assert all(len(ends) == 1 for ends in bus.terminal().values())
        await station.settled()


def interrupted(store: OwnedPostgres) -> None:
    """It is down for a while."""
    store.kill()
    asyncio.run(asyncio.sleep(DOWN_S))
    store.start()
