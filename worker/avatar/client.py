"""The Avatar API's client: one attempt and one time-out a call, connections reused, redirects not followed.

Retrying is the lane's business, since only the lane knows what may come after what.
"""

import base64
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self
from urllib.parse import quote

import aiohttp
from aiohttp.abc import AbstractStreamWriter

from worker.avatar import faults
from worker.avatar.credentials import KsSource, NoKs
from worker.core.model import TOO_LATE, CallKind, CallResult, Piece, Session, Viewer
from worker.core.work import Open
from worker.ops.metrics import Metrics

_RENEW_AHEAD_S = 300.0
_LONGEST_LIFE_S = 10 * 365 * 86_400.0
_IDLE_CONNECTION_S = 15.0
"""Shorter than common servers' own limit: a connection they close just as we use it costs us a lost answer."""
_CREATE = "create"
_CONNECT_S = 5.0
"""A connection that does not come about is surely not taken, so there is no use in waiting long for it."""


@dataclass(frozen=True, slots=True)
class Api:
    """Where the API is and which of its contradictory forms it takes (KALTURA.md). Times in seconds."""

    base_url: str
    create_path: str = "/create"
    avatar_field: str = "avatarId"
    create_extra: dict[str, Any] | None = None
    timeout_s: float = 10.0
    create_timeout_s: float = 20.0
    interrupt_timeout_s: float = 2.0


def _dumps(document: object) -> str:
    return json.dumps(document, ensure_ascii=False, separators=(",", ":"))


class _Revocable(aiohttp.JsonPayload):
    """A body that is asked for at the last moment: aiohttp sends the headers with its first bytes."""

    def __init__(self, document: dict[str, Any], still: Callable[[], bool]) -> None:
        super().__init__(document, dumps=_dumps)
        self.revoked = False
        self._still = still

    async def write_with_length(self, writer: AbstractStreamWriter, content_length: int | None) -> None:
        """Write it all, or nothing."""
        if not self._still():
            self.revoked = True
            raise aiohttp.ClientConnectionError(TOO_LATE.error)
        await super().write_with_length(writer, content_length)


_Body = dict[str, Any] | _Revocable


