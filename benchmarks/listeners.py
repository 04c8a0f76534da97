"""`python -m benchmarks.listeners`: speech with a listener, with none, and with one whose queue is full.

A full queue that rejects what is published refuses every event; the worker goes on trying for `EVENT_RETRY_S`.
"""

import argparse
import asyncio
import sys
import time

from pamqp.common import FieldTable

from benchmarks.stage import at, quantiles, staged, verdict

NAMES = [f"c{number:02}" for number in range(50)]
QUEUE = "bench.events"
FULL: FieldTable = {"x-max-length": 1, "x-overflow": "reject-publish"}


async def main(seconds: float, rate: float) -> int:
    """0: whoever listens, or does not, speech is as fast."""
    async with staged(latency_ms=40) as stage:
        await stage.all_talk(NAMES, rate, 5)
        await stage.quiet(stage.published, 60)
        p99: dict[str, float] = {}
        for number, how in enumerate(("no listener", "a listener", "a full queue"), 1):
            arguments = FULL if how == "a full queue" else None
            queue = await stage.channel.declare_queue(QUEUE, arguments=arguments)
            if how != "no listener":
                await queue.bind("avatar.events", "#")
            listens = how == "a listener" and await queue.consume(lambda _: asyncio.sleep(0), no_ack=True)
            before = set(stage.published)
            used, begun = stage.cpu_s(), time.monotonic()
            await stage.all_talk(NAMES, rate, seconds, first=number * 100_000)
            load = (stage.cpu_s() - used) / (time.monotonic() - begun)
            await stage.quiet(stage.published, 30)
            ages = [age for word, age in (await stage.ages()).items() if word not in before]
            p99[how] = at(sorted(ages), 0.99)
            print(f"{how + ':':<14} {quantiles(ages)}, {load:.0%} of the worker's processor", flush=True)
            if listens:
                await queue.cancel(listens)
            await queue.delete(if_unused=False, if_empty=False)
        return verdict(
            no_listener_slows_nothing=p99["no listener"] <= 2 * p99["a listener"],
            a_full_queue_slows_nothing=p99["a full queue"] <= 2 * p99["a listener"],
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.listeners", description=__doc__)
    parser.add_argument("--seconds", type=float, default=45, help="of each (%(default)s)")
    parser.add_argument("--rate", type=float, default=3, help="chunks a second of each conversation (%(default)s)")
    options = parser.parse_args()
    sys.exit(asyncio.run(main(options.seconds, options.rate)))
