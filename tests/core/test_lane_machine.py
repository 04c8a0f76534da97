"""Any commands, any outcomes, any time, workers that die or lose their partition, express copies: the promise holds.

The broker has one active consumer, hands out no more than a window, and gives what is not acknowledged to the next one,
in order; it may take the partition away while a call is under way, and the *zombie* may still be handed deliveries, or
have kept some. The ledger keeps what was written; the API keeps what it has heard. Clocks jump.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.support.conversation import (
    DENIED,
    GONE,
    NOT_TAKEN,
    OK,
    REFUSED,
    RULES,
    SESSION,
    STALE,
    UNKNOWN,
    Conversation,
    Outdated,
    entry,
    express,
    wire,
)
from worker.core.lane import Lane
from worker.core.memory import Changes, Memory
from worker.core.model import CallKind, CallResult, Entry
from worker.core.verdict import Conclusion
from worker.core.work import INTENT_S, Attach, Call, Open, Say, Wait

_TURNS = st.sampled_from(["t1", "t2", "t3"])
FULL = CallResult(CallKind.FULL, local=True)
_OPEN = [OK, OK, NOT_TAKEN, UNKNOWN, REFUSED, DENIED, CallResult(CallKind.NOT_TAKEN, 429), FULL]
_IN_LINE = [OK, FULL]
_ON_SESSION = [OK, OK, OK, NOT_TAKEN, UNKNOWN, REFUSED, GONE, STALE]


@dataclass(frozen=True, eq=False)
class Published:
    """A message as the broker keeps it; `body` has no text for what may be said twice."""

    message_id: str | None
    born: float
    body: dict[str, Any]

    def delivered(self, *, again: bool = False) -> Entry:
        return entry(self.message_id, born=self.born, delivery=self, redelivered=again, **self.body)


@dataclass
class Zombie:
    """A worker that lost its partition while it was calling. It does not know, and goes on until the ledger says so."""

    lane: Lane
    memory: Memory
    call: Call | None
    begun: float


class LaneMachine(RuleBasedStateMachine):
    published = Bundle("published")

    def __init__(self) -> None:
        super().__init__()
        self.talk = Conversation()
        self.unacked: list[Published] = []
        self.backlog: list[Published] = []
        self.slow = False
        self.delivered: set[Entry] = set()
        self.heard: list[str] = []
        self.zombie: Zombie | None = None
        self.interrupts: list[tuple[int, str | None]] = []
        self.seen: set[tuple[int, str | None]] = set()
        self.chunks: dict[str, tuple[int, str]] = {}
        self.turns_without_id: set[str] = set()
        self.numbers = 0
        self.begun = 0.0
        self.busy_until = self.zombie_until = self.noted_until = 0.0
        self.sure = 0
        self.cut: set[str] = set()

    @initialize(
        shaping=st.sampled_from(["sentences", "off"]),
        ambiguous=st.sampled_from(["repeat", "skip"]),
        avatar=st.sampled_from(["ann", None]),
        session=st.booleans(),
        holds=st.booleans(),
        final_text=st.sampled_from(["", "Bye."]),
    )
    def begin(
        self, *, shaping: Any, ambiguous: Any, avatar: str | None, session: bool, holds: bool, final_text: str
    ) -> None:
        rules = replace(RULES, shaping=shaping, ambiguous=ambiguous, default_avatar=avatar, max_age_s=30)
        rules = replace(rules, final_text=final_text)
        if holds:
            rules = replace(rules, stall_first_s=0.5, stall_s=1.0, auto_final_s=10)
        self.talk = Conversation(rules, SESSION if session else None)

    # What producers do.

    def publish(self, message_id: str | None, body: dict[str, Any]) -> Published:
        message = Published(message_id, self.talk.now, body)
        self.unacked.append(message)
        self.backlog.append(message)
        if not self.slow:
            self.catch_up()
        return message

    def deliver(self, message: Published, *, again: bool = False) -> None:
        one = message.delivered(again=again)
        self.delivered.add(one)
        self.careful(lambda: self.talk.offer(one), message)

    @rule()
    def fall_behind(self) -> None:
        """From now on what is published waits in the broker: the window is full. Express copies overtake it."""
        self.slow = True

    @rule(count=st.integers(1, 3))
    def hand_out(self, count: int) -> None:
        """There is room for some."""
        for _ in range(min(count, len(self.backlog))):
            if self.backlog:
                self.deliver(self.backlog.pop(0))

    @rule()
    def catch_up(self) -> None:
        self.slow = False
        while self.backlog:
            self.deliver(self.backlog.pop(0))

    @rule(target=published, turn=_TURNS, final=st.booleans(), pad=st.sampled_from([0, 0, 0, 600, 1500]))
    def speak(self, turn: str, final: bool, pad: int) -> Published:
        self.numbers += 1
        self.chunks[f"m{self.numbers}"] = self.numbers, turn
        text = f"<{self.numbers}>" + "y" * pad
        return self.publish(f"m{self.numbers}", {"turnId": turn, "text": text, "isFinal": final})

    @rule(
        target=published,
        turn=_TURNS,
        marked=st.sampled_from(["**<{}>. And", "<{}>** [so](", "<{}>) `this ", "{} ```\n"]),
    )
    def speak_marked(self, turn: str, marked: str) -> Published:
        self.numbers += 1
        self.chunks[f"m{self.numbers}"] = self.numbers, turn
        body = {"turnId": turn, "text": marked.format(self.numbers), "isFinal": False}
        return self.publish(f"m{self.numbers}", body)

    @rule(target=published, turn=_TURNS, seq=st.integers(0, 3), final=st.booleans(), named=st.booleans())
    def speak_numbered(self, turn: str, seq: int, final: bool, named: bool) -> Published:
        self.numbers += 1
        if named:
            self.chunks[f"m{self.numbers}"] = self.numbers, turn
        else:
            self.turns_without_id.add(turn)
        body = {"turnId": turn, "text": f"<{self.numbers}>" if named else "no id", "isFinal": final, "seq": seq}
        return self.publish(f"m{self.numbers}" if named else None, body)

    @rule(target=published, turn=_TURNS, text=st.sampled_from(["", " ", "\n\n"]))
    def speak_blank(self, turn: str, text: str) -> Published:
        self.numbers += 1
        self.chunks[f"m{self.numbers}"] = self.numbers, turn
        return self.publish(f"m{self.numbers}", {"turnId": turn, "text": text, "isFinal": True})

    @rule(turn=_TURNS, final=st.booleans())
    def speak_without_id(self, turn: str, final: bool) -> None:
        self.turns_without_id.add(turn)
        self.publish(None, {"turnId": turn, "text": "no id", "isFinal": final})

    @rule(target=published, turn=_TURNS | st.none())
    def interrupt(self, turn: str | None) -> Published:
        self.numbers += 1
        self.interrupts.append((self.numbers, turn))
        return self.publish(f"m{self.numbers}", {"type": "interrupt"} | ({"turnId": turn} if turn else {}))

    @rule(message=published)
    def overtake(self, message: Published) -> None:
        """An express copy comes: before its ordered one, after it, long after it, twice, or never."""
        if message.body.get("type") == "interrupt":
            self.careful(lambda: self.talk.offer(express(message.delivered())), message)

    @rule(
        target=published,
        body=st.sampled_from(
            [
                {"type": "session.start"},
                {"type": "session.start", "avatarId": "bob"},
                {"type": "session.start", "handoff": "viewer"},
                {"type": "session.attach", "sessionId": "theirs", "token": "t"},
                {"type": "session.end"},
            ]
        ),
    )
    def session(self, body: dict[str, Any]) -> Published:
        self.numbers += 1
        return self.publish(f"m{self.numbers}", body)

    @rule(message=published)
    def send_again(self, message: Published) -> None:
        self.publish(message.message_id, message.body)

    @rule(message=published)
    def reuse_the_id(self, message: Published) -> None:
        if message.message_id is not None:
            self.chunks.setdefault(message.message_id, (self.numbers, "t1"))
        else:
            self.turns_without_id.add("t1")
        self.publish(message.message_id, {"turnId": "t1", "text": "reused", "isFinal": True})

    # What the runner, the API, the broker and the clock do.

    @precondition(lambda self: self.talk.calling is None)
    @rule()
    def next(self) -> None:
        self.careful(self.look)

    def look(self) -> None:
        work = self.talk.next()
        if work is not None and not isinstance(work, Wait):
            assert not self.talk.telling, "nothing new while the API is being told of an interrupt"
            busy_until = max(self.busy_until, self.zombie_until)
            assert self.talk.now >= busy_until, "a call whose answer was lost counts as running"
            # It is over, wherever the clock jumps from here.
            self.noted_until = max(self.noted_until, busy_until)
            self.busy_until = self.zombie_until = 0.0
            self.begun = self.talk.now
            assert isinstance(work, Open) or self.talk.now >= self.talk.pause_until, "the API is to be left alone"
        if isinstance(work, Say):
            assert work.piece.text.strip()
            assert not self.talk.memory.is_silent(work.piece.turn_id)
            assert len(work.piece.text) <= 1000
            for number, turn in self.seen:
                older = any(one < number for one in _numbers(work.piece.text))
                assert not (older if turn is None else work.piece.turn_id == turn), "it was interrupted"

    @precondition(lambda self: self.talk.calling is None)
    @rule(calls=st.integers(1, 4), stop=st.booleans())
    def go_on(self, calls: int, stop: bool) -> None:
        """The API answers well, until it is being called once more; one rule, for else few steps come that far."""
        for _ in range(calls):
            self.next()
            if stop and isinstance(self.talk.calling, Say):
                break
            self.answer_well()

    def answer_well(self) -> None:
        if self.talk.calling is not None:
            self.hear(self.talk.calling)
            self.careful(self.talk.done)

    @precondition(lambda self: self.talk.calling is not None)
    @rule(data=st.data())
    def answer(self, data: st.DataObject) -> None:
        call = self.talk.calling
        assert call is not None
        result = self.result_of(call, data)
        if result is UNKNOWN:
            self.busy_until = max(self.busy_until, self.begun + 2.0)
        self.careful(lambda: self.talk.done(result, jitter=data.draw(st.sampled_from([0.0, 0.5]))))

    @precondition(lambda self: self.talk.telling)
    @rule(result=st.sampled_from(_ON_SESSION))
    def answer_interrupt(self, result: CallResult) -> None:
        if result is UNKNOWN:
            self.busy_until = max(self.busy_until, self.talk.told_at[0] + 2.0)
        self.careful(lambda: self.talk.interrupted(result))

    def result_of(self, call: Call, data: st.DataObject) -> CallResult:
        """What a call comes to, and what the API has heard of it."""
        match call:
            case Attach():
                results = [OK]
            case Open():
                results = _IN_LINE if call.not_before else _OPEN
            case _:
                results = _ON_SESSION
        result = data.draw(st.sampled_from(results))
        if result is OK or (result is UNKNOWN and data.draw(st.booleans())):
            self.hear(call)
        return result

    def hear(self, call: Call) -> None:
        if isinstance(call, Say):
            self.heard.append(call.piece.text)

    @rule(seconds=st.sampled_from([0.1, 1.0, 2.0, 15.0, 200.0, -3.0]))
    def pass_time(self, seconds: float) -> None:
        """Time passes, or the clock jumps."""
        self.talk.now += seconds

    @rule(seconds=st.sampled_from([1.0, 15.0]))
    def pause(self, seconds: float) -> None:
        """The API asks to be left alone."""
        self.talk.pause_until = self.talk.now + seconds

    @rule()
    def acknowledge(self) -> None:
        told = (one for conclusion in self.talk.conclusions for one in conclusion.entries)
        acked = {one.delivery for one in told if one in self.delivered}
        self.unacked = [message for message in self.unacked if message not in acked]
        self.sure = len(self.talk.conclusions)

    # What goes wrong.

    def careful(self, step: Callable[[], object], seeing: Published | None = None) -> None:
        """A step whose writing the ledger may refuse: then nothing of it is told, and the conversation begun anew.

        `seeing`: the message that the lane is handed.
        """
        self.noted_until = max(self.noted_until, *(told_at + 2.0 for told_at in self.talk.told_at), 0.0)
        try:
            step()
        except Outdated:
            self.redeliver()
        else:
            if seeing is not None:
                self.see(seeing)

    def see(self, message: Published) -> None:
        """If it is an interrupt, it has acted."""
        if message.body.get("type") == "interrupt" and message.message_id is not None:
            self.seen.add((int(message.message_id[1:]), message.body.get("turnId")))

    def redeliver(self) -> None:
        """The lane is gone; another one begins, and what was not acknowledged comes to it."""
        self.busy_until = max(self.busy_until, *(told_at + 2.0 for told_at in self.talk.told_at), 0.0)
        self.talk.forget()
        self.delivered = set()
        for message in [one for one in self.unacked if one not in self.backlog]:
            self.deliver(message, again=True)

    @rule(data=st.data())
    def die(self, data: st.DataObject) -> None:
        """A call under way has had its effect or not, the last ends may not have been told."""
        if self.talk.calling is not None:
            self.busy_until = max(self.busy_until, self.begun + INTENT_S + 2.0)
            if data.draw(st.booleans()):
                self.hear(self.talk.calling)
        untold = data.draw(st.integers(self.sure, len(self.talk.conclusions)))
        self.cut |= {event.id("s") for conclusion in self.talk.conclusions[untold:] for event in conclusion.events}
        del self.talk.conclusions[untold:]
        self.redeliver()

    @precondition(lambda self: self.talk.calling is None)
    @rule()
    def die_before_writing(self) -> None:
        self.talk.lane.next(self.talk.now)
        self.redeliver()

    @precondition(lambda self: self.talk.calling is not None)
    @rule(data=st.data())
    def die_before_writing_the_outcome(self, data: st.DataObject) -> None:
        assert self.talk.calling is not None
        result = self.result_of(self.talk.calling, data)
        got = self.talk.brings(self.talk.calling) if result.kind is CallKind.OK else None
        self.talk.lane.done(self.talk.calling, result, self.talk.now, begun=self.begun, got=got)
        self.busy_until = max(self.busy_until, self.begun + INTENT_S + 2.0)
        self.redeliver()

    @precondition(lambda self: self.talk.calling is not None)
    @rule(wanted=_TURNS | st.none(), soon=st.booleans(), data=st.data())
    def lose_the_partition_while_calling(self, wanted: str | None, soon: bool, data: st.DataObject) -> None:
        """The next owner may have an interrupt to write of before the call is answered, which may be soon."""
        assert self.talk.calling is not None
        self.zombie = Zombie(self.talk.lane, self.talk.memory, self.talk.calling, self.begun)
        self.zombie_until = self.begun + INTENT_S + 2.0
        self.noted_until = max(self.noted_until, self.zombie_until)
        self.redeliver()
        if wanted is not None:
            self.overtake(self.interrupt(wanted))
        if soon:
            self.answer_to_the_zombie(data)

    @precondition(lambda self: self.zombie is not None and self.zombie.call is not None)
    @rule(data=st.data())
    def answer_to_the_zombie(self, data: st.DataObject) -> None:
        """What it learns is written if nobody has tried again or decided without it, and told then."""
        zombie = self.zombie
        assert zombie is not None
        assert zombie.call is not None
        call, zombie.call = zombie.call, None
        result = self.result_of(call, data)
        got = self.talk.brings(call) if result.kind is CallKind.OK else None
        told = zombie.lane.done(call, result, self.talk.now, begun=zombie.begun, got=got)
        self.zombie_until = zombie.begun + 2.0 if result is UNKNOWN else 0.0
        self.tell_for_the_zombie(told, outcome=isinstance(call, Say))

    @precondition(lambda self: self.zombie is not None)
    @rule(message=published, overtaking=st.booleans())
    def deliver_to_the_zombie(self, message: Published, overtaking: bool) -> None:
        """It wakes to deliveries long given to others, or hears an express copy as everybody does."""
        assert self.zombie is not None
        one = message.delivered()
        if overtaking:
            if message.body.get("type") != "interrupt":
                return
            one = express(one)
        self.zombie.memory.ended |= self.talk.written.known(one.message_id)
        if self.tell_for_the_zombie(self.zombie.lane.offer(one, self.talk.now)):
            self.see(message)

    @precondition(lambda self: self.zombie is not None and self.zombie.call is None)
    @rule()
    def let_the_zombie_go_on(self) -> None:
        """It may tell what nobody has changed meanwhile; with the first call it wants to make, it is found out."""
        assert self.zombie is not None
        step = self.zombie.lane.next(self.talk.now)
        if step.work is None or isinstance(step.work, Wait):
            self.tell_for_the_zombie(step.conclusions)
        else:
            self.zombie = None

    def tell_for_the_zombie(self, told: tuple[Conclusion, ...], *, outcome: bool = False) -> bool:
        assert self.zombie is not None
        changes, stood = self.zombie.memory.take_changes(), self.talk.written.recall()
        if changes is not None and not self.talk.written.write(changes, outcome=outcome):
            self.zombie = None
            return False
        if changes is not None and outcome:
            self.undoes_nothing(stood, changes)
        self.talk.conclusions += told
        return True

    def undoes_nothing(self, stood: Memory, outcome: Changes) -> None:
        """What another has written about the conversation stands, whatever came of the call."""
        stands = self.talk.written.recall()
        assert (stands.state.fences, stands.state.silenced) == (stood.state.fences, stood.state.silenced)
        silent = {turn_id: turn.state for turn_id, turn in stood.turns.items() if turn.silent}
        assert silent.items() <= {turn_id: turn.state for turn_id, turn in stands.turns.items()}.items()
        if stood.version != outcome.base:
            assert stands.state.busy_until >= stood.state.busy_until
        known = (*stands.state.untold, *outcome.before.untold)
        assert all(event in known for event in stood.state.untold)

    # What holds at any time.

    @invariant()
    def one_event_id_a_command(self) -> None:
        terminal: dict[tuple[str, bytes], set[str]] = {}
        for conclusion in self.talk.conclusions:
            for one in conclusion.entries:
                assert isinstance(one, Entry)
                if one.message_id is not None and conclusion.event is not None:
                    assert one.message_id in wire(conclusion.event)["commandIds"]
                    terminal.setdefault((one.message_id, one.fingerprint), set()).add(conclusion.event.id("s"))
        assert all(len(ids) == 1 for ids in terminal.values()), terminal

    @invariant()
    def one_delivery_ends_once(self) -> None:
        ended = [one for conclusion in self.talk.conclusions for one in conclusion.entries]
        assert len(ended) == len(set(ended))

    @invariant()
    def one_event_id_one_meaning(self) -> None:
        told: dict[str, Any] = {}
        for event in self.talk.events:
            assert told.setdefault(event.id("s"), wire(event)) == wire(event)

    @invariant()
    def accepted_in_the_order_of_the_queue_and_once(self) -> None:
        """But what a worker had not told when it died: its successor tells first what no command comes again with."""
        accepted: list[int] = []
        late: list[int] = []
        seen: set[str] = set()
        for event in self.talk.events:
            if event.type == "avatar.speech.accepted" and event.id("s") not in seen:
                seen.add(event.id("s"))
                (late if event.id("s") in self.cut else accepted).extend(_numbers(wire(event)["text"]))
        assert accepted == sorted(accepted)
        assert len({*accepted, *late}) == len(accepted) + len(late)

    @invariant()
    def heard_in_the_order_of_the_queue(self) -> None:
        first = list(dict.fromkeys(number for text in self.heard for number in _numbers(text)))
        assert first == sorted(first)

    @invariant()
    def nothing_is_repeated_but_as_it_was_said_and_flagged(self) -> None:
        texts: dict[int, list[str]] = {}
        for text in self.heard:
            for number in _numbers(text):
                texts.setdefault(number, []).append(text)
        repeated = {number for number, said in texts.items() if len(said) > 1}
        for number in repeated:
            assert len({text for text in texts[number] if "no id" not in text}) <= 1, texts[number]
        for event in self.talk.events:
            if event.type == "avatar.speech.accepted" and repeated & set(_numbers(wire(event)["text"])):
                assert wire(event).get("possibleDuplicate"), wire(event)

    @invariant()
    def only_what_an_interrupt_is_about_is_silenced(self) -> None:
        for event in self.talk.events:
            if event.type == "avatar.speech.discarded" and wire(event)["reason"] == "interrupted":
                for message_id in wire(event)["commandIds"]:
                    assert any(self.is_about(one, *self.chunks[message_id]) for one in self.interrupts), message_id

    def is_about(self, interrupt: tuple[int, str | None], chunk: int, turn: str) -> bool:
        number, wanted = interrupt
        if wanted is not None:
            return wanted == turn
        lost = any(one < number and other == turn for one, other in self.chunks.values())
        return chunk < number or lost or turn in self.turns_without_id

    def teardown(self) -> None:
        """When the API answers well again, everything ends and nothing is left, and nobody is muted for good."""
        self.catch_up()
        self.come_to_rest()
        self.end_well()
        if self.talk.rules.default_avatar is not None:
            self.numbers += 1
            self.publish(f"m{self.numbers}", {"turnId": "last", "text": f"<{self.numbers}>", "isFinal": True})
            self.come_to_rest()
            assert self.heard[-1] == f"<{self.numbers}>"

    def come_to_rest(self) -> None:
        for _ in range(1000):
            while self.talk.telling:
                self.careful(self.talk.interrupted)
            self.answer_well()
            self.next()
            if isinstance(work := self.talk.works[-1], Wait):
                self.talk.now = max(self.talk.now, work.until)
            elif work is None:
                break

    def end_well(self) -> None:
        assert len(self.talk.lane) == 0
        ended = {one.delivery for conclusion in self.talk.conclusions for one in conclusion.entries}
        assert ended >= set(self.unacked)
        state = self.talk.written.recall().state
        assert (state.attempt, state.silenced, state.fences) == (None, {}, {})
        assert not [key for key in state.spoken if key.startswith("m")], "without an id a chunk is not known again"
        still_open = set(self.talk.written.recall().open_turns())
        assert set(state.shapes) <= still_open
        assert not (still_open and self.talk.rules.auto_final_s)
        assert state.busy_until <= max(self.busy_until, self.noted_until, 0.0)
        told = {message_id for event in self.talk.events for message_id in wire(event).get("commandIds", ())}
        assert told >= {message.message_id for message in self.unacked if message.message_id is not None}
        self.one_event_id_a_command()
        self.one_delivery_ends_once()
        self.one_event_id_one_meaning()
        self.accepted_in_the_order_of_the_queue_and_once()
        self.nothing_is_repeated_but_as_it_was_said_and_flagged()


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"<(\d+)>", text)]


TestLaneMachine = LaneMachine.TestCase
TestLaneMachine.settings = settings(max_examples=600, stateful_step_count=40, deadline=None)
