"""Asks RabbitMQ's management API for the policies: AMQP does not show them. `policies` says which of them do harm."""

import asyncio
import json
from base64 import b64encode
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import aiohttp
import structlog
from aio_pika.connection import make_url
from pydantic import SecretStr
from yarl import URL

from worker.amqp import policies
from worker.amqp.policies import Harm, Policy
from worker.core.finding import Finding
from worker.errors import TopologyError
from worker.ops import logs

_log = structlog.stdlib.get_logger(__name__)

TIMEOUT_S = 3.0
"""A worker that connects again waits for it, with speech that is perishable."""
_ITEM = "policies"
_UNSET = (
    "AMQP does not show them: set MANAGEMENT_URL, or see that `rabbitmqctl list_policies -p VHOST` and "
    "`rabbitmqctl list_operator_policies -p VHOST` have none whose pattern takes in avatar.*"
)


class NoAnswer(Exception):  # noqa: N818 - it names what there is not
    """The policies are not to be had; the text says what to look at."""


@dataclass(frozen=True, slots=True)
class Management:
    """Where the API is, without `/api`, and who asks it about which virtual host."""

    url: str
    user: str
    password: str = field(repr=False)
    vhost: str

    @classmethod
    def of(cls, management_url: SecretStr | None, amqp_url: SecretStr) -> "Management | None":
        """What the settings say; where the first names no user, it is that of the second. None: nothing.

        The address is not guessed: the password would be sent, unencrypted, to whoever listens at that port.
        """
        if management_url is None:
            return None
        amqp = make_url(amqp_url.get_secret_value())
        parts = urlsplit(management_url.get_secret_value())
        user, password = amqp.user or "guest", amqp.password or "guest"
        if parts.username:
            user, password = unquote(parts.username), unquote(parts.password or "")
        base = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
        # As aiormq reads them.
        vhost = amqp.path[1:].replace("%2F", "/") or "/"
        return cls(base.rstrip("/").removesuffix("/api"), user, password, vhost)

    async def policies(self) -> list[Policy]:
        """All policies of the virtual host.

        Raises:
            NoAnswer: they are not to be had.
        """
        credentials = b64encode(f"{self.user}:{self.password}".encode()).decode()
        headers = {"Authorization": f"Basic {credentials}"}
        try:
            async with asyncio.timeout(TIMEOUT_S), aiohttp.ClientSession(headers=headers) as http:
                return [
                    _policy(row, operator=operator)
                    for operator, kind in ((False, "policies"), (True, "operator-policies"))
                    for row in await self._rows(http, kind)
                ]
        except TimeoutError:
            raise NoAnswer(f"MANAGEMENT_URL: no answer from {self.url} within {TIMEOUT_S:g} s") from None
        except (aiohttp.ClientError, OSError) as error:
            raise NoAnswer(f"MANAGEMENT_URL: no answer from {self.url}: {str(error) or type(error).__name__}") from None
        except (ValueError, TypeError, KeyError):
            raise NoAnswer(f"MANAGEMENT_URL: what answers at {self.url} is not RabbitMQ's management API") from None

    async def _rows(self, http: aiohttp.ClientSession, kind: str) -> list[dict[str, Any]]:
        url = URL(f"{self.url}/api/{kind}/{quote(self.vhost, safe='')}", encoded=True)
        async with http.get(url, allow_redirects=False) as answer:
            if answer.status == 401:
                raise NoAnswer(
                    f"MANAGEMENT_URL: {self.url} refuses the user: check user and password, there or in AMQP_URL; the "
                    f"user needs the tag `management` and access to the virtual host {self.vhost}"
                )
            if answer.status != 200:
                raise NoAnswer(f"MANAGEMENT_URL: {self.url} answers {answer.status}: check host, port and path")
            return list(json.loads(await answer.read()))


async def inspect_policies(management: Management | None, partitions: int) -> list[Finding]:
    """What the policies do to this broker's workers."""
    if management is None:
        return [Finding.unchecked(_ITEM, _UNSET)]
    try:
        found = policies.harms(await management.policies(), partitions)
    except NoAnswer as error:
        return [Finding.wrong(_ITEM, str(error))]
    if not found:
        return [Finding.ok(_ITEM, "none that could lose or reorder commands")]
    return [Finding.wrong(_item(harm), harm.told(management.vhost)) for harm in found]


async def demand_harmless_policies(management: Management | None, partitions: int) -> None:
    """Refuse policies that could lose or reorder commands. An API that is away is only warned of.

    Raises:
        TopologyError: there are some.
    """
    if management is None:
        return
    try:
        found = policies.harms(await management.policies(), partitions)
    except NoAnswer as error:
        _log.warning(logs.POLICIES_UNCHECKED, error=str(error))
        return
    if found:
        lines = "\n".join(f"{_item(harm)}: {harm.told(management.vhost)}" for harm in found)
        raise TopologyError(f"the broker has policies that could lose or reorder commands:\n{lines}")


def _item(harm: Harm) -> str:
    return f"{'operator ' if harm.policy.operator else ''}policy {harm.policy.name}"


def _policy(row: dict[str, Any], *, operator: bool) -> Policy:
    name, pattern, apply_to = (str(row[key]) for key in ("name", "pattern", "apply-to"))
    return Policy(name, pattern, apply_to, dict(row["definition"]), int(row["priority"]), operator)
