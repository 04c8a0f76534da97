"""A short run of `python -m benchmarks.slots`: no more sessions than there may be, whoever is killed."""

import asyncio

import pytest

from benchmarks import slots

SEED = 3


@pytest.mark.timeout(300)  # about 90 s on an idle machine with two cores
def test_five_slots_for_forty_conversations_on_workers_that_are_killed() -> None:
    assert asyncio.run(slots.main(20, SEED)) == 0
