"""`python -m tests.chaos`: three workers, a real broker, random faults; what was promised is looked at afterwards.

Without options: five seeds on each pair of broker and store. `--quick` is one seed on the first of each.
"""

import argparse
import asyncio
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import uvloop

from tests.chaos import run as runs
from tests.chaos import stores
from tests.chaos.evidence import Verdict
from tests.chaos.faults import FULL, SHORT
from tests.support.brokers import FOUR, LOCAL, TEST_PLUGINS, kinds, rabbitmq4
from tests.support.postgres import Postgres, find_postgres
from worker.local.broker import Broker, own_broker
from worker.local.broker.base import handshake

_SHOWN = 8
_COLUMNS = {
    "commands": "commands",
    "kills": "kills with a say in flight",
    "lost": "lost",
    "disorder": "out of order",
    "overlaps": "overlapping calls",
    "unflagged": "unflagged repeats",
    "flagged": "flagged",
    "intents": "intents open at faults",
    "unanswered": "answers lost",
    "timed": "interrupts the clock judged",
    "late": "spoken on after an interrupt",
    "kept": "kept in the durable inbox",
}
"""What the table shows, of the figures and of what is broken. `flagged` is at most `intents` + `unanswered`."""


def main() -> int:
    """0: every run kept every promise. 1: one did not."""
    options = _parser().parse_args()
    # Producers and listener lose their connections as often as the broker is restarted, and aiormq is upset each time.
    logging.getLogger("aiormq").setLevel(logging.CRITICAL)
    brokers, kept_in = options.broker or kinds(), options.store
    seeds = options.seed
    if options.quick:
        brokers, kept_in, seeds = brokers[:1], kept_in[:1], seeds[:1]
    table = []
    for name in brokers:
        with _broker(name) as broker:
            for store in kept_in:
                with find_postgres() if store == stores.POSTGRESQL else nullcontext() as postgres:
                    for seed in seeds:
                        print(f"RabbitMQ {broker.version}, {store}, seed {seed}, {options.seconds:.0f} s", flush=True)
                        verdict = _run(broker, postgres, seed, options)
                        _show(verdict)
                        table.append((f"RabbitMQ {broker.version}", store, str(seed), verdict))
    print("\n".join(_rows(table)))
    good = all(verdict.good for *_, verdict in table)
    print(f"{len(table)} runs: {'every promise kept' if good else 'PROMISES BROKEN'}")
    return 0 if good else 1


def _run(broker: Broker, postgres: Postgres | None, seed: int, options: argparse.Namespace) -> Verdict:
    keep = options.keep and options.keep / f"{broker.version}-{'postgresql' if postgres else 'sqlite'}-{seed}"
    wanted = runs.Options(
        seed, options.seconds, options.conversations, options.rate, options.latency_ms, keep, postgres
    )
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        work = runs.run(broker, wanted, SHORT if options.short else FULL, _tell)
        return runner.run(asyncio.wait_for(work, options.seconds * 2 + 400))


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


def _show(verdict: Verdict) -> None:
    for name, figure in verdict.figures.items():
        print(f"  {name}: {figure}")
    for name, what in verdict.broken.items():
        print(f"  {'ok ' if not what else 'BAD'} {name}: {len(what)}")
        for one in what[:_SHOWN]:
            print(f"        {one}")
    print(f"  {'every promise kept' if verdict.good else 'PROMISES BROKEN'}", flush=True)


def _rows(table: Sequence[tuple[str, str, str, Verdict]]) -> Iterator[str]:
    """A line of Markdown for each run."""
    yield f"| broker | store | seed | {' | '.join(_COLUMNS)} | promises |"
    yield f"|---|---|--:|{'--:|' * len(_COLUMNS)}---|"
    for broker, store, seed, verdict in table:
        counts = {**verdict.figures, **{name: len(what) for name, what in verdict.broken.items()}}
        cells = [str(counts[name]) for name in _COLUMNS.values()]
        yield f"| {broker} | {store} | {seed} | {' | '.join(cells)} | {'kept' if verdict.good else '**BROKEN**'} |"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.chaos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--broker", nargs="+", help=f"{LOCAL}, {FOUR} or an address (all that are found)")
    parser.add_argument("--store", nargs="+", choices=stores.KINDS, default=list(stores.KINDS), help="(both)")
    parser.add_argument("--seed", type=int, nargs="+", default=[1, 2, 3, 4, 5], help="(%(default)s)")
    parser.add_argument("--quick", action="store_true", help="only the first broker, store and seed")
    parser.add_argument("--seconds", type=float, default=75, help="how long faults go on (%(default)s)")
    parser.add_argument("--conversations", type=int, default=30)
    parser.add_argument("--rate", type=float, default=60, help="chunks a second over all (%(default)s)")
    parser.add_argument("--latency-ms", type=float, default=60, help="of the Avatar API (%(default)s)")
    parser.add_argument("--keep", type=Path, help="folder for logs, transcript and events; emptied first")
    parser.add_argument("--short", action="store_true", help="demand few faults")
    return parser


if __name__ == "__main__":
    sys.exit(main())
