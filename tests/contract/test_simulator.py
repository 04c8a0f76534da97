"""The shipped simulator, as a real process: strict as the vendor's documentation, scriptable, with a true memory."""

import ast
import asyncio
import base64
import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-c", "import sys; from worker.local.simulator import main; sys.exit(main(sys.argv[1:]))"]
BASE = "/v1/avatar-session"
CREATE = {"visualConfig": {"avatarId": "ann"}, "voiceConfig": {"id": "v1", "speed": 1.1}}
SAY = {"text": "Hello", "turnId": "t1", "isFinal": True}
SESSION_ROUTES = ["init-client", "say-text", "interrupt", "keep-alive", "end"]
DEADLINE_S = 10
EARLY_S = 0.002  # uvloop's timers count whole milliseconds and may fire one too soon

Json = Any


@contextlib.contextmanager
def process(*options: str, **env: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A running simulator and its origin (`http://host:port`); it must have had nothing to complain about."""
    clean = {name: value for name, value in os.environ.items() if name != "AVATAR_KS"} | env
    with (
        tempfile.TemporaryFile("w+") as stderr,
        subprocess.Popen(
            [*COMMAND, *options], stdout=subprocess.PIPE, stderr=stderr, text=True, cwd=ROOT, env=clean
        ) as simulator,
    ):
        try:
            assert simulator.stdout is not None
            line = simulator.stdout.readline()
            assert line.startswith("simulator listening on http://"), line
            yield simulator, line.split()[-1].removesuffix(BASE)
        finally:
            simulator.terminate()
            simulator.wait(DEADLINE_S)
        stderr.seek(0)
        assert stderr.read() == ""


class Avatar:
    """A caller that shares nothing with the worker's client."""

    def __init__(self, http: aiohttp.ClientSession) -> None:
        self.http = http
        self.tokens: dict[str, str] = {}

    async def post(self, path: str, body: Json, authorization: str) -> tuple[int, Json]:
        headers = {"Authorization": authorization}
        async with self.http.post(BASE + path, json=body, headers=headers) as response:
            return response.status, await response.json()

    async def create(self, body: Json = CREATE, ks: str = "demo-ks") -> str:
        status, answer = await self.post("/create", body, f"KS {ks}")
        assert (status, answer["success"]) == (200, True), answer
        self.tokens[answer["sessionId"]] = answer["token"]
        return str(answer["sessionId"])

    async def call(self, session: str, route: str, body: Json = None) -> tuple[int, Json]:
        default = SAY if route == "say-text" else {}
        token = self.tokens.get(session, "unknown")
        return await self.post(f"/{session}/{route}", default if body is None else body, f"Bearer {token}")

    async def say(self, session: str, text: str = "Hello", turn: str = "t1", final: bool = False) -> int:
        status, _ = await self.call(session, "say-text", {"text": text, "turnId": turn, "isFinal": final})
        return status

    async def control(self, method: str, path: str, body: Json = None) -> Json:
        async with self.http.request(method, f"/_control/{path}", json=body) as response:
            answer = await response.json()
            assert response.status == 200, answer
            return answer

    async def fault(self, kind: str, **fields: object) -> None:
        await self.control("POST", "faults", {"kind": kind, **fields})

    async def seen(self, session: str) -> Json:
        return await self.control("GET", f"sessions/{session}")

    async def until_begun(self, calls: int) -> None:
        await self.control("GET", f"wait?stage=begun&route=say-text&calls={calls}")


@pytest.fixture(scope="module")
def origin() -> Iterator[str]:
    with process() as (_, url):
        yield url


@pytest.fixture
async def avatar(origin: str) -> AsyncIterator[Avatar]:
    async with aiohttp.ClientSession(origin, timeout=aiohttp.ClientTimeout(DEADLINE_S)) as http:
        caller = Avatar(http)
        await caller.control("POST", "reset")
        yield caller


async def eventually(probe: Callable[[], Awaitable[Json]], expected: Json) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while await probe() != expected:  # noqa: ASYNC110  what is polled is in another process
            await asyncio.sleep(0.01)


class TestStrictness:
    @pytest.mark.parametrize(
        "path",
        ["", "/", "/create/", "/Create", "/create?x=1", "/s/say-text", "/s/sayText", "/s/say-text/", "/s", "x/create"],
    )
    async def test_wrong_path(self, avatar: Avatar, path: str) -> None:
        status, answer = await avatar.post(path, SAY, "KS demo-ks")
        assert status == (401 if path == "/s/say-text" else 404)
        assert answer["success"] is False

    @pytest.mark.parametrize("route", ["create", *(f"s/{route}" for route in SESSION_ROUTES)])
    @pytest.mark.parametrize("method", ["GET", "PUT", "DELETE"])
    async def test_wrong_method(self, avatar: Avatar, method: str, route: str) -> None:
        async with avatar.http.request(method, f"{BASE}/{route}", json={}) as response:
            assert response.status == 405
            assert response.headers["Allow"] == "POST"
            assert (await response.json())["success"] is False

    async def test_a_wrong_call_is_remembered(self, avatar: Avatar) -> None:
        await avatar.post("/nowhere", SAY, "KS demo-ks")
        (stray,) = (await avatar.control("GET", "transcript"))["strays"]
        assert (stray["path"], stray["status"], stray["body"]) == (f"{BASE}/nowhere", 404, SAY)

    @pytest.mark.parametrize(
        "authorization", ["", "demo-ks", "KS", "KS wrong", "ks demo-ks", "Bearer demo-ks", "KS  demo-ks"]
    )
    async def test_create_needs_the_ks(self, avatar: Avatar, authorization: str) -> None:
        status, answer = await avatar.post("/create", CREATE, authorization)
        assert (status, answer) == (401, {"success": False, "error": "Invalid Kaltura Session"})

    @pytest.mark.parametrize(
        "body",
        [
            None,
            [],
            {},
            {"visualConfig": None},
            {"visualConfig": {}},
            {"visualConfig": {"id": "ann"}},
            {"visualConfig": {"avatarId": ""}},
            {"visualConfig": {"avatarId": 7}},
            {"visualConfig": {"avatarId": "ann", "more": "x"}},
            {**CREATE, "voiceConfig": None},
            {**CREATE, "voiceConfig": "v1"},
            {**CREATE, "voiceConfig": {}},
            {**CREATE, "voiceConfig": {"speed": 1}},
            {**CREATE, "voiceConfig": {"id": ""}},
            {**CREATE, "voiceConfig": {"id": "v1", "speed": "1.1"}},
            {**CREATE, "voiceConfig": {"id": "v1", "speed": True}},
            {**CREATE, "voiceConfig": {"id": "v1", "speed": 0}},
            {**CREATE, "voiceConfig": {"id": "v1", "speed": None}},
            {**CREATE, "voiceConfig": {"id": "v1", "voiceId": "v1"}},
            {**CREATE, "voiceConfig": {"id": "eself-v1", "modelId": "m"}},
            {**CREATE, "clientId": 7},
            {**CREATE, "more": "x"},
        ],
    )
    async def test_create_needs_its_fields(self, avatar: Avatar, body: Json) -> None:
        status, answer = await avatar.post("/create", body, "KS demo-ks")
        assert (status, answer["success"]) == (400, False)
        assert (await avatar.control("GET", "transcript"))["sessions"] == []

    @pytest.mark.parametrize(
        "body",
        [
            {"visualConfig": {"avatarId": "ann"}},
            {**CREATE, "voiceConfig": {"id": "v1", "speed": 1}},
            {**CREATE, "clientId": "c", "voiceConfig": {"id": "v1", "modelId": "m", "language": "de"}},
        ],
    )
    async def test_create_takes_what_is_documented(self, avatar: Avatar, body: Json) -> None:
        seen = await avatar.seen(await avatar.create(body))
        assert (seen["avatar_id"], seen["voice"]) == ("ann", body.get("voiceConfig"))
        assert seen["calls"][0]["body"] == body

    async def test_the_token_looks_like_a_jwt(self, avatar: Avatar) -> None:
        session = await avatar.create()
        header, payload, signature = avatar.tokens[session].split(".")
        claims = json.loads(base64.urlsafe_b64decode(payload + "=="))
        assert json.loads(base64.urlsafe_b64decode(header + "=="))["typ"] == "JWT"
        assert claims["exp"] - claims["iat"] == 86_400
        assert signature
        assert abs(claims["iat"] - time.time()) < 60

    @pytest.mark.parametrize(
        ("body", "error"),
        [
            ({**SAY, "text": ""}, "Text is required"),
            ({**SAY, "text": " \n"}, "Text is required"),
            ({"turnId": "t1", "isFinal": True}, "Text is required"),
            ({**SAY, "text": 7}, "text"),
            ({**SAY, "text": None}, "text"),
            ({**SAY, "turnId": ""}, "turnId"),
            ({**SAY, "turnId": 7}, "turnId"),
            ({"text": "Hello", "isFinal": True}, "turnId"),
            ({**SAY, "isFinal": "true"}, "isFinal"),
            ({**SAY, "isFinal": 1}, "isFinal"),
            ({**SAY, "isFinal": None}, "isFinal"),
            ({"text": "Hello", "turnId": "t1"}, "isFinal"),
            ({**SAY, "seq": 1}, "seq"),
            ({"text": "Hello", "turn_id": "t1", "is_final": True}, "turnId"),
            ([SAY], "body"),
            ("Hello", "body"),
        ],
    )
    async def test_say_text_needs_its_fields(self, avatar: Avatar, body: Json, error: str) -> None:
        session = await avatar.create()
        status, answer = await avatar.call(session, "say-text", body)
        assert (status, answer["success"]) == (400, False)
        assert answer["error"].startswith(error)
        seen = await avatar.seen(session)
        assert seen["spoken"] == []
        assert (seen["calls"][1]["effect"], seen["calls"][1]["error"]) == (False, answer["error"])

    @pytest.mark.parametrize("route", ["init-client", "interrupt", "keep-alive", "end"])
    async def test_the_others_take_an_empty_object(self, avatar: Avatar, route: str) -> None:
        session = await avatar.create()
        assert (await avatar.call(session, route, {"turnId": "t1"}))[0] == 400
        assert (await avatar.call(session, route, []))[0] == 400
        assert (await avatar.call(session, route, {}))[0] == 200

    @pytest.mark.parametrize("route", SESSION_ROUTES)
    async def test_only_json_is_read(self, avatar: Avatar, route: str) -> None:
        session = await avatar.create()
        url = f"{BASE}/{session}/{route}"
        good = json.dumps(SAY if route == "say-text" else {}).encode()
        for body, content_type, expected in [
            (good, "text/plain", 400),
            (b"", "application/json", 400),
            (b"{", "application/json", 400),
            (b'{"text":"\xff"}', "application/json", 400),
            (b"[" * 100_000, "application/json", 400),
            (good, "application/json; charset=utf-8", 200),
        ]:
            headers = {"Authorization": f"Bearer {avatar.tokens[session]}", "Content-Type": content_type}
            async with avatar.http.post(url, data=body, headers=headers) as response:
                assert (response.status, (await response.json())["success"]) == (expected, expected == 200)
        assert len((await avatar.seen(session))["calls"]) == 7

    async def test_a_body_too_large(self, avatar: Avatar) -> None:
        session = await avatar.create()
        headers = {"Content-Type": "application/json"}
        async with avatar.http.post(
            f"{BASE}/{session}/say-text", data=io.BytesIO(b" " * 2**21), headers=headers
        ) as response:
            assert (response.status, (await response.json())["success"]) == (413, False)

    @pytest.mark.parametrize("route", SESSION_ROUTES)
    async def test_who_may_call(self, avatar: Avatar, route: str) -> None:
        session, other = await avatar.create(), await avatar.create()
        body = SAY if route == "say-text" else {}
        for authorization in (
            "",
            avatar.tokens[session],
            f"KS {avatar.tokens[session]}",
            f"Bearer {avatar.tokens[other]}",
        ):
            status, answer = await avatar.post(f"/{session}/{route}", body, authorization)
            assert (status, answer) == (401, {"success": False, "error": "Invalid or expired token"})
        status, answer = await avatar.call("no-such-session", route)
        assert (status, answer) == (404, {"success": False, "error": "Session not found"})

    async def test_init_client_once(self, avatar: Avatar) -> None:
        session = await avatar.create()
        status, answer = await avatar.call(session, "init-client")
        assert (status, answer["success"]) == (200, True)
        assert answer["whepUrl"].startswith("https://")
        assert set(answer["turn"]) == {"url", "username", "credential"}
        assert (await avatar.call(session, "init-client"))[0] == 409
        assert (await avatar.seen(session))["initialized"] is True


class TestLifetimes:
    @pytest.mark.parametrize("route", SESSION_ROUTES)
    @pytest.mark.parametrize(
        ("action", "status", "error"),
        [
            ("expire", 401, "Invalid or expired token"),
            ("end", 410, "Session ended"),
            ("forget", 404, "Session not found"),
        ],
    )
    async def test_ways_to_be_gone(self, avatar: Avatar, action: str, status: int, error: str, route: str) -> None:
        session = await avatar.create()
        await avatar.control("POST", f"sessions/{session}/{action}")
        assert await avatar.call(session, route) == (status, {"success": False, "error": error})

    @pytest.mark.parametrize("route", SESSION_ROUTES)
    async def test_after_the_end(self, avatar: Avatar, route: str) -> None:
        session = await avatar.create()
        assert (await avatar.call(session, "end"))[0] == 200
        assert await avatar.call(session, route) == (410, {"success": False, "error": "Session ended"})
        assert (await avatar.seen(session))["ended_by"] == "request"

    async def test_a_token_expires(self, avatar: Avatar) -> None:
        await avatar.control("POST", "settings", {"token_life_s": 0.1})
        session = await avatar.create()

        async def keep_alive() -> int:
            return (await avatar.call(session, "keep-alive"))[0]

        await eventually(keep_alive, 401)

    async def test_an_idle_session_ends(self, avatar: Avatar) -> None:
        await avatar.control("POST", "settings", {"idle_timeout_s": 0.1})
        session = await avatar.create()

        async def ended_by() -> Json:
            return (await avatar.seen(session))["ended_by"]

        await eventually(ended_by, "idle")
        assert await avatar.say(session) == 410

    async def test_keep_alive_keeps_alive(self, avatar: Avatar) -> None:
        await avatar.control("POST", "settings", {"idle_timeout_s": 1})
        session = await avatar.create()
        begun = time.monotonic()
        while time.monotonic() < begun + 1.2:
            assert (await avatar.call(session, "keep-alive"))[0] == 200
        assert (await avatar.seen(session))["max_gap_s"] < 1

    async def test_the_session_limit(self, avatar: Avatar) -> None:
        await avatar.control("POST", "settings", {"session_limit": 2})
        first, _ = await avatar.create(), await avatar.create()
        assert (await avatar.post("/create", CREATE, "KS demo-ks"))[0] == 429
        await avatar.call(first, "end")
        await avatar.create()
        assert (await avatar.control("GET", "counters"))["sessions"] == {"created": 3, "open": 2}

    async def test_the_ks_is_rotated_and_revoked(self, avatar: Avatar) -> None:
        assert "ks" not in await avatar.control("POST", "settings", {"ks": "new"})
        assert (await avatar.post("/create", CREATE, "KS demo-ks"))[0] == 401
        session = await avatar.create(ks="new")
        await avatar.control("POST", "settings", {"ks": None})
        for ks in ("new", "None", "null"):
            assert (await avatar.post("/create", CREATE, f"KS {ks}"))[0] == 401
        assert await avatar.say(session) == 200

    async def test_a_reset_brings_back_the_beginning(self, avatar: Avatar) -> None:
        session = await avatar.create()
        await avatar.control("POST", "settings", {"ks": "new", "session_limit": 1})
        await avatar.fault("status", status=503, times=None)
        await avatar.control("POST", "reset")
        assert await avatar.call(session, "keep-alive") == (404, {"success": False, "error": "Session not found"})
        await avatar.create()
        await avatar.create()
        assert (await avatar.control("GET", "counters"))["calls"] == 3


class TestFaults:
    @pytest.mark.parametrize("when", ["before", "after"])
    @pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 429, 500, 502, 503, 504])
    async def test_status(self, avatar: Avatar, status: int, when: str) -> None:
        session = await avatar.create()
        await avatar.fault("status", status=status, when=when)
        answered, body = await avatar.call(session, "say-text")
        assert (answered, body["success"]) == (status, False)
        assert body["error"]
        await self.expect(avatar, session, status, f"status {when}", taken=when == "after")

    @pytest.mark.parametrize("when", ["before", "after"])
    async def test_refuse(self, avatar: Avatar, when: str) -> None:
        session = await avatar.create()
        await avatar.fault("refuse", when=when, error="no")
        assert await avatar.call(session, "say-text") == (200, {"success": False, "error": "no"})
        await self.expect(avatar, session, 200, f"refuse {when}", taken=when == "after")

    @pytest.mark.parametrize("when", ["before", "after"])
    async def test_exception(self, avatar: Avatar, when: str) -> None:
        session = await avatar.create()
        await avatar.fault("exception", when=when, error="INVALID_KS")
        status, body = await avatar.call(session, "say-text")
        assert (status, body["objectType"], body["code"]) == (200, "KalturaAPIException", "INVALID_KS")
        await self.expect(avatar, session, 200, f"exception {when}", taken=when == "after")

    @pytest.mark.parametrize("when", ["before", "after"])
    async def test_garbage(self, avatar: Avatar, when: str) -> None:
        session = await avatar.create()
        await avatar.fault("garbage", when=when)
        headers = {"Authorization": f"Bearer {avatar.tokens[session]}"}
        async with avatar.http.post(f"{BASE}/{session}/say-text", json=SAY, headers=headers) as response:
            assert (response.status, response.content_type) == (502, "text/html")
            with pytest.raises(ValueError, match="Expecting value"):
                json.loads(await response.text())
        await self.expect(avatar, session, 502, f"garbage {when}", taken=when == "after")

    @pytest.mark.parametrize("when", ["before", "after"])
    async def test_drop(self, avatar: Avatar, when: str) -> None:
        session = await avatar.create()
        await avatar.fault("drop", when=when)
        with pytest.raises(aiohttp.ClientConnectionError):
            await avatar.call(session, "say-text")
        await self.expect(avatar, session, 0, f"drop {when}", taken=when == "after")
        assert await avatar.say(session) == 200

    async def test_a_session_leaks_when_the_answer_to_create_is_lost(self, avatar: Avatar) -> None:
        await avatar.fault("drop", route="create", when="after")
        with pytest.raises(aiohttp.ClientConnectionError):
            await avatar.create()
        assert (await avatar.control("GET", "counters"))["sessions"] == {"created": 1, "open": 1}

    @pytest.mark.parametrize("when", ["before", "after"])
    async def test_hang_until_released(self, avatar: Avatar, when: str) -> None:
        session = await avatar.create()
        await avatar.fault("hang", when=when)
        say = asyncio.create_task(avatar.say(session))
        await avatar.until_begun(1)
        running = (await avatar.seen(session))["calls"][1]
        assert (running["status"], running["ended_s"], running["effect"]) == (None, None, when == "after")
        assert await avatar.control("POST", "release") == {"released": 1}
        assert await say == (504 if when == "before" else 200)
        await self.expect(avatar, session, await say, f"hang {when}", taken=when == "after")

    async def test_hang_for_a_time(self, avatar: Avatar) -> None:
        session = await avatar.create()
        await avatar.fault("hang", seconds=0.1)
        assert await avatar.say(session) == 504
        call = (await avatar.seen(session))["calls"][1]
        assert call["ended_s"] - call["begun_s"] >= 0.1 - EARLY_S

    async def test_a_hung_call_ends_when_its_caller_hangs_up(self, avatar: Avatar) -> None:
        session = await avatar.create()
        await avatar.fault("hang", when="after")
        say = asyncio.create_task(avatar.say(session))
        await avatar.until_begun(1)
        say.cancel()
        with pytest.raises(asyncio.CancelledError):
            await say
        await avatar.control("GET", f"wait?stage=finished&route=say-text&calls=1&session={session}")
        await self.expect(avatar, session, 0, "hang after", taken=True)

    async def test_a_caller_that_hangs_up_does_not_stop_the_call(self, avatar: Avatar) -> None:
        session = await avatar.create()
        await avatar.fault("latency", seconds=0.3)
        say = asyncio.create_task(avatar.say(session))
        await avatar.until_begun(1)
        say.cancel()
        with pytest.raises(asyncio.CancelledError):
            await say
        await avatar.control("GET", "wait?stage=finished&route=say-text&calls=1")
        await self.expect(avatar, session, 0, "latency before", taken=True)
        call = (await avatar.seen(session))["calls"][1]
        assert call["ended_s"] - call["begun_s"] >= 0.3 - EARLY_S

    async def test_latency_before_delays_the_effect(self, avatar: Avatar) -> None:
        session = await avatar.create()
        await avatar.fault("latency", seconds=0.5, turn="late")
        late = asyncio.create_task(avatar.say(session, turn="late"))
        await avatar.until_begun(1)
        await avatar.control("POST", f"sessions/{session}/end")
        assert await late == 410

    async def test_latency_after_delays_the_answer(self, avatar: Avatar) -> None:
        session = await avatar.create()
        await avatar.fault("latency", seconds=0.5, when="after")
        say = asyncio.create_task(avatar.say(session))
        await avatar.until_begun(1)
        await avatar.control("POST", f"sessions/{session}/end")
        assert await say == 200

    async def test_latency_of_every_call(self, avatar: Avatar) -> None:
        await avatar.control("POST", "settings", {"latency_ms": 50})
        session = await avatar.create()
        await avatar.fault("status", status=503)
        assert [await avatar.say(session), await avatar.say(session)] == [503, 200]
        durations = [call["ended_s"] - call["begun_s"] for call in (await avatar.seen(session))["calls"]]
        assert min(durations[0], durations[2]) >= 0.05 - EARLY_S

    async def test_retry_after(self, avatar: Avatar) -> None:
        session = await avatar.create()
        date = "Wed, 21 Oct 2026 07:28:00 GMT"
        await avatar.control("POST", "faults", [{"kind": "status", "status": 429, "retry_after": v} for v in (3, date)])
        headers = {"Authorization": f"Bearer {avatar.tokens[session]}"}
        for expected in ("3", date):
            async with avatar.http.post(f"{BASE}/{session}/say-text", json=SAY, headers=headers) as response:
                assert (response.status, response.headers["Retry-After"]) == (429, expected)

    async def test_an_after_fault_does_not_hide_a_mistake(self, avatar: Avatar) -> None:
        session = await avatar.create()
        await avatar.fault("drop", when="after")
        assert await avatar.say(session, text="") == 400

    @pytest.mark.parametrize(
        "selector",
        [{"route": "say-text"}, {"turn": "t1"}, {"session": "{session}"}, {"avatar": "bob"}],
        ids=lambda selector: next(iter(selector)),
    )
    async def test_whom_a_fault_strikes(self, avatar: Avatar, selector: dict[str, str]) -> None:
        bystander, session = await avatar.create(), await avatar.create({"visualConfig": {"avatarId": "bob"}})
        (name, value), *_ = selector.items()
        await avatar.fault("status", status=503, **{name: value.format(session=session)})
        if name in ("session", "avatar"):
            assert await avatar.say(bystander) == 200
        elif name == "turn":
            assert await avatar.say(session, turn="t2") == 200
        else:
            assert (await avatar.call(session, "keep-alive"))[0] == 200
        assert await avatar.say(session) == 503

    async def test_an_avatar_names_a_create_too(self, avatar: Avatar) -> None:
        await avatar.fault("status", status=500, avatar="bob")
        await avatar.create()
        assert (await avatar.post("/create", {"visualConfig": {"avatarId": "bob"}}, "KS demo-ks"))[0] == 500

    async def test_faults_strike_in_order_and_so_many_times(self, avatar: Avatar) -> None:
        session = await avatar.create()
        await avatar.control(
            "POST",
            "faults",
            [
                {"kind": "latency", "seconds": 0},
                {"kind": "status", "status": 503, "times": 2},
                {"kind": "status", "status": 500, "times": None},
            ],
        )
        assert [await avatar.say(session) for _ in range(6)] == [200, 503, 503, 500, 500, 500]
        assert [(f["struck"], f["left"]) for f in await avatar.control("GET", "faults")] == [(1, 0), (2, 0), (3, None)]
        assert await avatar.control("DELETE", "faults") == []
        assert await avatar.say(session) == 200

    async def test_probability_is_repeatable(self, avatar: Avatar) -> None:
        session = await avatar.create()
        rounds = []
        for seed in (1, 1, 2):
            await avatar.fault("status", status=503, times=None, probability=0.5, seed=seed)
            rounds.append([await avatar.say(session) for _ in range(40)])
            await avatar.control("DELETE", "faults")
        assert set(rounds[0]) == {200, 503}
        assert rounds[0] == rounds[1] != rounds[2]

    @pytest.mark.parametrize(
        "fault",
        [
            {},
            {"kind": "explode"},
            {"kind": "status"},
            {"kind": "latency"},
            {"kind": "status", "status": 200},
            {"kind": "drop", "when": "during"},
            {"kind": "drop", "rout": "say-text"},
            {"kind": "drop", "times": 0},
            {"kind": "drop", "probability": 2},
            "drop",
        ],
    )
    async def test_a_wrong_fault_is_refused(self, avatar: Avatar, fault: Json) -> None:
        async with avatar.http.post("/_control/faults", json=fault) as response:
            assert response.status == 400
            assert (await response.json())["error"]
        assert await avatar.control("GET", "faults") == []

    async def expect(self, avatar: Avatar, session: str, status: int, fault: str, *, taken: bool) -> None:
        seen = await avatar.seen(session)
        call = seen["calls"][1]
        assert (call["status"], call["effect"], call["fault"]) == (status, taken, fault)
        assert seen["spoken"] == (["Hello"] if taken else [])


