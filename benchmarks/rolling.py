"""`python -m benchmarks.rolling`: what anybody notices of three workers that are restarted, one after the other.

The age of each chunk, from its publication to its call, is held against that before. With `--four` on RabbitMQ 4 in
Docker, where the three share the conversations; else one has them all, and the others stand by.
"""

import argparse
import asyncio
import signal
import sys

from benchmarks.stage import Stage, quantiles, staged, verdict
from tests.support.brokers import rabbitmq4

NAMES = [f"c{number:02}" for number in range(40)]
WORKERS = 3
PARTITIONS = 32
ENDED_WITHIN_S = 30.0
PAUSE_S = 3.0
GAP_S = 1.0
"""What a person who listens would notice."""


async def main(seconds: float, rate: float, *, four: bool) -> int:
    """0: no chunk waited noticeably, and every worker ended well."""
    async with staged(
        latency_ms=40,
        workers=WORKERS,
        source=rabbitmq4 if four else None,
        PARTITIONS=f"{PARTITIONS}",
        SPEECH_SHAPING="off",
    ) as stage:
        await stage.all_talk(NAMES, rate, 5)
        await stage.quiet(stage.published, 60)
        ages: list[list[float]] = []
        codes: list[int] = []
        for first in (100_000, 200_000):
            before = set(stage.published)
            talking = asyncio.create_task(stage.all_talk(NAMES, rate, seconds, first=first))
            if ages:
                codes = await _restart_all(stage)
            await talking
            await stage.quiet(stage.published, 60)
            ages.append([age for word, age in (await stage.ages()).items() if word not in before])
        print(f"{len(NAMES)} conversations at {rate:g} chunks/s for {seconds:.0f} s")
        print(f"undisturbed:     {quantiles(ages[0])}, most {max(ages[0]) * 1000:.0f} ms")
        print(f"rolling restart: {quantiles(ages[1])}, most {max(ages[1]) * 1000:.0f} ms")
        return verdict(no_gap_to_be_noticed=max(ages[1]) < GAP_S, every_worker_ended_well=codes == [0] * WORKERS)


async def _restart_all(stage: Stage) -> list[int]:
    codes = []
    for worker in stage.workers:
        await asyncio.sleep(PAUSE_S)
        worker.send(signal.SIGTERM)
        codes.append(await worker.ended(ENDED_WITHIN_S))
        await worker.start()
        assert await worker.ready(stage.http), worker.fail("was not ready in time")
    return codes


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rolling", description=__doc__)
    parser.add_argument("--seconds", type=float, default=30, help="of each (%(default)s)")
    parser.add_argument("--rate", type=float, default=2, help="chunks a second of each conversation (%(default)s)")
    parser.add_argument("--four", action="store_true", help="on RabbitMQ 4, in Docker")
    options = parser.parse_args()
    sys.exit(asyncio.run(main(options.seconds, options.rate, four=options.four)))
