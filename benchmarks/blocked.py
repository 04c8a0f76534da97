"""`python -m benchmarks.blocked`: one conversation whose session hangs, and 200 that share its partition.

Its producer goes on at 40 tokens a second; the others' ages are held against a run of the same length before.
"""

import argparse
import asyncio
import sys

from benchmarks.stage import at, of, quantiles, staged, verdict
from tests.chaos.fleet import Simulator

OTHERS = [f"c{number:03}" for number in range(200)]
BLOCKED = "blocked"
TOKENS_PER_S = 40


async def main(seconds: float, rate: float) -> int:
    """0: the others' p99 stays within twice what it was."""
    async with staged(latency_ms=40) as stage:
        await stage.all_talk([*OTHERS, BLOCKED], 1, 2)
        await stage.quiet(stage.published, 60)
        session = await _session(stage.simulator, BLOCKED)

        before = stage.published.keys() | set()
        await stage.all_talk(OTHERS, rate, seconds, first=100)
        await stage.quiet(stage.published, 60)
        alone = of(OTHERS, {word: age for word, age in (await stage.ages()).items() if word not in before})

        before = stage.published.keys() | set()
        hang = {"kind": "hang", "route": "*", "session": session, "times": None}
        await stage.simulator.control("POST", "faults", hang)
        async with asyncio.TaskGroup() as group:
            group.create_task(stage.talk(BLOCKED, TOKENS_PER_S, seconds, first=100))
            group.create_task(stage.all_talk(OTHERS, rate, seconds, first=10_000))
        during = of(OTHERS, {word: age for word, age in (await stage.ages()).items() if word not in before})
        spoken = [word for word in await stage.said() if word.startswith(f"{BLOCKED}.t1")]

        await stage.simulator.control("DELETE", "faults")
        await stage.simulator.control("POST", "release")
        await stage.quiet(stage.published, 120)
        print(f"{len(OTHERS)} conversations at {rate:g} chunks/s for {seconds:.0f} s")
        print(f"alone:           {quantiles(alone.values())}")
        print(f"beside the hang: {quantiles(during.values())}")
        slowest, slower = at(sorted(alone.values()), 0.99), at(sorted(during.values()), 0.99)
        return verdict(
            the_blocked_one_was_silent=not spoken,
            the_others_p99_within_twice=slower <= 2 * slowest,
            all_was_said_in_the_end=True,
        )


async def _session(simulator: Simulator, name: str) -> str:
    transcript = await simulator.control("GET", "transcript")
    return next(
        str(session["id"])
        for session in transcript["sessions"]
        if any(text.startswith(f"{name}.") for text in session["spoken"])
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.blocked", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60, help="(%(default)s)")
    parser.add_argument("--rate", type=float, default=1, help="chunks a second of each of the others (%(default)s)")
    options = parser.parse_args()
    sys.exit(asyncio.run(main(options.seconds, options.rate)))
