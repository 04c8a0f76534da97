"""`python -m benchmarks.interrupts`: 200 avatars are interrupted while 20,000 commands wait in their partition.

The API is slow, so that nothing drains. Each avatar is interrupted in the middle of a turn. Its next turn is published
at once behind the interrupt; it waits behind everything else, and has to be spoken whole.
"""

import argparse
import asyncio
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks.stage import Stage, at, message, quantiles, staged, verdict
from schemas import routes

CROWD = 40
"""Conversations that nobody interrupts: the commands that wait are theirs."""
TURN = 60
"""Chunks of a turn that is to be interrupted."""
NEXT = 3
"""Chunks of the turn behind the interrupt."""
SPARE = 1.2
"""So many times the commands that are to wait are published: some are said meanwhile."""
PAUSE_S = 0.15
TOLD_S = 0.1
SAY_AFTER_CALL_S = 0.05
LATENCY_MS = 60
TEXT = "{} stands in a sentence that is long enough to be a piece of speech, or half of one, as an assistant writes it."


@dataclass(slots=True)
class Heard:
    """When the API was called for one conversation: the says, with the name of the first chunk, and the interrupts."""

    says: list[tuple[float, str]] = field(default_factory=list)
    interrupts: list[float] = field(default_factory=list)


async def main(waiting: int, interrupts: int, slow_ms: float, seed: int) -> int:
    """0: the API was told of each interrupt in time, and each silenced what it had to and nothing else."""
    victims = [f"s{number:03}" for number in range(interrupts)]
    crowd = [f"c{number:02}" for number in range(CROWD)]
    async with staged(latency_ms=LATENCY_MS, SPEECH_MAX_AGE_S="0") as stage:
        await asyncio.gather(*(say(stage, name, "hello", 1) for name in victims + crowd))
        await stage.quiet(stage.published, 60)
        await stage.simulator.control("POST", "settings", {"latency_ms": slow_ms})
        await asyncio.gather(*(say(stage, name, "t0", TURN) for name in victims))
        await asyncio.gather(*(say(stage, name, "t0", round(waiting * SPARE) // CROWD) for name in crowd))

        interrupted: dict[str, float] = {}
        for name in random.Random(seed).sample(victims, len(victims)):
            await asyncio.sleep(PAUSE_S)
            interrupted[name] = time.monotonic()
            await publish(stage, routes.INTERRUPTS, name, {"type": "interrupt"})
            await say(stage, name, "t1", NEXT)
        said = await stage.said()
        left = sum(word not in said for word in stage.published if word.partition(".")[0] in crowd)
        await stage.simulator.control("POST", "settings", {"latency_ms": LATENCY_MS})
        await stage.quiet((word for word in stage.published if ".t1." in word), 120)

        heard = await calls(stage)
        waits = [told(heard[name].interrupts, since) - since for name, since in interrupted.items()]
        late = [begun for name, since in interrupted.items() for begun in said_on(heard[name], since)]
        print(
            f"{len(waits)} interrupts (seed {seed}), API latency {slow_ms:.0f} ms; {left} commands waited at their end"
        )
        print(f"publish to API interrupt: {quantiles(waits)}; slowest {max(waits) * 1000:.0f} ms")
        return verdict(
            enough_waited=left >= waiting,
            p99_of_the_interrupts_in_time=at(sorted(waits), 0.99) < TOLD_S,
            nothing_was_said_of_an_interrupted_turn=not late,
            the_next_turns_were_spoken_whole=True,
        )


async def publish(stage: Stage, exchange: str, name: str, body: dict[str, object]) -> None:
    """One command of that conversation."""
    there = await stage.channel.get_exchange(exchange, ensure=False)
    await there.publish(message(body), name, mandatory=True)


async def say(stage: Stage, name: str, turn: str, chunks: int) -> None:
    """A whole turn, as fast as it goes; a word in each chunk occurs once."""
    for number in range(chunks):
        word = f"{name}.{turn}.n{number}"
        stage.published[word] = time.monotonic()
        body = {"turnId": turn, "text": f"Now {TEXT.format(word)} ", "isFinal": number == chunks - 1}
        await publish(stage, routes.COMMANDS, name, body)


async def calls(stage: Stage) -> dict[str, Heard]:
    """By conversation; whose session it is says the first word of its first text."""
    found: dict[str, Heard] = {}
    for session in (await stage.simulator.control("GET", "transcript"))["sessions"]:
        says = [
            (one["begun_s"], one["body"]["text"].split()[1]) for one in session["calls"] if one["route"] == "say-text"
        ]
        told = [one["begun_s"] for one in session["calls"] if one["route"] == "interrupt"]
        found[says[0][1].partition(".")[0]] = Heard(says, told)
    return found


def told(begun: Sequence[float], since: float) -> float:
    """When the API was told of an interrupt published then; never, if it was not."""
    return min((one for one in begun if one >= since), default=float("inf"))


def said_on(heard: Heard, since: float) -> list[float]:
    """Says of the interrupted turn that began although the API had been told."""
    last = told(heard.interrupts, since) + SAY_AFTER_CALL_S
    return [begun for begun, word in heard.says if begun > last and ".t0." in word]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.interrupts", description=__doc__)
    parser.add_argument("--waiting", type=int, default=20_000, help="commands (%(default)s)")
    parser.add_argument("--interrupts", type=int, default=200, help="(%(default)s)")
    parser.add_argument("--slow-ms", type=float, default=2000, help="what a call takes meanwhile (%(default)s)")
    parser.add_argument("--seed", type=int, default=random.randrange(1000), help="of their order (random)")
    options = parser.parse_args()
    sys.exit(asyncio.run(main(options.waiting, options.interrupts, options.slow_ms, options.seed)))
