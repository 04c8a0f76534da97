"""All settings, from the environment and `.env` (contract, section 5). Times carry their unit in the name."""

import json
import os
import socket
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, ValidationError, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from schemas.routes import MAX_PARTITIONS
from worker.core.shaping.cut import Cutting
from worker.core.shaping.markup import Clean
from worker.core.shaping.shaper import Shaping
from worker.core.work import Rules
from worker.errors import ConfigurationError

_S = TypeVar("_S", bound="BrokerSettings")
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Timeout = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class BrokerSettings(BaseSettings):
    """What it takes to talk to the broker; enough for the commands that look at it."""

    model_config = SettingsConfigDict(
        env_file=".env", extra="ignore", frozen=True, env_ignore_empty=True, hide_input_in_errors=True
    )

    amqp_url: SecretStr = SecretStr("amqp://guest:guest@127.0.0.1:5672/")
    heartbeat_s: Annotated[int, Field(ge=1, le=600)] = 10
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["auto", "console", "json"] = "auto"

    @field_validator("amqp_url")
    @classmethod
    def _is_amqp(cls, value: SecretStr) -> SecretStr:
        _demand_url(value.get_secret_value(), ("amqp", "amqps"))
        return value

    @field_validator("log_level", mode="before")
    @classmethod
    def _any_case(cls, value: object) -> object:
        return value.lower() if isinstance(value, str) else value