class TestTranscript:
    async def test_what_was_said(self, avatar: Avatar) -> None:
        session = await avatar.create()
        for text, turn, final in [("Hello ", "t1", False), ("you.", "t1", True), ("More.", "t2", True)]:
            assert await avatar.say(session, text, turn, final) == 200
        await avatar.call(session, "interrupt")
        seen = await avatar.seen(session)
        assert seen["spoken"] == ["Hello ", "you.", "More."]
        assert seen["turns"] == {"t1": "Hello you.", "t2": "More."}
        assert seen["duplicates"] == []
        assert [call["route"] for call in seen["calls"]] == ["create", *["say-text"] * 3, "interrupt"]
        assert [call["order"] for call in seen["calls"]] == [1, 2, 3, 4, 5]
        assert seen["calls"][2]["body"] == {"text": "you.", "turnId": "t1", "isFinal": True}

    async def test_times(self, avatar: Avatar) -> None:
        begun = time.monotonic()
        session = await avatar.create()
        await avatar.say(session)
        moments = [m for call in (await avatar.seen(session))["calls"] for m in (call["begun_s"], call["ended_s"])]
        assert moments == sorted(moments)
        assert begun <= moments[0] <= moments[-1] <= time.monotonic()
        epoch = (await avatar.seen(session))["calls"][0]["begun_epoch_s"]
        assert abs(epoch - time.time()) < 60

    async def test_duplicates(self, avatar: Avatar) -> None:
        session = await avatar.create()
        for text in ("one", "two", "one"):
            await avatar.say(session, text)
        assert (await avatar.seen(session))["duplicates"] == [{"turn": "t1", "text": "one", "calls": [2, 4]}]

    async def test_numbers_count_over_all_sessions(self, avatar: Avatar) -> None:
        first, second = await avatar.create(), await avatar.create()
        for session in (second, first, second):
            await avatar.say(session)
        transcript = await avatar.control("GET", "transcript")
        assert [session["id"] for session in transcript["sessions"]] == [first, second]
        assert [[call["number"] for call in session["calls"]] for session in transcript["sessions"]] == [
            [1, 4],
            [2, 3, 5],
        ]

    async def test_the_request_id_names_the_call(self, avatar: Avatar) -> None:
        async with avatar.http.post(f"{BASE}/nowhere", json={}) as response:
            assert response.headers["x-kaltura-request-id"] == "1"

    async def test_counters(self, avatar: Avatar) -> None:
        session = await avatar.create()
        await avatar.say(session)
        await avatar.say(session, text="")
        counters = await avatar.control("GET", "counters")
        assert counters["calls"] == 3
        assert counters["routes"]["say-text"] == {
            "begun": 2,
            "accepted": 1,
            "finished": 2,
            "statuses": {"200": 1, "400": 1},
        }
        assert counters == (await avatar.control("GET", "transcript"))["counters"]

    async def test_the_gap_between_accepted_calls(self, avatar: Avatar) -> None:
        session = await avatar.create()
        begun = time.monotonic()
        while time.monotonic() < begun + 0.3:
            await avatar.say(session, text="")
        await avatar.call(session, "keep-alive")
        gap = (await avatar.seen(session))["max_gap_s"]
        assert 0.3 <= gap < DEADLINE_S

    async def test_no_overlap(self, avatar: Avatar) -> None:
        sessions = [await avatar.create() for _ in range(5)]

        async def speak(session: str) -> None:
            for number in range(20):
                await avatar.say(session, f"{number} ")

        await asyncio.gather(*map(speak, sessions))
        transcript = await avatar.control("GET", "transcript")
        assert transcript["counters"]["overlaps"] == {"say": 0, "any": 0}
        expected = "".join(f"{number} " for number in range(20))
        assert [session["turns"]["t1"] for session in transcript["sessions"]] == [expected] * 5

    @pytest.mark.parametrize("other", ["say-text", "keep-alive"])
    async def test_overlap(self, avatar: Avatar, other: str) -> None:
        session, bystander = await avatar.create(), await avatar.create()
        await avatar.fault("hang", when="after", route="say-text")
        hung = asyncio.create_task(avatar.say(session))
        await avatar.until_begun(1)
        await avatar.call(session, other)
        await avatar.say(bystander)
        await avatar.control("POST", "release")
        assert await hung == 200
        assert await avatar.say(session) == 200
        pair = [[3, 4]]
        assert (await avatar.seen(session))["overlaps"] == {"say": pair if other == "say-text" else [], "any": pair}
        assert (await avatar.seen(bystander))["overlaps"] == {"say": [], "any": []}

    @pytest.mark.parametrize("kind", ["drop", "status"])
    async def test_a_repeat_while_the_server_is_still_busy_overlaps(self, avatar: Avatar, kind: str) -> None:
        session = await avatar.create()
        await avatar.fault(kind, when="after", linger_s=1, **({"status": 504} if kind == "status" else {}))
        with contextlib.suppress(aiohttp.ClientConnectionError):
            await avatar.say(session)
        await avatar.say(session)
        assert (await avatar.seen(session))["overlaps"]["say"] == [[2, 3]]
        await avatar.control("GET", "wait?stage=finished&route=say-text&calls=2")
        await avatar.say(session)
        seen = await avatar.seen(session)
        assert seen["overlaps"]["say"] == [[2, 3]]
        assert seen["calls"][1]["ended_s"] - seen["calls"][1]["begun_s"] >= 1 - EARLY_S


