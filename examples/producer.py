#!/usr/bin/env python3
"""A chatbot's side of the Avatar Worker in one file: streams text token by token and shows what becomes of it.

    producer.py answer.txt                                one conversation, one turn
    fortune | producer.py --conversations 20 --rate 40    the same text in twenty conversations
    producer.py long.txt short.txt --interrupt-after 2    two turns; the user barges in on the first

Copy it: it needs aio-pika and rich, nothing of the worker. What to keep when you do:

- One channel, with confirms, for a turn and for the interrupts that follow it: that keeps their order.
- Messages are persistent and `mandatory`, each with a `message_id` of its own. What was not confirmed may be published
  again under the same id and is spoken once; a service that lives long does so over `aio_pika.connect_robust`.
- A conversation that was asked to pause (`avatar.flow.paused`) gets nothing but interrupts until it may go on, or until
  the pause lapses after `validS`; what is held back is sent then, at the old pace.
- The exchanges are the worker's: look them up, never declare them. Listening to `avatar.events` is optional.

Exit codes: 0 every turn was spoken or interrupted; 1 a turn failed, was rejected or did not end in time; 2 wrong usage;
3 the broker cannot be reached or went away; 4 the worker's exchanges or queues are missing; 130 Ctrl-C.
"""

import argparse
import asyncio
import json
import logging
import math
import os
import re
import signal
import sys
import time
import uuid
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import aio_pika
from aio_pika.abc import AbstractConnection, AbstractIncomingMessage
from aio_pika.exceptions import AMQPError, ChannelNotFoundEntity, PublishError
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

FAILED, NO_BROKER, NO_WORKER, CTRL_C = 1, 3, 4, 130
INTERRUPT: dict[str, object] = {"type": "interrupt"}
SESSION_END: dict[str, object] = {"type": "session.end"}


@dataclass
class Turn:
    """One answer of the chatbot, and the line that shows it."""

    line: TaskID
    state: str = "sending"
    ended: bool = False


