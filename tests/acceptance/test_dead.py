"""What the broker gave up, through a worker as it runs in production."""

import json
import os
import signal
import sys
from asyncio.subprocess import PIPE, create_subprocess_exec

from tests.acceptance.conftest import ROOT, StartWorker
from tests.support.bus import Bus
from worker.local.demo.processes import Backstage


async def test_it_ends_and_the_worker_stops_in_order(
    start_worker: StartWorker, bus: Bus, backstage: Backstage, amqp_url: str
) -> None:
    worker = await start_worker()
    spoken = await bus.say("c", "t", "Hello.")
    await bus.ended(spoken)
    lost = await bus.say("c", "u", "Lost.", exchange="avatar.dead")
    assert (await bus.ended(lost))["data"]["reason"] == "dead_lettered"

    settings = {"AMQP_URL": amqp_url, "STORE_URL": f"sqlite:///{backstage.folder / 'store.db'}"}
    process = await create_subprocess_exec(
        *(sys.executable, "-m", "worker", "explain", "c", "--json"),
        env=os.environ | settings | {"PYTHONPATH": str(ROOT)},
        cwd=backstage.folder,
        stdout=PIPE,
    )
    out, _ = await process.communicate()
    told = json.loads(out)
    assert [row["message_id"] for row in told["parked"]] == [lost]
    assert {end["command"]: end["event"] for end in told["last_ends"]} == {
        spoken: "avatar.speech.accepted",
        lost: "avatar.speech.failed",
    }
    assert "token" not in told["session"]

    worker.signal(signal.SIGTERM)
    assert await worker.ended() == 0
