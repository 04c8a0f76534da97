"""Planted secrets, and everywhere they must not come out: logs, events, reprs, tracebacks, explain, parked copies."""

import base64
import contextlib
import io
import json
import logging
import traceback
from collections.abc import Iterator
from typing import Any

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr, ValidationError

from schemas.commands import parse
from schemas.events import encode
from tests.support.conversation import GONE, REFUSED, Conversation, entry, speak
from tests.support.simulator import Simulator
from worker import explain
from worker.amqp.management import Management
from worker.amqp.parked import without_token
from worker.avatar.client import Api, AvatarClient
from worker.avatar.credentials import FixedKs, Minted
from worker.avatar.ks_service import AdminSecret, AppToken
from worker.core.model import ReplyTo, Session, Viewer
from worker.core.work import Open
from worker.ops import logs
from worker.ports import Held
from worker.settings import Settings
from worker.stores import records
from worker.stores.database import Database
from worker.stores.sessions import SqlSessions

REPLY = ReplyTo("answers", "corr", 30_000)

raw = st.binary(min_size=24, max_size=60)
kaltura_sessions = raw.map(lambda body: base64.urlsafe_b64encode(b"v2|101|" + body).decode())
tokens = st.tuples(raw, raw).map(
    lambda parts: "eyJ" + ".".join(base64.urlsafe_b64encode(part).decode().rstrip("=") for part in (b"{}{}{}", *parts))
)
opaque = st.text("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-", min_size=16, max_size=40).map(
    lambda text: f"x{text}"
)


@contextlib.contextmanager
def logged(log_format: Any) -> Iterator[io.StringIO]:
    """What is logged in here, as an operator sees it."""
    root = logging.getLogger()
    before, level = root.handlers, root.level
    worker_level = logging.getLogger("worker").level
    logs.configure("debug", log_format)
    out = io.StringIO()
    (handler,) = root.handlers
    assert isinstance(handler, logging.StreamHandler)
    handler.setStream(out)
    try:
        yield out
    finally:
        root.handlers = before
        root.setLevel(level)
        logging.getLogger("worker").setLevel(worker_level)
        structlog.reset_defaults()


def fail(text: str) -> None:
    raise RuntimeError(text)


@pytest.mark.parametrize("log_format", ["json", "console"])
@given(ks=kaltura_sessions, token=tokens, password=opaque)
def test_logs_even_where_somebody_else_wrote_the_text(log_format: str, ks: str, token: str, password: str) -> None:
    with logged(log_format) as out:
        log = structlog.stdlib.get_logger("worker.test")
        log.error("call_failed", error=f"refused: KS {ks}", url=f"amqp://user:{password}@host/")
        logging.getLogger("worker.library").error("token %s of %s", token, ks)
        try:
            fail(f"Authorization: Bearer {token}; ks={ks}")
        except RuntimeError:
            log.exception("lane_crashed")
    text = out.getvalue()
    assert text.count("call_failed") == 1
    assert "lane_crashed" in text
    assert not [secret for secret in (ks, token, password) if secret in text]


@given(token=opaque, credential=opaque)
def test_events_and_reprs_of_everything_a_lane_has(token: str, credential: str) -> None:
    viewer = Viewer("https://whep", {"username": "u", "credential": credential})
    talk = Conversation(session=Session("s1", token, "ann", "v1", viewer=viewer))
    talk.offer(
        entry(type="session.start", reply_to=REPLY),
        entry(type="session.start", handoff="viewer", reply_to=REPLY),
        speak("t1", "a", final=True),
        entry(type="session.attach", sessionId="theirs", token=token),
        speak("t2", "b", final=True),
        entry(type="session.end"),
    ).settle(GONE, REFUSED)
    assert any(conclusion.answer for conclusion in talk.conclusions), "the asker is answered"
    shown = [
        repr(talk.conclusions),
        repr(talk.works),
        repr(talk.memory.state),
        repr(list(talk.book)),
        talk.written.state,
    ]
    shown += [encode(event, source="s", worker="w").decode() for event in talk.events]
    assert not [text for text in shown if token in text or credential in text]


