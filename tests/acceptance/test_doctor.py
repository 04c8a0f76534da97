"""`doctor`, `topology` and `topology repartition` as a person types them."""

from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from schemas.routes import partition_queue
from tests.acceptance.conftest import KS, Finished, Simulator, StartWorker, finished, started
from tests.support.bus import Bus
from tests.support.policies import policies
from worker.doctor import _where
from worker.local.broker import OwnedBroker

Command = Callable[..., Awaitable[Finished]]


@pytest.fixture
def command(amqp_url: str, simulator: Simulator, tmp_path: Path) -> Command:
    """Runs a command with settings that are right, but for those given; `answer` is what is typed into it."""

    async def run(*arguments: str, answer: str = "", **settings: str) -> Finished:
        usual = {
            "AMQP_URL": amqp_url,
            "AVATAR_BASE_URL": simulator.api_url,
            "AVATAR_KS": KS,
            "AVATAR_ID": "test-avatar",
            "STORE_URL": f"sqlite:///{tmp_path / 'store.db'}",
        }
        async with started("-m", "worker", *arguments, env=usual | settings, cwd=tmp_path) as process:
            found = await finished(process, answer)
        assert "Traceback" not in found.err
        return found

    return run


def lines(found: Finished, state: str) -> dict[str, str]:
    """Item and text of each line of that state."""
    rows = [line for line in found.out.splitlines() if line.startswith(f"{state} ")]
    return {item.strip(): text for _, item, text in ((row[:10], row[10:38], row[39:]) for row in rows)}


async def test_all_is_well(command: Command, simulator: Simulator) -> None:
    assert (await command("topology")).code == 0
    found = await command("doctor")
    assert found.code == 0
    assert not lines(found, "WRONG")
    assert lines(found, "ok").keys() >= {
        *("settings", "store", "broker", "permissions", "version", "agreement", "declarations"),
        *("way avatar.commands", "way avatar.interrupts", "way avatar.dead", "credentials", "Avatar API"),
    }
    assert await simulator.sessions() == []


@pytest.mark.parametrize(
    ("item", "remedy", "settings"),
    [
        ("settings", "AVATAR_KS: missing", {"AVATAR_KS": ""}),
        ("settings", "AVATAR_ID_FIELD", {"AVATAR_ID_FIELD": "", "AVATAR_CREATE_PATH": "create"}),
        ("store", "STORE_URL: /nowhere/store.db cannot be written", {"STORE_URL": "sqlite:////nowhere/store.db"}),
        ("credentials", "AVATAR_KS_FILE: /nowhere cannot be read", {"AVATAR_KS_FILE": "/nowhere"}),
        ("broker", "AMQP_URL: no broker at 127.0.0.1:1/", {"AMQP_URL": "amqp://u:s3cret@127.0.0.1:1/"}),
        ("broker", "check user and password", {"AMQP_URL": "wrong password"}),
        ("broker", "refuses the virtual host", {"AMQP_URL": "wrong virtual host"}),
        ("agreement", "set PARTITIONS=1", {"PARTITIONS": "2"}),
        ("agreement", "set PREFETCH=4000", {"PREFETCH": "20"}),
        ("agreement", "STORE_URL", {"STORE_URL": "sqlite:///another.db"}),
        ("Avatar API", "check AVATAR_BASE_URL", {"AVATAR_BASE_URL": "http://127.0.0.1:1/"}),
        ("Avatar API", "404: check AVATAR_BASE_URL and AVATAR_CREATE_PATH", {"AVATAR_CREATE_PATH": "/creation"}),
    ],
)
async def test_what_is_wrong_is_named_with_the_remedy(
    command: Command, amqp_url: str, item: str, remedy: str, settings: dict[str, str]
) -> None:
    assert (await command("topology")).code == 0
    if settings.get("AMQP_URL") == "wrong password":
        settings = {"AMQP_URL": amqp_url.replace("guest:guest", "guest:s3cret")}
    if settings.get("AMQP_URL") == "wrong virtual host":
        settings = {"AMQP_URL": f"{amqp_url}.of-nobody"}
    found = await command("doctor", **settings)
    assert found.code == 1
    wrong = lines(found, "WRONG")
    if "AVATAR_ID_FIELD" not in settings:
        assert wrong.keys() == {item}
        assert remedy in wrong[item]
    assert "s3cret" not in found.out + found.err
    assert KS not in found.out + found.err


async def test_policies_cannot_be_seen_without_the_management_api(command: Command) -> None:
    for found in (await command("topology"), await command("doctor")):
        assert found.code == 0
        assert "set MANAGEMENT_URL" in lines(found, "unchecked")["policies"]


async def test_a_policy_that_harms_is_named_with_the_command(command: Command, owned_broker: OwnedBroker) -> None:
    async with policies(owned_broker) as operator:
        settings = {"AMQP_URL": owned_broker.url, "MANAGEMENT_URL": operator.api, "PARTITIONS": "4"}
        await operator.put("ttl", {"message-ttl": 3_600_000}, pattern=".*")
        for found in (await command("topology", **settings), await command("doctor", **settings)):
            assert found.code == 1
            wrong = lines(found, "WRONG")
            assert wrong.keys() == {"policy ttl"}
            assert f"rabbitmqctl clear_policy -p {operator.vhost} ttl" in wrong["policy ttl"]
        await operator.clear("ttl")
        found = await command("doctor", **settings)
        assert found.code == 0
        assert "policies" in lines(found, "ok")


