"""What is said and what is not: shaping, expiry, duplicates, interrupts, bad input."""

import asyncio
import json
import re
import time
from collections import Counter

from pamqp.commands import Basic

from tests.acceptance.conftest import Simulator, StartWorker
from tests.support.bus import Bus, Moment, Raw

ANSWER = """## Why the sky is blue

Sunlight is a *mix* of all colours. In the air the **short** waves, the blue ones, bounce off the molecules (see \
[Rayleigh](https://example.org/rayleigh)) far more often than the long ones do, by a factor of about 5.5. So wherever \
you look, some blue light comes to you from there 🌍:

- **Noon**: the way through the air is short, e.g. 8 km.
- **Evening**: it is long, and the blue gets lost.

```python
scattering = 1 / wavelength**4
```

What is left then is `red`. Does that help?
"""
SPOKEN = """Why the sky is blue
Sunlight is a mix of all colours. In the air the short waves, the blue ones, bounce off the molecules (see \
Rayleigh) far more often than the long ones do, by a factor of about 5.5. So wherever \
you look, some blue light comes to you from there:
Noon: the way through the air is short, e.g. 8 km.
Evening: it is long, and the blue gets lost.
What is left then is red. Does that help?
"""
QUEUE = "avatar.commands.v1.p00"


async def test_without_shaping_a_chunk_is_a_call(start_worker: StartWorker, simulator: Simulator, bus: Bus) -> None:
    await start_worker(SPEECH_SHAPING="off")
    chunks = ["Hel", "lo  ", " *wor*", "ld\n", "."]
    ids = [await bus.say("c", "t", chunk, final=chunk == ".") for chunk in chunks]
    blank = await bus.say("c", "t2", " \n")
    await bus.all_ended([*ids, blank])
    (session,) = await simulator.sessions()
    says = [call["body"] for call in session["calls"] if call["route"] == "say-text"]
    assert [say["text"] for say in says] == chunks
    assert [say["isFinal"] for say in says] == [False, False, False, False, True]
    ended = await bus.ended(blank)
    assert (ended["type"], ended["data"]["reason"]) == ("avatar.speech.discarded", "empty")


async def test_an_answer_in_markdown_is_spoken_in_sentences(
    start_worker: StartWorker, simulator: Simulator, bus: Bus
) -> None:
    await start_worker()
    tokens = re.findall(r"\s*\S{1,6}|\s+", ANSWER)
    ids = [await bus.say("c", "t", token, final=False) for token in tokens]
    ids.append(await bus.say("c", "t", ""))
    await bus.all_ended(ids)
    (session,) = await simulator.sessions()
    says = [call["body"] for call in session["calls"] if call["route"] == "say-text"]
    assert "".join(say["text"] for say in says).split() == SPOKEN.split()
    assert [say["isFinal"] for say in says] == [*[False] * (len(says) - 1), True]
    assert len(says) <= len(tokens) / 8
    assert Counter(id_ for event in bus.of("speech.accepted") for id_ in event["data"]["commandIds"]) == Counter(ids)
    completed = await bus.event("turn.completed")
    assert (completed["data"]["pieces"], completed["data"]["finalSent"]) == (len(says), True)


async def test_each_part_of_cleaning_is_a_setting(start_worker: StartWorker, simulator: Simulator, bus: Bus) -> None:
    await start_worker(SPEECH_CLEAN_EMPHASIS="false", SPEECH_CLEAN_EMOJI="false", SPEECH_LANGUAGE="de")
    await bus.ended(await bus.say("c", "t", "**Am 3. Oktober**, `ja` 🎉!"))
    assert await simulator.spoken() == {"t": "**Am 3. Oktober**, ja 🎉!"}


async def test_a_turn_without_a_final_is_closed(start_worker: StartWorker, simulator: Simulator, bus: Bus) -> None:
    await start_worker(SPEECH_AUTO_FINAL_S="1", SPEECH_STALL_FIRST_MS="100", SPEECH_FINAL_TEXT="Bye.")
    await bus.ended(await bus.say("c", "t", "Hello there. ", final=False))
    completed = (await bus.event("turn.completed", "c"))["data"]
    assert (completed["finalSent"], completed["autoFinal"]) == (True, True)
    assert await simulator.spoken() == {"t": "Hello there. Bye."}


