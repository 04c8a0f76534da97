"""Workers that join get the partitions they rank highest for, and no order is broken by it."""

import asyncio
import logging
from contextlib import AsyncExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest

from tests.integration.conftest import Avatar, Start
from tests.support.bus import Bus
from worker.amqp import topology
from worker.core.model import CallResult, Piece, Session
from worker.core.ownership import score
from worker.stores.ledger import SqlLedger

_log = logging.getLogger(__name__)

PARTITIONS = 8
CONVERSATIONS = [f"conversation-{number}" for number in range(40)]
NAMES = ("w1", "w2", "w3")
LATENCY_S = 0.05
PAUSE_S = 0.2


@dataclass(eq=False)
class Mouth(Avatar):
    """An avatar that takes a while; all workers' calls are in one transcript: when, by whom, which turn, which text."""

    name: str = ""
    transcript: "list[tuple[float, str, str, str]]" = None  # type: ignore[assignment]  # always given

    async def say(self, session: Session, piece: Piece, __: object = None) -> CallResult:
        self.transcript.append((asyncio.get_running_loop().time(), self.name, piece.turn_id, piece.text))
        await asyncio.sleep(LATENCY_S)
        return await super().say(session, piece)


async def rightful(ledger: SqlLedger, conversation_id: str, *, moving: bool) -> str:
    """Whose the conversation should be."""
    partition = await ledger.partition_of(conversation_id)
    assert partition is not None
    return max((score(name, partition), name) for name in NAMES)[1] if moving else NAMES[0]


@pytest.mark.timeout(120)
async def test_every_partition_gets_to_whom_it_belongs(start: Start, bus: Bus, tmp_path: Path) -> None:
    """Before RabbitMQ 4.0 a partition stays with its owner."""
    transcript: list[tuple[float, str, str, str]] = []
    ids: list[str] = []
    said = dict.fromkeys(CONVERSATIONS, 0)
    ending = asyncio.Event()

    async def speak(one: str) -> None:
        said[one] += 1
        ids.append(await bus.say(one, one, f"{said[one]} ", final=False))

    async def produce(one: str) -> None:
        while not ending.is_set():
            await speak(one)
            await asyncio.sleep(PAUSE_S)

    async with AsyncExitStack() as stack:
        store_url = f"sqlite:///{tmp_path / 'store.db'}"
        producers: list[asyncio.Task[None]] = []
        ledger: SqlLedger | None = None
        for name in NAMES:
            avatar = Mouth(name=name, transcript=transcript)
            station = await stack.enter_async_context(
                start(name=name, partitions=PARTITIONS, store_url=store_url, avatar=avatar)
            )
            ledger = station.ledger
            producers = producers or [asyncio.create_task(produce(one)) for one in CONVERSATIONS]
            await asyncio.sleep(2)
        ending.set()
        await asyncio.gather(*producers)
        await bus.all_ended(ids, within_s=60)
        told = len(transcript)
        moving = topology.moves_partitions(bus.connection)
        assert ledger is not None
        async with asyncio.timeout(30):
            # A partition moves when its old owner has nothing in hand; until then another round of speech goes to that.
            while True:
                begun = len(transcript)
                for one in CONVERSATIONS:
                    await speak(one)
                await bus.all_ended(ids)
                owners = {turn_id: name for _, name, turn_id, _ in transcript[begun:]}
                if owners == {one: await rightful(ledger, one, moving=moving) for one in CONVERSATIONS}:
                    break
        gaps = []
        for one in CONVERSATIONS:
            mine = [(at, name) for at, name, turn_id, _ in transcript[:told] if turn_id == one]
            gaps += [then - at for (at, by), (then, next_) in pairwise(mine) if by != next_]
            assert "".join(text for _, _, turn_id, text in transcript if turn_id == one) == "".join(
                f"{number} " for number in range(1, said[one] + 1)
            )
        _log.info("gaps between owners, ms: %s", sorted(round(1000 * gap) for gap in gaps))
        assert not bus.of("speech.accepted", possibleDuplicate=True)
