"""Policies that could lose or reorder commands are found by the management API, and what it takes to ask it is told."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aio_pika
import pytest
from aio_pika.abc import AbstractConnection
from aiohttp import web
from pydantic import SecretStr

from schemas.routes import partition_queue
from tests.integration.conftest import agreed
from tests.support.policies import Policies, policies
from worker.amqp import inspection, management, topology
from worker.amqp.limit import Limit
from worker.amqp.management import Management, NoAnswer, demand_harmless_policies, inspect_policies
from worker.amqp.policies import in_effect
from worker.core.finding import State
from worker.errors import TopologyError
from worker.local.broker import OwnedBroker
from worker.local.broker.base import free_port

PASSWORD = "s3cret-value"


@pytest.fixture
async def operator(owned_broker: OwnedBroker) -> AsyncIterator[Policies]:
    async with policies(owned_broker) as one:
        yield one


@pytest.fixture
async def connection(owned_broker: OwnedBroker) -> AsyncIterator[AbstractConnection]:
    async with await aio_pika.connect(owned_broker.url) as connection:
        await topology.declare(connection, agreed(2))
        yield connection


def api_of(management_url: str, amqp_url: str = "amqp://") -> Management:
    found = Management.of(SecretStr(management_url), SecretStr(amqp_url))
    assert found is not None
    return found


async def found(connection: AbstractConnection, api: Management) -> dict[str, tuple[State, str]]:
    """What is said of policies."""
    findings = await inspection.inspect(connection, agreed(2), api)
    return {one.item: (one.state, one.text) for one in findings if "polic" in one.item}


async def test_a_policy_that_harms_is_named_until_it_is_gone(
    owned_broker: OwnedBroker, operator: Policies, connection: AbstractConnection
) -> None:
    """At once: what the API says of queues would be late by seconds."""
    api = api_of(operator.api, owned_broker.url)
    fine = {"policies": (State.OK, "none that could lose or reorder commands")}
    assert await found(connection, api) == fine
    await demand_harmless_policies(api, 2)
    await operator.put("short", {"message-ttl": 60_000, "max-in-memory-length": 1})
    await operator.put("limit", {"delivery-limit": 2}, pattern="p01$", to="queues", operator=True)
    wrong = await found(connection, api)
    assert {state for state, _ in wrong.values()} == {State.WRONG}
    assert wrong.keys() == {"policy short", "operator policy limit"}
    _, short = wrong["policy short"]
    assert short.startswith(
        f"message-ttl=60000 on {partition_queue(0)}, {partition_queue(1)}, avatar.parked and 2 more"
    )
    assert f"`rabbitmqctl clear_policy -p {operator.vhost} short`" in short
    _, limit = wrong["operator policy limit"]
    assert limit.startswith(f"delivery-limit=2 on {partition_queue(1)}: ")
    assert f"`rabbitmqctl clear_operator_policy -p {operator.vhost} limit`" in limit
    with pytest.raises(TopologyError) as refused:
        await demand_harmless_policies(api, 2)
    assert short in str(refused.value)
    assert limit in str(refused.value)
    await operator.clear("short")
    await operator.clear("limit", operator=True)
    assert await found(connection, api) == fine
    await demand_harmless_policies(api, 2)


async def test_what_is_in_effect_is_what_the_broker_says(owned_broker: OwnedBroker, operator: Policies) -> None:
    """Patterns, kinds, priorities, operator policies, and keys that quorum queues do not know."""
    await operator.put("wide", {"max-length": 9, "delivery-limit": 9}, pattern=".*", priority=-1)
    await operator.put("queues", {"max-length": 8}, pattern=r"^avatar\.commands\.v1\.p\d\d$", to="queues")
    await operator.put("exchanges", {"alternate-exchange": "x"}, pattern="(?i)COMMANDS|dead", to="exchanges")
    await operator.put("lazy", {"queue-mode": "lazy", "max-length": 7}, pattern="p00|parked", to="queues", priority=7)
    await operator.put("first", {"max-length": 6}, pattern="(?<!v1.)p00", to="queues", priority=9)
    await operator.put("below", {"message-ttl": 5}, pattern="p0", to="queues", operator=True)
    await operator.put("above", {"max-length": 4}, pattern="p01$", to="queues", priority=1, operator=True)
    api = api_of(operator.api, owned_broker.url)
    all_of_them = await api.policies()
    assert len(all_of_them) == 7

    def named(name: str, *, queue: bool) -> dict[str, str]:
        (applied,) = in_effect(all_of_them, name, queue=queue)
        return {"operator_policy" if one.operator else "policy": one.name for one in applied}

    async with await aio_pika.connect(owned_broker.url) as connection:
        await topology.declare(connection, agreed(2))
        exchanges = await operator.seen("exchanges")
        for name in topology.exchanges(2):
            assert named(name, queue=False) == {
                key: exchanges[name][key] for key in ("policy",) if key in exchanges[name]
            }
        queues = [*topology.queues(2), topology.RECORD]
        async with asyncio.timeout(30):
            seen = await operator.seen("queues")
            while not all("policy" in seen[name] for name in queues):
                await asyncio.sleep(0.2)
                seen = await operator.seen("queues")
    shown = {
        name: {key: seen[name][key] for key in ("policy", "operator_policy") if seen[name][key]} for name in queues
    }
    assert shown == {name: named(name, queue=True) for name in queues}
    assert seen[partition_queue(1)]["effective_policy_definition"] == {"max-length": 4}
    assert seen[partition_queue(0)]["effective_policy_definition"] == {"max-length": 8, "message-ttl": 5}


async def test_it_takes_a_user_with_the_tag_management_and_nothing_more(
    owned_broker: OwnedBroker, operator: Policies
) -> None:
    await operator.put("short", {"message-ttl": 60_000})
    await operator.ask("PUT", "users/looker", {"password": "p/w", "tags": "management"})
    await operator.ask("PUT", f"permissions/{operator.vhost}/looker", {"configure": "", "write": "", "read": ""})
    url = operator.api.replace("://", "://looker:p%2Fw@")
    assert [one.name for one in await api_of(url, owned_broker.url).policies()] == ["short"]
    await operator.ask("PUT", "users/looker", {"password": "p/w", "tags": ""})
    for wrong in (url, url.replace("p%2Fw", PASSWORD)):
        with pytest.raises(NoAnswer, match=r"refuses the user: .* `management`") as refused:
            await api_of(wrong, owned_broker.url).policies()
        assert PASSWORD not in str(refused.value)
    await operator.ask("DELETE", "users/looker")


async def test_a_virtual_host_of_any_name(owned_broker: OwnedBroker, operator: Policies) -> None:
    await operator.ask("PUT", "vhosts/a%2Fb%20c")
    amqp_url = f"{owned_broker.url.rpartition('/')[0]}/a%2Fb%20c"
    async with policies(owned_broker, "a/b c") as there, await aio_pika.connect(amqp_url):
        await there.put("short", {"message-ttl": 60_000})
        with pytest.raises(TopologyError, match="clear_policy -p 'a/b c' short"):
            await demand_harmless_policies(api_of(operator.api, amqp_url), 1)
    await operator.ask("DELETE", "vhosts/a%2Fb%20c")


@pytest.mark.parametrize(
    ("amqp_url", "vhost"),
    [("amqp://h", "/"), ("amqp://h/", "/"), ("amqp://h/%2F", "/"), ("amqp://h/%2f", "/"), ("amqp://h/a", "a")],
)
def test_the_virtual_host_is_that_of_the_amqp_url(amqp_url: str, vhost: str) -> None:
    assert api_of("http://h:15672", amqp_url).vhost == vhost


@pytest.mark.parametrize("path", ["", "/", "/api", "/api/"])
def test_the_address_is_that_of_the_page_or_of_the_api(path: str) -> None:
    api = api_of(f"https://u:p%40@h:15671/prefix{path}", "amqp://v:w@h/")
    assert (api.url, api.user, api.password) == ("https://h:15671/prefix", "u", "p@")
    assert "p@" not in repr(api)


def test_the_user_is_that_of_the_amqp_url_unless_there_is_one() -> None:
    api = api_of("http://h:15672/", "amqp://v:w%2F@h/")
    assert (api.user, api.password) == ("v", "w/")


@asynccontextmanager
async def answering(status: int, body: str) -> AsyncIterator[str]:
    """Where somebody answers so, whatever is asked; status 0: never."""
    app, port = web.Application(), free_port()

    async def answer(_: web.Request) -> web.Response:
        await asyncio.sleep(0 if status else 60)
        return web.Response(status=status, text=body)

    app.router.add_get("/{path:.*}", answer)
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    try:
        yield f"http://u:{PASSWORD}@127.0.0.1:{port}/"
    finally:
        await runner.cleanup()


@pytest.mark.parametrize(
    ("status", "body", "told"),
    [
        (0, "", "no answer from {} within 0.5 s"),
        (200, "<html>", "what answers at {} is not RabbitMQ's management API"),
        (200, '{"error": "none"}', "what answers at {} is not RabbitMQ's management API"),
        (200, '[{"name": "x"}]', "what answers at {} is not RabbitMQ's management API"),
        (
            200,
            '[{"name": "x", "pattern": "x", "apply-to": "all", "definition": 1, "priority": 0}]',
            "is not RabbitMQ's",
        ),
        (302, "", "{} answers 302: check host, port and path"),
        (404, '{"error": "Object Not Found"}', "{} answers 404: check host, port and path"),
        (503, "", "{} answers 503: check host, port and path"),
    ],
)
async def test_what_is_no_answer_is_told_and_stops_no_worker(
    monkeypatch: pytest.MonkeyPatch, status: int, body: str, told: str
) -> None:
    monkeypatch.setattr(management, "TIMEOUT_S", 0.5)
    async with answering(status, body) as url:
        (finding,) = await inspect_policies(api_of(url), 2)
        assert (finding.state, finding.item) == (State.WRONG, "policies")
        assert finding.text.startswith("MANAGEMENT_URL: ")
        assert told.format(url.replace(f"u:{PASSWORD}@", "").rstrip("/")) in finding.text
        assert PASSWORD not in finding.text
        await demand_harmless_policies(api_of(url), 2)


@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_nobody_listens(scheme: str) -> None:
    api = api_of(f"{scheme}://u:{PASSWORD}@127.0.0.1:{free_port()}")
    with pytest.raises(NoAnswer, match=f"MANAGEMENT_URL: no answer from {api.url}: ") as refused:
        await api.policies()
    assert PASSWORD not in str(refused.value)
    await demand_harmless_policies(api, 2)


async def test_without_an_address_nothing_is_asked() -> None:
    (finding,) = await inspect_policies(None, 2)
    assert finding.state is State.UNCHECKED
    for remedy in ("MANAGEMENT_URL", "rabbitmqctl list_policies", "rabbitmqctl list_operator_policies"):
        assert remedy in finding.text
    await demand_harmless_policies(None, 2)


async def test_a_limit_that_cannot_be_tried_out_is_unknown_and_stops_nobody() -> None:
    limit = Limit(f"amqp://guest:guest@127.0.0.1:{free_port()}/", heartbeat_s=10)
    found = await limit.inspect()
    assert (found.state, found.item) == (State.UNCHECKED, "delivery limit")
    await limit.demand_none()
