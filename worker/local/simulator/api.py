"""The vendor's rules: who may call what with which body, what then happens, and what is answered.

Where the vendor says nothing the strict reading is taken, so that a client that passes here does not lean on luck.
"""

import base64
import json
import secrets
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.alias_generators import to_camel

from worker.local.simulator.model import CREATE, SAY_TEXT, Call, Session, World

BASE_PATH: Final = "/v1/avatar-session"

BAD_KS: Final = "Invalid Kaltura Session"
KS_NOT_AUTHORIZED: Final = "Kaltura Session not authorized"
BAD_TOKEN: Final = "Invalid or expired token"  # noqa: S105  the vendor's error text, not a secret
NOT_FOUND: Final = "Session not found"
ENDED: Final = "Session ended"
TEXT_REQUIRED: Final = "Text is required"

_STRICT: Final = ConfigDict(extra="forbid", strict=True, alias_generator=to_camel, allow_inf_nan=False)


@dataclass(frozen=True, slots=True)
class Answer:
    """What goes back over HTTP."""

    status: int
    body: bytes
    content_type: str = "application/json"
    headers: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, status: int, payload: object, headers: Mapping[str, str] | None = None) -> "Answer":
        """An answer with a JSON body."""
        return cls(status, json.dumps(payload).encode(), headers=headers or {})

    @classmethod
    def error(cls, status: int, error: str, headers: Mapping[str, str] | None = None) -> "Answer":
        """An answer in the vendor's error form."""
        return cls.of(status, {"success": False, "error": error}, headers)


_SUCCESS: Final = Answer.of(200, {"success": True})


class Refusal(Exception):  # noqa: N818  an answer, not a failure of ours
    """The call is wrong; the caller is told `status` and `error`."""

    def __init__(self, status: int, error: str) -> None:
        super().__init__(error)
        self.status = status
        self.error = error


class _VoiceConfig(BaseModel):
    model_config = _STRICT
    id: str = Field(min_length=1)
    speed: float = Field(1.0, gt=0)
    model_id: str = Field("", min_length=1)
    language: str = Field("", min_length=1)


class _Create(BaseModel):
    model_config = _STRICT
    visual_config: dict[str, str]
    voice_config: _VoiceConfig = Field(default=None)  # type: ignore[assignment]  # may be left out, but is never null
    client_id: str = Field("", min_length=1)


class _SayText(BaseModel):
    model_config = _STRICT
    # Blank counts as empty: nobody knows what the vendor's speech engine makes of it.
    text: str = Field(pattern=r"\S")
    turn_id: str = Field(min_length=1)
    is_final: bool


class _NoFields(BaseModel):
    model_config = _STRICT


_BODIES: Final[dict[str, type[BaseModel]]] = {
    "init-client": _NoFields,
    SAY_TEXT: _SayText,
    "interrupt": _NoFields,
    "keep-alive": _NoFields,
    "end": _NoFields,
}
SESSION_ROUTES: Final = frozenset(_BODIES)

_Body = TypeVar("_Body", bound=BaseModel)


def perform(world: World, call: Call, headers: Mapping[str, str]) -> Answer:
    """Judge the call, let it take effect and say what is answered; all in one step, at this moment."""
    now = time.monotonic()
    try:
        if call.route == CREATE:
            return _create(world, call, headers, now)
        session = _authorized(world, call, headers, now)
        _parse(_BODIES[call.route], call, headers)
        answer = _init_client(session) if call.route == "init-client" else _SUCCESS
    except Refusal as refusal:
        call.error = refusal.error
        return Answer.error(refusal.status, refusal.error)
    world.accept(call, now)
    if call.route == "end":
        session.end("request", now)
    return answer


def _credential(headers: Mapping[str, str], scheme: str, error: str) -> str:
    found, _, credential = headers.get("Authorization", "").partition(" ")
    if found != scheme or not credential:
        raise Refusal(401, error)
    return credential


