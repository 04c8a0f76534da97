"""Where the Kaltura Session comes from: fixed, a file that is rotated, or the KS service, which the simulator plays."""

import asyncio
import hashlib
import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from pydantic import SecretStr

from tests.support.fakes import FakeClock, idle
from tests.support.simulator import Simulator
from worker.avatar.client import Api, AvatarClient
from worker.avatar.credentials import FixedKs, KsFile, KsSource, Minted, MintedKs, NoKs
from worker.avatar.ks_service import Account, AdminSecret, AppToken, KsService
from worker.core.model import CallKind, CallResult
from worker.core.work import Open
from worker.errors import ConfigurationError

ANN = Open("ann", "v1", None)
SECRET = AdminSecret("demo-secret")
TOKEN = AppToken("0_demo", "demo-app-token")
DOWN = CallResult(CallKind.NOT_TAKEN, 503, error="down")
WRONG = CallResult(CallKind.DENIED, 200, error="wrong hash")


class TestStored:
    async def test_a_file_is_read_again_when_it_changes(self, simulator: Simulator, tmp_path: Path) -> None:
        path = tmp_path / "ks"
        path.write_text("demo-ks\n")
        source = KsFile(path)
        async with AvatarClient(Api(simulator.url), source) as client:
            assert (await client.create(ANN))[0].kind is CallKind.OK
            await simulator.control("POST", "settings", {"ks": "fresh"})
            assert (await client.create(ANN))[0].kind is CallKind.DENIED
            before = source.ready
            path.write_text("fresh\n")
            assert (before, source.ready) == (False, True), "nobody knows yet whether this one is refused"
            assert (await client.create(ANN))[0].kind is CallKind.OK

    async def test_a_mounted_secret_changes_by_a_link(self, tmp_path: Path) -> None:
        """As Kubernetes does it: the file is a link into `..data`, itself a link that is replaced at once."""
        for version in ("first", "second"):
            (tmp_path / version).mkdir()
            (tmp_path / version / "ks").write_text(version.ljust(8, "-"))
            os.utime(tmp_path / version / "ks", ns=(1, 1))
        (tmp_path / "..data").symlink_to("first")
        (tmp_path / "ks").symlink_to("..data/ks")
        source = KsFile(tmp_path / "ks")
        assert await source.current() == "first---"
        (tmp_path / "..new").symlink_to("second")
        (tmp_path / "..new").rename(tmp_path / "..data")
        assert await source.current() == "second--"

    async def test_one_that_is_rotated_while_it_is_refused_is_tried_once(
        self, simulator: Simulator, tmp_path: Path
    ) -> None:
        path = tmp_path / "ks"
        path.write_text("old")

        class Rotating(KsFile):
            async def after(self, refused: str) -> str:
                path.write_text("demo-ks")
                return await super().after(refused)

        source = Rotating(path)
        async with AvatarClient(Api(simulator.url), source) as client:
            assert (await client.create(ANN))[0].kind is CallKind.OK
        assert [one["status"] for one in await simulator.calls()] in ([200, 401], [401, 200])
        assert source.ready

    @pytest.mark.parametrize("meanwhile", [None, b"", b" \n", b"\xff\xfe", b"two\nlines"])
    async def test_a_file_that_is_being_rotated_leaves_the_last_one(
        self, tmp_path: Path, meanwhile: bytes | None
    ) -> None:
        path = tmp_path / "ks"
        path.write_text("first")
        source = KsFile(path)
        if meanwhile is None:
            path.unlink()
        else:
            path.write_bytes(meanwhile)
        assert await source.current() == "first"
        path.write_text("second-one")
        assert await source.current() == "second-one"

    @pytest.mark.parametrize("content", [None, b"", b"\n", b"\xff", b"two words", b"two\r\nlines"])
    def test_nothing_to_begin_with(self, tmp_path: Path, content: bytes | None) -> None:
        path = tmp_path / "ks"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ConfigurationError, match="AVATAR_KS_FILE") as raised:
            KsFile(path)
        assert "two" not in str(raised.value).removeprefix(f"AVATAR_KS_FILE: {path}")

    async def test_blanks_around_it_do_not_matter(self) -> None:
        assert await FixedKs(SecretStr(" djJ8abc=\n")).current() == "djJ8abc="

    async def test_a_fixed_one_that_is_refused_is_not_ready_until_it_is_taken_again(self, simulator: Simulator) -> None:
        source = FixedKs(SecretStr("demo-ks"))
        async with AvatarClient(Api(simulator.url), source) as client:
            await simulator.control("POST", "settings", {"ks": None})
            assert (await client.create(ANN))[0].kind is CallKind.DENIED
            assert len(await simulator.calls()) == 1, "there is no other to try"
            assert not source.ready
            await simulator.control("POST", "settings", {"ks": "demo-ks"})
            assert (await client.create(ANN))[0].kind is CallKind.OK
            assert source.ready

    async def test_a_403_may_be_about_the_avatar(self, simulator: Simulator) -> None:
        source = FixedKs(SecretStr("demo-ks"))
        async with AvatarClient(Api(simulator.url), source) as client:
            await simulator.fault("status", route="create", status=403)
            assert (await client.create(ANN))[0].kind is CallKind.DENIED
        assert source.ready


