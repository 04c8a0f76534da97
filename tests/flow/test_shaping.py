"""Pieces in the flow: the lane says until when to wait, the runner asks again then; producers are held back."""

import asyncio
import time
from dataclasses import replace

import pytest

from tests.flow.conftest import Fleet, Flow
from tests.support.conversation import RULES, wire
from tests.support.fakes import FakeClock, until
from tests.support.scrape import value
from worker.flow import runner

QUICK = replace(RULES, stall_first_s=0.05, stall_s=0.1, auto_final_s=0.3, pause_chars=100, resume_chars=20)
SENTENCE = "This is a sentence of some length. "


class RunningClock(FakeClock):
    """Time that passes by itself."""

    def __call__(self) -> float:
        return self.now + time.monotonic()


@pytest.fixture
async def flow(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> Flow:
    monkeypatch.setattr(runner, "LINGER_S", 3600)
    monkeypatch.setattr(fleet, "_clock", RunningClock())
    return fleet.join("w1", replace(QUICK, pause_valid_s=0.1))


async def hung(flow: Flow) -> asyncio.Event:
    gate = flow.api.gates[f"say {SENTENCE}"] = asyncio.Event()
    flow.speak(SENTENCE)
    flow.speak("And more")
    await until(lambda: flow.api.said == [SENTENCE])
    return gate


async def test_a_stalled_tail_is_spoken_and_the_turn_closes(flow: Flow) -> None:
    flow.speak("Well, ")
    await flow.said("Well, ")
    await until(lambda: flow.told("turn.completed"))
    assert wire(flow.told("turn.completed")[0])["autoFinal"] is True


async def test_a_stopping_worker_leaves_the_tail_to_its_successor(flow: Flow, fleet: Fleet) -> None:
    flow.lanes._rules = replace(QUICK, stall_first_s=3600, stall_s=3600, auto_final_s=3600)
    flow.speak(SENTENCE)
    flow.speak("And **more")
    await flow.said(SENTENCE)
    await until(lambda: flow.deliveries[0].settled)
    await flow.lanes.stop()
    assert flow.deliveries[1].settled == 0
    other = fleet.join("w2", QUICK)
    for one in flow.lose():
        other.deliver(one)
    other.speak("** of it.", final=True)
    await other.said("And more of it.")


async def test_producers_are_held_back_while_a_call_hangs_and_told_when_it_is_over(flow: Flow) -> None:
    gate = await hung(flow)
    for _ in range(4):
        flow.speak(SENTENCE)
    await until(lambda: len(flow.told("flow.paused")) >= 3)
    assert len({event.id("") for event in flow.told("flow.paused")}) == len(flow.told("flow.paused"))
    assert flow.told("flow.resumed") == []
    gate.set()
    await until(lambda: flow.told("flow.resumed"))
    paused = len(flow.told("flow.paused"))
    flow.speak("", final=True)
    await flow.all_settled()
    assert len(flow.told("flow.paused")) == paused
    assert wire(flow.told("flow.resumed")[0])["waitingChars"] <= 20


async def test_a_worker_that_loses_the_conversation_asks_nobody_to_wait(flow: Flow) -> None:
    gate = await hung(flow)
    for _ in range(4):
        flow.speak(SENTENCE)
    await until(lambda: flow.told("flow.paused"))
    flow.lose()
    gate.set()
    await flow.quiet()
    paused = len(flow.told("flow.paused"))
    await until(lambda: not any(runner._errands for runner in flow.lanes._runners.values()))
    assert len(flow.told("flow.paused")) == paused
    assert flow.told("flow.resumed") == []


async def test_numbers_out_of_order_are_counted(flow: Flow) -> None:
    for seq in (1, 2, 5, 3):
        flow.offer(turnId="t1", text="word ", isFinal=False, seq=seq)
    await flow.all_settled()
    for kind in ("gap", "step_back"):
        assert value(flow.metrics.registry, "chunks_out_of_order_total", kind=kind) == 1