class TestWait:
    async def test_it_answers_when_there_are_enough(self, avatar: Avatar) -> None:
        session = await avatar.create()
        waiting = asyncio.create_task(avatar.control("GET", "wait?calls=3&route=say-text"))
        for _ in range(2):
            await avatar.say(session)
        assert not waiting.done()
        await avatar.say(session)
        assert await waiting == {"calls": 3}
        assert await avatar.control("GET", "wait?calls=2&route=say-text") == {"calls": 3}
        assert await avatar.control("GET", "wait?calls=4") == {"calls": 4}

    async def test_it_counts_what_was_accepted(self, avatar: Avatar) -> None:
        session = await avatar.create()
        await avatar.say(session, text="")
        async with avatar.http.get("/_control/wait?calls=1&route=say-text&timeout_s=0") as response:
            assert response.status == 408

    async def test_it_can_look_at_one_session(self, avatar: Avatar) -> None:
        first, second = await avatar.create(), await avatar.create()
        await avatar.say(first)
        waiting = asyncio.create_task(avatar.control("GET", f"wait?calls=1&route=say-text&session={second}"))
        await avatar.say(first)
        assert not waiting.done()
        await avatar.say(second)
        assert await waiting == {"calls": 1}

    @pytest.mark.parametrize(
        ("query", "status"),
        [("", 400), ("calls=0", 400), ("calls=x", 400), ("calls=1&rout=x", 400), ("calls=1&session=x", 404)],
    )
    async def test_a_wrong_query_is_refused(self, avatar: Avatar, query: str, status: int) -> None:
        async with avatar.http.get(f"/_control/wait?{query}") as response:
            assert response.status == status


