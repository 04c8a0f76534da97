"""Commands, producer → worker (contract, section 2), and `parse`, which makes one, or a `Malformed`, of any bytes.

Types are strict: `"yes"` and `1` are not booleans, `null` is not a string. Unknown fields are ignored.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, ValidationError, model_validator
from pydantic.alias_generators import to_camel
from pydantic.json_schema import SkipJsonSchema
from pydantic_core import PydanticCustomError, from_json

from schemas.routes import MAX_COMMAND_BYTES, is_conversation_id


def _not_null(value: object) -> object:
    if value is None:
        raise PydanticCustomError("null", "must not be null; leave the field out instead")
    return value


_NotNull = BeforeValidator(_not_null)
ConversationId = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._:-]{1,128}$")]
TurnId = Annotated[str, StringConstraints(min_length=1, max_length=128)]
Name = Annotated[str, StringConstraints(min_length=1, max_length=512)]
OptionalTurnId = Annotated[TurnId | SkipJsonSchema[None], _NotNull]
OptionalName = Annotated[Name | SkipJsonSchema[None], _NotNull]


class _Command(BaseModel):
    model_config = ConfigDict(alias_generator=to_camel, strict=True, frozen=True, extra="ignore")

    conversation_id: ConversationId


class Speak(_Command):
    """Say this chunk of the turn. The default when `type` is absent."""

    type: Literal["speak"] = "speak"
    turn_id: TurnId
    text: str
    is_final: bool = True
    seq: Annotated[Annotated[int, Field(ge=0)] | SkipJsonSchema[None], _NotNull] = None

    @model_validator(mode="after")
    def _only_a_final_may_be_empty(self) -> Self:
        if not self.text and not self.is_final:
            raise PydanticCustomError("empty_text", "text may be empty only with isFinal true")
        return self


class Interrupt(_Command):
    """Stop speaking now; with `turn_id`, only that turn."""

    type: Literal["interrupt"]
    turn_id: OptionalTurnId = None


class SessionStart(_Command):
    """Create the avatar session now, or answer with the one that is live."""

    type: Literal["session.start"]
    avatar_id: OptionalName = None
    voice_id: OptionalName = None
    voice_speed: Annotated[Annotated[float, Field(gt=0, allow_inf_nan=False)] | SkipJsonSchema[None], _NotNull] = None
    handoff: Literal["token", "viewer"] = "token"


class SessionAttach(_Command):
    """Use a session somebody else created."""

    type: Literal["session.attach"]
    session_id: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._~:-]{0,255}$")]
    token: Annotated[str, StringConstraints(pattern=r"^[\x21-\x7e]{1,8192}$")] = Field(repr=False)


class SessionEnd(_Command):
    """Say what was queued before, then end the session."""

    type: Literal["session.end"]


Command = Speak | Interrupt | SessionStart | SessionAttach | SessionEnd

COMMANDS: dict[str, type[Command]] = {
    "speak": Speak,
    "interrupt": Interrupt,
    "session.start": SessionStart,
    "session.attach": SessionAttach,
    "session.end": SessionEnd,
}


class RejectReason(StrEnum):
    """Why a message is no command: the closed set of `avatar.command.rejected`."""

    NOT_UTF8 = "not_utf8"
    NOT_JSON = "not_json"
    TOO_LARGE = "too_large"
    UNKNOWN_TYPE = "unknown_type"
    INVALID_FIELD = "invalid_field"
    CONVERSATION_MISMATCH = "conversation_mismatch"
    INVALID_CONVERSATION_ID = "invalid_conversation_id"
    MESSAGE_ID_REUSED = "message_id_reused"


@dataclass(frozen=True, slots=True)
class FieldError:
    """A field and the rule it breaks; never the value, which may be a secret or somebody's words."""

    field: str
    rule: str


@dataclass(frozen=True, slots=True)
class Malformed:
    """A message that is no command. `conversation_id` is None where no valid one can be read."""

    reason: RejectReason
    errors: tuple[FieldError, ...]
    conversation_id: str | None


def parse(body: bytes, routing_key: str) -> Command | Malformed:
    """Read one message. Never raises, whatever the bytes.

    `routing_key` stands in for a `conversationId` the body leaves out.
    """
    conversation_id = routing_key if is_conversation_id(routing_key) else None
    try:
        document = _document(body)
        conversation_id = _conversation_id(document, routing_key)
        if routing_key and routing_key != conversation_id:
            error = FieldError("conversationId", "must equal the routing key where both are given")
            return Malformed(RejectReason.CONVERSATION_MISMATCH, (error,), conversation_id)
        model, kind = _model(document)
        return model.model_validate(document | {"conversationId": conversation_id, "type": kind})
    except _Broken as broken:
        return Malformed(broken.reason, (broken.error,), conversation_id)
    except ValidationError as error:
        return Malformed(RejectReason.INVALID_FIELD, _rules(error), conversation_id)


class _Broken(Exception):  # noqa: N818 - never leaves this module
    def __init__(self, reason: RejectReason, field: str, rule: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.error = FieldError(field, rule)


def _document(body: bytes) -> dict[str, Any]:
    if len(body) > MAX_COMMAND_BYTES:
        rule = f"must be at most {MAX_COMMAND_BYTES} bytes, is {len(body)}"
        raise _Broken(RejectReason.TOO_LARGE, "$", rule)
    try:
        body.decode()
    except UnicodeDecodeError as error:
        raise _Broken(RejectReason.NOT_UTF8, "$", f"must be UTF-8; byte {error.start} is not") from None
    try:
        document = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise _Broken(RejectReason.NOT_JSON, "$", f"must be JSON: {error}") from None
    if not isinstance(document, dict):
        raise _Broken(RejectReason.INVALID_FIELD, "$", "must be a JSON object")
    return document


def _conversation_id(document: dict[str, Any], routing_key: str) -> str:
    found = document.get("conversationId", routing_key)
    if not isinstance(found, str):
        raise _Broken(RejectReason.INVALID_FIELD, "conversationId", "must be a string")
    if not is_conversation_id(found):
        rule = "must be 1 to 128 characters of A-Z a-z 0-9 . _ : - (in the body, or as the routing key)"
        raise _Broken(RejectReason.INVALID_CONVERSATION_ID, "conversationId", rule)
    return found


def _model(document: dict[str, Any]) -> tuple[type[Command], str]:
    kind = document.get("type", "speak")
    if not isinstance(kind, str):
        raise _Broken(RejectReason.INVALID_FIELD, "type", "must be a string")
    if kind not in COMMANDS:
        raise _Broken(RejectReason.UNKNOWN_TYPE, "type", f"must be one of {', '.join(COMMANDS)}")
    return COMMANDS[kind], kind


_FIELD_OF = {"empty_text": "text"}
"""Of rules that look at several fields: the one to change."""


def _rules(error: ValidationError) -> tuple[FieldError, ...]:
    details = error.errors(include_url=False, include_context=False, include_input=False)
    # An optional field is a union with None for pydantic, which then also complains that the value is not None.
    return tuple(
        FieldError(str(detail["loc"][0]) if detail["loc"] else _FIELD_OF.get(detail["type"], "$"), detail["msg"])
        for detail in details
        if detail["type"] != "none_required"
    )
