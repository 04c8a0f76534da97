"""`/healthz` (the process is alive) and `/readyz` (it can do its work) for orchestrators, `/metrics` for Prometheus."""

from collections.abc import Callable, Mapping
from typing import Self

from aiohttp import web

from worker.errors import ConfigurationError
from worker.ops.metrics import Metrics


class Health:
    """A small HTTP server. `checks` names what must be true to be ready; while stopping nothing is.

    Serves only inside `async with`; port 0 means none at all.
    """

    def __init__(self, host: str, port: int, checks: Mapping[str, Callable[[], bool]], metrics: Metrics) -> None:
        self.stopping = False
        self._host = host
        self._port = port
        self._checks = checks
        self._metrics = metrics
        app = web.Application()
        app.router.add_get("/healthz", self._healthz)
        app.router.add_get("/readyz", self._readyz)
        app.router.add_get("/metrics", self._show)
        self._runner = web.AppRunner(app, access_log=None)

    async def __aenter__(self) -> Self:
        """Listen.

        Raises:
            ConfigurationError: the port is taken.
        """
        if self._port:
            await self._runner.setup()
            try:
                await web.TCPSite(self._runner, self._host, self._port).start()
            except OSError as error:
                await self._runner.cleanup()
                where = f"{self._host}:{self._port}"
                text = f"OPS_PORT: cannot listen on {where} ({error.strerror}); set another, or 0 for none"
                raise ConfigurationError(text) from None
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()

    async def _healthz(self, _request: web.Request) -> web.Response:
        return web.json_response({"alive": True})

    async def _readyz(self, _request: web.Request) -> web.Response:
        found = {name: check() for name, check in self._checks.items()}
        ready = not self.stopping and all(found.values())
        return web.json_response({"ready": ready, "stopping": self.stopping} | found, status=200 if ready else 503)

    async def _show(self, request: web.Request) -> web.Response:
        body, content_type = self._metrics.exposition(request.headers.get("Accept", ""))
        return web.Response(body=body, headers={"Content-Type": content_type})
