"""Tells how commands end that the broker gave up: once, whoever else has told already."""

from dataclasses import replace

from worker.core import undelivered
from worker.core.memory import Ended
from worker.core.model import Entry, Misfit
from worker.flow.settler import Settler
from worker.ports import Clock, Ledger


class DeadLetters:
    """Handed one after the other, by whoever empties the queue of them."""

    def __init__(self, *, ledger: Ledger, settler: Settler, clock: Clock) -> None:
        self._ledger = ledger
        self._settler = settler
        self._clock = clock

    async def take(self, found: Entry | Misfit, why: str) -> None:
        """Note the end, unless it has ended; it is parked, told and acknowledged in its turn."""
        conclusion = undelivered.conclude(found, why)
        if isinstance(found, Entry):
            ended = Ended(found.fingerprint, conclusion.event, self._clock(), after=conclusion.after)
            stands = await self._ledger.end(found, ended)
            if (stands.fingerprint, stands.event) == (ended.fingerprint, ended.event):
                conclusion = replace(conclusion, after=stands.after)
            else:
                conclusion = undelivered.conclude_again(stands, found, why)
        self._settler.submit([conclusion])
