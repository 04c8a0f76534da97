"""A conversation's memory: what is handed over to be written, and what is left to the ledger."""

from schemas.events import Event, SpeechDiscarded
from worker.core.memory import KEPT_AT_HAND, Ended, Memory, TurnState


def ended(message_id: str) -> Ended:
    data = SpeechDiscarded(turn_id="t1", command_ids=(message_id,), reason="empty")
    return Ended(b"", Event("c1", data, message_id), 1.0)


def test_only_what_is_new_is_handed_over_and_only_once() -> None:
    memory = Memory(writer="w")
    assert memory.take_changes() is None
    memory.turn("t1", 1.0)
    memory.end("m1", ended("m1"))
    first = memory.take_changes()
    assert first is not None
    assert (set(first.turns), set(first.ended)) == ({"t1"}, {"m1"})
    assert memory.take_changes() is None
    memory.turn("t2", 2.0)
    second = memory.take_changes()
    assert second is not None
    assert (set(second.turns), set(second.ended)) == ({"t2"}, set())


def test_what_was_handed_over_does_not_change_any_more() -> None:
    memory = Memory(writer="w")
    memory.turn("t1", 1.0)
    changes = memory.take_changes()
    assert changes is not None
    memory.turn("t1", 2.0).state = TurnState.CLOSED
    assert changes.turns["t1"].state is TurnState.OPEN


def test_every_change_is_based_on_the_one_before_and_on_no_other_memorys() -> None:
    bases, versions = [], []
    for writer in ("w1", "w2"):
        memory = Memory(version="recalled", writer=writer)
        for n in range(3):
            memory.update(number=n)
            changes = memory.take_changes()
            assert changes is not None
            bases.append(changes.base)
            versions.append(changes.version)
    assert bases == ["recalled", *versions[:2], "recalled", *versions[3:5]]
    assert len({*versions, "recalled"}) == 7


def test_what_ended_long_ago_is_left_to_the_ledger() -> None:
    memory = Memory(writer="w")
    for n in range(2 * KEPT_AT_HAND):
        memory.end(f"m{n}", ended(f"m{n}"))
        memory.trim()
    assert (len(memory.ended), memory.elsewhere) == (2 * KEPT_AT_HAND, set())
    memory.end("last", ended("last"))
    memory.trim()
    assert memory.to_look_up({"m1", "m4000", "new"}) == {"m1"}, "it has to be asked now"
    assert next(iter(memory.ended)) == f"m{KEPT_AT_HAND + 1}"
    assert len(memory.ended) == KEPT_AT_HAND
    changes = memory.take_changes()
    assert changes is not None
    assert len(changes.ended) == 2 * KEPT_AT_HAND + 1, "and gets all there is"
