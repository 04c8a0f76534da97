"""`ports.AvatarApi`: the real client against the shipped simulator."""

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from tests.support.conversation import speak
from tests.support.scrape import value
from tests.support.simulator import Simulator
from worker.avatar import faults
from worker.avatar.client import Api, AvatarClient
from worker.avatar.credentials import FixedKs
from worker.core.model import TOO_LATE, CallKind, CallResult, Part, Piece, Session
from worker.core.work import Open
from worker.ops.metrics import Metrics

ANN = Open("ann", "v1", 1.1)
VERBS = ["create", "init-client", "say-text", "interrupt", "keep-alive", "end"]
ON_SESSION = VERBS[1:]
SHORT_S = 0.3


def piece(text: str = "Hello", *, final: bool = True) -> Piece:
    return Piece("t1", text, final, (Part(speak("t1", text, final=True), 0, len(text), last=True),))


@pytest.fixture
async def client(simulator: Simulator) -> AsyncIterator[AvatarClient]:
    async with AvatarClient(Api(simulator.url), FixedKs(SecretStr("demo-ks"))) as one:
        yield one


@pytest.fixture
async def session(client: AvatarClient) -> Session:
    result, created = await client.create(ANN)
    assert created is not None, result
    return created


async def call(client: AvatarClient, verb: str, session: Session) -> CallResult:
    """One call of any kind."""
    calls: dict[str, Callable[[], Awaitable[CallResult | tuple[CallResult, Any]]]] = {
        "create": lambda: client.create(ANN),
        "init-client": lambda: client.init_client(session),
        "say-text": lambda: client.say(session, piece()),
        "interrupt": lambda: client.interrupt(session),
        "keep-alive": lambda: client.keep_alive(session),
        "end": lambda: client.end(session),
    }
    answer = await calls[verb]()
    if isinstance(answer, CallResult):
        return answer
    result, got = answer
    assert (got is not None) == (result.kind is CallKind.OK), "it brings something exactly if it succeeds"
    return result


class TestMetrics:
    @pytest.mark.parametrize("verb", VERBS)
    async def test_a_call_is_counted_by_its_route_and_what_became_of_it(self, simulator: Simulator, verb: str) -> None:
        metrics = Metrics()
        async with AvatarClient(Api(simulator.url), FixedKs(SecretStr("demo-ks")), metrics) as client:
            _, session = await client.create(ANN)
            assert session is not None
            await simulator.fault(kind="status", status=503, route=verb, times=1)
            await call(client, verb, session)
            await call(client, verb, session)
        assert value(metrics.registry, "api_calls_total", route=verb, outcome="ok") == 1 + (verb == "create")
        assert value(metrics.registry, "api_calls_total", route=verb, outcome="not_taken") == 1
        assert value(metrics.registry, "api_call_duration_seconds_count", route=verb) == 2 + (verb == "create")


