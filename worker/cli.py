"""What a person types (contract, section 6). Parses, loads the settings, sets the exit code; no logic.

Exit codes: 0 done, 1 failed, 2 wrong settings or usage.
"""

import argparse
import asyncio
import math
import os
import sys
from collections.abc import Coroutine, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from schemas.commands import RejectReason
from schemas.events import SpeechFailure
from schemas.routes import MAX_PARTITIONS
from worker.errors import ConfigurationError, WorkerError

if TYPE_CHECKING:
    from worker.amqp.shelf import Wanted
    from worker.settings import BrokerSettings

_S = TypeVar("_S", bound="BrokerSettings")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # These two have options of their own, and are not imported by a worker in production.
    if arguments[:1] == ["simulator"]:
        from worker.local import simulator  # noqa: PLC0415

        return simulator.main(arguments[1:])
    if arguments[:1] == ["demo"]:
        from worker.local import demo  # noqa: PLC0415

        return demo.main(arguments[1:])
    options = _parser().parse_args(arguments)
    try:
        return int(options.command(options))
    except ConfigurationError as error:
        print(f"avatar-worker: {error}", file=sys.stderr)
        return 2
    except WorkerError as error:
        print(f"avatar-worker: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # as in: avatar-worker parked list | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="avatar-worker",
        description="Speaks for an upstream system: RabbitMQ commands in, a Kaltura avatar's speech out, events back.",
        epilog="Settings come from the environment and .env; the README lists them.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="serve until SIGTERM")
    run.set_defaults(command=_run)
    commands.add_parser("demo", help="broker, simulator, worker and producer at once: watch an answer being spoken")
    commands.add_parser("simulator", help="the Avatar API on this machine, with scriptable faults")
    topology = commands.add_parser("topology", help="declare and check what the worker needs on the broker")
    topology.set_defaults(command=_topology)
    changes = topology.add_subparsers(metavar="CHANGE")
    repartition = changes.add_parser("repartition", help="change the number of partitions, while no worker runs")
    repartition.add_argument("partitions", type=_partitions, metavar="N", help=f"1 to {MAX_PARTITIONS}")
    repartition.set_defaults(command=_repartition)
    doctor = commands.add_parser("doctor", help="check all a worker needs, and say what to do")
    doctor.add_argument("--live", action="store_true", help="also open sessions with the Avatar API, and end them")
    doctor.add_argument("--yes", action="store_true", help="do not ask before that")
    doctor.set_defaults(command=_doctor)
    _add_parked(commands.add_parser("parked", help="commands that were given up"))
    explain = commands.add_parser(
        "explain", help="what is known of a conversation: session, turns, ends, what is parked"
    )
    explain.add_argument("conversation", metavar="CONVERSATION", help="its id")
    explain.add_argument("--json", action="store_true", help="as one JSON object")
    explain.set_defaults(command=_explain)
    tail = commands.add_parser("tail", help="show the events as they come, until Ctrl-C")
    tail.add_argument("--conversation", help="only those of this conversation")
    tail.add_argument("--json", action="store_true", help="the whole event, one a line")
    tail.set_defaults(command=_tail)
    return parser


def _add_parked(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    listing = actions.add_parser("list", help="show the oldest, with the reason")
    listing.add_argument("--limit", type=_positive, default=100, help="how many at most (default 100)")
    listing.set_defaults(command=_parked_list)
    replay = actions.add_parser("replay", help="send them again, whole turns in order; without --yes only show which")
    replay.set_defaults(command=_parked_replay)
    drop = actions.add_parser("drop", help="throw them away; without --yes only show which")
    drop.set_defaults(command=_parked_drop)
    for action in (replay, drop):
        action.add_argument("--yes", action="store_true", help="do it")
    for action in (listing, replay, drop):
        reasons = sorted(map(str, {*SpeechFailure, *RejectReason}))
        text = "only those given up for this reason"
        action.add_argument("--reason", metavar="REASON", choices=reasons, help=f"{text}: {', '.join(reasons)}")
        action.add_argument("--conversation", help="only those of this conversation")
        action.add_argument("--age", type=_age, metavar="SECONDS", help="only those parked longer ago than this")
        action.add_argument("--json", action="store_true", help="one JSON object a line")


def _run(_options: argparse.Namespace) -> int:
    from worker import app  # noqa: PLC0415
    from worker.settings import Settings  # noqa: PLC0415

    _await(app.run(_load(Settings)))
    return 0


def _topology(_options: argparse.Namespace) -> int:
    from worker import operate  # noqa: PLC0415
    from worker.settings import TopologySettings  # noqa: PLC0415

    return int(_await(operate.declare_topology(_load(TopologySettings))))


def _repartition(options: argparse.Namespace) -> int:
    from worker import operate  # noqa: PLC0415
    from worker.settings import TopologySettings  # noqa: PLC0415

    return int(_await(operate.repartition(_load(TopologySettings), options.partitions)))


def _doctor(options: argparse.Namespace) -> int:
    from worker import doctor  # noqa: PLC0415
    from worker.ops import logs  # noqa: PLC0415

    logs.configure("error", "auto")
    return int(_await(doctor.run(live=options.live, unasked=options.yes)))


def _parked_list(options: argparse.Namespace) -> int:
    from worker import parking  # noqa: PLC0415
    from worker.settings import BrokerSettings  # noqa: PLC0415

    settings, wanted = _load(BrokerSettings), _wanted(options)
    return int(_await(parking.list_parked(settings, wanted, limit=options.limit, as_json=options.json)))


def _parked_replay(options: argparse.Namespace) -> int:
    from worker import parking  # noqa: PLC0415
    from worker.settings import BrokerSettings  # noqa: PLC0415

    settings, wanted = _load(BrokerSettings), _wanted(options)
    return int(_await(parking.replay_parked(settings, wanted, yes=options.yes, as_json=options.json)))


def _parked_drop(options: argparse.Namespace) -> int:
    from worker import parking  # noqa: PLC0415
    from worker.settings import BrokerSettings  # noqa: PLC0415

    settings, wanted = _load(BrokerSettings), _wanted(options)
    return int(_await(parking.drop_parked(settings, wanted, yes=options.yes, as_json=options.json)))


def _wanted(options: argparse.Namespace) -> "Wanted":
    from worker.amqp.shelf import Wanted  # noqa: PLC0415

    return Wanted(options.reason, options.conversation, options.age)


def _explain(options: argparse.Namespace) -> int:
    from worker import explain  # noqa: PLC0415
    from worker.settings import TopologySettings  # noqa: PLC0415

    return int(_await(explain.explain(_load(TopologySettings), options.conversation, as_json=options.json)))


def _tail(options: argparse.Namespace) -> int:
    from worker import tail  # noqa: PLC0415
    from worker.settings import BrokerSettings  # noqa: PLC0415

    return int(_await(tail.tail(_load(BrokerSettings), options.conversation, as_json=options.json)))


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError("must be a whole number, 1 or more")
    return int(text)


def _age(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise argparse.ArgumentTypeError("must be a number of seconds, 0 or more")
    return seconds


def _partitions(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= MAX_PARTITIONS:
        raise argparse.ArgumentTypeError(f"must be a number from 1 to {MAX_PARTITIONS}")
    return int(text)


def _load(kind: "type[_S]") -> "_S":
    from worker import settings  # noqa: PLC0415
    from worker.ops import logs  # noqa: PLC0415

    found = settings.load(kind)
    logs.configure(found.log_level, found.log_format)
    return found


def _await(work: Coroutine[Any, Any, Any]) -> Any:
    import uvloop  # noqa: PLC0415

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work)
