"""What a worker counts: each end once, by the word it ended with, and never whose it was."""

import asyncio
from dataclasses import replace

import pytest

from schemas.commands import RejectReason
from schemas.events import DiscardReason, SpeechFailure
from tests.flow.conftest import Flow
from tests.support.conversation import express, interrupt
from tests.support.fakes import OK, until
from tests.support.scrape import samples, value
from worker.core.model import CallKind, CallResult
from worker.ops.metrics import Metrics

REFUSED = CallResult(CallKind.REFUSED, 400)
BUSY = CallResult(CallKind.NOT_TAKEN, 503, retry_after_s=0.0)


def ended(flow: Flow, event: str, reason: str = "") -> float:
    return value(flow.metrics.registry, "commands_ended_total", event=f"avatar.{event}", reason=reason)


async def counted(flow: Flow, event: str, count: int, reason: str = "") -> None:
    await until(lambda: ended(flow, event, reason) == count, f"{count} {event} {reason}")


async def test_accepted_speech(flow: Flow) -> None:
    flow.speak("one")
    flow.clock.now += 2
    flow.speak("two", final=True)
    await counted(flow, "speech.accepted", 2)
    count = value(flow.metrics.registry, "speech_latency_seconds_count")
    assert count == len(flow.api.said)
    assert value(flow.metrics.registry, "speech_latency_seconds_sum") >= 2
    assert value(flow.metrics.registry, "possible_duplicates_total") == 0


async def test_how_long_the_first_words_of_a_turn_took(flow: Flow) -> None:
    recalled = flow.ledger.gates["recall"] = asyncio.Event()
    flow.speak("one", final=True)
    await until(lambda: flow.ledger.asked["recall"])
    flow.clock.now += 2
    recalled.set()
    flow.speak("A second turn, which is spoken in several pieces. ", turn_id="t2")
    flow.speak("This is what follows. ", turn_id="t2", final=True)
    await counted(flow, "speech.accepted", 3)
    assert len(flow.api.said) == 3
    assert value(flow.metrics.registry, "first_words_seconds_count") == 2
    assert value(flow.metrics.registry, "first_words_seconds_sum") == 2


async def test_speech_that_fails_and_the_rest_of_its_turn(flow: Flow) -> None:
    flow.api.results["say"] = [REFUSED]
    flow.speak("one")
    await counted(flow, "speech.failed", 1, "refused")
    flow.speak("two")
    await counted(flow, "speech.failed", 1, "turn_failed")
    assert value(flow.metrics.registry, "speech_latency_seconds_count") == 0


async def test_retries(flow: Flow) -> None:
    flow.api.results["say"] = [BUSY, BUSY, OK]
    flow.speak("one")

    def retried() -> float:
        flow.clock.now += 0.02
        for runner in flow.lanes._runners.values():
            runner._wake.set()
        return value(flow.metrics.registry, "speech_retries_total")

    await until(lambda: retried() == 2)
    assert ended(flow, "speech.accepted") == 1


async def test_what_comes_again_is_not_counted_as_another_end(flow: Flow) -> None:
    one = flow.speak("one")
    await counted(flow, "speech.accepted", 1)
    flow.deliver(replace(one, redelivered=True))
    await until(lambda: value(flow.metrics.registry, "commands_repeated_total") == 1)
    assert ended(flow, "speech.accepted") == 1
    assert value(flow.metrics.registry, "speech_latency_seconds_count") == 1


@pytest.mark.parametrize("first", ["express", "ordered"])
async def test_an_interrupt_in_two_copies_ends_once(flow: Flow, first: str) -> None:
    flow.api.gates["say one"] = gate = asyncio.Event()
    flow.speak("one")
    await until(lambda: flow.api.said == ["one"])
    waiting, stop = flow.speak("two"), interrupt(None, born=flow.clock())
    if first == "express":
        flow.lanes.hear(express(stop))
        await flow.quiet()
    flow.deliver(stop)
    if first == "ordered":
        await flow.quiet()
        flow.lanes.hear(express(stop))
    gate.set()
    await flow.all_settled()
    await counted(flow, "speech.discarded", 1, "interrupted")
    assert waiting.message_id is not None
    assert ended(flow, "interrupt.done") == 1
    assert value(flow.metrics.registry, "interrupt_latency_seconds_count") == 1


async def test_what_is_in_hand(flow: Flow) -> None:
    flow.api.gates["say one"] = gate = asyncio.Event()
    flow.speak("one")
    await until(lambda: flow.api.said == ["one"])
    flow.speak("two")
    assert (flow.lanes.in_hand, flow.lanes.conversations) == (2, 1)
    gate.set()
    await flow.all_settled()
    assert flow.lanes.in_hand == 0
    await until(lambda: flow.lanes.conversations == 0)


async def test_nobody_is_named(flow: Flow) -> None:
    flow.offer(conversation_id="somebody", turnId="a-turn", text="some words", isFinal=True, seq=3)
    await counted(flow, "speech.accepted", 1)
    text = flow.metrics.exposition("")[0].decode()
    assert not [name for name in ("somebody", "a-turn", "some words") if name in text]


def test_every_word_is_shown_from_the_start() -> None:
    text, content_type = Metrics().exposition("")
    assert content_type.startswith("text/plain; version=0.0.4")
    shown = samples(text.decode())
    for event, reasons in (
        ("speech.discarded", DiscardReason),
        ("speech.failed", SpeechFailure),
        ("command.rejected", RejectReason),
    ):
        for reason in reasons:
            labels = (("event", f"avatar.{event}"), ("reason", f"{reason}"))
            assert shown["avatar_worker_commands_ended_total", labels] == 0


def test_openmetrics_for_whoever_asks_for_it() -> None:
    text, content_type = Metrics().exposition("application/openmetrics-text; version=1.0.0")
    assert content_type.startswith("application/openmetrics-text")
    assert text.endswith(b"# EOF\n")


def test_two_workers_in_a_process_count_for_themselves() -> None:
    one, other = Metrics(), Metrics()
    one.dropped.inc()
    assert (value(one.registry, "events_dropped_total"), value(other.registry, "events_dropped_total")) == (1, 0)
