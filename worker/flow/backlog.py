"""The durable inbox (law 7): what a lane holds for long is kept in the store, and acknowledged to the broker.

So a slow conversation does not fill the window that all of its partition share, nor hold up a hand-over. What is kept
comes before whatever the broker still has: it was taken from the head of the queue.
"""

import asyncio
import uuid
from collections import deque
from collections.abc import Sequence
from functools import partial

from worker.core.model import Entry, Misfit
from worker.flow.deliveries import keepable, tenure_of
from worker.ports import BacklogStore, Grant, Kept, Tenure

HOLD_S = 2.0
"""How long a command may wait for its turn before it is kept: a chunk may wait that long for its sentence's end."""
PACKED = 100
"""How many commands are made ready for the store at a stretch: an interrupt does not wait for a thousand."""
TICK_S = 0.25
LOOK_S = 1.0
"""How often the store is asked whether conversations that nobody serves have something to do."""


class Backlog:
    """What is kept, and which of it is in this process's hands already, under which tenure.

    `window` is how many deliveries of a partition the broker hands out unacknowledged.
    """

    def __init__(self, store: BacklogStore, *, window: int) -> None:
        self.most = window // 4
        """How many commands of one conversation may wait before they are kept."""
        self._store = store
        self._in_hand: dict[str, Tenure] = {}

    async def keep(self, conversation_id: str, entries: Sequence[Entry], tenure: Tenure, epoch: int) -> Grant:
        """Move deliveries to the store, in order; nothing is done unless it is granted."""
        # One random number for all: each hands the interpreter to the store's threads.
        name, kept = uuid.uuid4().hex, []
        keys = [f"{name}.{number}" for number in range(len(entries))]
        # Before anybody can find them in the store: a lane that is begun meanwhile has these commands already.
        self._in_hand |= dict.fromkeys(keys, tenure)
        for number, (key, entry) in enumerate(zip(keys, entries, strict=True), start=1):
            kept.append(Kept(key, entry.key, keepable(entry).pack()))
            if not number % PACKED:
                await asyncio.sleep(0)
        grant = await self._store.keep(conversation_id, kept, tenure.partition, epoch)
        for entry, one in zip(entries, kept, strict=True):
            if grant is Grant.GRANTED:
                await keepable(entry).move(partial(self._let_go, one.key))
            else:
                self._in_hand.pop(one.key, None)
        return grant

    async def take(self, conversation_id: str, tenure: Tenure) -> list[Entry | Misfit]:
        """What is kept of the conversation from that partition, in order, but for what is in hand under the tenure."""
        taken = []
        for one in await self._waiting(conversation_id, tenure):
            self._in_hand[one.key] = tenure
            taken.append(tenure.unpack(one.entry_key, one.packed, partial(self._let_go, one.key)))
        return taken

    async def waits(self, conversation_id: str, tenure: Tenure) -> bool:
        """Whether there is anything to take."""
        return bool(await self._waiting(conversation_id, tenure))

    async def _waiting(self, conversation_id: str, tenure: Tenure) -> list[Kept]:
        # What is removed while the store is asked was in hand before, and may be among what it answers.
        before = {key for key, owner in self._in_hand.items() if owner is tenure}
        kept = await self._store.kept(conversation_id, tenure.partition)
        return [one for one in kept if one.key not in before and self._in_hand.get(one.key) is not tenure]

    async def conversations(self) -> list[tuple[int, str]]:
        """Of which conversations something is kept, with their partitions."""
        return await self._store.conversations()

    @property
    def in_hand(self) -> int:
        """How many commands that are kept are in this process's hands."""
        return len(self._in_hand)

    def forget(self, tenure: Tenure) -> None:
        """The tenure has ended: what was in hand under it is for whoever owns the partition next."""
        self._in_hand = {key: owner for key, owner in self._in_hand.items() if owner is not tenure}

    def _let_go(self, key: str) -> None:
        self._store.let_go(key).add_done_callback(lambda _: self._in_hand.pop(key, None))


class Holding:
    """What one conversation holds of the broker's, in order, until it is settled or kept."""

    def __init__(self, conversation_id: str, backlog: Backlog) -> None:
        self._conversation_id = conversation_id
        self._backlog = backlog
        self._held: deque[Entry] = deque()
        self._keeping = False

    def add(self, entry: Entry) -> None:
        """It was delivered."""
        self._held.append(entry)

    def forget(self, tenure: Tenure) -> None:
        """It will be delivered again."""
        self._held = deque(one for one in self._held if tenure_of(one) is not tenure)

    @property
    def in_hand(self) -> int:
        """How many it holds."""
        return sum(not keepable(one).settled for one in self._held)

    def due(self, now: float) -> Tenure | None:
        """The tenure whose deliveries are to be kept now: there are many of them, or they have been held for long."""
        while self._held and keepable(self._held[0]).settled:
            self._held.popleft()
        if self._keeping or not self._held:
            return None
        long = now - keepable(self._held[0]).received > HOLD_S
        return tenure_of(self._held[0]) if long or len(self._held) > self._backlog.most else None

    async def keep(self, tenure: Tenure) -> bool:
        """Move to the store what is held under the tenure. False: another worker owns the partition.

        Raises:
            LinkLost: the tenure has ended.
        """
        self._keeping = True
        try:
            epoch = await tenure.epoch()
            held = [one for one in self._held if tenure_of(one) is tenure and not keepable(one).settled]
            if await self._backlog.keep(self._conversation_id, held, tenure, epoch) is Grant.REFUSED:
                return False
            kept = set(held)
            self._held = deque(one for one in self._held if one not in kept)
            return True
        finally:
            self._keeping = False