class AvatarClient:
    """`ports.AvatarApi` over HTTP. Close it when done: `async with AvatarClient(...) as client`."""

    def __init__(self, api: Api, ks: KsSource, metrics: Metrics | None = None) -> None:
        self._api = api
        self._ks = ks
        self._metrics = metrics or Metrics()
        self._http = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=_IDLE_CONNECTION_S),
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.close()

    async def create(self, wanted: Open) -> tuple[CallResult, Session | None]:
        """See `ports.AvatarApi`, here and below. Where the KS is refused and there is another, that is tried once."""
        try:
            ks = await self._ks.current()
            result, session = await self._create(wanted, ks)
            if result.kind is CallKind.DENIED and (fresh := await self._ks.after(ks)) != ks:
                result, session = await self._create(wanted, fresh)
        except NoKs as none:
            return none.result, None
        return result, session

    async def say(self, session: Session, piece: Piece, still: Callable[[], bool] = lambda: True) -> CallResult:
        """Hand over a piece, if it is still to be said when its bytes leave: a process may be stopped at any place."""
        document = {"text": piece.text, "turnId": piece.turn_id, "isFinal": piece.is_final}
        return (await self._on_session(session, "say-text", _Revocable(document, still), self._api.timeout_s))[0]

    async def interrupt(self, session: Session) -> CallResult:
        """Stop what is being spoken."""
        return (await self._on_session(session, "interrupt", {}, self._api.interrupt_timeout_s))[0]

    async def keep_alive(self, session: Session) -> CallResult:
        """The session is still wanted."""
        return (await self._on_session(session, "keep-alive", {}, self._api.timeout_s))[0]

    async def init_client(self, session: Session) -> tuple[CallResult, Viewer | None]:
        """What a viewer needs."""
        result, document = await self._on_session(session, "init-client", {}, self._api.timeout_s)
        match document:
            case {"whepUrl": str(url), "turn": dict(turn)} if result.kind is CallKind.OK:
                return result, Viewer(url, turn)
        return _incomplete(result, "whepUrl and turn"), None

    async def end(self, session: Session) -> CallResult:
        """End the session."""
        return (await self._on_session(session, "end", {}, self._api.timeout_s))[0]

    async def knock(self) -> CallResult:
        """Call create for nobody, who must be refused: shows that an Avatar API is there, and begins nothing."""
        url = self._api.base_url + self._api.create_path
        return (await self._post(url, None, {}, self._api.timeout_s, _CREATE))[0]

    async def _create(self, wanted: Open, ks: str) -> tuple[CallResult, Session | None]:
        voice = {"id": wanted.voice_id, "speed": wanted.voice_speed}
        ours = {
            "visualConfig": {self._api.avatar_field: wanted.avatar_id},
            "voiceConfig": {name: value for name, value in voice.items() if value is not None},
        }
        body = _merged(self._api.create_extra or {}, ours)
        if "id" not in body["voiceConfig"]:
            del body["voiceConfig"]
        url = self._api.base_url + self._api.create_path
        result, document = await self._post(url, f"KS {ks}", body, self._api.create_timeout_s, _CREATE)
        # 403 may be about the avatar.
        if result.kind is CallKind.OK or result.status == 401:
            self._ks.note(ks, accepted=result.kind is CallKind.OK)
        match document:
            case {"sessionId": str(session_id), "token": str(token)} if result.kind is CallKind.OK:
                avatar_id, voice_id, speed = wanted.avatar_id, wanted.voice_id, wanted.voice_speed
                renew_at, expires_at = life_of(token, time.time())
                session = Session(
                    session_id, token, avatar_id, voice_id, speed, renew_at=renew_at, expires_at=expires_at
                )
                return result, session
        return _incomplete(result, "sessionId and token"), None

    async def _on_session(self, session: Session, verb: str, body: _Body, timeout_s: float) -> tuple[CallResult, Any]:
        url = f"{self._api.base_url}/{quote(session.session_id, safe='')}/{verb}"
        return await self._post(url, f"Bearer {session.token}", body, timeout_s, verb)

    async def _post(
        self, url: str, authorization: str | None, body: _Body, timeout_s: float, route: str
    ) -> tuple[CallResult, Any]:
        begun = time.monotonic()
        result, document = await self._answer(url, authorization, body, timeout_s, creating=route == _CREATE)
        self._metrics.call(route, result, time.monotonic() - begun)
        return result, document

    async def _answer(
        self, url: str, authorization: str | None, body: _Body, timeout_s: float, *, creating: bool
    ) -> tuple[CallResult, Any]:
        timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=min(timeout_s, _CONNECT_S))
        headers = {"Authorization": authorization} if authorization else {}
        try:
            payload = body if isinstance(body, _Revocable) else aiohttp.JsonPayload(body, dumps=_dumps)
            request = self._http.post(url, data=payload, headers=headers, timeout=timeout, allow_redirects=False)
            async with request as answer:
                document = faults.parsed(await answer.read())
                retry_after = answer.headers.get("Retry-After")
                secret = (authorization or "").partition(" ")[2]
                result = faults.of_answer(answer.status, document, retry_after, creating=creating, secret=secret)
                return result, document
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            if isinstance(body, _Revocable) and body.revoked:
                return TOO_LATE, None
            return faults.of_exception(error), None


def life_of(token: str, now: float) -> tuple[float | None, float | None]:
    """When the token of a new session should be replaced, and when it expires: epoch seconds, None if it does not say.

    A fifth of its life ahead, at most five minutes: time to end the session at the end of a turn. The signature is the
    API's business.
    """
    try:
        payload = token.split(".")[1]
        expires_at = float(json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))["exp"])
    except (ValueError, LookupError, TypeError, RecursionError):
        return None, None
    if not now < expires_at < now + _LONGEST_LIFE_S:
        return None, None
    return expires_at - min(_RENEW_AHEAD_S, (expires_at - now) / 5), expires_at


def _incomplete(result: CallResult, wanted: str) -> CallResult:
    """A success that lacks what it is for is none."""
    if result.kind is not CallKind.OK:
        return result
    return CallResult(CallKind.REFUSED, result.status, error=f"the answer lacks {wanted}")


def _merged(extra: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """Our fields over the configured ones; objects of both are merged."""
    merged = dict(extra)
    for name, value in ours.items():
        other = merged.get(name)
        merged[name] = {**other, **value} if isinstance(other, dict) and isinstance(value, dict) else value
    return merged
