#!/usr/bin/env python3
"""Lets an avatar speak what a language model answers, while it is still answering.

    LLM_BASE_URL=http://127.0.0.1:11434/v1 LLM_MODEL=llama3.2 llm_stream.py "Why is the sky blue?"

The endpoint is anything that speaks OpenAI's streaming chat completions; the key it may want comes from LLM_API_KEY.
Every delta of the stream is one `speak` chunk; an empty final chunk closes the turn. Ctrl-C barges in: the avatar falls
silent and the model is hung up on. How to listen to the worker's events is shown in producer.py.

Exit codes: 0 all of the answer was published; 1 the model failed, what it said before is spoken; 2 wrong usage; 3 the
broker cannot be reached, or no worker has ever run on it; 130 Ctrl-C.
"""

import argparse
import asyncio
import json
import logging
import os
import sys
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing

import aio_pika
import aiohttp
from aio_pika.abc import AbstractExchange
from aio_pika.exceptions import AMQPError

LLM_FAILED, NO_BROKER, CTRL_C = 1, 3, 130


class LlmError(Exception):
    """The model did not answer, or broke off. The text never holds the key."""


async def deltas(question: str, args: argparse.Namespace) -> AsyncGenerator[str]:
    """The answer's text, piece by piece as the model produces it.

    Raises LlmError when the endpoint refuses, breaks off, or goes silent for a minute.
    """
    url = f"{args.llm_base_url.rstrip('/')}/chat/completions"
    body = {"model": args.llm_model, "stream": True, "messages": [{"role": "user", "content": question}]}
    headers = {"Authorization": f"Bearer {args.llm_api_key}"} if args.llm_api_key else {}
    patience = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=60)
    try:
        async with (
            aiohttp.ClientSession(timeout=patience, read_bufsize=2**20) as http,
            http.post(url, json=body, headers=headers) as response,
        ):
            if response.status != 200:
                raise LlmError(f"{url} answered {response.status}: {(await response.text())[:300]}")
            async for line in response.content:
                field, _, value = line.decode().strip().partition(":")
                if field != "data":  # blank lines, comments and event names are part of server-sent events, too
                    continue
                if value.strip() == "[DONE]":
                    return
                chunk = json.loads(value)
                if "error" in chunk:
                    raise LlmError(f"{url} broke off: {chunk['error']}")
                for choice in chunk["choices"][:1]:
                    if text := (choice.get("delta") or {}).get("content"):
                        yield text
            raise LlmError(f"{url} broke off in the middle of its answer")
    except (aiohttp.ClientError, TimeoutError, ValueError, KeyError, TypeError) as error:
        raise LlmError(f"{url}: {type(error).__name__}: {error}") from error


async def publish(exchange: AbstractExchange, body: dict[str, object]) -> None:
    """One command: persistent, confirmed, `mandatory`, with an id of its own."""
    message = aio_pika.Message(
        json.dumps(body).encode(),
        content_type="application/json",
        delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
        message_id=str(uuid.uuid4()),
        headers={"published-at-ms": time.time_ns() // 1_000_000},
    )
    await exchange.publish(message, str(body["conversationId"]), mandatory=True, timeout=30)


async def run(args: argparse.Namespace) -> None:
    """Hand the model's answer to the worker as one turn, closed at the end or interrupted by Ctrl-C."""
    turn: dict[str, object] = {"conversationId": args.conversation, "turnId": uuid.uuid4().hex}
    async with await aio_pika.connect(args.url, timeout=10) as connection:
        channel = await connection.channel(publisher_confirms=True, on_return_raises=True)
        commands = await channel.get_exchange("avatar.commands")
        interrupts = await channel.get_exchange("avatar.interrupts")
        last = commands, turn | {"text": "", "isFinal": True}
        try:
            async with aclosing(deltas(args.question, args)) as answer:
                async for text in answer:
                    print(text, end="", flush=True)
                    await publish(commands, turn | {"text": text, "isFinal": False})
            print()
        except asyncio.CancelledError:
            last = interrupts, turn | {"type": "interrupt"}
            raise
        finally:
            await publish(*last)


def main() -> int:
    """Read the arguments; put what goes wrong into a sentence and an exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    env = os.environ.get
    parser.add_argument("question")
    parser.add_argument("--conversation", default="llm-1", metavar="ID", help="default: llm-1")
    broker = env("AMQP_URL", "amqp://guest:guest@127.0.0.1:5672/")
    parser.add_argument("--url", default=broker, help="of the broker; default: AMQP_URL")
    args = parser.parse_args()
    args.llm_base_url, args.llm_model, args.llm_api_key = env("LLM_BASE_URL"), env("LLM_MODEL"), env("LLM_API_KEY")
    if not (args.llm_base_url and args.llm_model):
        parser.error("set LLM_BASE_URL (such as http://127.0.0.1:11434/v1) and LLM_MODEL; LLM_API_KEY if there is one")
    logging.disable()  # what goes wrong is told below, once
    try:
        asyncio.run(run(args))
    except KeyboardInterrupt:
        return CTRL_C
    except LlmError as error:
        print(f"llm_stream: {error}", file=sys.stderr)
        return LLM_FAILED
    except (AMQPError, OSError, RuntimeError, ValueError) as error:
        print(f"llm_stream: cannot publish ({type(error).__name__}: {error}). Is a worker running?", file=sys.stderr)
        return NO_BROKER
    return 0


if __name__ == "__main__":
    sys.exit(main())
