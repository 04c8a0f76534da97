"""`python -m tests.mutations`: breaks each law on purpose, in a copy of the source, and sees the suite turn red.

A law that no test would miss is not proven. One that can no longer be broken as it stands here fails loudly: the source
has changed, and the mutation has to follow.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT_S = 150
_COPIED = ("schemas", "tests", "worker", "examples", "pyproject.toml", ".env.example")
_FAILED = 1
"""What pytest ends with when tests have failed; other codes mean that they could not be run."""


@dataclass(frozen=True, slots=True)
class Mutation:
    """A law, how it is broken (search, replace), and the tests that have to notice."""

    law: str
    path: str
    search: str
    replace: str
    tests: tuple[str, ...]


MUTATIONS = (
    Mutation(
        "an intent is granted to the owner of the newest epoch only",
        "worker/stores/ledger.py",
        "if job.epoch is not None and epochs.get(job.partition) != job.epoch:",
        "if False:",
        ("tests/contract/test_ledger.py", "-k", "raised_it"),
    ),
    Mutation(
        "nothing is acknowledged before its end is committed and told",
        "worker/flow/settler.py",
        "        try:\n            if submitted.recorded is not None",
        "        try:\n            for entry in conclusion.entries:\n"
        "                await cast(Delivery, entry.delivery).settle()\n            if submitted.recorded is not None",
        ("tests/flow/test_settler.py",),
    ),
    Mutation(
        "what is not taken is tried again in the lane, and never handed back to the broker",
        "worker/flow/runner.py",
        "        jitter = random.random()",
        "        if result.kind is CallKind.NOT_TAKEN:\n            self.forget(tenure)\n            return result\n"
        "        jitter = random.random()",
        ("tests/flow/test_runner.py", "-k", "api_that_is_down"),
    ),
    Mutation(
        "a call whose answer was lost counts as running for a while",
        "worker/core/lane.py",
        "free_at = max(self._book.memory.state.busy_until, hold_until)",
        "free_at = hold_until",
        ("tests/core/test_lane_speech.py", "-k", "lost_answer"),
    ),
    Mutation(
        "what an interrupt has overtaken is silent until its ordered copy comes",
        "worker/core/interrupts.py",
        "if standing and not self._book.known(chunk)",
        "if not standing and not self._book.known(chunk)",
        ("tests/core/test_interrupts_express.py",),
    ),
    Mutation(
        "nothing of a silenced turn is said although it was about to be",
        "worker/flow/runner.py",
        "if isinstance(call, Say) and self._memory.is_silent(call.piece.turn_id):",
        "if False:",
        ("tests/flow/test_interrupts.py",),
    ),
    Mutation(
        "a lost partition is left by closing its channel, not by cancelling",
        "worker/amqp/tenure.py",
        "        await self._channel.close()",
        "        channel = await self._channel.get_underlay_channel()\n"
        "        for tag in list(channel.consumers):\n            await channel.basic_cancel(tag)",
        ("tests/integration/test_backlog.py", "-k", "fenced_off and not rabbitmq-4"),
    ),
    Mutation(
        "nothing is acknowledged on a channel that is being closed",
        "worker/amqp/inbox.py",
        "            tenure.end()\n            self._receiver.forget(tenure)\n            try:\n"
        "                with named_losses():\n                    await tenure.close()\n",
        "            self._receiver.forget(tenure)\n            try:\n"
        "                with named_losses():\n                    await tenure.close()\n"
        "                    tenure.end()\n",
        ("tests/integration/test_hand_over.py", "-k", "being_closed and not rabbitmq-4"),
    ),
)


def main() -> int:
    """0: every mutation was noticed. 1: one was not, or could not be tried."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description=__doc__)
    parser.add_argument("-k", metavar="TEXT", default="", help="only those whose law or file contains it")
    wanted = parser.parse_args().k
    good = True
    for mutation in MUTATIONS:
        if wanted in mutation.law or wanted in mutation.path:
            begun = time.monotonic()
            fault = attempt(mutation)
            verdict = f"NOT NOTICED: {fault}" if fault else "noticed"
            print(f"{mutation.law}\n    {mutation.path}: {verdict} ({time.monotonic() - begun:.0f} s)", flush=True)
            good = good and not fault
    return 0 if good else 1


def attempt(mutation: Mutation) -> str:
    """Why the mutation is not proven to be noticed; "" if it is: its tests pass as long as nothing is broken."""
    with tempfile.TemporaryDirectory(prefix="avatar-mutation-") as name:
        copy = Path(name)
        for one in _COPIED:
            source = ROOT / one
            if source.is_dir():
                shutil.copytree(source, copy / one, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, copy / one)
        path = copy / mutation.path
        text = path.read_text()
        if text.count(mutation.search) != 1:
            return f"what it replaces is there {text.count(mutation.search)} times"
        if code := _run(copy, mutation.tests):
            return f"its tests end with {code} although nothing is broken"
        path.write_text(text.replace(mutation.search, mutation.replace))
        code = _run(copy, mutation.tests)
        return "" if code == _FAILED else f"its tests end with {code}"


def _run(copy: Path, tests: tuple[str, ...]) -> int:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    with (copy / "output").open("ab") as output:
        done = subprocess.run(command, cwd=copy, stdout=output, stderr=output, check=False, timeout=TIMEOUT_S)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