class TestSuccess:
    async def test_a_strict_server_has_nothing_to_complain_about(self, client: AvatarClient, session: Session) -> None:
        for verb in ON_SESSION:
            assert await call(client, verb, session) == CallResult(CallKind.OK, 200), verb

    async def test_what_is_sent(self, client: AvatarClient, session: Session, simulator: Simulator) -> None:
        await client.say(session, piece('Grüße, 👋 "you"\n', final=False))
        created, said = await simulator.calls()
        assert created["body"] == {"visualConfig": {"avatarId": "ann"}, "voiceConfig": {"id": "v1", "speed": 1.1}}
        assert said["body"] == {"text": 'Grüße, 👋 "you"\n', "turnId": "t1", "isFinal": False}

    async def test_what_is_not_to_be_said_any_more_when_its_bytes_would_leave_never_arrives(
        self, client: AvatarClient, session: Session, simulator: Simulator
    ) -> None:
        asked: list[int] = []

        def still() -> bool:
            asked.append(len(client._http.connector._acquired))  # type: ignore[union-attr]
            return False

        assert await client.say(session, piece("no"), still) is TOO_LATE
        assert asked == [1], "there was a connection, and nothing left to wait for"
        assert (await client.say(session, piece("yes"))).kind is CallKind.OK
        assert [one["body"]["text"] for one in await simulator.calls() if one["route"] == "say-text"] == ["yes"]

    async def test_a_session_remembers_what_it_was_made_with(self, session: Session) -> None:
        assert (session.avatar_id, session.voice_id, session.voice_speed) == ("ann", "v1", 1.1)
        assert session.token
        assert session.token not in repr(session)

    async def test_a_viewer(self, client: AvatarClient, session: Session) -> None:
        _, viewer = await client.init_client(session)
        assert viewer is not None
        assert viewer.whep_url.endswith(session.session_id)
        assert set(viewer.turn) == {"url", "username", "credential"}
        assert session.session_id not in repr(viewer)

    @pytest.mark.parametrize("speed", [None, 1.5])
    async def test_no_voice_config_without_a_voice(
        self, client: AvatarClient, simulator: Simulator, speed: float | None
    ) -> None:
        result, _ = await client.create(Open("ann", None, speed))
        assert result.kind is CallKind.OK
        assert (await simulator.calls())[0]["body"] == {"visualConfig": {"avatarId": "ann"}}


class TestForms:
    async def created(self, simulator: Simulator, api: Api, wanted: Open = ANN) -> dict[str, Any]:
        async with AvatarClient(api, FixedKs(SecretStr("demo-ks"))) as client:
            result, _ = await client.create(wanted)
        (created,) = await simulator.calls()
        assert result.kind is CallKind.OK, created
        return created

    @pytest.mark.parametrize("path", ["/create", "/make", ""])
    async def test_the_create_path(self, simulator: Simulator, path: str) -> None:
        await simulator.control("POST", "settings", {"create_path": path})
        created = await self.created(simulator, Api(simulator.url, create_path=path))
        assert created["path"].endswith(f"/avatar-session{path}")

    async def test_the_avatar_field(self, simulator: Simulator) -> None:
        await simulator.control("POST", "settings", {"avatar_field": "id"})
        created = await self.created(simulator, Api(simulator.url, avatar_field="id"))
        assert created["body"]["visualConfig"] == {"id": "ann"}

    async def test_extra_fields_are_merged_under_ours(self, simulator: Simulator) -> None:
        extra = {"clientId": "shop", "voiceConfig": {"language": "de", "id": "overruled"}}
        created = await self.created(simulator, Api(simulator.url, create_extra=extra))
        assert created["body"] == {
            "clientId": "shop",
            "visualConfig": {"avatarId": "ann"},
            "voiceConfig": {"language": "de", "id": "v1", "speed": 1.1},
        }
        assert extra == {"clientId": "shop", "voiceConfig": {"language": "de", "id": "overruled"}}

    async def test_extra_voice_fields_wait_for_a_voice(self, simulator: Simulator) -> None:
        api = Api(simulator.url, create_extra={"voiceConfig": {"language": "de"}})
        assert "voiceConfig" not in (await self.created(simulator, api, Open("ann", None, None)))["body"]


