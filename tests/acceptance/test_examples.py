"""The examples, run as a stranger runs them: as processes, against a worker and the simulator."""

import asyncio
import json
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import aio_pika
import pytest
from aio_pika.exceptions import ChannelNotFoundEntity
from aiohttp import web
from aiohttp.test_utils import TestServer

from tests.acceptance.conftest import EXAMPLES, Finished, Simulator, finished, started
from worker.local.broker import OwnedBroker
from worker.local.broker.base import free_port
from worker.local.demo.processes import Child

TEXT = "The quick brown fox jumps over the lazy dog. Twice, and then it sleeps."
LONG = " ".join(f"Sentence number {number} is a short one." for number in range(60))

Start = Callable[..., AbstractAsyncContextManager[asyncio.subprocess.Process]]
Run = Callable[..., Awaitable[Finished]]


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    (tmp_path / "short.txt").write_text(TEXT + "\n")
    (tmp_path / "long.txt").write_text(LONG + "\n")
    return tmp_path


@pytest.fixture
def start(amqp_url: str, texts: Path) -> Start:
    """Starts an example in a folder with `short.txt` and `long.txt`."""

    def start(example: str, *arguments: str, **env: str) -> AbstractAsyncContextManager[asyncio.subprocess.Process]:
        return started(EXAMPLES / example, *arguments, env={"AMQP_URL": amqp_url, **env}, cwd=texts)

    return start


@pytest.fixture
def run(start: Start) -> Run:
    async def run(example: str, *arguments: str, given: str = "", **env: str) -> Finished:
        async with start(example, *arguments, **env) as process:
            return await finished(process, given)

    return run


@pytest.fixture
async def channel(amqp_url: str) -> AsyncIterator[aio_pika.abc.AbstractChannel]:
    async with await aio_pika.connect(amqp_url) as connection, connection.channel() as channel:
        yield channel


@pytest.fixture
async def deaf_worker(channel: aio_pika.abc.AbstractChannel) -> None:
    """The exchanges, and a queue that takes every command, but nobody who reads it."""
    commands = await channel.declare_exchange("avatar.commands", "topic", durable=True)
    interrupts = await channel.declare_exchange("avatar.interrupts", "fanout", durable=True)
    await channel.declare_exchange("avatar.events", "topic", durable=True)
    queue = await channel.declare_queue("avatar.commands.v1.p00", durable=True)
    await queue.bind(commands, "#")
    await queue.bind(interrupts)


def summary(finished: Finished) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(finished.out.splitlines()[-1])["summary"]
    return found


def only(turns: dict[str, str]) -> str:
    (text,) = turns.values()
    return text


async def test_every_conversation_hears_the_whole_text(run: Run, worker: Child, simulator: Simulator) -> None:
    result = await run("producer.py", "long.txt", "--conversations", "10", "--rate", "300", "--end", "--json")

    assert (result.code, result.err) == (0, "")
    assert summary(result)["turns"] == {"completed": 10}
    assert summary(result)["commands"] == 10 * (len(LONG.split()) + 1)
    assert summary(result)["withoutEnd"] == []
    transcript = await simulator.transcript()
    assert [only(session["turns"]) for session in transcript["sessions"]] == [LONG] * 10
    assert [session["ended_by"] for session in transcript["sessions"]] == ["request"] * 10
    assert transcript["counters"]["overlaps"]["say"] == 0


async def test_the_producer_waits_while_it_is_asked_to(start: Start, worker: Child, simulator: Simulator) -> None:
    await simulator.fault(kind="hang", route="say-text", when="after")
    async with start("producer.py", "long.txt", "--rate", "300", "--json") as process:
        assert process.stdout
        lines: list[dict[str, Any]] = []
        pauses: list[int] = []
        async for line in process.stdout:
            lines.append(json.loads(line))
            if lines[-1].get("event", {}).get("type") == "avatar.flow.paused":
                pauses.append(len(lines))
                if len(pauses) == 2:
                    await simulator.release()
        behind = [one for one in lines[pauses[0] : pauses[1]] if "published" in one]
        assert len(behind) <= 1, "one was on its way"
        assert lines[-1]["summary"]["turns"] == {"completed": 1}
    assert only(await simulator.spoken()) == LONG


async def test_a_person_sees_the_progress_and_how_each_turn_ended(run: Run, worker: Child) -> None:
    result = await run("producer.py", "--conversation-prefix", "visitor", given=TEXT)

    assert (result.code, result.err) == (0, "")
    (line, total) = result.out.splitlines()
    assert line.startswith("visitor-1 ")
    assert "14/14" in line
    assert "completed" in line
    assert total == "turns: 1 completed; commands: 14, none without its terminal event"