class Mint:
    """A KS service on paper: `answers` are used up one by one, then each makes another that lasts `life_s`."""

    def __init__(self, *answers: CallResult | Exception, life_s: float = 1000.0) -> None:
        self.answers = list(answers)
        self.life_s = life_s
        self.made = 0
        self.asked = 0
        self.gate: asyncio.Event | None = None

    async def __call__(self) -> Minted | CallResult:
        self.asked += 1
        if self.gate is not None:
            await self.gate.wait()
        await asyncio.sleep(0)
        if self.answers:
            answer = self.answers.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return answer
        self.made += 1
        return Minted(f"ks{self.made}", self.life_s)


class TestMinted:
    """Renewal, on a clock that the test puts on."""

    async def test_one_for_all_who_ask_at_once(self) -> None:
        mint = Mint()
        source = MintedKs(mint, FakeClock())
        assert await asyncio.gather(*(source.current() for _ in range(20))) == ["ks1"] * 20
        assert mint.asked == 1

    async def test_who_asks_is_cancelled_the_others_wait_on(self) -> None:
        mint = Mint()
        mint.gate = asyncio.Event()
        source = MintedKs(mint, FakeClock())
        first, second = (asyncio.create_task(source.current()) for _ in range(2))
        await idle()
        first.cancel()
        await idle()
        mint.gate.set()
        assert await second == "ks1"
        assert (first.cancelled(), mint.asked) == (True, 1)

    async def test_it_is_renewed_ahead_of_its_end(self, monkeypatch: pytest.MonkeyPatch) -> None:
        clock, mint = FakeClock(), Mint()
        source = MintedKs(mint, clock)
        async with running(source, monkeypatch):
            await idle()
            assert await source.current() == "ks1"
            clock.now += 899
            await idle()
            assert mint.made == 1
            clock.now += 2
            await idle()
            assert (await source.current(), mint.asked) == ("ks2", 2)

    async def test_a_service_that_is_down_when_it_is_due_costs_nothing_yet(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        clock, mint = FakeClock(), Mint()
        source = MintedKs(mint, clock)
        async with running(source, monkeypatch):
            await idle()
            mint.answers = [DOWN] * 3
            clock.now += 901
            for _ in range(8):
                await idle()
                assert source.ready
                assert await source.current() in ("ks1", "ks2")
                clock.now += 3
            assert await source.current() == "ks2"
            assert mint.asked == 5

    @pytest.mark.parametrize(("answer", "pause_s"), [(DOWN, 0.2), (WRONG, 30.0), (RuntimeError("a bug"), 0.2)])
    async def test_without_one_all_are_told_why_and_the_service_is_left_alone_for_a_while(
        self, answer: CallResult | Exception, pause_s: float
    ) -> None:
        clock, mint = FakeClock(), Mint(answer)
        source = MintedKs(mint, clock)
        assert not source.ready
        for _ in range(3):
            with pytest.raises(NoKs) as raised:
                await source.current()
            result = raised.value.result
            assert result.kind is (CallKind.DENIED if answer is WRONG else CallKind.NOT_TAKEN)
            assert result.local, "it says nothing about the Avatar API"
            assert result.retry_after_s is not None
            assert pause_s / 2 <= result.retry_after_s <= pause_s
        assert mint.asked == 1
        clock.now += pause_s + 0.1
        assert await source.current() == "ks1"
        assert source.ready

    async def test_one_that_the_api_refuses_is_replaced_once_for_all(self) -> None:
        clock, mint = FakeClock(), Mint()
        source = MintedKs(mint, clock)
        old = await source.current()
        clock.now += 100
        assert await asyncio.gather(*(source.after(old) for _ in range(5))) == ["ks2"] * 5
        assert mint.asked == 2

    async def test_a_new_one_that_is_refused_is_not_replaced_again_and_again(self) -> None:
        clock, mint = FakeClock(), Mint()
        source = MintedKs(mint, clock)
        old = await source.current()
        assert await source.after(old) == old
        clock.now += 6
        assert await source.after(old) == "ks2"

    async def test_one_that_is_refused_while_the_service_is_down_is_not_used_again(self) -> None:
        clock, mint = FakeClock(), Mint()
        source = MintedKs(mint, clock)
        old = await source.current()
        clock.now += 100
        mint.answers = [DOWN]
        source.note(old, accepted=False)
        with pytest.raises(NoKs):
            await source.after(old)
        assert not source.ready
        clock.now += 1
        assert await source.current() == "ks2"

    async def test_one_that_may_not_create_this_avatar_is_kept_while_the_service_is_down(self) -> None:
        clock, mint = FakeClock(), Mint()
        source = MintedKs(mint, clock)
        old = await source.current()
        clock.now += 100
        mint.answers = [DOWN]
        assert await asyncio.gather(*(source.after(old) for _ in range(5))) == [old] * 5
        assert mint.asked == 2
        assert source.ready
        clock.now += 1
        assert await source.after(old) == "ks2"

    async def test_one_that_has_expired_is_not_used(self) -> None:
        clock, mint = FakeClock(), Mint()
        source = MintedKs(mint, clock)
        await source.current()
        clock.now += 1001
        mint.answers = [DOWN]
        with pytest.raises(NoKs):
            await source.current()

    def test_it_is_in_no_repr(self) -> None:
        assert "hidden" not in repr(Minted("hidden", 1.0)) + repr(AppToken("id", "hidden")) + repr(
            AdminSecret("hidden")
        )


class running:  # noqa: N801
    """The source renews by itself in here, looking whenever others run."""

    def __init__(self, source: MintedKs, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("worker.avatar.credentials.LOOK_S", 0)
        self._source = source

    async def __aenter__(self) -> None:
        self._task = asyncio.create_task(self._source.run())

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])
        assert self._task.cancelled()