@given(secret=opaque)
def test_reprs_of_what_holds_credentials(secret: str) -> None:
    held = Held("c1", Session("s1", secret, viewer=Viewer("https://whep", {"credential": secret})), 1.0)
    url = SecretStr(f"http://u:{secret}@host/")
    settings = Settings(
        avatar_ks=SecretStr(secret),
        kaltura_app_token=SecretStr(secret),
        kaltura_admin_secret=secret,
        management_url=url,
    )
    held_by = [
        held,
        settings,
        Minted(secret, 1.0),
        AppToken("id", secret),
        AdminSecret(secret),
        FixedKs(SecretStr(secret)),
        Management.of(url, settings.amqp_url),
    ]
    assert secret not in repr(held_by) + str(held_by)


@given(secret=opaque, kind=st.sampled_from(["speak", "session.attach", "dance"]), wrong=st.sampled_from([1, None, []]))
def test_what_is_said_of_a_malformed_command(secret: str, kind: str, wrong: object) -> None:
    body = {"type": kind, "sessionId": wrong, "token": [secret], "turnId": {secret: 1}, "text": wrong}
    found = parse(json.dumps(body).encode(), "c1")
    assert secret not in repr(found)


@given(secret=opaque)
def test_tracebacks_of_settings_that_are_wrong(secret: str) -> None:
    try:
        Settings(avatar_ks=SecretStr(f"{secret} {secret}"), partitions=secret)
    except ValidationError:
        assert secret not in traceback.format_exc()
    else:
        raise AssertionError("they are right")


@given(secret=opaque, after=st.text(max_size=5), broken=st.booleans(), deep=st.booleans())
def test_parked_copies(secret: str, after: str, broken: bool, deep: bool) -> None:
    document: dict[str, Any] = {"type": "session.attach", "sessionId": "s", "Token" if deep else "token": secret}
    body = json.dumps({"session": document} if deep else document).encode()
    assert secret.encode() not in without_token(body[:-1] + after.encode() if broken else body)


async def test_explain_and_the_store_s_errors() -> None:
    token, credential = "a-token-that-is-planted", "a-credential-that-is-planted"
    database = await Database.open("sqlite://")
    store = SqlSessions(database)
    viewer = Viewer("https://whep", {"credential": credential})
    await store.put(Held("c1", Session("s1", token, "ann", viewer=viewer), 1.0), "w1", 2.0)
    dossier = await records.collect(database, "c1")
    found = explain._OnBroker(None, [])
    document = explain._document("c1", None, dossier, found)
    assert document["session"]["session_id"] == "s1"
    assert not [secret for secret in (token, credential) if secret in json.dumps(document) + repr(dossier)]
    await database.write(lambda one: one.exec_driver_sql("DROP TABLE sessions"), "test", alone=True)
    with pytest.raises(Exception, match="sessions") as raised:
        await store.put(Held("c1", Session("s1", token), 1.0), "w1", 2.0)
    assert token not in "".join(traceback.format_exception(raised.value))
    await database.close()


async def test_an_api_that_quotes_what_it_was_sent(simulator: Simulator) -> None:
    async with AvatarClient(Api(simulator.url), FixedKs(SecretStr("demo-ks"))) as client:
        _, session = await client.create(Open("ann", None, None))
        assert session is not None
        await simulator.fault("status", route="say-text", status=400, error=f"token {session.token} may not say this")
        await simulator.fault("status", route="create", status=403, error="demo-ks may not do this")
        said = await client.say(session, speak_piece())
        created, _ = await client.create(Open("ann", None, None))
    assert session.token[:20] not in said.error
    assert created.error == "[redacted] may not do this"


def speak_piece() -> Any:
    talk = Conversation().offer(speak("t1", "a", final=True))
    return talk.say().piece
