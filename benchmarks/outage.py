"""`python -m benchmarks.outage`: the Avatar API is down for two minutes under a load of 30 % of capacity or less.

Capacity is the worker's processor: asyncio has one. Down means that every call is answered by 503.
"""

import argparse
import asyncio
import statistics
import sys
import time

from benchmarks.stage import Stage, staged, verdict
from schemas import routes
from tests.chaos.traffic import Listener

NAMES = [f"c{number:02}" for number in range(50)]
BEFORE_S = 15.0
AFTER_S = 25.0
SETTLED_S = 10.0
FIRST_SAY_S = 5.0
CAPACITY = 0.3


async def main(outage_s: float, rate: float, max_age_s: float) -> int:
    """0: nothing was given up that need not be, and speech was soon as young as before."""
    async with staged(latency_ms=100, SPEECH_MAX_AGE_S=str(max_age_s)) as stage:
        listener = Listener(stage.url)
        listening = asyncio.create_task(listener.run())
        await listener.listening.wait()
        talking = asyncio.create_task(stage.all_talk(NAMES, rate, BEFORE_S + outage_s + AFTER_S))
        used, begun = stage.cpu_s(), time.monotonic()
        await asyncio.sleep(BEFORE_S)
        load = (stage.cpu_s() - used) / (time.monotonic() - begun)
        down = time.monotonic()
        await stage.simulator.control("POST", "faults", {"route": "*", "kind": "status", "status": 503, "times": None})
        await asyncio.sleep(outage_s)
        await stage.simulator.control("DELETE", "faults")
        back = time.monotonic()
        await talking
        await asyncio.sleep(5)

        said = await stage.said()
        ages = {word: at - stage.published[word] for word, at in said.items()}
        first_s = min(at for at in said.values() if at > back) - back
        ages_before = statistics.median(age for word, age in ages.items() if said[word] < down)
        ages_after = statistics.median(age for word, age in ages.items() if said[word] > back + SETTLED_S)
        expired, too_young = _expired(stage, listener, max_age_s)
        queue = await stage.channel.declare_queue(routes.PARKED, passive=True)
        parked = queue.declaration_result.message_count
        listening.cancel()

        print(f"{len(NAMES)} conversations at {rate:g} chunks/s: {load:.0%} of the worker's processor")
        print(f"down for {outage_s:.0f} s; speech expires after {max_age_s:.0f} s: {expired} chunks did")
        print(f"first say {first_s:.2f} s after its return")
        print(f"median age {ages_before * 1000:.0f} ms before, {ages_after * 1000:.0f} ms from {SETTLED_S:.0f} s after")
        silent = len(stage.published) - len(said) - expired
        return verdict(
            load_within_capacity=load <= CAPACITY,
            nothing_parked=parked == 0,
            nothing_expired_too_young=too_young == 0,
            everything_else_was_said=silent == 0,
            first_say_in_time=first_s <= FIRST_SAY_S,
            median_age_within_twice=ages_after <= 2 * ages_before,
        )


def _expired(stage: Stage, listener: Listener, max_age_s: float) -> tuple[int, int]:
    """How many chunks expired; and in how many turns although the first of them was younger than that."""
    firsts: dict[tuple[str, str], float] = {}
    count = 0
    for one in listener.arrivals:
        data = one.event["data"]
        if one.event["type"] == "avatar.speech.discarded" and data["reason"] == "expired":
            count += len(data["commandIds"])
            firsts.setdefault((one.event["subject"], data["turnId"]), one.at)
    young = 0
    for (name, turn), at in firsts.items():
        oldest = min(stage.published[word] for word in stage.published if word.startswith(f"{name}.{turn}."))
        young += at - oldest < max_age_s
    return count, young


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.outage", description=__doc__)
    parser.add_argument("--seconds", type=float, default=120, help="how long the API is down (%(default)s)")
    parser.add_argument("--rate", type=float, default=0.5, help="chunks a second of each conversation (%(default)s)")
    parser.add_argument("--max-age", type=float, default=120, help="SPEECH_MAX_AGE_S (%(default)s)")
    options = parser.parse_args()
    sys.exit(asyncio.run(main(options.seconds, options.rate, options.max_age)))
