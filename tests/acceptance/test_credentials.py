"""A worker whose Kaltura Session comes from the KS service, which is down, refuses, or comes back."""

import asyncio
import contextlib
from pathlib import Path

import aiohttp
import pytest

from tests.acceptance.conftest import Simulator, StartWorker, Worker
from tests.acceptance.test_sessions import Asker
from tests.support.bus import Bus

TOKEN = "demo-app-token"


@pytest.fixture
async def asker(bus: Bus) -> Asker:
    return Asker(bus, await bus.answer_queue())


def by_app_token(simulator: Simulator, **settings: str) -> dict[str, str | None]:
    return {
        "AVATAR_KS": None,
        "KALTURA_SERVICE_URL": simulator.api_url[: simulator.api_url.index("/v1")],
        "KALTURA_PARTNER_ID": "101",
        "KALTURA_APP_TOKEN_ID": "0_demo",
        "KALTURA_APP_TOKEN": TOKEN,
        **settings,
    }


async def shows(worker: Worker, **wanted: bool) -> None:
    """Return once its readiness is just that."""
    async with asyncio.timeout(20), aiohttp.ClientSession() as http:
        while True:
            with contextlib.suppress(aiohttp.ClientConnectorError):
                async with http.get(f"{worker.ops_url}/readyz") as answer:
                    if wanted.items() <= (await answer.json()).items():
                        return
            await asyncio.sleep(0.05)


async def test_a_service_that_is_down_at_the_start_is_waited_for(
    start_worker: StartWorker, simulator: Simulator, bus: Bus, asker: Asker
) -> None:
    await simulator.fault(kind="status", status=503, route="ks-widget", times=None)
    worker = await start_worker(ready=False, **by_app_token(simulator, SESSION_WAIT_S="1"))
    await simulator.wait("ks-widget", 2, stage="finished")
    await shows(worker, consuming=True, authorized=False, ready=False)
    answer = await asker.start("c")
    assert answer["error"].startswith("unavailable: no Kaltura Session")
    spoken = await bus.say("c", "t", "Said as soon as there is a session.")
    await simulator.clear()
    assert (await bus.ended(spoken))["type"] == "avatar.speech.accepted"
    await worker.ready()
    assert '"ks_failed"' in worker.log
    assert TOKEN not in worker.log


async def test_a_session_goes_on_without_a_kaltura_session(
    start_worker: StartWorker, simulator: Simulator, bus: Bus, asker: Asker
) -> None:
    worker = await start_worker(**by_app_token(simulator, SESSION_WAIT_S="0.5"))
    await bus.ended(await bus.say("lives", "t", "Before."))
    await asyncio.sleep(5)  # a KS younger than this is not replaced
    await simulator.fault(kind="drop", route="ks-widget", times=None)
    await simulator.post("ks/revoke")
    assert (await asker.start("new"))["error"].startswith("unavailable: no Kaltura Session")
    await shows(worker, ready=False, authorized=False)
    assert (await bus.ended(await bus.say("lives", "t2", "After.")))["type"] == "avatar.speech.accepted"
    await simulator.clear()
    await worker.ready()
    assert "token" in await asker.start("new")


async def test_an_app_token_that_is_refused_fails_what_needs_a_session(
    start_worker: StartWorker, simulator: Simulator, bus: Bus, asker: Asker
) -> None:
    worker = await start_worker(ready=False, **by_app_token(simulator, KALTURA_APP_TOKEN_HASH="SHA1"))
    await shows(worker, consuming=True, authorized=False, ready=False)
    answer = await asker.start("c")
    assert answer["error"].startswith("credentials: no Kaltura Session: INVALID_APP_TOKEN_HASH")
    failed = await bus.ended(await bus.say("c", "t", "Nobody says this."))
    assert (failed["type"], failed["data"]["reason"]) == ("avatar.speech.failed", "credentials")
    assert "KALTURA_PARTNER_ID" in worker.log, "the operator is told what to look at"
    assert TOKEN not in worker.log


async def test_a_kaltura_session_that_expires_is_renewed_ahead(
    start_worker: StartWorker, simulator: Simulator, asker: Asker
) -> None:
    worker = await start_worker(**by_app_token(simulator, KALTURA_KS_EXPIRY_S="10"))
    assert "token" in await asker.start("before")
    await simulator.wait("ks-app-token", 2, stage="finished")
    await simulator.fault(kind="drop", route="ks-widget", times=None)
    assert "token" in await asker.start("after")
    assert worker.log.count('"ks_renewed"') >= 2
    refused = [call for call in (await simulator.transcript())["strays"] if call["route"] == "create"]
    assert refused == [], "no create had to be refused first"


async def test_one_that_was_revoked_is_replaced_within_the_call(
    start_worker: StartWorker, simulator: Simulator, bus: Bus, asker: Asker
) -> None:
    worker = await start_worker(**by_app_token(simulator))
    assert "token" in await asker.start("before")
    await asyncio.sleep(5)  # a KS younger than this is not replaced
    await simulator.post("ks/revoke")
    assert "token" in await asker.start("after")
    assert bus.of("session.failed") == []
    await shows(worker, ready=True, authorized=True)


async def test_a_file_is_rotated_while_the_worker_runs(
    start_worker: StartWorker, simulator: Simulator, asker: Asker, tmp_path: Path
) -> None:
    file = tmp_path / "ks"
    file.write_text("test-ks\n")
    worker = await start_worker(AVATAR_KS=None, AVATAR_KS_FILE=str(file))
    assert "token" in await asker.start("before")
    await simulator.change(ks="the-next-ks")
    assert (await asker.start("too-early"))["error"].startswith("credentials")
    await shows(worker, ready=False, authorized=False)
    file.write_text("the-next-ks\n")
    await shows(worker, ready=True, authorized=True)
    assert "token" in await asker.start("after")
    assert '"ks_renewed"' in worker.log
    assert "the-next-ks" not in worker.log
