"""Any commands, any outcomes, any time, connections lost at any moment: what a lane promises holds."""

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
    entry,
    wire,
)
from worker.core.model import CallKind, CallResult, Entry
from worker.core.work import Attach, Open, Say, Wait

_TURNS = st.sampled_from(["t1", "t2", "t3"])
_OPEN = [OK, OK, NOT_TAKEN, UNKNOWN, REFUSED, DENIED, CallResult(CallKind.NOT_TAKEN, 429)]
_ON_SESSION = [OK, OK, OK, NOT_TAKEN, UNKNOWN, REFUSED, GONE, STALE]


@dataclass(frozen=True, eq=False)
class Published:
    """A message as the broker keeps it; `body` has no text for what may be said twice."""

    message_id: str | None
    born: float
    body: dict[str, Any]

    def delivered(self, *, again: bool = False) -> Entry:
        return entry(self.message_id, born=self.born, delivery=self, redelivered=again, **self.body)


class LaneMachine(RuleBasedStateMachine):
    published = Bundle("published")

    def __init__(self) -> None:
        super().__init__()
        self.talk = Conversation()
        self.unacked: list[Published] = []
        self.numbers = 0
        self.heard: list[int] = []
        self.busy_until = 0.0

    @initialize(
        shaping=st.sampled_from(["sentences", "off"]),
        ambiguous=st.sampled_from(["repeat", "skip"]),
        avatar=st.sampled_from(["ann", None]),
        session=st.booleans(),
    )
    def begin(self, shaping: Any, ambiguous: Any, avatar: str | None, session: bool) -> None:
        rules = replace(RULES, shaping=shaping, ambiguous=ambiguous, default_avatar=avatar, max_age_s=30)
        self.talk = Conversation(rules, SESSION if session else None)

    # What producers do.

    def publish(self, message_id: str | None, body: dict[str, Any]) -> Published:
        message = Published(message_id, self.talk.now, body)
        self.unacked.append(message)
        self.talk.offer(message.delivered())
        return message

    @rule(target=published, turn=_TURNS, final=st.booleans(), pad=st.sampled_from([0, 0, 0, 600, 1500]))
    def speak(self, turn: str, final: bool, pad: int) -> Published:
        self.numbers += 1
        text = f"<{self.numbers}>" + "~" * pad
        return self.publish(f"m{self.numbers}", {"turnId": turn, "text": text, "isFinal": final})

    @rule(target=published, turn=_TURNS, text=st.sampled_from(["", " ", "\n\n"]))
    def speak_blank(self, turn: str, text: str) -> Published:
        self.numbers += 1
        return self.publish(f"m{self.numbers}", {"turnId": turn, "text": text, "isFinal": True})

    @rule(turn=_TURNS, final=st.booleans())
    def speak_without_id(self, turn: str, final: bool) -> None:
        self.publish(None, {"turnId": turn, "text": "no id", "isFinal": final})

    @rule(target=published, turn=_TURNS | st.none())
    def interrupt(self, turn: str | None) -> Published:
        self.numbers += 1
        return self.publish(f"m{self.numbers}", {"type": "interrupt"} | ({"turnId": turn} if turn else {}))

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
        self.publish(message.message_id, {"turnId": "t1", "text": "reused", "isFinal": True})

    # What the runner, the API, the broker and the clock do.

    @precondition(lambda self: self.talk.calling is None)
    @rule()
    def next(self) -> None:
        work = self.talk.next()
        if work is not None and not isinstance(work, Wait):
            assert self.talk.now >= self.busy_until, "a call whose answer was lost counts as running"
        if isinstance(work, Say):
            assert work.piece.text.strip()
            assert len(work.piece.text) <= 1000

    @precondition(lambda self: self.talk.calling is not None)
    @rule(data=st.data())
    def answer(self, data: st.DataObject) -> None:
        call = self.talk.calling
        results = [OK] if isinstance(call, Attach) else _OPEN if isinstance(call, Open) else _ON_SESSION
        result = data.draw(st.sampled_from(results))
        if result is UNKNOWN:
            # The clock may have been put on since: later than needed is never wrong.
            self.busy_until = max(self.busy_until, self.begun + 2.0)
        self.talk.done(result, jitter=data.draw(st.sampled_from([0.0, 0.5])))

    @property
    def begun(self) -> float:
        return self.talk.lane._attempts.begun

    @rule(seconds=st.sampled_from([0.1, 1.0, 2.0, 15.0]))
    def pass_time(self, seconds: float) -> None:
        self.talk.now += seconds

    @rule()
    def acknowledge(self) -> None:
        ended = {one.delivery for conclusion in self.talk.conclusions for one in conclusion.entries}
        self.unacked = [message for message in self.unacked if message not in ended]

    @rule()
    def lose_connection(self) -> None:
        self.talk.forget()
        for message in self.unacked:
            self.talk.offer(message.delivered(again=True))

    @precondition(lambda self: self.talk.calling is None)
    @rule()
    def crash(self) -> None:
        perhaps_said = self.talk.lane._speech.perhaps_said
        if not perhaps_said:  # the flag is what a crash costs
            session = self.talk.lane._sessions.session
            self.talk.lane = self.talk.lane.rebuilt()
            self.talk.lane.begin(session)

    # What holds at any time.

    @invariant()
    def one_event_id_a_command(self) -> None:
        terminal: dict[tuple[str, bytes], set[str]] = {}
        for conclusion in self.talk.conclusions:
            for one in conclusion.entries:
                assert isinstance(one, Entry)
                if one.message_id is not None:
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
        heard: list[int] = []
        seen: set[str] = set()
        for event in self.talk.events:
            if event.type == "avatar.speech.accepted" and event.id("s") not in seen:
                seen.add(event.id("s"))
                heard += [int(part.split(">")[0]) for part in wire(event)["text"].split("<")[1:]]
        assert heard == sorted(set(heard))

    def teardown(self) -> None:
        """When the API answers well again, everything ends and nothing is left."""
        if self.talk.calling is not None:
            self.talk.done()
        self.talk.settle()
        assert len(self.talk.lane) == 0
        ended = {one.delivery for conclusion in self.talk.conclusions for one in conclusion.entries}
        assert ended >= set(self.unacked)
        assert not self.talk.lane._silenced
        self.one_event_id_a_command()
        self.one_delivery_ends_once()
        self.one_event_id_one_meaning()
        self.accepted_in_the_order_of_the_queue_and_once()


TestLaneMachine = LaneMachine.TestCase
TestLaneMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