def account(simulator: Simulator, by: AppToken | AdminSecret = TOKEN, **fields: Any) -> Account:
    return Account(simulator.url[: simulator.url.index("/v1")], **{"partner_id": 101, "by": by} | fields)


@pytest.fixture
async def opened(
    simulator: Simulator,
) -> AsyncIterator[Callable[..., Awaitable[tuple[AvatarClient, KsSource, FakeClock]]]]:
    """Makes clients whose Kaltura Session the simulator makes."""
    stack: list[AvatarClient | KsService] = []

    async def open_client(
        by: AppToken | AdminSecret = TOKEN, **fields: Any
    ) -> tuple[AvatarClient, KsSource, FakeClock]:
        clock, service = FakeClock(), KsService(account(simulator, by, **fields))
        source = MintedKs(service.mint, clock)
        client = AvatarClient(Api(simulator.url), source)
        stack.extend([client, service])
        return client, source, clock

    yield open_client
    for one in stack:
        await one.__aexit__()


class TestService:
    @pytest.mark.parametrize("by", [SECRET, TOKEN], ids=["secret", "app token"])
    async def test_what_it_makes_creates_sessions(self, opened: Any, simulator: Simulator, by: Any) -> None:
        client, source, _ = await opened(by)
        for _ in range(2):
            assert (await client.create(ANN))[0].kind is CallKind.OK
        routes = [call["route"] for call in await simulator.calls() if call["route"] != "create"]
        assert routes == (["ks-start"] if by is SECRET else ["ks-widget", "ks-app-token"])
        assert source.ready

    @pytest.mark.parametrize("hash_type", ["MD5", "SHA1", "SHA256", "SHA512"])
    async def test_every_hash(self, opened: Any, simulator: Simulator, hash_type: Any) -> None:
        await simulator.control("POST", "settings", {"app_token_hash": hash_type})
        client, _, _ = await opened(AppToken("0_demo", "demo-app-token", hash_type))
        assert (await client.create(ANN))[0].kind is CallKind.OK

    @pytest.mark.parametrize(
        ("by", "partner_id", "said"),
        [
            (AppToken("0_demo", "demo-app-token", "SHA1"), 101, "Invalid application token hash"),
            (AppToken("0_demo", "wrong-app-token"), 101, "Invalid application token hash"),
            (AppToken("0_other", "demo-app-token"), 101, "APP_TOKEN_ID_NOT_FOUND"),
            (TOKEN, 102, "INVALID_WIDGET_ID"),
            (AdminSecret("wrong-secret"), 101, "START_SESSION_ERROR"),
            (SECRET, 102, "START_SESSION_ERROR"),
        ],
    )
    async def test_what_the_service_refuses_with_status_200(
        self, opened: Any, simulator: Simulator, by: Any, partner_id: int, said: str
    ) -> None:
        client, source, _ = await opened(by, partner_id=partner_id)
        result, _ = await client.create(ANN)
        assert (result.kind, result.status) == (CallKind.DENIED, 200)
        assert said in result.error
        assert "KALTURA_" in result.error, "the operator is told what to look at"
        assert not {"wrong", "demo-"} & set(result.error.replace("-", " ").split())
        assert not source.ready
        assert not [call for call in await simulator.calls() if call["route"] == "create"]

    async def test_a_token_that_was_revoked(self, opened: Any, simulator: Simulator) -> None:
        await simulator.control("POST", "settings", {"app_token": None})
        client, _, clock = await opened()
        assert (await client.create(ANN))[0].kind is CallKind.DENIED
        await simulator.control("POST", "settings", {"app_token": "demo-app-token"})
        clock.now += 31
        assert (await client.create(ANN))[0].kind is CallKind.OK

    async def test_a_session_that_may_not_create_is_refused(self, opened: Any) -> None:
        client, _, _ = await opened(AdminSecret("demo-secret", privileges=""))
        result, _ = await client.create(ANN)
        assert (result.kind, result.status) == (CallKind.DENIED, 403)

    @pytest.mark.parametrize("how", ["expire", "revoke"])
    async def test_one_that_expired_or_was_revoked_is_replaced_within_the_call(
        self, opened: Any, simulator: Simulator, how: str
    ) -> None:
        client, _, clock = await opened()
        await client.create(ANN)
        assert await simulator.control("POST", f"ks/{how}") == {"refused": 2}
        clock.now += 60
        assert (await client.create(ANN))[0].kind is CallKind.OK
        assert [call["status"] for call in await simulator.calls() if call["route"] == "create"] == [200, 401, 200]

    async def test_the_service_says_how_long_it_lasts(self, opened: Any, simulator: Simulator) -> None:
        await simulator.control("POST", "settings", {"ks_life_s": 30})
        client, source, clock = await opened()
        await client.create(ANN)
        clock.now += 28
        assert source.ready
        clock.now += 3
        assert not source.ready

    @pytest.mark.parametrize(
        "fault",
        [
            {"kind": "status", "status": 503},
            {"kind": "status", "status": 500},
            {"kind": "status", "status": 429, "retry_after": 4},
            {"kind": "garbage"},
            {"kind": "garbage", "status": 503},
            {"kind": "drop"},
            {"kind": "drop", "when": "after"},
            {"kind": "hang"},
            {"kind": "exception"},
        ],
        ids=json.dumps,
    )
    @pytest.mark.parametrize("route", ["ks-widget", "ks-app-token"])
    async def test_a_service_in_trouble_is_asked_again_later(
        self, opened: Any, simulator: Simulator, route: str, fault: dict[str, Any]
    ) -> None:
        await simulator.fault(**fault, route=route)
        client, _, clock = await opened(timeout_s=0.3)
        result, _ = await client.create(ANN)
        assert (result.kind, result.local) == (CallKind.NOT_TAKEN, True)
        assert result.error.startswith("no Kaltura Session")
        assert result.retry_after_s is not None
        assert result.retry_after_s >= fault.get("retry_after", 0)
        await simulator.control("POST", "release")
        clock.now += result.retry_after_s
        assert (await client.create(ANN))[0].kind is CallKind.OK

    async def test_no_connection(self, simulator: Simulator) -> None:
        async with KsService(account(simulator, timeout_s=1).__class__("http://127.0.0.1:1", 101, TOKEN)) as service:
            result = await service.mint()
        assert isinstance(result, CallResult)
        assert (result.kind, result.status) == (CallKind.NOT_TAKEN, None)