def _authorized(world: World, call: Call, headers: Mapping[str, str], now: float) -> Session:
    token = _credential(headers, "Bearer", BAD_TOKEN)
    session = call.session
    if session is None or session.forgotten:
        raise Refusal(404, NOT_FOUND)
    if token != session.token:
        raise Refusal(401, BAD_TOKEN)
    world.end_idle(session)
    if session.ended is not None:
        raise Refusal(410, ENDED)
    if now >= session.token_expires:
        raise Refusal(401, BAD_TOKEN)
    return session


def _parse(model: type[_Body], call: Call, headers: Mapping[str, str]) -> _Body:
    media_type = headers.get("Content-Type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise Refusal(400, "Content-Type must be application/json")
    try:
        return model.model_validate_json(call.raw)
    except ValidationError as exc:
        first = exc.errors(include_url=False, include_context=False, include_input=False)[0]
    if first["loc"] == ("text",) and first["type"] != "string_type":
        raise Refusal(400, TEXT_REQUIRED)
    where = ".".join(map(str, first["loc"])) or "body"
    raise Refusal(400, f"{where}: {first['msg']}")


def _create(world: World, call: Call, headers: Mapping[str, str], now: float) -> Answer:
    settings = world.settings
    _judge_ks(world, _credential(headers, "KS", BAD_KS), now)
    body = _parse(_Create, call, headers)
    avatar_id = body.visual_config.get(settings.avatar_field)
    if not avatar_id or len(body.visual_config) > 1:
        raise Refusal(400, f"visualConfig: {settings.avatar_field} is required, and nothing else known")
    if settings.avatars and avatar_id not in settings.avatars:
        raise Refusal(400, "visualConfig: unknown avatar")
    voice = _voice(body, settings.voices)
    if settings.session_limit and world.open_sessions() >= settings.session_limit:
        raise Refusal(429, "Too many concurrent sessions")
    session_id = str(uuid.uuid4())
    expires = now + settings.token_life_s
    token = _mint(session_id, life_s=settings.token_life_s)
    world.open(call, Session(session_id, avatar_id, voice, token, expires, created=now, last_active=now))
    world.accept(call, now)
    return Answer.of(200, {"success": True, "sessionId": session_id, "token": token})


def _judge_ks(world: World, ks: str, now: float) -> None:
    issued = world.issued.get(ks)
    if issued is not None:
        if not issued.good(now):
            raise Refusal(401, BAD_KS)
        if not issued.admin:
            raise Refusal(403, KS_NOT_AUTHORIZED)
    elif ks != world.settings.ks:
        raise Refusal(401, BAD_KS)


def _voice(body: _Create, known: tuple[str, ...]) -> dict[str, str | float] | None:
    if "voice_config" not in body.model_fields_set:
        return None
    voice = body.voice_config
    if known and voice.id not in known:
        raise Refusal(400, "voiceConfig.id: unknown voice")
    if voice.id.startswith("eself-") and voice.model_id:
        raise Refusal(400, "voiceConfig.modelId: not with a cloned voice")
    return voice.model_dump(by_alias=True, exclude_unset=True)


def _mint(session_id: str, life_s: float) -> str:
    """A token that looks like a JWT and is signed by nobody."""
    now = time.time()
    parts = ({"alg": "HS256", "typ": "JWT"}, {"sub": session_id, "iat": int(now), "exp": int(now + life_s)})
    encoded = [base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=") for part in parts]
    return ".".join([*encoded, secrets.token_urlsafe(32)])


def _init_client(session: Session) -> Answer:
    """What a viewer needs, once. What a second call gets nobody says; a second viewer gets 409, so does this."""
    if session.initialized:
        raise Refusal(409, "Client already initialized")
    session.initialized = True
    url = f"https://whep.simulator.invalid/{session.id}"
    turn = {"url": "turn:turn.simulator.invalid", "username": session.id, "credential": secrets.token_urlsafe(16)}
    return Answer.of(200, {"success": True, "whepUrl": url, "turn": turn})
