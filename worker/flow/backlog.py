"""The durable inbox (law 7): what a lane holds for long is kept in the store, and acknowledged to the broker.

So a slow conversation does not fill the window that all of its partition share, nor hold up a hand-over. What is kept
comes before whatever the broker still has: it was taken from the head of the queue.
"""

import uuid
from collections.abc import Sequence
from functools import partial
from typing import cast

from worker.core.model import Entry, Misfit
from worker.ports import BacklogStore, Grant, KeepableDelivery, Kept, Tenure

HOLD_S = 1.0
"""How long a command may wait for its turn before it is kept."""
TICK_S = 0.25
LOOK_S = 1.0
"""How often the store is asked whether it keeps commands of conversations that nobody serves."""


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
        kept = [Kept(uuid.uuid4().hex, entry.key, keepable(entry).pack()) for entry in entries]
        # Before anybody can find them in the store: a lane that is begun meanwhile has these commands already.
        self._in_hand |= {one.key: tenure for one in kept}
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
        for one in await self._store.kept(conversation_id, tenure.partition):
            if self._in_hand.get(one.key) is not tenure:
                self._in_hand[one.key] = tenure
                taken.append(tenure.unpack(one.entry_key, one.packed, partial(self._let_go, one.key)))
        return taken

    async def conversations(self) -> dict[int, list[str]]:
        """Of which conversations something is kept, by partition."""
        found: dict[int, list[str]] = {}
        for number, conversation_id in await self._store.conversations():
            found.setdefault(number, []).append(conversation_id)
        return found

    def forget(self, tenure: Tenure) -> None:
        """The tenure has ended: what was in hand under it is for whoever owns the partition next."""
        self._in_hand = {key: owner for key, owner in self._in_hand.items() if owner is not tenure}

    def _let_go(self, key: str) -> None:
        self._in_hand.pop(key, None)
        self._store.let_go(key)


def keepable(entry: Entry) -> KeepableDelivery:
    """The delivery of an entry known to be keepable."""
    return cast(KeepableDelivery, entry.delivery)