class TestSimulatedService:
    """It is strict, and its transcript holds no secret."""

    async def ask(self, simulator: Simulator, action: str, headers: Any = None, **form: str) -> tuple[int, Any]:
        origin = simulator.url[: simulator.url.index("/v1")]
        url = f"{origin}/api_v3/service/{action}"
        async with aiohttp.ClientSession() as http, http.post(url, data=form, headers=headers) as answer:
            text = await answer.text()
            return answer.status, json.loads(text) if "json" in answer.content_type else text

    async def test_the_way_by_an_app_token(self, simulator: Simulator) -> None:
        status, widget = await self.ask(simulator, "session/action/startWidgetSession", widgetId="_101", format="1")
        assert status == 200
        token_hash = hashlib.sha256((widget["ks"] + "demo-app-token").encode()).hexdigest()
        form = {"ks": widget["ks"], "id": "0_demo", "tokenHash": token_hash, "type": "2", "format": "1"}
        _, session = await self.ask(simulator, "appToken/action/startSession", **form)
        assert session["ks"].startswith("djJ8")
        transcript = json.dumps(await simulator.control("GET", "transcript"))
        assert not [secret for secret in (widget["ks"], session["ks"], token_hash) if secret in transcript]

    @pytest.mark.parametrize(
        ("action", "form", "code"),
        [
            ("session/action/start", {"partnerId": "101", "secret": "wrong"}, "START_SESSION_ERROR"),
            ("session/action/start", {"partnerId": "101"}, "MISSING_MANDATORY_PARAMETER"),
            ("session/action/start", {"partnerId": "101", "secret": "x", "expire": "1"}, "INVALID_PARAMETERS_SYNTAX"),
            ("session/action/startWidgetSession", {"widgetId": "101"}, "INVALID_WIDGET_ID"),
            ("appToken/action/startSession", {"ks": "x", "id": "0_demo", "tokenHash": "x"}, "INVALID_KS"),
        ],
    )
    async def test_it_refuses_with_status_200(
        self, simulator: Simulator, action: str, form: dict[str, str], code: str
    ) -> None:
        status, answer = await self.ask(simulator, action, **form, format="1")
        assert (status, answer["objectType"], answer["code"]) == (200, "KalturaAPIException", code)

    async def test_without_the_format_it_answers_xml(self, simulator: Simulator) -> None:
        _, answer = await self.ask(simulator, "session/action/start", partnerId="101", secret="demo-secret")
        assert answer.startswith("<?xml")

    async def test_an_unknown_action(self, simulator: Simulator) -> None:
        status, _ = await self.ask(simulator, "session/action/stop", format="1")
        assert status == 404

    async def test_a_widget_session_creates_nothing(self, simulator: Simulator) -> None:
        _, widget = await self.ask(simulator, "session/action/startWidgetSession", widgetId="_101", format="1")
        async with AvatarClient(Api(simulator.url), FixedKs(SecretStr(widget["ks"]))) as client:
            assert (await client.create(ANN))[0].status == 403
