"""Events on the wire: CloudEvents by the official SDK, data by the generated schemas, ids that never change."""

import json
from datetime import UTC, datetime
from typing import Any, get_args

import pytest
from cloudevents.core.formats.json import JSONFormat
from cloudevents.core.v1.event import CloudEvent
from jsonschema import Draft202012Validator
from pydantic import ValidationError

from schemas import events, generate, routes
from schemas.commands import COMMANDS, RejectReason
from schemas.events import (
    EVENT_TYPES,
    CommandRejected,
    Data,
    DiscardReason,
    EndReason,
    Event,
    FlowPaused,
    FlowResumed,
    InterruptDone,
    RejectedField,
    SessionEnded,
    SessionFailed,
    SessionFailure,
    SessionReady,
    SpeechAccepted,
    SpeechDiscarded,
    SpeechFailed,
    SpeechFailure,
    TurnCompleted,
    TurnFailed,
    TurnInterrupted,
    TurnStarted,
    encode,
)

TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
IDS = ("m1", "m2")
SAMPLES: list[Data] = [
    SessionReady(session_id="s1", command_ids=()),
    SessionReady(session_id="s1", avatar_id="ann", voice_id="v1", command_ids=IDS),
    *(SessionEnded(reason=reason, command_ids=()) for reason in EndReason),
    SessionEnded(session_id="s1", reason=EndReason.IDLE, command_ids=IDS),
    *(SessionFailed(reason=reason, command_ids=()) for reason in SessionFailure),
    SessionFailed(reason=SessionFailure.CAPACITY, status=429, command_ids=IDS),
    TurnStarted(turn_id="t1"),
    TurnCompleted(turn_id="t1", pieces=0, text_length=0, final_sent=False),
    TurnCompleted(turn_id="t1", pieces=2, text_length=12, final_sent=True, auto_final=True),
    TurnInterrupted(turn_id="t1", discarded_commands=3),
    TurnFailed(turn_id="t1", reason="expired"),
    *(TurnFailed(turn_id="t1", reason=reason) for reason in SpeechFailure),
    SpeechAccepted(turn_id="t1", text="Grüße 👋", is_final=True, attempts=1, latency_ms=7, command_ids=()),
    SpeechAccepted(
        turn_id="t1",
        text="x",
        is_final=False,
        attempts=2,
        latency_ms=2000,
        possible_duplicate=True,
        command_ids=IDS,
    ),
    *(SpeechDiscarded(turn_id="t1", reason=reason, command_ids=IDS) for reason in DiscardReason),
    *(SpeechFailed(turn_id="t1", reason=reason, command_ids=IDS) for reason in SpeechFailure),
    SpeechFailed(turn_id="t1", reason=SpeechFailure.REFUSED, status=400, command_ids=()),
    *(CommandRejected(reason=reason, errors=(), command_ids=()) for reason in RejectReason),
    CommandRejected(
        reason=RejectReason.INVALID_FIELD,
        errors=(RejectedField(field="text", rule="must be a string"),),
        routing_key="\\xff",
        command_ids=IDS,
    ),
    InterruptDone(turn_ids=(), latency_ms=0, command_ids=()),
    InterruptDone(turn_ids=("t1", "t2"), latency_ms=9, api_status=0, command_ids=IDS),
    FlowPaused(waiting_chars=1000, valid_s=10),
    FlowResumed(waiting_chars=0),
]
DOCUMENTS = generate.documents()


def envelope(event: Event, **options: Any) -> dict[str, Any]:
    found = json.loads(encode(event, source="avatar-worker", worker="w1", **options))
    assert isinstance(found, dict)
    return found


def test_there_is_a_sample_of_every_event() -> None:
    assert {type(sample) for sample in SAMPLES} == set(get_args(Data)) == set(EVENT_TYPES)


@pytest.mark.parametrize("trace", [None, TRACE])
@pytest.mark.parametrize("conversation_id", ["c.1", None])
@pytest.mark.parametrize("data", SAMPLES, ids=[f"{type(data).__name__}{n}" for n, data in enumerate(SAMPLES)])
def test_the_official_sdk_and_the_schema_accept_it(data: Data, conversation_id: str | None, trace: str | None) -> None:
    event = Event(conversation_id, data, "key", trace)
    moment = datetime(2026, 1, 2, 3, 4, 5, 678_000, tzinfo=UTC)
    body = encode(event, source="avatar-worker", worker="w1", time=moment)

    read = JSONFormat().read(CloudEvent, body)

    subject = conversation_id or "$invalid"
    assert (read.get_specversion(), read.get_type(), read.get_source()) == ("1.0", event.type, "avatar-worker")
    assert (read.get_subject(), read.get_id()) == (subject, event.id("avatar-worker"))
    assert (read.get_time(), read.get_datacontenttype()) == (moment, "application/json")
    assert (read.get_extension("worker"), read.get_extension("traceparent")) == ("w1", trace)
    payload = read.get_data()
    assert isinstance(payload, dict)
    assert payload["conversationId"] == subject
    assert None not in payload.values()
    Draft202012Validator(DOCUMENTS[f"event.{event.type}.json"]).validate(payload)
    assert event.routing_key == f"{event.type}.{subject}"