class TestControl:
    @pytest.mark.parametrize(
        ("method", "path", "body", "status"),
        [
            ("GET", "nothing", None, 404),
            ("POST", "transcript", None, 404),
            ("GET", "sessions/x", None, 404),
            ("GET", "sessions", None, 404),
            ("POST", "settings", {"latency": 5}, 400),
            ("POST", "settings", {"latency_ms": "5"}, 400),
            ("POST", "settings", [], 400),
        ],
    )
    async def test_wrong_requests_are_refused(
        self, avatar: Avatar, method: str, path: str, body: Json, status: int
    ) -> None:
        async with avatar.http.request(method, f"/_control/{path}", json=body) as response:
            assert response.status == status
            assert (await response.json())["error"]

    async def test_an_unknown_action_of_a_session(self, avatar: Avatar) -> None:
        session = await avatar.create()
        async with avatar.http.post(f"/_control/sessions/{session}/explode") as response:
            assert response.status == 404

    async def test_healthz(self, avatar: Avatar) -> None:
        async with avatar.http.get("/healthz") as response:
            assert (response.status, await response.json()) == (200, {"status": "ok"})


class TestProcess:
    @pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
    def test_it_stops_on_a_signal(self, tmp_path: Path, signum: signal.Signals) -> None:
        port_file = tmp_path / "port"
        with process("--port-file", str(port_file)) as (simulator, origin):
            assert origin == f"http://127.0.0.1:{port_file.read_text().strip()}"
            simulator.send_signal(signum)
            assert simulator.wait(DEADLINE_S) == 0

    async def test_it_stops_while_a_call_hangs(self) -> None:
        with process() as (simulator, origin):
            async with aiohttp.ClientSession(origin) as http:
                avatar = Avatar(http)
                session = await avatar.create()
                await avatar.fault("hang")
                say = asyncio.create_task(avatar.say(session))
                await avatar.until_begun(1)
                simulator.terminate()
                assert await asyncio.to_thread(simulator.wait, DEADLINE_S) == 0
                await asyncio.wait([say])
                assert say.exception() or say.result() == 504

    async def test_options(self) -> None:
        options = ["--ks", "k", "--avatar", "ann", "--avatar", "bob", "--voice", "v1", "--session-limit", "1"]
        with process(*options, "--create-path", "", "--avatar-field", "id", AVATAR_KS="other") as (_, origin):
            async with aiohttp.ClientSession(origin) as http:
                avatar = Avatar(http)
                for avatar_id, voice, status in [
                    ("eve", "v1", 400),
                    ("bob", "v2", 400),
                    ("bob", "v1", 200),
                    ("ann", "v1", 429),
                ]:
                    body = {"visualConfig": {"id": avatar_id}, "voiceConfig": {"id": voice}}
                    assert (await avatar.post("", body, "KS k"))[0] == status
                assert (await avatar.post("/create", CREATE, "KS k"))[0] == 404

    async def test_the_ks_of_the_environment(self) -> None:
        with process(AVATAR_KS="from-env") as (_, origin):
            async with aiohttp.ClientSession(origin) as http:
                await Avatar(http).create(ks="from-env")

    @pytest.mark.parametrize(
        "options",
        [
            ["--port", "99999"],
            ["--port", "x"],
            ["--latency-ms", "-1"],
            ["--token-life-s", "nan"],
            ["--avatar-field", "x"],
        ],
        ids=" ".join,
    )
    def test_wrong_options(self, options: list[str]) -> None:
        assert options[0].lstrip("-").replace("-", "_") in self.refused(*options).replace("-", "_")

    def test_a_port_that_is_taken(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            assert f"cannot listen on 127.0.0.1 port {port}" in self.refused("--port", str(port))

    def test_a_port_file_that_cannot_be_written(self, tmp_path: Path) -> None:
        assert "cannot write" in self.refused("--port-file", str(tmp_path / "absent" / "port"))

    def refused(self, *options: str) -> str:
        done = subprocess.run([*COMMAND, *options], capture_output=True, text=True, cwd=ROOT, timeout=30, check=False)
        assert (done.returncode, done.stdout) == (2, "")
        assert "Traceback" not in done.stderr
        return done.stderr


def test_it_shares_nothing_with_the_client() -> None:
    modules = list((ROOT / "worker/local/simulator").glob("*.py"))
    assert modules
    for module in modules:
        for node in ast.walk(ast.parse(module.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            ours = [name for name in names if name.split(".")[0] in ("schemas", "worker")]
            assert all(name.startswith("worker.local.simulator") for name in ours), (module, ours)