async def test_an_interrupt_cuts_one_turn_short_and_the_next_is_whole(
    run: Run, worker: Child, simulator: Simulator
) -> None:
    result = await run("producer.py", "long.txt", "short.txt", "--rate", "60", "--interrupt-after", "1", "--json")

    assert (result.code, result.err) == (0, "")
    assert summary(result)["turns"] == {"interrupted": 1, "completed": 1}
    interrupted, whole = (await simulator.spoken()).values()
    assert LONG.startswith(interrupted)
    assert len(interrupted) < len(LONG)
    assert whole == TEXT


async def test_an_interrupt_may_come_when_all_is_published(run: Run, worker: Child, simulator: Simulator) -> None:
    result = await run("producer.py", "short.txt", "--rate", "inf", "--interrupt-after", "1")

    assert (result.code, result.err) == (0, "")
    assert only(await simulator.spoken()) == TEXT
    await simulator.wait("interrupt")


async def test_ctrl_c_silences_the_avatar_and_ends_its_session(
    start: Start, worker: Child, simulator: Simulator
) -> None:
    async with start("producer.py", "long.txt", "--end", "--json") as producer:
        await simulator.wait("say-text")
        producer.send_signal(signal.SIGINT)
        result = await finished(producer)

    assert (result.code, result.err) == (130, "")
    assert summary(result)["turns"] == {"interrupted": 1}
    (session,) = (await simulator.transcript())["sessions"]
    assert session["ended_by"] == "request"
    assert LONG.startswith(only(session["turns"]))


async def test_a_turn_that_fails_is_told(run: Run, worker: Child, simulator: Simulator) -> None:
    await simulator.fault(kind="status", status=400, route="say-text")

    result = await run("producer.py", "short.txt")

    assert result.code == 1
    assert "1 failed: refused" in result.out


async def test_a_rejected_command_is_told(run: Run, worker: Child) -> None:
    result = await run("producer.py", "--conversation-prefix", "no spaces please", given="Hello!")

    assert result.code == 1
    assert "1 rejected: invalid_conversation_id" in result.out


@pytest.mark.usefixtures("deaf_worker")
async def test_a_worker_that_is_silent_is_not_waited_for_for_ever(run: Run) -> None:
    result = await run("producer.py", "short.txt", "--timeout", "1", "--rate", "inf")

    assert result.code == 1
    assert result.out.endswith("turns: 1 without end; commands: 14, 14 without its terminal event\n")


async def test_without_a_worker_it_says_so_and_declares_nothing(
    run: Run, channel: aio_pika.abc.AbstractChannel
) -> None:
    result = await run("producer.py", "short.txt")

    assert result.code == 4
    assert "no exchange 'avatar.commands'" in result.err
    assert "Has a worker been started" in result.err
    with pytest.raises(ChannelNotFoundEntity):
        await channel.get_exchange("avatar.commands")


@pytest.mark.usefixtures("deaf_worker")
async def test_a_command_that_no_queue_takes_is_told(run: Run, channel: aio_pika.abc.AbstractChannel) -> None:
    await channel.queue_delete("avatar.commands.v1.p00")

    result = await run("producer.py", "short.txt")

    assert result.code == 4
    assert "NO_ROUTE" in result.err
    assert "Has a worker been started" in result.err


@pytest.mark.timeout(180)
async def test_a_broker_that_goes_away_is_told(owned_broker: OwnedBroker, texts: Path) -> None:
    async with await aio_pika.connect(owned_broker.url) as connection, connection.channel() as channel:
        for name, kind in {"commands": "topic", "interrupts": "fanout", "events": "topic"}.items():
            await channel.declare_exchange(f"avatar.{name}", kind, durable=True)
        queue = await channel.declare_queue("avatar.commands.v1.p00", durable=True)
        await queue.bind("avatar.commands", "#")

    arguments = ("long.txt", "--rate", "5", "--json")
    async with started(EXAMPLES / "producer.py", *arguments, env={"AMQP_URL": owned_broker.url}, cwd=texts) as producer:
        assert producer.stdout is not None
        await producer.stdout.readline()
        await asyncio.to_thread(owned_broker.kill)
        result = await finished(producer)

    assert result.code == 3
    assert "no use of the broker at 127.0.0.1" in result.err
    assert "Traceback" not in result.err


