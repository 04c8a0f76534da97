"""The `/_control` routes: faults in, transcript out. JSON both ways; a wrong request gets 400 or 404, `{"error": …}`.

| route | does |
|---|---|
| `GET /_control/transcript` | everything: see `transcript.whole` |
| `GET /_control/counters` | the same without the calls: see `transcript.counters` |
| `GET /_control/sessions/{id}` | one session: see `transcript.of_session` |
| `POST /_control/sessions/{id}/expire` | its token is expired: 401 from now on |
| `POST /_control/sessions/{id}/end` | it is over: 410 from now on |
| `POST /_control/sessions/{id}/forget` | it is unknown: 404 from now on |
| `POST /_control/ks/expire`, `…/ks/revoke` | whatever the KS service has made so far is refused; `{"refused": N}` |
| `GET /_control/wait?calls=N` | waits until N calls reached a stage: see `Wait` |
| `POST /_control/faults` | queues a fault or a list of them: see `faults.Fault` |
| `GET /_control/faults` | the queue: each fault, how often it `struck`, how often it is `left` to |
| `DELETE /_control/faults` | empties the queue; calls that hang go on hanging |
| `POST /_control/release` | lets all calls that hang go; `{"released": N}` |
| `POST /_control/settings` | changes some of `model.Settings`, e.g. `{"latency_ms": 50}`, `{"ks": null}` |
| `POST /_control/reset` | everything as after the start; what still runs is released and counts no more |
"""

import json
import time
from collections.abc import Awaitable, Callable
from typing import Final, Literal

from aiohttp import web
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from worker.local.simulator import transcript
from worker.local.simulator.api import Answer, Refusal
from worker.local.simulator.faults import Armed, Fault, FaultQueue
from worker.local.simulator.model import IssuedKs, Route, Session, Settings, Stage, World, count

PREFIX: Final = "/_control/"


class Wait(BaseModel):
    """The query of `/_control/wait`: 200, `{"calls": …}` as soon as there are that many, 408 after `timeout_s`."""

    model_config = ConfigDict(extra="forbid")

    calls: int = Field(ge=1)
    """Since the start or the last reset."""
    route: Route | Literal["*"] = "*"
    stage: Stage = "accepted"
    """`begun` counts calls that have arrived, `accepted` those that took effect, `finished` those that run no more."""
    session: str | None = None
    timeout_s: float = Field(10.0, ge=0)


_FAULTS: Final[TypeAdapter[Fault | list[Fault]]] = TypeAdapter(Fault | list[Fault])
_PATCH: Final[TypeAdapter[dict[str, object]]] = TypeAdapter(dict[str, object])


class Control:
    """Owns what a reset replaces, the world and the faults, and answers the control routes."""

    def __init__(self, settings: Settings) -> None:
        self._initial = settings
        self.world = World(settings)
        self.faults = FaultQueue()
        self._routes: dict[tuple[str, str], Callable[[web.BaseRequest], Awaitable[object]]] = {
            ("GET", "transcript"): self._transcript,
            ("GET", "counters"): self._counters,
            ("GET", "wait"): self._wait,
            ("GET", "faults"): self._queue,
            ("POST", "faults"): self._arm,
            ("DELETE", "faults"): self._disarm,
            ("POST", "release"): self._release,
            ("POST", "settings"): self._change,
            ("POST", "reset"): self._reset,
            ("POST", "ks/expire"): self._expire_ks,
            ("POST", "ks/revoke"): self._revoke_ks,
        }

    async def handle(self, request: web.BaseRequest) -> Answer:
        """Answer a request whose path begins with `PREFIX`."""
        try:
            return Answer.of(200, await self._payload(request))
        except Refusal as refusal:
            return Answer.of(refusal.status, {"error": refusal.error})
        except ValidationError as exc:
            return Answer.of(400, {"error": exc.errors(include_url=False, include_context=False, include_input=False)})

    async def _payload(self, request: web.BaseRequest) -> object:
        name, _, rest = request.path.removeprefix(PREFIX).partition("/")
        if name == "sessions":
            return self._session(request.method, *rest.split("/", 1))
        route = self._routes.get((request.method, f"{name}/{rest}" if rest else name))
        if route is None:
            raise Refusal(404, f"no control route {request.method} {request.path}")
        return await route(request)

    async def _transcript(self, _: web.BaseRequest) -> object:
        return transcript.whole(self.world)

    async def _counters(self, _: web.BaseRequest) -> object:
        return transcript.counters(self.world)

    async def _wait(self, request: web.BaseRequest) -> object:
        wanted = Wait.model_validate(dict(request.query))
        tally = self.world.tally if wanted.session is None else self._find(wanted.session).tally
        if not await self.world.wait(tally, wanted.route, wanted.stage, wanted.calls, wanted.timeout_s):
            raise Refusal(408, f"only {count(tally, wanted.route, wanted.stage)} calls in time")
        return {"calls": count(tally, wanted.route, wanted.stage)}

    async def _queue(self, _: web.BaseRequest) -> object:
        return [{**armed.fault.model_dump(), "struck": armed.struck, "left": armed.left} for armed in self.faults.armed]

    async def _arm(self, request: web.BaseRequest) -> object:
        faults = _FAULTS.validate_json(await request.read())
        self.faults.armed += [Armed(fault) for fault in (faults if isinstance(faults, list) else [faults])]
        return await self._queue(request)

    async def _disarm(self, request: web.BaseRequest) -> object:
        self.faults.armed.clear()
        return await self._queue(request)

    async def _release(self, _: web.BaseRequest) -> object:
        return {"released": self.faults.release()}

    async def _change(self, request: web.BaseRequest) -> object:
        changed = self.world.settings.model_dump() | _PATCH.validate_json(await request.read())
        self.world.settings = Settings.model_validate_json(json.dumps(changed))
        return self.world.settings.model_dump(exclude={"ks", "admin_secret", "app_token"})

    async def _reset(self, _: web.BaseRequest) -> object:
        self.faults.release()
        self.world = World(self._initial)
        self.faults = FaultQueue()
        return {}

    async def _expire_ks(self, _: web.BaseRequest) -> object:
        good = self._good_ks()
        for issued in good:
            issued.expires = time.monotonic()
        return {"refused": len(good)}

    async def _revoke_ks(self, _: web.BaseRequest) -> object:
        good = self._good_ks()
        for issued in good:
            issued.revoked = True
        return {"refused": len(good)}

    def _good_ks(self) -> list[IssuedKs]:
        return [issued for issued in self.world.issued.values() if issued.good(time.monotonic())]

    def _find(self, session_id: str) -> Session:
        session = self.world.sessions.get(session_id)
        if session is None:
            raise Refusal(404, f"no session {session_id}")
        return session

    def _session(self, method: str, session_id: str, action: str = "") -> object:
        session = self._find(session_id)
        now = time.monotonic()
        match method, action:
            case "GET", "":
                pass
            case "POST", "expire":
                session.token_expires = now
            case "POST", "end":
                session.end("control", now)
            case "POST", "forget":
                session.end("control", now)
                session.forgotten = True
            case _:
                raise Refusal(404, f"no control route {method} sessions/…/{action}")
        return transcript.of_session(self.world, session)