async def test_producers_are_asked_to_pause_while_the_api_hangs(
    start_worker: StartWorker, simulator: Simulator, bus: Bus
) -> None:
    await start_worker(FLOW_VALID_S="0.5")
    await simulator.fault(kind="hang", route="say-text", when="after")
    ids = [await bus.say("c", "t", "Being said. ", final=False)]
    await simulator.wait("say-text")
    ids += [await bus.say("c", "t", "This is one sentence of many. ", final=number == 39) for number in range(40)]
    await bus.until(lambda: len(bus.of("flow.paused")) >= 3)
    assert not bus.of("flow.resumed")
    assert {event["data"]["validS"] for event in bus.of("flow.paused")} == {0.5}
    assert all(event["data"]["waitingChars"] >= 1000 for event in bus.of("flow.paused"))
    await simulator.release()
    assert (await bus.event("flow.resumed", "c"))["data"]["waitingChars"] <= 200
    await bus.all_ended(ids)
    assert len(bus.of("flow.resumed")) == 1


async def test_old_speech_expires_with_its_turn(start_worker: StartWorker, simulator: Simulator, bus: Bus) -> None:
    await start_worker(SPEECH_MAX_AGE_S="5")
    long_ago = {"published-at-ms": round((time.time() - 60) * 1000)}
    first = await bus.say("c", "old", "Too late.", final=False, headers=long_ago)
    second = await bus.say("c", "old", "The rest of it.")
    third = await bus.say("c", "new", "In time.")
    await bus.all_ended([first, second, third])
    assert {event["data"]["reason"] for event in bus.of("speech.discarded")} == {"expired"}
    assert (await bus.event("turn.failed", "c"))["data"] == {
        "conversationId": "c",
        "turnId": "old",
        "reason": "expired",
    }
    assert await simulator.spoken() == {"new": "In time."}


async def test_a_duplicate_is_told_again_and_not_said(
    start_worker: StartWorker, simulator: Simulator, bus: Bus
) -> None:
    await start_worker()
    for _ in range(3):
        await bus.say("c", "t", "Once.", message_id="one id")
    await bus.ended(await bus.say("c", "t2", "Another."))
    accepted = [event for event in bus.of("speech.accepted") if event["data"]["commandIds"] == ["one id"]]
    assert len(accepted) == 3
    assert len({event["id"] for event in accepted}) == 1
    await bus.say("c", "t", "Something else.", message_id="one id")
    rejected = await bus.event("command.rejected", "c")
    assert rejected["data"]["reason"] == "message_id_reused"
    assert await simulator.spoken() == {"t": "Once.", "t2": "Another."}
    # The same id in another conversation is another command.
    await bus.say("other", "t", "Elsewhere.", message_id="one id")
    await bus.event("speech.accepted", "other")


async def test_an_interrupt_silences_what_stands_before_it(
    start_worker: StartWorker, simulator: Simulator, bus: Bus
) -> None:
    await start_worker()
    await simulator.fault(kind="hang", route="say-text", when="after")
    first = await bus.say("c", "t", "Being said. ", final=False)
    await simulator.wait("say-text")
    dropped = [await bus.say("c", "t", f"Never {number}. ", final=False) for number in range(5)]
    interrupt = await bus.interrupt("c")
    late = await bus.say("c", "t", "Late.")
    following = await bus.say("c", "t2", "After it.")
    other = await bus.say("elsewhere", "t3", "Meanwhile.")
    await bus.ended(other)
    await simulator.release()
    await bus.all_ended([first, *dropped, interrupt, late, following])
    done = (await bus.ended(interrupt))["data"]
    assert (done["turnIds"], done["apiStatus"]) == (["t"], 200)
    assert {(await bus.ended(id_))["data"]["reason"] for id_ in [*dropped, late]} == {"interrupted"}
    assert await simulator.spoken() == {"t": "Being said. ", "t2": "After it.", "t3": "Meanwhile."}


