"""The way of one request: find its route, record the call, let its fault strike, answer."""

import asyncio
import time
from typing import Final

from aiohttp import web

from worker.local.simulator import api, ks
from worker.local.simulator.api import BASE_PATH, SESSION_ROUTES, Answer
from worker.local.simulator.control import PREFIX, Control
from worker.local.simulator.faults import Fault, FaultQueue
from worker.local.simulator.ks import KS_PATH
from worker.local.simulator.model import CREATE, Call, Settings, World

_UNKNOWN: Final = "?"
_CUT: Final = Answer(500, b"")  # never sent: its connection is gone


class Simulator:
    """The handler of a `web.Server`: four kinds of path need no router, and load tests feel the cost of one."""

    def __init__(self, settings: Settings) -> None:
        self._control = Control(settings)

    async def handle(self, request: web.BaseRequest) -> web.Response:
        """Answer one HTTP request."""
        path = request.raw_path
        if path.startswith((BASE_PATH, KS_PATH)):
            return await self._serve(request)
        if path.startswith(PREFIX):
            return _response(await self._control.handle(request))
        if path == "/healthz":
            return _response(Answer.of(200, {"status": "ok"}))
        return _response(Answer.error(404, "Not found"))

    async def _serve(self, request: web.BaseRequest) -> web.Response:
        # A reset replaces both; a call stays with those it began under.
        world, faults = self._control.world, self._control.faults
        route, session_id = _locate(request.raw_path, world.settings.create_path)
        call = world.begin(route, request.raw_path, session_id)
        answer, fault = None, None
        try:
            call.raw = await request.read()
            if route == _UNKNOWN:
                answer = Answer.error(404, "Not found")
            elif request.method != "POST":
                answer = Answer.error(405, "Method not allowed", {"Allow": "POST"})
            elif fault := faults.pick(call):
                call.fault = f"{fault.kind} {fault.when}"
                answer = await _struck(world, faults, fault, call, request)
            else:
                answer = await _true(world, call, request)
        except web.HTTPRequestEntityTooLarge:
            answer = Answer.error(413, "Body too large")
        finally:
            world.answer(call, answer.status if answer and request.transport else 0)
            _finish(world, call, fault)
        if answer is None and request.transport:
            request.transport.abort()
        return _response(answer or _CUT, call)


async def _true(world: World, call: Call, request: web.BaseRequest) -> Answer:
    """What the rules say, after everybody's latency. The effect comes first: a caller that hangs up still had it."""
    perform = ks.perform if call.path.startswith(KS_PATH) else api.perform
    answer = perform(world, call, request.headers)
    if world.settings.latency_ms:
        await asyncio.sleep(world.settings.latency_ms / 1000)
    return answer


async def _struck(
    world: World, faults: FaultQueue, fault: Fault, call: Call, request: web.BaseRequest
) -> Answer | None:
    """What the fault makes of the call; None: its connection is cut."""
    if fault.kind == "latency" and fault.when == "before":
        await asyncio.sleep(fault.seconds or 0)
        return await _true(world, call, request)
    true = await _true(world, call, request) if fault.when == "after" else None
    if true is not None and not call.effect:
        return true
    if fault.kind == "hang":
        await faults.hold(fault.seconds, gone=lambda: request.transport is None)
    elif fault.seconds:
        await asyncio.sleep(fault.seconds)
    return fault.answer(call, true)


def _finish(world: World, call: Call, fault: Fault | None) -> None:
    busy_s = 0.0 if fault is None else call.begun + fault.linger_s - time.monotonic()
    if busy_s > 0:
        asyncio.get_running_loop().call_later(busy_s, world.finish, call)
    else:
        world.finish(call)


def _response(answer: Answer, call: Call | None = None) -> web.Response:
    """The HTTP response; its request id is the call's number in the transcript."""
    headers = {"Content-Type": answer.content_type, **answer.headers}
    if call is not None:
        headers["x-kaltura-request-id"] = str(call.number)
    return web.Response(status=answer.status, body=answer.body, headers=headers)


def _locate(path: str, create_path: str) -> tuple[str, str | None]:
    """The route and session id of a path below the base path."""
    if path.startswith(KS_PATH):
        return ks.ROUTES.get(path.removeprefix(KS_PATH), _UNKNOWN), None
    below = path.removeprefix(BASE_PATH)
    if below == create_path:
        return CREATE, None
    match below.split("/"):
        case ["", session_id, route]:
            return (route if route in SESSION_ROUTES else _UNKNOWN), session_id
    return _UNKNOWN, None
