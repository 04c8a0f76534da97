"""The plot: simulator, worker and producers come and go in order, and the end is checked against what was published."""

import asyncio
import json
import secrets
import signal
from collections.abc import Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.live import Live

from worker.local.broker.base import free_port
from worker.local.demo import witness
from worker.local.demo.processes import Backstage, Child
from worker.local.demo.record import Record, complaints
from worker.local.demo.scenes import SCENES, Scene, find_examples
from worker.local.demo.timeline import Timeline, account

REAL_SESSIONS = 2
"""At most so many with the real Avatar API, where an account is said to have five."""
TOKENS_PER_S = 14
LATENCY_MS = 350
"""Of the simulated API: slow enough that several tokens join while a call is in flight."""

# Nobody hears a simulated avatar, so the end of its playback is not waited for.
_SIMULATED = {"AVATAR_KS": "demo-ks", "AVATAR_ID": "demo-avatar", "SESSION_END_WAIT_S": "1"}


class Play:
    """One performance. `folder` is scratch space for the store and the logs; `real`: with the real Avatar API."""

    def __init__(self, console: Console, folder: Path, *, real: bool) -> None:
        run = secrets.token_hex(3)
        # What is meant for the real API is not for the simulator's worker, least of all a secret.
        self._backstage = Backstage(folder, hidden=("AVATAR_KS_FILE",) if real else ("AVATAR_", "VOICE_"))
        self._real = real
        self._examples = find_examples()
        self._scenes = {f"demo-{run}-{scene.name}": scene for scene in SCENES[: REAL_SESSIONS if real else None]}
        self._record = Record({f"{prefix}-1": scene.name for prefix, scene in self._scenes.items()})
        self._producers: list[Child] = []
        self._console = console
        self.timeline = Timeline(console, self._record)

    async def run(self, amqp_url: str) -> bool:
        """Play to the end and print the account; whether all of it was said.

        Raises:
            DemoError: a process did not start, or ended too early.
        """
        async with AsyncExitStack() as stack:
            api_url = None if self._real else await self._start_simulator(stack)
            worker = await self._start_worker(stack, amqp_url, api_url)
            failures = await self._perform(worker, amqp_url)
            if api_url:
                testimony = await witness.of_simulator(api_url, self._record)
            else:
                testimony = witness.of_events(self._record)
        if worker.process.returncode:
            failures.append(f"{worker.failure('did not stop as it should')}")
        wrong = [*failures, *complaints(self._record, testimony.said), *testimony.wrong]
        latency = "from oldest token to the API's yes" + (f" ({LATENCY_MS} ms of it simulated)" if api_url else "")
        self._console.print(account(self._record, testimony, latency, wrong))
        return not wrong

    async def _start_simulator(self, stack: AsyncExitStack) -> str:
        arguments = ("-m", "worker", "simulator", "--port", "0", "--latency-ms", f"{LATENCY_MS}")
        process = self._backstage.running("simulator", *arguments, settings=_SIMULATED)
        url = await (await stack.enter_async_context(process)).logged(r"listening on (\S+)")
        self.timeline.stage(f"simulator of the Avatar API at {url}")
        return url

    async def _start_worker(self, stack: AsyncExitStack, amqp_url: str, api_url: str | None) -> Child:
        port = free_port()
        settings = {
            "AMQP_URL": amqp_url,
            "STORE_URL": f"sqlite:///{self._backstage.folder / 'demo.db'}",
            "OPS_PORT": f"{port}",
            "LOG_FORMAT": "json",
        }
        if api_url:
            settings |= _SIMULATED | {"AVATAR_BASE_URL": api_url}
        process = self._backstage.running("worker", "-m", "worker", "run", settings=settings)
        worker = await stack.enter_async_context(process)
        await worker.answers(f"http://127.0.0.1:{port}/readyz")
        self.timeline.stage("worker" if api_url else "worker, with the real Avatar API")
        return worker

    async def _perform(self, worker: Child, amqp_url: str) -> list[str]:
        """All scenes at once; what went wrong with their producers.

        Raises:
            DemoError: the worker ended in the middle of it.
        """
        try:
            with Live(console=self._console, get_renderable=self.timeline.words, transient=True):
                async with asyncio.TaskGroup() as group:
                    watch = group.create_task(self._watch(worker))
                    acts = [group.create_task(self._act(*scene, amqp_url)) for scene in self._scenes.items()]
                    # Not gather: when cancelled it does not wait for all, and the group would cancel them once more.
                    await asyncio.wait(acts)
                    watch.cancel()
        except asyncio.CancelledError:
            self.timeline.stage("stopped: the avatars are silent and their sessions ended")
            raise
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return [failure for act in acts if (failure := act.result())]

    async def _act(self, prefix: str, scene: Scene, amqp_url: str) -> str | None:
        """One conversation, played by a producer process; what went wrong with that."""
        arguments = [
            self._examples / "producer.py",
            *(self._examples / "texts" / answer for answer in scene.answers),
            *("--conversation-prefix", prefix, "--rate", f"{TOKENS_PER_S}", "--end", "--json"),
            *(("--interrupt-after", f"{scene.interrupt_after_s}") if scene.interrupt_after_s else ()),
        ]
        # On SIGINT a producer interrupts its avatar and ends the session.
        settings = {"AMQP_URL": amqp_url}
        name = f"producer-{scene.name}"
        process = self._backstage.running(name, *arguments, settings=settings, stop=signal.SIGINT, piped=True)
        async with process as producer:
            self._producers.append(producer)
            async for line in producer.lines():
                self._take(scene, json.loads(line))
            code = await producer.process.wait()
        return f"{producer.failure(f'ended with exit code {code}')}" if code else None

    async def _watch(self, worker: Child) -> NoReturn:
        code = await worker.process.wait()
        for producer in self._producers:
            producer.kill()  # it would wait for events that nobody sends
        raise worker.failure(f"ended with exit code {code} in the middle of the play")

    def _take(self, scene: Scene, line: Mapping[str, Any]) -> None:
        """One line of a producer: what it published, or an event it heard."""
        at_ms, event = line["atMs"], line.get("event")
        conversation = self._record.conversations.get(event["subject"] if event else line.get("conversationId", ""))
        if conversation is None:
            return
        if event:
            self._record.heard(conversation, event)
            self.timeline.heard(at_ms, conversation, event)
            return
        turn = self._record.published(conversation, line["messageId"], line["published"])
        if turn and len(turn.tokens) == 1:
            self.timeline.asked(at_ms, conversation, scene.questions[turn.number - 1])
        self.timeline.published(at_ms, conversation, line["published"], turn)
