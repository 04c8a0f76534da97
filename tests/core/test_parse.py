"""`parse`: every reason to reject, strictness, whose conversation it is; and never an exception, never a secret."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.commands import (
    Command,
    Interrupt,
    Malformed,
    RejectReason,
    SessionAttach,
    SessionEnd,
    SessionStart,
    Speak,
    parse,
)
from schemas.routes import MAX_COMMAND_BYTES

SPEAK = {"turnId": "t1", "text": "Hello"}
ATTACH = {"type": "session.attach", "sessionId": "s1", "token": "abc"}
START = {"type": "session.start"}


def read(body: Any, routing_key: str = "c1") -> Command | Malformed:
    return parse(json.dumps(body).encode(), routing_key)


def rejected(body: Any, routing_key: str = "c1") -> Malformed:
    found = parse(body, routing_key) if isinstance(body, bytes) else read(body, routing_key)
    assert isinstance(found, Malformed), found
    return found


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (SPEAK | {"isFinal": True}, Speak(conversationId="c1", turnId="t1", text="Hello")),
        (SPEAK, Speak(conversationId="c1", type="speak", turnId="t1", text="Hello", isFinal=True)),
        (
            SPEAK | {"type": "speak", "isFinal": False, "seq": 0},
            Speak(conversationId="c1", turnId="t1", text="Hello", isFinal=False, seq=0),
        ),
        ({"turnId": "t1", "text": ""}, Speak(conversationId="c1", turnId="t1", text="")),
        ({"type": "interrupt"}, Interrupt(conversationId="c1", type="interrupt")),
        ({"type": "interrupt", "turnId": "t1"}, Interrupt(conversationId="c1", type="interrupt", turnId="t1")),
        (START, SessionStart(conversationId="c1", type="session.start")),
        (
            START | {"avatarId": "a", "voiceId": "v", "voiceSpeed": 1, "handoff": "viewer"},
            SessionStart(
                conversationId="c1", type="session.start", avatarId="a", voiceId="v", voiceSpeed=1.0, handoff="viewer"
            ),
        ),
        (ATTACH, SessionAttach(conversationId="c1", type="session.attach", sessionId="s1", token="abc")),
        ({"type": "session.end"}, SessionEnd(conversationId="c1", type="session.end")),
    ],
)
def test_commands(body: dict[str, Any], expected: Command) -> None:
    assert read(body) == expected
    assert read(body | {"conversationId": "c1"}) == expected
    assert read(body | {"conversationId": "c1"}, "") == expected
    assert read(body | {"unheardOf": {"deep": [None]}, "turn_id": 7, "conversation_id": 7}) == expected


@pytest.mark.parametrize(
    ("body", "reason", "field"),
    [
        (b"\xff", "not_utf8", "$"),
        (json.dumps(SPEAK).encode("utf-16"), "not_utf8", "$"),
        (b"", "not_json", "$"),
        (b"{", "not_json", "$"),
        (b"Hello", "not_json", "$"),
        (b'{"turnId":"t1","text":"x"} {}', "not_json", "$"),
        (b'\xef\xbb\xbf{"turnId":"t1","text":"x"}', "not_json", "$"),
        (b'{"turnId":"t1","text":"\\ud800"}', "not_json", "$"),
        (b'{"turnId":"t1","text":"\\udc00\\ud800"}', "not_json", "$"),
        (b'{"type":"session.start","voiceSpeed":NaN}', "not_json", "$"),
        (b'{"turnId":"t1","text":"x","seq":1' + b"0" * 5000 + b"}", "not_json", "$"),
        (b"[" * 100_000, "not_json", "$"),
        (b'{"a":' * 40_000, "not_json", "$"),
        (b" " * (MAX_COMMAND_BYTES + 1), "too_large", "$"),
        ([], "invalid_field", "$"),
        (None, "invalid_field", "$"),
        ("speak", "invalid_field", "$"),
        (SPEAK | {"type": "shout"}, "unknown_type", "type"),
        (SPEAK | {"type": "Speak"}, "unknown_type", "type"),
        (SPEAK | {"type": ""}, "unknown_type", "type"),
        (SPEAK | {"type": None}, "invalid_field", "type"),
        (SPEAK | {"type": 1}, "invalid_field", "type"),
        ({}, "invalid_field", "turnId"),
        ({"turnId": "t1"}, "invalid_field", "text"),
        ({"turnId": "t1", "text": "", "isFinal": False}, "invalid_field", "text"),
        (SPEAK | {"turnId": ""}, "invalid_field", "turnId"),
        (SPEAK | {"turnId": "t" * 129}, "invalid_field", "turnId"),
        (SPEAK | {"turnId": 1}, "invalid_field", "turnId"),
        (SPEAK | {"turnId": None}, "invalid_field", "turnId"),
        (SPEAK | {"text": None}, "invalid_field", "text"),
        (SPEAK | {"text": ["Hello"]}, "invalid_field", "text"),
        (SPEAK | {"isFinal": "yes"}, "invalid_field", "isFinal"),
        (SPEAK | {"isFinal": 1}, "invalid_field", "isFinal"),
        (SPEAK | {"isFinal": None}, "invalid_field", "isFinal"),
        (SPEAK | {"seq": -1}, "invalid_field", "seq"),
        (SPEAK | {"seq": 1.0}, "invalid_field", "seq"),
        (SPEAK | {"seq": "1"}, "invalid_field", "seq"),
        (SPEAK | {"seq": True}, "invalid_field", "seq"),
        (SPEAK | {"seq": None}, "invalid_field", "seq"),
        ({"type": "interrupt", "turnId": None}, "invalid_field", "turnId"),
        ({"type": "interrupt", "turnId": ""}, "invalid_field", "turnId"),
        (START | {"avatarId": None}, "invalid_field", "avatarId"),
        (START | {"avatarId": ""}, "invalid_field", "avatarId"),
        (START | {"voiceId": 5}, "invalid_field", "voiceId"),
        (START | {"voiceSpeed": 0}, "invalid_field", "voiceSpeed"),
        (START | {"voiceSpeed": "1"}, "invalid_field", "voiceSpeed"),
        (START | {"voiceSpeed": True}, "invalid_field", "voiceSpeed"),
        (b'{"type":"session.start","voiceSpeed":1e400}', "invalid_field", "voiceSpeed"),
        (b'{"type":"session.start","voiceSpeed":1' + b"0" * 400 + b"}", "invalid_field", "voiceSpeed"),
        (START | {"handoff": "page"}, "invalid_field", "handoff"),
        (START | {"handoff": None}, "invalid_field", "handoff"),
        (ATTACH | {"sessionId": ""}, "invalid_field", "sessionId"),
        (ATTACH | {"sessionId": "../s"}, "invalid_field", "sessionId"),
        (ATTACH | {"token": "two\r\nlines"}, "invalid_field", "token"),
        ({"type": "session.attach", "sessionId": "s1"}, "invalid_field", "token"),
        (SPEAK | {"conversationId": "c2"}, "conversation_mismatch", "conversationId"),
        (SPEAK | {"conversationId": None}, "invalid_field", "conversationId"),
        (SPEAK | {"conversationId": 1}, "invalid_field", "conversationId"),
        (SPEAK | {"conversationId": ""}, "invalid_conversation_id", "conversationId"),
        (SPEAK | {"conversationId": "a b"}, "invalid_conversation_id", "conversationId"),
        (SPEAK | {"conversationId": "c1\n"}, "invalid_conversation_id", "conversationId"),
        (SPEAK | {"conversationId": "ü"}, "invalid_conversation_id", "conversationId"),
        (SPEAK | {"conversationId": "c" * 129}, "invalid_conversation_id", "conversationId"),
    ],
)
def test_rejected(body: Any, reason: str, field: str) -> None:
    found = rejected(body)
    assert found.reason == reason
    assert field in [error.field for error in found.errors]
    assert len(found.errors) == len({error.field for error in found.errors}), "one rule a field is enough"


def test_each_reason_is_covered_by_the_table_above() -> None:
    (table,) = (mark for mark in test_rejected.pytestmark if mark.name == "parametrize")
    seen = {reason for _, reason, _ in table.args[1]}
    assert seen == set(RejectReason) - {RejectReason.MESSAGE_ID_REUSED}  # which a lane finds out


def test_all_broken_fields_are_named() -> None:
    found = rejected({"turnId": "", "text": 1, "isFinal": "yes"})
    assert [error.field for error in found.errors] == ["turnId", "text", "isFinal"]


def test_a_command_may_be_256_kib() -> None:
    frame = len(json.dumps(SPEAK | {"text": ""}))
    largest = json.dumps(SPEAK | {"text": "x" * (MAX_COMMAND_BYTES - frame)}).encode()
    assert len(largest) == MAX_COMMAND_BYTES
    assert isinstance(parse(largest, "c1"), Speak)
    assert rejected(largest + b" ").reason == "too_large"


@pytest.mark.parametrize("conversation_id", ["a", "A-z.0_9:-", "c" * 128, ".", "-"])
def test_conversation_ids(conversation_id: str) -> None:
    assert isinstance(read(SPEAK, conversation_id), Speak)
    assert isinstance(read(SPEAK | {"conversationId": conversation_id}, ""), Speak)


@pytest.mark.parametrize(
    ("body", "routing_key", "subject"),
    [
        (b"{", "c1", "c1"),
        (b"{", "", None),
        (b"{", "not an id", None),
        (b"{", "c" * 255, None),
        (b'{"conversationId":"c2"}', "c1", "c2"),
        (b'{"conversationId":"c2"}', "\udcff", "c2"),
        (b'{"conversationId":"c2"}', "", "c2"),
        (b'{"conversationId":"a b"}', "c1", "c1"),
        (b'{"conversationId":"a b"}', "", None),
        (b'{"conversationId":7}', "c1", "c1"),
        (b"{}", "\udcff", None),
        (b"[]", "c1", "c1"),
    ],
)
def test_whose_message_a_malformed_one_is(body: bytes, routing_key: str, subject: str | None) -> None:
    assert rejected(body, routing_key).conversation_id == subject


SECRET = "c7f3-planted-9e1b"
_keys = st.sampled_from(
    ["type", "conversationId", "turnId", "text", "isFinal", "seq", "avatarId", "voiceSpeed", "handoff", "token", "x"]
)
_leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(SECRET)
_values = st.recursive(
    _leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_keys, inner, max_size=3), max_leaves=6
)
_objects = st.fixed_dictionaries(
    {"token": st.just(SECRET), "text": st.just(SECRET)},
    optional={
        key: _values | st.just(SECRET) for key in ("turnId", "isFinal", "seq", "avatarId", "sessionId", "handoff")
    }
    | {"type": st.sampled_from(["speak", "interrupt", "session.start", "session.attach", SECRET]) | _values}
    | {"conversationId": st.sampled_from(["c1", "c 1", SECRET]) | _values},
)
_bodies = (
    st.binary(max_size=200)
    | _objects.map(lambda found: json.dumps(found).encode())
    | st.tuples(_objects, st.integers(0, 200)).map(lambda pair: json.dumps(pair[0]).encode()[: pair[1]])
)


@given(body=_bodies, routing_key=st.sampled_from(["c1", "", "\udcff"]) | st.text(max_size=300))
def test_parse_never_raises_and_never_tells_a_value(body: bytes, routing_key: str) -> None:
    found = parse(body, routing_key)
    if isinstance(found, Malformed):
        assert found.errors
        assert SECRET not in repr(found.errors)
    else:
        assert found.conversation_id in ("c1", routing_key, SECRET)


def test_a_token_is_not_shown() -> None:
    found = read(ATTACH | {"token": SECRET})
    assert isinstance(found, SessionAttach)
    assert found.token == SECRET
    assert SECRET not in f"{found!r} {found}"
