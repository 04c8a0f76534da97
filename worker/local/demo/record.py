"""What was published, what came of it, and whether that is what should have come."""

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

Said = list[tuple[str, str]]
"""Turn id and text of each piece an avatar took, in order."""


@dataclass(slots=True)
class Turn:
    """One answer: its tokens as they were published, and what the events say of it."""

    id: str
    number: int
    tokens: dict[str, str] = field(default_factory=dict)
    """Text by `message_id`."""
    accepted: set[str] = field(default_factory=set)
    discarded: set[str] = field(default_factory=set)
    said: str = ""
    outcome: str = ""

    @property
    def text(self) -> str:
        """All that was published."""
        return "".join(self.tokens.values())


@dataclass(slots=True)
class Conversation:
    """One chat and its avatar."""

    id: str
    name: str
    session_id: str = ""
    turns: dict[str, Turn] = field(default_factory=dict)
    interrupts: int = 0
    said: Said = field(default_factory=list)


class Record:
    """Takes in the lines of the producers, `producer.py --json`."""

    def __init__(self, names: dict[str, str]) -> None:
        """`names`: what a person calls each conversation, by its id."""
        self.conversations = {id_: Conversation(id_, name) for id_, name in names.items()}
        self.endings: defaultdict[str, list[str]] = defaultdict(list)
        """The terminal events of each command, by `message_id`."""
        self.latencies_ms: list[int] = []
        self.events: Counter[str] = Counter()

    def published(self, conversation: Conversation, message_id: str, body: dict[str, Any]) -> Turn | None:
        """Note a command; the turn it belongs to, if any."""
        self.endings[message_id] = []
        if body.get("type") == "interrupt":
            conversation.interrupts += 1
        if "text" not in body:
            return None
        new = Turn(body["turnId"], len(conversation.turns) + 1)
        turn = conversation.turns.setdefault(body["turnId"], new)
        turn.tokens[message_id] = body["text"]
        return turn

    def heard(self, conversation: Conversation, event: dict[str, Any]) -> Turn | None:
        """Note an event; the turn it is about, if any."""
        kind, data = event["type"].removeprefix("avatar."), event["data"]
        self.events[kind] += 1
        for command in data.get("commandIds", ()):
            self.endings[command].append(kind)
        turn = conversation.turns.get(data.get("turnId", ""))
        match kind:
            case "session.ready":
                conversation.session_id = data["sessionId"]
            case "speech.accepted" if turn:
                turn.accepted.update(data["commandIds"])
                turn.said += data["text"]
                conversation.said.append((turn.id, data["text"]))
                self.latencies_ms.append(data["latencyMs"])
            case "speech.discarded" if turn:
                turn.discarded.update(data["commandIds"])
            case "turn.completed" | "turn.interrupted" | "turn.failed" if turn:
                turn.outcome = kind.removeprefix("turn.")
        return turn


def complaints(record: Record, said: dict[str, Said]) -> list[str]:
    """What is wrong, in sentences; empty if all went well. `said` is by conversation id."""
    wrong = [
        f"command {command} has {len(ends)} terminal events ({', '.join(ends) or 'none'}) instead of one"
        for command, ends in record.endings.items()
        if len(ends) != 1
    ]
    for conversation in record.conversations.values():
        wrong += [f"{conversation.name}: {what}" for what in _wrong_with(conversation, said[conversation.id])]
    return wrong


def _wrong_with(conversation: Conversation, said: Said) -> Iterable[str]:
    order = [turn for turn, _ in groupby(turn for turn, _ in said)]
    if order != [turn for turn in conversation.turns if turn in order]:
        yield f"the turns were said in the order {order}, published in the order {list(conversation.turns)}"
    interrupted = 0
    for turn in conversation.turns.values():
        heard = words("".join(text for turn_id, text in said if turn_id == turn.id))
        published = words(turn.text)
        accepted = words("".join(text for token, text in turn.tokens.items() if token in turn.accepted))
        if turn.outcome == "completed" and heard != published:
            yield f"turn {turn.number} was published as {turn.text!r} but said as {heard!r}"
        elif turn.outcome == "interrupted":
            interrupted += 1
            # A chunk that was cut in two pieces may end as discarded although its beginning was said.
            if not (published.startswith(heard) and heard.startswith(accepted)):
                yield f"turn {turn.number} was interrupted, but what was said is not how it begins: {heard!r}"
        elif turn.outcome != "completed":
            yield f"turn {turn.number} {turn.outcome or 'did not end'}"
    if interrupted > conversation.interrupts:
        yield "a turn was interrupted that nobody interrupted"


def words(text: str) -> str:
    """The letters and digits alone: mark-up is not said, and blanks may go where a text is cut into pieces."""
    return "".join(filter(str.isalnum, text))