@pytest.mark.parametrize("data", SAMPLES, ids=[f"{type(data).__name__}{n}" for n, data in enumerate(SAMPLES)])
def test_the_routing_key_of_the_longest_conversation_id_can_be_published(data: Data) -> None:
    """255 bytes: tests/integration/test_traps_publishing.py."""
    longest = "c" * 128
    assert routes.is_conversation_id(longest)
    assert len(Event(longest, data, "key").routing_key.encode()) <= 255


def test_the_time_defaults_to_now_in_utc() -> None:
    told = datetime.fromisoformat(envelope(Event("c1", TurnStarted(turn_id="t1"), "k"))["time"])
    assert abs((datetime.now(UTC) - told).total_seconds()) < 60


def test_the_schemas_are_valid_and_say_what_is_required() -> None:
    for name, document in DOCUMENTS.items():
        Draft202012Validator.check_schema(document)
        assert document["title"] == name.removesuffix(".json")
    validator = Draft202012Validator(DOCUMENTS["event.avatar.speech.failed.json"])
    assert not validator.is_valid({"conversationId": "c1", "turnId": "t1", "commandIds": [], "reason": "refused"})
    assert not validator.is_valid({"turnId": "t1", "commandIds": [], "reason": "refused", "parked": True})


def test_the_schema_files_are_those_of_the_models() -> None:
    expected = {name: generate.render(document) for name, document in DOCUMENTS.items()}
    found = {path.name: path.read_text(encoding="utf-8") for path in generate.FOLDER.iterdir()}
    assert found == expected, "run: python -m schemas.generate"
    assert len(found) == len(COMMANDS) + len(EVENT_TYPES)


@pytest.mark.parametrize(
    ("command", "valid"),
    [
        ({"turnId": "t1", "text": "Hello", "isFinal": True}, True),
        ({"turnId": "t1", "text": "Hello", "later": 1}, True),
        ({"turnId": "t1"}, False),
        ({"turnId": "t1", "text": None}, False),
        ({"turnId": "t1", "text": "x", "seq": None}, False),
        ({"turnId": "t1", "text": "x", "isFinal": "yes"}, False),
        ({"turnId": "t1", "text": "x", "conversationId": "a b"}, False),
    ],
)
def test_the_command_schema_agrees_with_parse(command: dict[str, Any], valid: bool) -> None:
    assert Draft202012Validator(DOCUMENTS["command.speak.json"]).is_valid(command) is valid


class TestIds:
    def test_an_id_is_known_beforehand(self) -> None:
        # Written out: listeners keep ids, so that a new release must make the same ones.
        event = Event("c1", TurnStarted(turn_id="t1"), "m1\n0")
        assert event.id("avatar-worker") == "f3f62e36-d681-50e8-aa6f-6e286145b71e"

    def test_the_same_happening_has_the_same_id_whoever_tells_it_and_when(self) -> None:
        event = Event("c1", TurnStarted(turn_id="t1"), "k")
        again = Event("c1", TurnStarted(turn_id="t1"), "k", TRACE)
        early = envelope(event, time=datetime(2020, 1, 1, tzinfo=UTC))
        late = json.loads(encode(again, source="avatar-worker", worker="w2"))
        assert early["id"] == late["id"]

    def test_another_happening_has_another_id(self) -> None:
        event = Event("c1", TurnStarted(turn_id="t1"), "k")
        others = [
            event.id("another deployment"),
            Event("c2", TurnStarted(turn_id="t1"), "k").id("avatar-worker"),
            Event("c1", TurnStarted(turn_id="t1"), "k2").id("avatar-worker"),
            Event("c1", TurnInterrupted(turn_id="t1", discarded_commands=0), "k").id("avatar-worker"),
        ]
        assert len({event.id("avatar-worker"), *others}) == 5


def test_limits() -> None:
    with pytest.raises(ValidationError):
        SpeechDiscarded(turn_id="t1", reason=DiscardReason.EMPTY, command_ids=("m",) * 501)
    with pytest.raises(ValidationError):
        CommandRejected(reason=RejectReason.NOT_JSON, errors=(), routing_key="k" * 256, command_ids=())


def test_names_on_the_broker() -> None:
    assert [routes.partition_queue(n) for n in (0, 9, 99)] == [f"avatar.commands.v1.p{n}" for n in ("00", "09", "99")]
    for beyond in (-1, 100):
        with pytest.raises(ValueError, match="partition"):
            routes.partition_queue(beyond)
    assert (routes.COMMANDS, routes.INTERRUPTS, routes.EVENTS) == (
        "avatar.commands",
        "avatar.interrupts",
        "avatar.events",
    )
    assert (routes.PARKED, routes.DEAD) == ("avatar.parked", "avatar.dead")
    assert events.CONTENT_TYPE == "application/cloudevents+json"