class Chat:
    """Publishes commands, and keeps what the events say about them."""

    def __init__(self, connection: AbstractConnection, args: argparse.Namespace) -> None:
        self.connection, self.args = connection, args
        self.names = [f"{args.conversation_prefix}-{number}" for number in range(1, args.conversations + 1)]
        self.turns: dict[tuple[str, str], Turn] = {}
        self.open_commands: dict[str, Turn | None] = {}
        self.pauses: dict[str, tuple[float, asyncio.Event]] = {}
        self.seen_events: set[str] = set()
        self.published = 0
        self.stopped = False
        self.news = asyncio.Event()
        text = [TextColumn(f"{{task.fields[{name}]}}", markup=False) for name in ("state", "said")]
        columns = (TextColumn("{task.description}"), BarColumn(20), MofNCompleteColumn(), *text)
        self.screen = Progress(*columns, disable=args.json)

    async def open(self) -> None:
        """Look up what the worker declared, and listen before the first word is published."""
        channel = await self.connection.channel(publisher_confirms=True, on_return_raises=True)
        self.commands = await channel.get_exchange("avatar.commands")
        self.interrupts = await channel.get_exchange("avatar.interrupts")
        listening = await self.connection.channel()
        events = await listening.declare_queue(exclusive=True)
        await events.bind("avatar.events", "#")
        await events.consume(self.hear, no_ack=True)
        self.connection.close_callbacks.add(lambda *_: self.news.set())

    async def publish(self, conversation: str, body: dict[str, object], turn: Turn | None = None) -> None:
        """Return when the broker has confirmed; raise if no queue takes the message (`mandatory`)."""
        message_id = str(uuid.uuid4())
        self.open_commands[message_id] = turn
        self.published += 1
        self.report(published=body, conversationId=conversation, messageId=message_id)
        message = aio_pika.Message(
            json.dumps(body).encode(),
            content_type="application/json",
            delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
            message_id=message_id,
            headers={"published-at-ms": time.time_ns() // 1_000_000},
        )
        exchange = self.interrupts if body is INTERRUPT else self.commands
        await exchange.publish(message, conversation, mandatory=True, timeout=self.args.timeout)

    async def converse(self, conversation: str, texts: list[str]) -> None:
        """All turns of one conversation. The interrupt silences whatever is being said when its time has come."""
        run = uuid.uuid4().hex[:6]
        until = time.monotonic() + self.args.interrupt_after
        for number, text in enumerate(texts, 1):
            if not await self.speak(conversation, f"{run}-{number}", re.findall(r"\s*\S{1,20}", text), until):
                await self.publish(conversation, INTERRUPT)
                until = math.inf
            if self.stopped:
                break
        if until < math.inf:
            await asyncio.sleep(until - time.monotonic())
            await self.publish(conversation, INTERRUPT)
        if self.args.end:
            await self.publish(conversation, SESSION_END)

    async def speak(self, conversation: str, turn_id: str, tokens: list[str], until: float) -> bool:
        """Stream one turn at `--rate`. False if cut short: by Ctrl-C, or because the clock has reached `until`."""
        started = time.monotonic()
        line = self.screen.add_task(f"{conversation} {turn_id}", total=len(tokens), state="sending", said="")
        turn = self.turns[conversation, turn_id] = Turn(line)
        for number, token in enumerate(tokens):
            due = started + number / self.args.rate
            await asyncio.sleep(min(due, until) - time.monotonic())
            if number and (self.stopped or due > until):
                return False
            started += await self.pause(conversation, until)
            if number and (self.stopped or time.monotonic() > until):
                return False
            body: dict[str, object] = {"turnId": turn_id, "text": token, "isFinal": number == len(tokens) - 1}
            await self.publish(conversation, body, turn)
            self.screen.advance(line)
        return True

    async def pause(self, conversation: str, until: float) -> float:
        """Hold back while the worker asks for it; how many seconds that was."""
        begun = time.monotonic()
        while conversation in self.pauses and not self.stopped:
            lapses, over = self.pauses[conversation]
            if (left := min(lapses, until) - time.monotonic()) <= 0:
                break
            with suppress(TimeoutError):
                await asyncio.wait_for(over.wait(), left)
        return time.monotonic() - begun

    async def hear(self, message: AbstractIncomingMessage) -> None:
        """Take in one event. Every command ends with exactly one; an event may be repeated, with the same id."""
        event = json.loads(message.body)
        kind, data = event["type"].removeprefix("avatar."), event["data"]
        turn = self.turns.get((event["subject"], data.get("turnId", "")))
        ended = [command for command in data.get("commandIds", ()) if command in self.open_commands]
        if event["id"] in self.seen_events or not (ended or event["subject"] in self.names):
            return
        self.seen_events.add(event["id"])
        self.report(event=event)
        for command in ended:
            owner = self.open_commands.pop(command)
            if kind == "command.rejected" and owner:
                self.show(owner, f"rejected: {data['reason']}", ended=True)
        if kind == "flow.paused":
            _, over = self.pauses.get(event["subject"], (0.0, asyncio.Event()))
            self.pauses[event["subject"]] = time.monotonic() + data["validS"], over
        elif kind == "flow.resumed" and event["subject"] in self.pauses:
            self.pauses.pop(event["subject"])[1].set()
        if turn and kind == "speech.accepted" and not turn.ended:
            self.show(turn, "speaking", data["text"])
        elif turn and kind in {"turn.completed", "turn.interrupted", "turn.failed"}:
            why = f": {data['reason']}" if kind == "turn.failed" else ""
            self.show(turn, kind.removeprefix("turn.") + why, ended=True)
        self.news.set()

    def show(self, turn: Turn, state: str, said: str = "", ended: bool = False) -> None:
        """Note what has become of a turn."""
        turn.state, turn.ended = state, ended
        self.screen.update(turn.line, state=state, said=said.strip())

    def report(self, **line: object) -> None:
        """One JSON line for a program that reads along (`--json`)."""
        if self.args.json:
            print(json.dumps({"atMs": time.time_ns() // 1_000_000} | line), flush=True)

    def stop(self, *_: object) -> None:
        """First Ctrl-C: barge in, say no more. The second one leaves at once."""
        self.stopped = True
        for pause in self.pauses.values():
            pause[1].set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    async def all_ended(self) -> None:
        """Return when every command has had its terminal event and every turn its end."""
        while self.open_commands or not all(turn.ended for turn in self.turns.values()):
            await self.news.wait()
            self.news.clear()
            if not self.connection.connected.is_set():
                raise ConnectionError("the connection was closed")

    def summary(self) -> int:
        """Tell how all turns ended, and answer with the exit code."""
        turns = Counter(turn.state if turn.ended else "without end" for turn in self.turns.values())
        missing = len(self.open_commands)
        self.report(summary={"turns": turns, "commands": self.published, "withoutEnd": list(self.open_commands)})
        if not self.args.json:
            states = ", ".join(f"{count} {state}" for state, count in turns.items())
            print(f"turns: {states}; commands: {self.published}, {missing or 'none'} without its terminal event")
        if self.stopped:
            return CTRL_C
        return FAILED if missing or turns.keys() - {"completed", "interrupted"} else 0


async def run(args: argparse.Namespace, texts: list[str]) -> int:
    """Talk, and wait until all of it has ended or `--timeout` is over."""
    async with await aio_pika.connect(args.url, timeout=args.timeout) as connection:
        chat = Chat(connection, args)
        await chat.open()
        signal.signal(signal.SIGINT, chat.stop)
        with chat.screen:
            await asyncio.gather(*(chat.converse(name, texts) for name in chat.names))
            with suppress(TimeoutError):
                await asyncio.wait_for(chat.all_ended(), args.timeout)
        return chat.summary()


def positive(value: str) -> float:
    """A number above 0, `inf` among them."""
    if not float(value) > 0:
        raise ValueError
    return float(value)


def main() -> int:
    """Read the arguments and the texts; put what goes wrong into a sentence and an exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("files", nargs="*", default=["-"], metavar="FILE", help="a text per turn; - or none: standard input")
    add("--url", default=os.environ.get("AMQP_URL", "amqp://guest:guest@127.0.0.1:5672/"), help="default: AMQP_URL")
    add("--conversations", type=int, default=1, metavar="N", help="how many at the same time (default: 1)")
    add("--conversation-prefix", default="chat", metavar="NAME", help="they are called NAME-1, NAME-2, ...")
    add("--rate", type=positive, default=12, help="tokens a second in each conversation (default: 12; inf: no pause)")
    add("--interrupt-after", type=positive, default=math.inf, metavar="SECONDS", help="barge in on each conversation")
    add("--end", action="store_true", help="end the avatar sessions afterwards, also on Ctrl-C")
    add("--timeout", type=positive, default=60, metavar="SECONDS", help="patience with broker and worker (default: 60)")
    add("--json", action="store_true", help="print what is published and heard as JSON lines")
    args = parser.parse_args()
    try:
        texts = [sys.stdin.read() if file == "-" else Path(file).read_text("utf-8") for file in args.files]
    except (OSError, UnicodeDecodeError) as error:
        parser.error(str(error))
    if not all(text.strip() for text in texts):
        parser.error("there is nothing to say: the text is empty")
    logging.disable()  # what goes wrong is told below, once
    try:
        return asyncio.run(run(args, texts))
    except KeyboardInterrupt:
        return CTRL_C
    except (ChannelNotFoundEntity, PublishError) as error:
        print(f"producer: {error}. Has a worker been started on this broker? It makes the queues.", file=sys.stderr)
        return NO_WORKER
    except (AMQPError, OSError, RuntimeError, ValueError) as error:
        host = urlsplit(args.url).hostname
        print(f"producer: no use of the broker at {host}: {type(error).__name__}: {error}", file=sys.stderr)
        return NO_BROKER


if __name__ == "__main__":
    sys.exit(main())
