"""`python -m tests.chaos`: three workers, a real broker, random faults; what was promised is looked at afterwards."""

import argparse
import asyncio
import logging
import sys
from contextlib import AbstractContextManager
from pathlib import Path

import uvloop

from tests.chaos import run as runs
from tests.chaos.faults import FULL, SHORT
from tests.chaos.judge import Verdict
from tests.support.brokers import FOUR, LOCAL, TEST_PLUGINS, rabbitmq4
from worker.local.broker import Broker, own_broker
from worker.local.broker.base import handshake

_SHOWN = 8


def main() -> int:
    """0: every run kept every promise. 1: one did not."""
    options = _parser().parse_args()
    # Producers and listener lose their connections as often as the broker is restarted, and aiormq is upset each time.
    logging.getLogger("aiormq").setLevel(logging.CRITICAL)
    good = True
    with _broker(options.broker) as broker:
        for seed in options.seed:
            print(f"seed {seed}, {options.seconds:.0f} s, RabbitMQ {broker.version}", flush=True)
            keep = options.keep and options.keep / f"seed-{seed}"
            wanted = runs.Options(seed, options.seconds, options.conversations, options.rate, options.latency_ms, keep)
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                work = asyncio.wait_for(
                    runs.run(broker, wanted, SHORT if options.short else FULL, _tell), options.seconds * 2 + 400
                )
                verdict = runner.run(work)
            _show(verdict, seed)
            good = good and verdict.good
    return 0 if good else 1


def _broker(name: str) -> AbstractContextManager[Broker]:
    if name == LOCAL:
        return own_broker(plugins=TEST_PLUGINS)
    if name == FOUR:
        return rabbitmq4()
    return _Named(name)


class _Named(AbstractContextManager[Broker]):
    def __init__(self, url: str) -> None:
        self._url = url

    def __enter__(self) -> Broker:
        return Broker("external", self._url, handshake(self._url, timeout_s=10))

    def __exit__(self, *_: object) -> None:
        pass


def _tell(text: str) -> None:
    print(text, flush=True)


def _show(verdict: Verdict, seed: int) -> None:
    for name, figure in verdict.figures.items():
        print(f"  {name}: {figure}")
    for name, what in verdict.broken.items():
        print(f"  {'ok ' if not what else 'BAD'} {name}: {len(what)}")
        for one in what[:_SHOWN]:
            print(f"        {one}")
    print(f"seed {seed}: {'every promise kept' if verdict.good else 'PROMISES BROKEN'}", flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seed", type=int, nargs="+", default=[1])
    parser.add_argument("--seconds", type=float, default=75, help="how long faults go on (%(default)s)")
    parser.add_argument("--broker", default=LOCAL, help=f"{LOCAL}, {FOUR} or an address (%(default)s)")
    parser.add_argument("--conversations", type=int, default=30)
    parser.add_argument("--rate", type=float, default=60, help="chunks a second over all (%(default)s)")
    parser.add_argument("--latency-ms", type=float, default=60, help="of the Avatar API (%(default)s)")
    parser.add_argument("--keep", type=Path, help="folder for logs, transcript and events; emptied first")
    parser.add_argument("--short", action="store_true", help="demand few faults")
    return parser


if __name__ == "__main__":
    sys.exit(main())
