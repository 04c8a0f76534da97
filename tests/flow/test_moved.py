"""A conversation whose key has moved: what comes from the new partition waits for all that came from the old one."""

import asyncio
from dataclasses import dataclass

import pytest

from tests.flow.conftest import Fleet, Flow
from tests.support.fakes import FakeDelivery, FakeTenure, until
from tests.support.scrape import value
from worker.core.model import Marker


@pytest.fixture(autouse=True)
def linger(fleet: Fleet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker.flow.runner.LINGER_S", 3600)


@dataclass
class Partition:
    """A partition of which a worker is the owner."""

    flow: Flow
    tenure: FakeTenure

    def speak(self, text: str) -> None:
        self.flow.tenure = self.tenure
        self.flow.speak(text)

    def pass_on(self, to: int) -> FakeDelivery:
        """Deliver a marker."""
        delivery = FakeDelivery(self.flow.outbox, f"marker to {to}", self.tenure)
        self.flow.lanes.pass_through(Marker("c1", to, delivery))
        return delivery

    async def marked(self, *marks: tuple[int, int]) -> None:
        """These markers were sent, and no others."""
        sent = [(old, new) for what, detail in self.flow.outbox.log if what == "mark" for _, old, new in [detail]]
        await until(lambda: self.flow.outbox.whats.count("mark") >= len(marks))
        sent = [(old, new) for what, detail in self.flow.outbox.log if what == "mark" for _, old, new in [detail]]
        assert sent == list(marks)


def partition(flow: Flow, number: int) -> Partition:
    return Partition(flow, FakeTenure(flow.ledger, number))


async def home(flow: Flow) -> int | None:
    return await flow.ledger.partition_of("c1")


@pytest.mark.parametrize("workers", [1, 2])
async def test_the_new_waits_until_the_marker_has_passed(fleet: Fleet, workers: int) -> None:
    flows = [fleet.join(f"w{number}") for number in range(workers)]
    old, new = partition(flows[0], 0), partition(flows[-1], 1)
    gate = flows[0].api.gates["say a"] = asyncio.Event()
    old.speak("a")
    await flows[0].said("a")
    new.speak("c")
    await new.marked((0, 1))
    old.speak("b")
    marker = old.pass_on(1)
    await flows[-1].quiet()
    assert not marker.settled
    assert "c" not in flows[-1].api.said
    gate.set()
    await until(lambda: "c" in flows[-1].api.said)
    if workers == 1:
        assert flows[0].api.said == ["a", "b", "c"]
    else:
        assert (flows[0].api.said, flows[1].api.said) == (["a", "b"], ["c"])
    for flow in flows:
        await flow.all_settled()
    await until(lambda: marker.settled)
    assert await home(flows[0]) == 1
    assert sum(value(flow.metrics.registry, "conversations_moved_total") for flow in flows) == 1
    assert [flow.outbox.whats.count("mark") for flow in flows][-1] == 1


async def test_an_idle_conversation_moves_as_well(flow: Flow) -> None:
    old, new = partition(flow, 0), partition(flow, 1)
    old.speak("a")
    await flow.all_settled()
    new.speak("b")
    await new.marked((0, 1))
    old.pass_on(1)
    await flow.said("a", "b")


async def test_a_partition_that_is_gone_is_not_waited_for(flow: Flow) -> None:
    old, new = partition(flow, 7), partition(flow, 1)
    old.speak("a")
    await flow.all_settled()
    flow.lose()
    flow.outbox.gone = {7}
    new.speak("b")
    await flow.said("a", "b")
    await flow.all_settled()
    assert await home(flow) == 1


async def test_markers_that_come_twice_change_nothing(flow: Flow) -> None:
    old, new = partition(flow, 0), partition(flow, 1)
    old.speak("a")
    await flow.all_settled()
    new.speak("b")
    await new.marked((0, 1))
    markers = [old.pass_on(1), old.pass_on(1)]
    await flow.said("a", "b")
    await until(lambda: all(marker.settled for marker in markers))
    await flow.quiet()
    assert await home(flow) == 1
    await new.marked((0, 1))


async def test_what_comes_from_the_old_partition_again_waits_for_the_new_one(flow: Flow) -> None:
    """The keys have moved back."""
    old, new = partition(flow, 0), partition(flow, 1)
    old.speak("a")
    await flow.all_settled()
    gate = flow.api.gates["say b"] = asyncio.Event()
    new.speak("b")
    await new.marked((0, 1))
    old.pass_on(1)
    await flow.said("a", "b")
    old.speak("d")
    await new.marked((0, 1), (1, 0))
    new.speak("c")
    new.pass_on(0)
    gate.set()
    await flow.said("a", "b", "c", "d")
    await flow.all_settled()
    assert await home(flow) == 0


async def test_two_moves_in_a_row_keep_their_order(fleet: Fleet) -> None:
    flows = [fleet.join(f"w{number}") for number in range(3)]
    first, second, third = (partition(flow, number) for number, flow in enumerate(flows))
    first.speak("a")
    await flows[0].all_settled()
    second.speak("b")
    await second.marked((0, 1))
    third.speak("c")
    await third.marked((0, 2))
    first.pass_on(1)
    first.pass_on(2)
    await flows[1].said("b")
    await until(lambda: flows[2].outbox.whats.count("mark") == 2)
    await third.marked((0, 2), (1, 2))
    assert flows[2].api.said == []
    second.pass_on(2)
    await flows[2].said("c")


async def test_a_worker_that_lost_the_old_partition_cannot_let_it_pass(fleet: Fleet) -> None:
    zombie, heir, newcomer = fleet.join("w1"), fleet.join("w2"), fleet.join("w3")
    lost, old, new = partition(zombie, 0), partition(heir, 0), partition(newcomer, 1)
    lost.speak("a")
    await zombie.all_settled()
    await old.tenure.epoch()
    new.speak("b")
    await new.marked((0, 1))
    marker = lost.pass_on(1)
    await until(lambda: lost.tenure.refusals)
    assert not marker.settled
    assert await home(zombie) == 0
    old.pass_on(1)
    await newcomer.said("b")


async def test_what_is_held_is_forgotten_with_its_tenure_and_comes_again(flow: Flow) -> None:
    old, new = partition(flow, 0), partition(flow, 1)
    old.speak("a")
    await flow.all_settled()
    new.speak("b")
    await new.marked((0, 1))
    flow.tenure = new.tenure
    again = flow.lose()
    flow.tenure.partition = 1
    old.pass_on(1)
    await flow.quiet()
    assert flow.api.said == ["a"]
    for one in again:
        flow.deliver(one)
    await flow.said("a", "b")


async def test_a_summons_for_what_has_ended_meanwhile_moves_nothing(flow: Flow) -> None:
    """The store is asked now and then what it keeps, and what has ended may not be out of it yet."""
    old, new = partition(flow, 0), partition(flow, 1)
    old.speak("a")
    await flow.all_settled()
    new.speak("b")
    await new.marked((0, 1))
    old.pass_on(1)
    await flow.said("a", "b")
    await flow.all_settled()
    flow.lose()
    await until(lambda: not flow.lanes.is_served("c1"))
    flow.lanes._start("c1").summon(old.tenure)
    await flow.quiet()
    await new.marked((0, 1))
    assert await home(flow) == 1
