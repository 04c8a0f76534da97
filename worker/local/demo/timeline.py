"""What a person sees: one line per thing that happens, the words as they are spoken, and the account at the end."""

import statistics
import time
from collections.abc import Mapping
from itertools import islice
from typing import Any

from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from worker.local.demo.record import Conversation, Record, Said, Turn, words
from worker.local.demo.witness import Testimony

PRODUCER, WORKER, AVATAR, STAGE = "producer", "worker", "avatar", ""
_ACTORS = {PRODUCER: "cyan", WORKER: "magenta", AVATAR: "green", STAGE: "dim"}
_PEOPLE = ("bright_blue", "bright_yellow", "bright_magenta", "bright_cyan")


class Timeline:
    """Prints the story while it happens. Times are seconds since the demo was started."""

    def __init__(self, console: Console, record: Record) -> None:
        self._console = console
        self._record = record
        self._zero = time.time()
        names = (conversation.name for conversation in record.conversations.values())
        self._colours = dict(zip(names, _PEOPLE, strict=False))

    def stage(self, text: str) -> None:
        """A line about the demo itself."""
        self._line(time.time(), None, STAGE, Text(text, "dim"))

    def asked(self, at_ms: int, conversation: Conversation, question: str) -> None:
        """A turn begins."""
        line = Text.assemble((f"“{question}” ", "bold"), ("– the answer streams token by token", "dim"))
        self._line(at_ms / 1000, conversation, PRODUCER, line)

    def published(self, at_ms: int, conversation: Conversation, body: Mapping[str, Any], turn: Turn | None) -> None:
        """A command went out; of a turn's tokens only the last is worth a line."""
        if turn is None:
            lines = {"interrupt": Text("interrupts", "bold yellow"), "session.end": Text("ends the session")}
            self._line(at_ms / 1000, conversation, PRODUCER, lines[body["type"]])
        elif body["isFinal"]:
            self._line(at_ms / 1000, conversation, PRODUCER, Text(f"the last of {len(turn.tokens)} tokens", "dim"))

    def heard(self, at_ms: int, conversation: Conversation, event: Mapping[str, Any]) -> None:
        """An event came back."""
        data, actor = event["data"], WORKER
        match event["type"].removeprefix("avatar."):
            case "speech.accepted":
                actor, tokens = AVATAR, len(data["commandIds"])
                line = Text.assemble(data["text"].strip(), (f"  ({tokens} tokens, {data['latencyMs']} ms)", "dim"))
            case "session.ready":
                line = Text("session ready")
            case "session.ended":
                line = Text("session ended")
            case "turn.completed":
                line = Text(f"turn completed: {data['textLength']} characters in {data['pieces']} pieces", "green")
            case "turn.interrupted":
                line = Text(f"turn interrupted: {data['discardedCommands']} tokens will not be said", "yellow")
            case "turn.failed" | "speech.failed" | "session.failed" | "command.rejected" as kind:
                line = Text(f"{kind}: {data['reason']}", "bold red")
            case "interrupt.done":
                line = Text(f"interrupt done after {data['latencyMs']} ms", "dim")
            case _:
                return
        self._line(at_ms / 1000, conversation, actor, line)

    def words(self) -> Group:
        """A line per conversation: bright what the avatar has said, dim what is on its way to it."""
        return Group(*(self._words_of(conversation) for conversation in self._record.conversations.values()))

    def _words_of(self, conversation: Conversation) -> Text:
        room = self._console.width - 10
        line = Text(no_wrap=True, overflow="crop")
        line.append(f"{conversation.name:>6}  ", self._colours[conversation.name])
        if conversation.turns:
            turn = list(conversation.turns.values())[-1]
            text = turn.said + _behind(turn.text, len(words(turn.said)))
            start = max(0, len(text) - room)
            line.append(turn.said[start:], "green").append(text[max(start, len(turn.said)) :], "dim")
        return line

    def _line(self, at: float, conversation: Conversation | None, actor: str, text: Text) -> None:
        line = Table.grid(padding=(0, 2), expand=True)
        line.add_column(width=6, justify="right", style="dim")
        line.add_column(width=5)
        line.add_column(width=8)
        line.add_column(ratio=1)
        name = conversation.name if conversation else ""
        who = Text(name, self._colours.get(name, ""))
        line.add_row(f"{max(0, at - self._zero):.2f}", who, Text(actor, _ACTORS[actor]), text)
        self._console.print(line)


def _behind(text: str, count: int) -> str:
    """What stands behind so many letters and digits."""
    places = (at for at, character in enumerate(text, 1) if character.isalnum())
    return text[next(islice(places, count - 1, None), len(text)) if count else 0 :]


def account(record: Record, testimony: Testimony, latency: str, wrong: list[str]) -> Group:
    """What each avatar said, the numbers (`latency` says what that is), and the verdict."""
    speeches = [_speech(each, testimony.said[id_]) for id_, each in record.conversations.items()]
    calls = Text(", ".join(f"{count} {call}" for call, count in testimony.calls.items()), "dim")
    numbers = Table.grid(padding=(0, 2))
    numbers.add_row("commands", str(len(record.endings)), Text("published and confirmed", "dim"))
    numbers.add_row("events", str(record.events.total()), Text("about them", "dim"))
    numbers.add_row("API calls", str(sum(testimony.calls.values())), calls)
    numbers.add_row("latency", _latency(record.latencies_ms), Text(latency, "dim"))
    verdict = Text("All of it was said: in order, each word once; every command has ended, once.", "bold green")
    if wrong:
        verdict = Text("\n".join(["Not all of it went well:", *wrong]), "bold red")
    return Group(*speeches, numbers, "", verdict)


def _speech(conversation: Conversation, said: Said) -> Panel:
    turns = []
    for turn in conversation.turns.values():
        text = Text("".join(piece for turn_id, piece in said if turn_id == turn.id).strip())
        turns.append(text.append(" … interrupted", "yellow") if turn.outcome == "interrupted" else text)
    title = f"what {conversation.name}'s avatar said"
    return Panel(Group(*turns), title=title, title_align="left", border_style="green")


def _latency(latencies_ms: list[int]) -> str:
    if len(latencies_ms) < 2:
        return "not measured"
    cuts = statistics.quantiles(latencies_ms, n=20, method="inclusive")
    return f"p50 {cuts[9]:.0f} ms, p95 {cuts[18]:.0f} ms"