class TestFaults:
    @pytest.mark.parametrize("when", ["before", "after"])
    @pytest.mark.parametrize("verb", VERBS)
    @pytest.mark.parametrize(
        ("status", "kind"),
        [
            (400, CallKind.REFUSED),
            (408, CallKind.NOT_TAKEN),
            (429, CallKind.NOT_TAKEN),
            (500, CallKind.UNKNOWN),
            (502, CallKind.UNKNOWN),
            (503, CallKind.NOT_TAKEN),
            (504, CallKind.UNKNOWN),
            (599, CallKind.UNKNOWN),
        ],
    )
    async def test_status(  # noqa: PLR0917  pytest hands over what a table says by name
        self,
        client: AvatarClient,
        session: Session,
        simulator: Simulator,
        verb: str,
        when: str,
        status: int,
        kind: CallKind,
    ) -> None:
        await simulator.fault("status", route=verb, status=status, when=when, error="said so")
        assert await call(client, verb, session) == CallResult(kind, status, error="said so")
        calls = [one for one in await simulator.calls() if one["route"] == verb]
        assert len(calls) == (2 if verb == "create" else 1), "one attempt a call"

    @pytest.mark.parametrize("verb", ON_SESSION)
    @pytest.mark.parametrize(("done", "status"), [("expire", 401), ("forget", 404), ("end", 410)])
    async def test_a_session_that_is_gone(
        self, client: AvatarClient, session: Session, simulator: Simulator, *, verb: str, done: str, status: int
    ) -> None:
        await simulator.control("POST", f"sessions/{session.session_id}/{done}")
        result = await call(client, verb, session)
        assert (result.kind, result.status) == (CallKind.GONE, status)

    @pytest.mark.parametrize("status", [401, 403])
    async def test_a_ks_that_is_refused(self, client: AvatarClient, simulator: Simulator, status: int) -> None:
        await simulator.fault("status", route="create", status=status)
        result, created = await client.create(ANN)
        assert (result.kind, result.status, created) == (CallKind.DENIED, status, None)
        assert "Kaltura Session" in result.error

    async def test_an_unknown_create_path_is_no_lost_session(self, simulator: Simulator) -> None:
        async with AvatarClient(Api(simulator.url, create_path="/nowhere"), FixedKs(SecretStr("demo-ks"))) as client:
            result, _ = await client.create(ANN)
        assert (result.kind, result.status) == (CallKind.REFUSED, 404)

    @pytest.mark.parametrize("verb", VERBS)
    async def test_200_without_success(
        self, client: AvatarClient, session: Session, simulator: Simulator, verb: str
    ) -> None:
        await simulator.fault("refuse", route=verb)
        assert await call(client, verb, session) == CallResult(CallKind.REFUSED, 200, error="Request refused")

    @pytest.mark.parametrize("verb", VERBS)
    async def test_200_with_an_exception_object(
        self, client: AvatarClient, session: Session, simulator: Simulator, verb: str
    ) -> None:
        await simulator.fault("exception", route=verb, error="SERVICE_FORBIDDEN")
        result = await call(client, verb, session)
        assert (result.kind, result.status) == (CallKind.REFUSED, 200)
        assert "SERVICE_FORBIDDEN" in result.error

    @pytest.mark.parametrize("verb", VERBS)
    @pytest.mark.parametrize(("status", "kind"), [(502, CallKind.UNKNOWN), (503, CallKind.NOT_TAKEN)])
    async def test_an_error_that_is_no_json(
        self, client: AvatarClient, session: Session, simulator: Simulator, *, verb: str, status: int, kind: CallKind
    ) -> None:
        await simulator.fault("garbage", route=verb, status=status)
        assert await call(client, verb, session) == CallResult(kind, status, error=f"HTTP {status}")

    @pytest.mark.parametrize("verb", VERBS)
    async def test_retry_after(self, client: AvatarClient, session: Session, simulator: Simulator, verb: str) -> None:
        await simulator.fault("status", route=verb, status=429, retry_after=7)
        assert (await call(client, verb, session)).retry_after_s == 7

    @pytest.mark.parametrize("verb", VERBS)
    @pytest.mark.parametrize("when", ["before", "after"])
    async def test_a_dropped_connection(
        self, client: AvatarClient, session: Session, simulator: Simulator, verb: str, when: str
    ) -> None:
        await simulator.fault("drop", route=verb, when=when)
        result = await call(client, verb, session)
        assert (result.kind, result.status) == (CallKind.UNKNOWN, None)
        calls = [one for one in await simulator.calls() if one["route"] == verb]
        assert len(calls) == (2 if verb == "create" else 1), "never sent again behind our back"
        assert calls[-1]["effect"] is (when == "after")

    @pytest.mark.parametrize("verb", VERBS)
    @pytest.mark.parametrize("when", ["before", "after"])
    async def test_an_answer_that_does_not_come(
        self, session: Session, simulator: Simulator, verb: str, when: str
    ) -> None:
        api = Api(simulator.url, timeout_s=SHORT_S, create_timeout_s=SHORT_S, interrupt_timeout_s=SHORT_S)
        await simulator.fault("hang", route=verb, when=when)
        async with AvatarClient(api, FixedKs(SecretStr("demo-ks"))) as client, asyncio.timeout(5):
            result = await call(client, verb, session)
        assert (result.kind, result.status) == (CallKind.UNKNOWN, None)
        await simulator.control("POST", "release")

    @pytest.mark.parametrize("verb", VERBS)
    async def test_a_refused_connection_surely_took_nothing(self, verb: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            api = Api(f"http://127.0.0.1:{free.getsockname()[1]}/v1")
            async with AvatarClient(api, FixedKs(SecretStr("demo-ks"))) as client:
                result = await call(client, verb, Session("s1", "secret-token"))
        assert (result.kind, result.status) == (CallKind.NOT_TAKEN, None)
        assert "secret" not in repr(result)

    async def test_another_call_goes_well_after_any_of_them(
        self, client: AvatarClient, session: Session, simulator: Simulator
    ) -> None:
        for kind in ("drop", "garbage", "refuse", "exception"):
            await simulator.fault(kind, route="say-text")
            assert (await client.say(session, piece())).kind is not CallKind.OK
            assert (await client.say(session, piece())).kind is CallKind.OK

    @pytest.mark.usefixtures("session")
    async def test_a_full_account(self, client: AvatarClient, simulator: Simulator) -> None:
        await simulator.control("POST", "settings", {"session_limit": 1})
        result, _ = await client.create(ANN)
        assert (result.kind, result.status) == (CallKind.NOT_TAKEN, 429)

    async def test_a_session_id_stays_one_segment_of_the_path(self, client: AvatarClient, simulator: Simulator) -> None:
        await client.say(Session("a/../b?c#d", "t"), piece())
        (stray,) = await simulator.calls()
        assert "/../" not in stray["path"]
        assert "b?c" not in stray["path"]


class TestTable:
    @pytest.mark.parametrize(
        ("document", "kind"),
        [
            ({"success": True}, CallKind.OK),
            ({"success": 1}, CallKind.REFUSED),
            ({"success": "true"}, CallKind.REFUSED),
            ({}, CallKind.REFUSED),
            ([], CallKind.REFUSED),
            (None, CallKind.UNKNOWN),
        ],
    )
    def test_success_is_true_and_nothing_else(self, document: object, kind: CallKind) -> None:
        assert faults.of_answer(200, document, None, creating=False).kind is kind

    @pytest.mark.parametrize(
        ("header", "seconds"),
        [(None, None), ("0", 0), ("2.5", 2.5), ("-3", 0), ("86400", 60), ("inf", 60), ("nan", None), ("soon", None)],
    )
    def test_retry_after(self, header: str | None, seconds: float | None) -> None:
        assert faults.of_answer(429, {}, header, creating=False).retry_after_s == seconds

    def test_retry_after_as_a_date(self) -> None:
        date = format_datetime(datetime.now(UTC) + timedelta(seconds=20), usegmt=True)
        seconds = faults.of_answer(503, None, date, creating=False).retry_after_s
        assert seconds is not None
        assert 10 < seconds <= 20

    @given(
        status=st.integers(200, 599),
        document=st.recursive(
            st.none() | st.booleans() | st.integers() | st.text(),
            lambda inner: st.dictionaries(st.sampled_from(["success", "error", "message", "objectType"]), inner),
        ),
        header=st.none() | st.text() | st.just("Mon, 01 Jan 99999999999999999999 00:00:00 GMT"),
        creating=st.booleans(),
    )
    def test_anything_is_judged(self, status: int, document: object, header: str | None, creating: bool) -> None:
        result = faults.of_answer(status, document, header, creating=creating)
        assert (result.kind is CallKind.OK) <= (200 <= status < 300)
        assert len(result.error) <= 250
