"""What of the durable inbox is in this process's hands already."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from tests.support.conversation import speak
from tests.support.fakes import FakeTenure
from worker.core.model import Entry, Misfit
from worker.flow.backlog import Backlog
from worker.ports import Grant, Kept


class SlowStore:
    """`ports.BacklogStore` that removes what is settled when `removed` says so."""

    def __init__(self) -> None:
        self.rows: list[Kept] = []
        self.removed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def _keep(self, commands: Sequence[Kept]) -> Grant:
        self.rows += commands
        return Grant.GRANTED

    def keep(self, _: str, commands: Sequence[Kept], __: int, ___: int) -> Awaitable[Grant]:
        return self._keep(commands)

    def let_go(self, _: str) -> asyncio.Future[None]:
        return self.removed

    async def kept(self, _: str, __: int) -> list[Kept]:
        rows = list(self.rows)
        if self.removed.done():
            self.rows.clear()
        await asyncio.sleep(0)  # meanwhile it hears that they are removed
        return rows

    async def conversations(self) -> list[tuple[int, str]]:
        return []


class KeptDelivery:
    """`ports.KeepableDelivery`: `settle` is what it was told to do then."""

    received = 0.0
    settled = False

    def __init__(self, tenure: FakeTenure) -> None:
        self.tenure = tenure
        self.remove: Callable[[], None] = lambda: None

    def pack(self) -> str:
        return "packed"

    async def move(self, remove: Callable[[], None]) -> None:
        self.remove = remove


class TakingTenure(FakeTenure):
    """Unpacks whatever it is handed."""

    def unpack(self, _: str, packed: str, __: Callable[[], None]) -> Entry | Misfit:
        return speak("t", packed)


async def test_what_is_being_removed_is_not_taken_again() -> None:
    store, tenure = SlowStore(), TakingTenure()
    backlog, delivery = Backlog(store, window=100), KeptDelivery(tenure)
    await backlog.keep("c1", [speak("t", "a", delivery=delivery)], tenure, 1)
    delivery.remove()
    assert not await backlog.waits("c1", tenure)
    assert await backlog.take("c1", tenure) == []
    store.removed.set_result(None)
    assert await backlog.take("c1", tenure) == []
    assert backlog._in_hand == {}


async def test_what_was_in_hand_under_a_tenure_that_has_ended_is_taken() -> None:
    store, tenure = SlowStore(), TakingTenure()
    backlog = Backlog(store, window=100)
    await backlog.keep("c1", [speak("t", "a", delivery=KeptDelivery(tenure))], tenure, 1)
    backlog.forget(tenure)
    assert await backlog.waits("c1", tenure)
    assert len(await backlog.take("c1", tenure)) == 1
    assert not await backlog.waits("c1", tenure)