@pytest.mark.parametrize("example", ["producer.py", "llm_stream.py"])
async def test_a_broker_that_is_not_there_is_told_without_the_password(example: str, texts: Path) -> None:
    url = f"amqp://somebody:secret@127.0.0.1:{free_port()}/"
    env = {"AMQP_URL": url, "LLM_BASE_URL": "http://127.0.0.1:1/v1", "LLM_MODEL": "none"}
    async with started(EXAMPLES / example, "short.txt", env=env, cwd=texts) as process:
        result = await finished(process)

    assert result.code == 3
    assert result.err.count("\n") == 1
    assert "secret" not in result.err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["missing.txt"], "missing.txt"),
        ([], "there is nothing to say"),
        (["short.txt", "--rate", "0"], "--rate"),
    ],
)
async def test_wrong_usage_is_told(texts: Path, arguments: list[str], complaint: str) -> None:
    async with started(EXAMPLES / "producer.py", *arguments, env={}, cwd=texts) as process:
        result = await finished(process)

    assert result.code == 2
    assert complaint in result.err


# ---------------------------------------------------------------- llm_stream.py


class FakeModel:
    """A streaming chat completion endpoint with a script: lines of the wire, then the end of the stream."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.status = 200
        self.hangs = False
        self.env: dict[str, str] = {}
        self.requests: list[tuple[dict[str, Any], str | None]] = []

    def says(self, *deltas: str) -> None:
        self.lines = [": keep-alive", 'data: {"choices":[{"index":0,"delta":{"role":"assistant","content":""}}]}']
        self.lines += [
            f"data: {json.dumps({'choices': [{'index': 0, 'delta': {'content': text}}]})}" for text in deltas
        ]

    def stops(self) -> None:
        self.lines += ['data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}']
        self.lines += ['data: {"choices":[],"usage":{"total_tokens":42}}', "data: [DONE]"]

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.requests.append((await request.json(), request.headers.get("Authorization")))
        if self.status != 200:
            return web.json_response({"error": {"message": "no such model"}}, status=self.status)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for line in self.lines:
            await response.write(f"{line}\n\n".encode())
        if self.hangs:
            await asyncio.Future()
        return response


@pytest.fixture
async def model() -> AsyncIterator[FakeModel]:
    model = FakeModel()
    app = web.Application()
    app.router.add_post("/v1/chat/completions", model.handle)
    async with TestServer(app) as server:
        model.env = {"LLM_BASE_URL": f"{server.make_url('/v1')}", "LLM_MODEL": "tiny", "LLM_API_KEY": "sk-secret"}
        yield model


async def test_the_avatar_says_what_the_model_streams(
    run: Run, worker: Child, simulator: Simulator, model: FakeModel
) -> None:
    model.says("Hello", ", ", "I am ", "a model", ". ", "Grüße!")
    model.stops()

    result = await run("llm_stream.py", "Who are you?", **model.env)

    assert (result.code, result.out, result.err) == (0, "Hello, I am a model. Grüße!\n", "")
    ((request, authorization),) = model.requests
    assert request["messages"] == [{"role": "user", "content": "Who are you?"}]
    assert (request["model"], request["stream"], authorization) == ("tiny", True, "Bearer sk-secret")
    await told(simulator, "Hello, I am a model. Grüße!")


async def test_what_the_model_said_before_it_broke_off_is_spoken(
    run: Run, worker: Child, simulator: Simulator, model: FakeModel
) -> None:
    model.says("Half of ", "a sentence")

    result = await run("llm_stream.py", "Who are you?", **model.env)

    assert result.code == 1
    assert "broke off in the middle" in result.err
    await told(simulator, "Half of a sentence")


async def test_a_model_that_refuses_is_told_without_the_key(run: Run, worker: Child, model: FakeModel) -> None:
    model.status = 404

    result = await run("llm_stream.py", "Who are you?", **model.env)

    assert result.code == 1
    assert "answered 404" in result.err
    assert "no such model" in result.err
    assert "sk-secret" not in result.err


async def test_ctrl_c_interrupts_the_model_and_the_avatar(
    start: Start, worker: Child, simulator: Simulator, model: FakeModel
) -> None:
    model.says("This will never ", "come to an end")
    model.hangs = True

    async with start("llm_stream.py", "Who are you?", **model.env) as process:
        await simulator.wait("say-text")
        process.send_signal(signal.SIGINT)
        result = await finished(process)

    assert (result.code, result.err) == (130, "")
    await simulator.wait("interrupt")


async def test_without_an_endpoint_it_says_what_to_set(run: Run) -> None:
    result = await run("llm_stream.py", "Who are you?")

    assert result.code == 2
    assert "set LLM_BASE_URL" in result.err


async def told(simulator: Simulator, text: str) -> None:
    """Return once the avatar has taken all of the text; the example does not wait for that."""
    async with asyncio.timeout(20):
        while "".join((await simulator.spoken()).values()) != text:
            await simulator.wait("say-text")
            await asyncio.sleep(0.05)
