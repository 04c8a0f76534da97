"""`worker demo`: a chatbot's answers travel through RabbitMQ and the worker to an avatar, before your eyes.

The demo starts processes and watches them: a private RabbitMQ (or the one in AMQP_URL), the simulator (or the real
Avatar API, if AVATAR_KS is set), the worker, and `examples/producer.py` for each conversation. It knows what the
producers print, who tell what they publish and hear, and what the simulator's transcript says.

Rooms: `scenes` (who asks what), `play` (the plot), `processes`, `record` (what happened, and was it right), `witness`
(what was said), `timeline` (what a person sees).
"""

import argparse
import asyncio
import os
import signal
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console

from worker.local.broker import BrokerError, find_broker
from worker.local.demo.play import Play
from worker.local.demo.processes import DemoError

FAILED, USAGE, CTRL_C = 1, 2, 130

_NO_AVATAR = """AVATAR_KS is set, so the demo speaks through the real Avatar API, and that has to know which avatar.
Set AVATAR_ID, or unset AVATAR_KS to use the simulator."""


def main(argv: list[str]) -> int:
    """Run the demo. 0: all of it was said. 1: it was not, or something did not start. 2: a setting is missing."""
    argparse.ArgumentParser(prog="demo", description=main.__doc__).parse_args(argv)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 100)
    real = bool(os.environ.get("AVATAR_KS"))
    if real and not os.environ.get("AVATAR_ID"):
        console.print(_NO_AVATAR, style="bold red", markup=False)
        return USAGE
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it otherwise
    for signum in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        with TemporaryDirectory(prefix="avatar-demo-") as folder:
            play = Play(console, Path(folder), real=real)
            with find_broker() as broker:
                play.timeline.stage(f"RabbitMQ {broker.version}, {broker.kind}")
                return 0 if asyncio.run(play.run(broker.url)) else FAILED
    except KeyboardInterrupt:
        console.print("Stopped. Nothing is left running.", style="yellow")
        return CTRL_C
    except (BrokerError, DemoError) as error:
        console.print(str(error), style="bold red", markup=False)
        return FAILED