async def test_a_limit_of_deliveries_is_found_without_the_management_api(
    command: Command, owned_broker: OwnedBroker
) -> None:
    """A worker refuses it, too: see test_stops.py."""
    async with policies(owned_broker) as operator:
        settings = {"AMQP_URL": owned_broker.url, "PARTITIONS": "4"}
        await operator.put("limit", {"delivery-limit": 5}, pattern="^avatar[.]commands", to="queues")
        for found in (await command("topology", **settings), await command("doctor", **settings)):
            assert found.code == 1
            assert "after 6 deliveries" in lines(found, "WRONG")["delivery limit"]
            assert "rabbitmqctl list_policies" in lines(found, "WRONG")["delivery limit"]
        await operator.clear("limit")
        found = await command("doctor", **settings)
        assert found.code == 0
        assert "delivery limit" in lines(found, "ok")


async def test_a_management_api_that_does_not_answer_is_wrong(command: Command) -> None:
    assert (await command("topology")).code == 0
    found = await command("doctor", MANAGEMENT_URL="http://u:s3cret@127.0.0.1:1/")
    assert found.code == 1
    assert lines(found, "WRONG").keys() == {"policies"}
    assert "MANAGEMENT_URL: no answer from http://127.0.0.1:1: " in lines(found, "WRONG")["policies"]
    assert "s3cret" not in found.out + found.err


async def test_live_it_asks_first(command: Command, simulator: Simulator) -> None:
    await command("topology")
    found = await command("doctor", "--live", answer="\n")
    assert "Go on? [y/N]" in found.out
    assert "not agreed to" in found.out
    assert found.code == 0
    assert await simulator.sessions() == []


@pytest.mark.parametrize("answer", ["y\n", None])
async def test_live_it_tries_everything_and_leaves_nothing_open(
    command: Command, simulator: Simulator, answer: str | None
) -> None:
    await command("topology")
    options = () if answer else ("--yes",)
    found = await command("doctor", "--live", *options, answer=answer or "", VOICE_ID="a-voice")
    assert found.code == 0
    assert ("Go on?" in found.out) == bool(answer)
    works = lines(found, "ok") | lines(found, "note")
    for how in ("with VOICE_ID", "without voice"):
        for verb in ("say-text", "keep-alive", "interrupt", "end"):
            assert works[f"{verb} {how}"] == "works"
    assert works["create, /create, avatarId"] == "works"
    assert "404" in works["create, bare base, avatarId"]
    assert "400" in works["create, /create, id"]
    assert works["settings"] == "use AVATAR_CREATE_PATH=/create AVATAR_ID_FIELD=avatarId"
    sessions = await simulator.sessions()
    assert len(sessions) == 3
    assert all(session["ended_by"] == "request" for session in sessions)
    secrets = {KS, *(session["id"] for session in sessions)}
    assert not [secret for secret in secrets if secret in found.out + found.err]


async def test_live_it_finds_the_form_that_works(command: Command, simulator: Simulator) -> None:
    await command("topology")
    await simulator.change(create_path="", avatar_field="id")
    found = await command("doctor", "--live", "--yes")
    assert found.code == 1
    assert lines(found, "WRONG").keys() == {"Avatar API", "create, /create, avatarId"}
    assert lines(found, "ok")["create, bare base, id"] == "works"
    assert lines(found, "note")["settings"] == "use AVATAR_CREATE_PATH= AVATAR_ID_FIELD=id"


async def test_live_a_session_without_a_voice_may_not_speak(command: Command, simulator: Simulator) -> None:
    await command("topology")
    await simulator.fault(kind="status", status=503, route="say-text")
    found = await command("doctor", "--live", "--yes")
    assert found.code == 1
    assert "set VOICE_ID" in lines(found, "WRONG")["say-text without voice"]
    assert all(session["ended_by"] == "request" for session in await simulator.sessions())


async def test_live_credentials_that_are_refused_are_named_and_not_shown(
    command: Command, simulator: Simulator
) -> None:
    await command("topology")
    found = await command("doctor", "--live", "--yes", AVATAR_KS="another-s3cret")
    assert found.code == 1
    assert "the KS is refused" in lines(found, "WRONG")["create, /create, avatarId"]
    assert "s3cret" not in found.out + found.err
    assert await simulator.sessions() == []


async def test_partitions_are_changed_and_said(
    command: Command, bus: Bus, start_worker: StartWorker, tmp_path: Path
) -> None:
    worker = await start_worker(PARTITIONS="2", STORE_URL=f"sqlite:///{tmp_path / 'store.db'}")
    refused = await command("topology", "repartition", "3", PARTITIONS="2")
    assert refused.code == 2
    assert "stop all workers" in refused.err
    await worker.killed()
    done = await command("topology", "repartition", "3", PARTITIONS="2")
    assert done.code == 0
    assert "Set PARTITIONS=3 and PREFETCH=4000" in done.out
    assert await bus.depth(partition_queue(2)) == 0
    assert (await command("topology", PARTITIONS="3")).code == 0
    refused = await command("topology", PARTITIONS="2")
    assert refused.code == 2
    assert "PARTITIONS=3" in refused.err


async def test_a_worker_with_another_prefetch_is_refused(command: Command, start_worker: StartWorker) -> None:
    await command("topology", PREFETCH="500", STORE_URL="sqlite://")
    worker = await start_worker(ready=False, PREFETCH="501")
    assert await worker.ended() == 2
    assert "set PREFETCH=500" in worker.log


@pytest.mark.parametrize("number", ["0", "101", "many", "-1"])
async def test_a_wrong_number_of_partitions_is_refused(command: Command, number: str) -> None:
    found = await command("topology", "repartition", number)
    assert found.code == 2
    assert "usage:" in found.err


def test_a_password_in_the_stores_address_is_not_shown() -> None:
    assert _where("postgresql://worker:secret@host:5432/avatar?password=secret") == "host:5432/avatar"
    assert _where("sqlite:////data/store.db") == "sqlite:////data/store.db"
