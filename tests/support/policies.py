"""Policies of a broker that belongs to the tests, set as an operator sets them: by the management API."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import quote

import aiohttp

from worker.local.broker import OwnedBroker


class Policies:
    """Those of one virtual host; they go with it."""

    def __init__(self, http: aiohttp.ClientSession, api: str, vhost: str) -> None:
        self.api = api
        self.vhost = vhost
        self._http = http

    async def put(
        self,
        name: str,
        definition: dict[str, object],
        *,
        pattern: str = "^avatar",
        to: str = "all",
        priority: int = 0,
        operator: bool = False,
    ) -> None:
        """Set one; it is in effect on return."""
        body = {"pattern": pattern, "definition": definition, "apply-to": to, "priority": priority}
        await self.ask("PUT", f"{_kind(operator)}/{self._quoted}/{name}", body)

    async def clear(self, name: str, *, operator: bool = False) -> None:
        """Clear one."""
        await self.ask("DELETE", f"{_kind(operator)}/{self._quoted}/{name}")

    async def seen(self, kind: str) -> dict[str, dict[str, Any]]:
        """What the broker says of the virtual host's `queues` (late, as it is statistics) or `exchanges`, by name."""
        columns = "name,policy,operator_policy,effective_policy_definition"
        rows = await self.ask("GET", f"{kind}/{self._quoted}?columns={columns}")
        return {row["name"]: row for row in rows}

    async def ask(self, method: str, path: str, body: object = None) -> Any:
        """Anything of the API."""
        async with self._http.request(method, f"{self.api}/{path}", json=body) as answer:
            return await answer.json() if method == "GET" else None

    @property
    def _quoted(self) -> str:
        return quote(self.vhost, safe="")


def _kind(operator: bool) -> str:
    return "operator-policies" if operator else "policies"


@asynccontextmanager
async def policies(broker: OwnedBroker, vhost: str | None = None) -> AsyncIterator[Policies]:
    """Those of the virtual host in the broker's address, or of another one."""
    assert broker.management_url is not None
    credentials = {"Authorization": aiohttp.encode_basic_auth("guest", "guest")}
    async with aiohttp.ClientSession(headers=credentials, raise_for_status=True) as http:
        yield Policies(http, broker.management_url, vhost or broker.url.rpartition("/")[2])