async def test_no_bad_message_stops_the_worker_serving_others(
    start_worker: StartWorker, simulator: Simulator, bus: Bus
) -> None:
    worker = await start_worker()
    good = json.dumps({"turnId": "t", "text": "s3cret words"}).encode()
    bad: list[tuple[str, bytes, str, str]] = [
        ("not JSON", b"{s3cret", "c", "not_json"),
        ("not UTF-8", b'"s3cret \xff', "c", "not_utf8"),
        ("deep", b"[" * 100_000, "c", "not_json"),
        ("wrong type", b'{"turnId":7,"text":"s3cret"}', "c", "invalid_field"),
        ("null", b'{"turnId":null,"text":"s3cret"}', "c", "invalid_field"),
        ("empty text", b'{"turnId":"t","text":"","isFinal":false}', "c", "invalid_field"),
        ("unknown type", b'{"type":"s3cret"}', "c", "unknown_type"),
        ("too large", b'{"text":"' + b"x" * 2**18 + b'"}', "c", "too_large"),
        ("mismatch", b'{"conversationId":"other","turnId":"t","text":"x"}', "c", "conversation_mismatch"),
        ("empty key", good, "", "invalid_conversation_id"),
        ("255 bytes of key", good, "k" * 255, "invalid_conversation_id"),
        ("key not UTF-8", good, Raw(b"\xff\xfe"), "invalid_conversation_id"),
        ("attach", b'{"type":"session.attach","token":"s3cret"}', "c", "invalid_field"),
    ]
    for name, body, key, _ in bad:
        await bus.publish(body, key, properties=Basic.Properties(message_id=name, delivery_mode=2))
        await bus.say("good", "served", "a", final=False)
    await bus.publish(good, "odd", properties=Basic.Properties(message_id=Raw(b"\xff"), headers={Raw(b"\xfe"): 1}))
    await bus.publish(good, "odd", properties=Basic.Properties(message_id="absurd", timestamp=Moment.of(2**62)))
    await bus.all_ended([name for name, *_ in bad] + [r"\xff", "absurd"])
    for name, _, _, reason in bad:
        event = await bus.ended(name)
        assert (event["type"], event["data"]["reason"]) == ("avatar.command.rejected", reason)
        assert event["data"]["errors"]
        assert event["data"]["parked"] is True
    assert {(await bus.ended(name))["type"] for name in (r"\xff", "absurd")} == {"avatar.speech.accepted"}
    copies = await bus.parked(len(bad))
    assert {copy.header.properties.message_id for copy in copies} == {name for name, *_ in bad}
    (attach,) = [copy for copy in copies if copy.header.properties.message_id == "attach"]
    assert b"s3cret" not in attach.body
    told = json.dumps([event for event in bus.events if event["type"] == "avatar.command.rejected"])
    assert "s3cret" not in told + worker.log
    await bus.ended(await bus.say("good", "served", "b"))
    assert (await simulator.spoken())["served"] == "a" * len(bad) + "b"
    await bus.drained(QUEUE)
    assert "broker_lost" not in worker.log


async def test_speech_goes_on_while_the_api_has_its_troubles(
    start_worker: StartWorker, simulator: Simulator, bus: Bus
) -> None:
    await start_worker(AMBIGUOUS_WAIT_MS="300")
    faults: list[dict[str, object]] = [
        {"kind": "status", "status": 429, "retry_after": 1, "turn": "limited"},
        {"kind": "status", "status": 503, "turn": "unavailable", "times": 3},
        {"kind": "status", "status": 500, "when": "after", "turn": "unsure"},
        {"kind": "drop", "when": "after", "turn": "cut"},
        {"kind": "drop", "turn": "cut before"},
    ]
    for fault in faults:
        await simulator.fault(route="say-text", **fault)
    ids = {
        str(fault["turn"]): await bus.say(f"c-{fault['turn']}".replace(" ", "-"), str(fault["turn"]), "x")
        for fault in faults
    }
    await bus.all_ended(ids.values())
    told = {turn: (await bus.ended(id_))["data"] for turn, id_ in ids.items()}
    assert {turn for turn, data in told.items() if data.get("possibleDuplicate")} == {"unsure", "cut", "cut before"}
    assert told["limited"]["attempts"] == 2
    assert told["limited"]["latencyMs"] >= 1000
    assert told["unavailable"]["attempts"] == 4
    assert all(session["overlaps"]["any"] == [] for session in await simulator.sessions())
    await simulator.fault(route="say-text", kind="status", status=400, turn="refused")
    refused = await bus.say("refused", "refused", "x", final=False)
    rest = await bus.say("refused", "refused", "y")
    assert (await bus.ended(refused))["data"]["reason"] == "refused"
    assert (await bus.ended(rest))["data"]["reason"] in ("turn_failed", "refused")
    await asyncio.wait_for(bus.parked(2), 10)
