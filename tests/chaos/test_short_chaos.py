"""A short run of `python -m tests.chaos`, so that no change goes by that breaks a promise outright."""

import asyncio

import pytest
import uvloop

from tests.chaos import run as runs
from tests.chaos.faults import SHORT
from worker.local.broker import Broker

SEED = 5


@pytest.mark.one_broker
@pytest.mark.timeout(150)  # about 35 s on an idle machine with two cores
def test_every_promise_is_kept(broker: Broker) -> None:
    # A say of 150 ms is met by a kill on a busy machine, too.
    wanted = runs.Options(SEED, SHORT.seconds, conversations=12, rate=30, latency_ms=150)
    told: list[str] = []
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        verdict = runner.run(runs.run(broker, wanted, SHORT, told.append))
    broken = {name: what for name, what in verdict.broken.items() if what}
    assert not broken, "\n".join([*told, f"seed {SEED}: {broken}"])