class TopologySettings(BrokerSettings):
    """What all workers of a broker must agree on, since it stands written there."""

    partitions: Annotated[int, Field(ge=1, le=MAX_PARTITIONS)] = 1
    prefetch: Annotated[int, Field(ge=1, le=65535)] = 4000
    """Unacknowledged commands a partition may hold here; the same for the whole fleet.

    A stream at 40 tokens a second holds up to 60 that wait for their sentence's end: this is for some 60 of them.
    """
    store_url: Annotated[str, Field(repr=False)] = "sqlite:///avatar-worker.db"
    management_url: SecretStr | None = None

    @field_validator("management_url")
    @classmethod
    def _is_management(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None:
            _demand_url(value.get_secret_value(), ("http", "https"))
        return value

    @field_validator("store_url")
    @classmethod
    def _is_known(cls, value: str) -> str:
        if value.startswith(("postgresql://", "postgres://")):
            return value
        if value != "sqlite://" and value.removeprefix("sqlite:///") in ("", value):
            raise ValueError(
                "must be sqlite:///FILE, sqlite:// for memory, or postgresql://USER:PASSWORD@HOST/DATABASE"
            )
        return value


class SpeechSettings(TopologySettings):
    """How chunks become calls."""

    speech_shaping: Literal["sentences", "off"] = "sentences"
    speech_language: Annotated[str, Field(pattern=r"^[A-Za-z]{2,3}([-_][A-Za-z0-9]{1,8})*$")] = "en"
    speech_stall_first_ms: Annotated[int, Field(ge=0)] = 500
    speech_stall_ms: Annotated[int, Field(ge=0)] = 1000
    speech_auto_final_s: Seconds = 30
    speech_final_text: Annotated[str, Field(max_length=100)] = ""
    speech_cap_chars: Annotated[int, Field(ge=100)] = 1000
    speech_clean_emphasis: bool = True
    speech_clean_headings: bool = True
    speech_clean_lists: bool = True
    speech_clean_links: bool = True
    speech_clean_code: bool = True
    speech_clean_urls: bool = True
    speech_clean_emoji: bool = True
    speech_clean_html: bool = True
    speech_clean_controls: bool = True
    speech_max_age_s: Seconds = 120

    flow_pause_chars: Annotated[int, Field(ge=1)] = 1000
    flow_resume_chars: Annotated[int, Field(ge=0)] = 200
    flow_valid_s: Timeout = 10

    @field_validator("flow_resume_chars")
    @classmethod
    def _is_below_pause(cls, value: int, info: ValidationInfo) -> int:
        if value >= info.data.get("flow_pause_chars", value + 1):
            raise ValueError("must be less than FLOW_PAUSE_CHARS")
        return value

    @property
    def shaping(self) -> Shaping:
        """What is kept from the voice, and where the rest is cut."""
        clean = Clean(**{part.name: getattr(self, f"speech_clean_{part.name}") for part in fields(Clean)})
        return Shaping(clean, Cutting(language=self.speech_language, cap=self.speech_cap_chars))


class Settings(SpeechSettings):
    """Everything `worker run` needs."""

    event_source: Annotated[str, Field(min_length=1)] = "avatar-worker"
    event_retry_s: Seconds = 30
    worker_name: Annotated[str, Field(min_length=1, max_length=128)] = Field(
        default_factory=lambda: f"{socket.gethostname()}-{os.getpid()}"
    )

    avatar_base_url: str = "https://api.avatar.us.kaltura.ai/v1/avatar-session"
    kaltura_service_url: str = "https://www.kaltura.com"
    kaltura_partner_id: Annotated[int | None, Field(ge=1)] = None
    kaltura_app_token_id: str | None = None
    kaltura_app_token: SecretStr | None = None
    kaltura_app_token_hash: Literal["MD5", "SHA1", "SHA256", "SHA512"] = "SHA256"  # noqa: S105 - no token
    kaltura_admin_secret: SecretStr | None = None
    kaltura_ks_privileges: str = "disableentitlement"
    kaltura_ks_expiry_s: Annotated[int, Field(ge=10)] = 86400
    avatar_ks_file: Path | None = None
    avatar_ks: Annotated[SecretStr | None, Field(validate_default=True)] = None
    avatar_id: str | None = None
    voice_id: str | None = None
    avatar_create_path: str = "/create"
    avatar_id_field: Annotated[str, Field(min_length=1)] = "avatarId"
    avatar_create_extra: Annotated[dict[str, Any], NoDecode] = Field(default_factory=dict)
    """More fields for the create call, as a JSON object; objects are merged with ours."""
    avatar_timeout_s: Timeout = 10
    avatar_create_timeout_s: Timeout = 20
    interrupt_timeout_s: Timeout = 2

    ambiguous_say: Literal["repeat", "skip"] = "repeat"
    ambiguous_wait_ms: Annotated[int, Field(ge=0)] = 2000
    ledger_keep_s: Timeout = 86400

    session_idle_s: Timeout = 300
    session_wait_s: Seconds = 10
    session_on_lost: Literal["recreate", "fail"] = "recreate"
    session_on_stop: Literal["keep", "end"] = "keep"
    session_ghost_s: Seconds = 60
    avatar_max_sessions: Annotated[int, Field(ge=0)] = 0
    session_end_wait_s: Seconds = 30
    keep_alive_s: Timeout = 10

    drain_timeout_s: Seconds = 25
    ops_host: str = "0.0.0.0"  # noqa: S104 - probes come from outside the container
    ops_port: Annotated[int, Field(ge=0, le=65535)] = 8081

    @field_validator("avatar_create_extra", mode="before")
    @classmethod
    def _is_json_object(cls, value: object) -> object:
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except ValueError:
                value = None
        if not isinstance(value, dict):
            raise ValueError('must be a JSON object, e.g. {"clientId": "shop"}')
        return value

    @field_validator("avatar_base_url", "kaltura_service_url")
    @classmethod
    def _is_http(cls, value: str) -> str:
        _demand_url(value, ("http", "https"))
        if "?" in value:
            raise ValueError("must end with its path: what is called is appended to it")
        return value.rstrip("/")

    @field_validator("avatar_create_path")
    @classmethod
    def _is_path(cls, value: str) -> str:
        if value and not value.startswith("/"):
            raise ValueError("must begin with / (or be empty: create is then posted to the base itself)")
        return value

    @field_validator("avatar_ks")
    @classmethod
    def _fits_a_header(cls, value: SecretStr | None, info: ValidationInfo) -> SecretStr | None:
        if value is None and info.data.get("avatar_ks_file") is None:
            _demand_account(info.data)
        ks = value.get_secret_value().strip() if value else None
        if ks is not None and not (ks and ks.isascii() and ks.isprintable() and " " not in ks):
            raise ValueError("must be printable ASCII without blanks")
        return value

    @property
    def rules(self) -> Rules:
        """The settings the core knows."""
        return Rules(
            shaping=self.speech_shaping,
            speech=self.shaping,
            stall_first_s=self.speech_stall_first_ms / 1000,
            stall_s=self.speech_stall_ms / 1000,
            auto_final_s=self.speech_auto_final_s,
            final_text=self.speech_final_text.strip(),
            pause_chars=self.flow_pause_chars,
            resume_chars=self.flow_resume_chars,
            pause_valid_s=self.flow_valid_s,
            max_age_s=self.speech_max_age_s,
            ambiguous=self.ambiguous_say,
            ambiguous_wait_s=self.ambiguous_wait_ms / 1000,
            on_lost=self.session_on_lost,
            session_wait_s=self.session_wait_s,
            session_end_wait_s=self.session_end_wait_s,
            default_avatar=self.avatar_id,
            default_voice=self.voice_id,
        )


def load(kind: type[_S]) -> _S:
    """Read the settings.

    Raises:
        ConfigurationError: one line per setting that is missing or wrong, without its value.
    """
    try:
        return kind()
    except ValidationError as error:
        details = error.errors(include_url=False, include_context=False, include_input=False)
        lines = [
            f"{'_'.join(map(str, detail['loc'][:1])).upper()}: {detail['msg']}".removeprefix(": ") for detail in details
        ]
        text = "\n".join(line.replace("Value error, ", "") for line in lines)
        raise ConfigurationError(f"wrong or missing settings:\n{text}") from None


def _demand_account(given: dict[str, Any]) -> None:
    """Without a Kaltura Session there must be what it takes to ask for one."""
    names = ("kaltura_partner_id", "kaltura_app_token_id", "kaltura_app_token", "kaltura_admin_secret")
    partner_id, token_id, token, secret = (given.get(name) is not None for name in names)
    if not (partner_id or token_id or token or secret):
        raise ValueError(
            "missing; set it to a Kaltura Session, or AVATAR_KS_FILE to a file with one, or KALTURA_PARTNER_ID, "
            "KALTURA_APP_TOKEN_ID and KALTURA_APP_TOKEN to ask for one"
        )
    if not partner_id:
        raise ValueError("missing, and without KALTURA_PARTNER_ID none can be asked for")
    if not (token_id and token) and (not secret or token_id or token):
        raise ValueError("missing, and KALTURA_APP_TOKEN_ID and KALTURA_APP_TOKEN belong together")


def _demand_url(value: str, schemes: tuple[str, ...]) -> None:
    wrong = ValueError(f"must be a URL like {schemes[0]}://host:port/")
    try:
        parts = urlsplit(value)
        parts.port  # noqa: B018 - reading it is what checks it
    except ValueError:
        raise wrong from None
    if parts.scheme not in schemes or not parts.hostname:
        raise wrong
    # What is cut off there would be taken for something else, and shown: it may be the rest of a password.
    if parts.fragment or "#" in value or "@" in parts.path + parts.query:
        raise ValueError("must hold no / : @ ? # % as such in user and password: write %2F %3A %40 %3F %23 %25")
