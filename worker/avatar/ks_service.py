"""Asks the Kaltura API for a Kaltura Session (KS), by an app token or, for trials, by the admin secret (KALTURA.md).

The API answers 200 to nearly everything: what counts is whether the answer is a KS or a `KalturaAPIException`.
"""

import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import aiohttp

from worker.avatar import faults
from worker.avatar.credentials import Minted, fit_for_a_header
from worker.core.model import CallKind, CallResult
from worker.ops.logs import redacted

ADMIN = 2
"""The type of KS that creates avatar sessions; a widget's is 0."""
_EPOCH_S = 1_000_000_000
"""An expiry above this is a moment, below it a duration: the API has told both."""

HashType = Literal["MD5", "SHA1", "SHA256", "SHA512"]


@dataclass(frozen=True, slots=True)
class AppToken:
    """An application token: can be revoked, and limits what its sessions may do."""

    id: str
    token: str = field(repr=False)
    hash_type: HashType = "SHA256"


@dataclass(frozen=True, slots=True)
class AdminSecret:
    """The account's own secret."""

    secret: str = field(repr=False)
    privileges: str = "disableentitlement"


@dataclass(frozen=True, slots=True)
class Account:
    """Whose sessions to ask for, where, by what, and for how many seconds."""

    service_url: str
    partner_id: int
    by: AppToken | AdminSecret
    expiry_s: int = 86_400
    timeout_s: float = 10.0


class _NotMade(Exception):  # noqa: N818 - an answer, not a failure of ours
    def __init__(self, result: CallResult) -> None:
        super().__init__(result.error)
        self.result = result


class KsService:
    """Close it when done: `async with KsService(...) as service`. `mint` is for `credentials.MintedKs`."""

    def __init__(self, account: Account) -> None:
        self._account = account
        self._wanted: dict[str, object] = {"type": ADMIN, "expiry": account.expiry_s}
        self._http = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=account.timeout_s))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.close()

    async def mint(self) -> Minted | CallResult:
        """Ask once; without a KS, why: NOT_TAKEN is worth trying again, DENIED is for the operator to put right."""
        account = self._account
        try:
            if isinstance(account.by, AdminSecret):
                ks, expiry = await self._by_secret(account.by)
            else:
                ks, expiry = await self._by_app_token(account.by)
        except _NotMade as not_made:
            return not_made.result
        life_s = expiry - time.time() if expiry > _EPOCH_S else expiry
        if life_s <= 0:
            return _refusal(200, "the service gave out one that has expired: is this machine's clock right?")
        return Minted(ks, life_s)

    async def _by_secret(self, by: AdminSecret) -> tuple[str, float]:
        who = {"partnerId": self._account.partner_id, "secret": by.secret}
        return await self._ask("session/action/start", who | self._wanted | {"privileges": by.privileges})

    async def _by_app_token(self, by: AppToken) -> tuple[str, float]:
        widget_id = f"_{self._account.partner_id}"
        widget_ks, _ = await self._ask("session/action/startWidgetSession", {"widgetId": widget_id})
        token_hash = hashlib.new(by.hash_type, (widget_ks + by.token).encode()).hexdigest()
        who = {"ks": widget_ks, "id": by.id, "tokenHash": token_hash}
        return await self._ask("appToken/action/startSession", who | self._wanted)

    async def _ask(self, action: str, fields: Mapping[str, object]) -> tuple[str, float]:
        """The KS in the answer, and its expiry.

        Raises:
            _NotMade: there is none.
        """
        url = f"{self._account.service_url}/api_v3/service/{action}"
        form = {name: str(value) for name, value in fields.items()} | {"format": "1"}
        try:
            async with self._http.post(url, data=form, allow_redirects=False) as answer:
                status, body, retry_after = answer.status, await answer.read(), answer.headers.get("Retry-After")
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            text = f"no answer from the KS service ({type(error).__name__})"
            raise _NotMade(CallResult(CallKind.NOT_TAKEN, error=f"no Kaltura Session: {text}")) from None
        document = faults.parsed(body)
        if status != 200:
            raise _NotMade(_failure(status, document, retry_after))
        match document:
            case str(ks):
                expiry: Any = None
            case {"ks": str(ks)}:
                expiry = document.get("expiry")
            case _:
                raise _NotMade(_failure(status, document, retry_after))
        try:
            fit = fit_for_a_header(ks.encode())
        except ValueError:
            raise _NotMade(_refusal(status, "what the service gave out is none")) from None
        known = isinstance(expiry, int | float) and not isinstance(expiry, bool)
        return fit, float(expiry) if known else float(self._account.expiry_s)


def _failure(status: int, document: object, retry_after: str | None) -> CallResult:
    """An answer without a KS. An internal error is the service's own, everything else that it says is about us."""
    told = faults.of_answer(status, document, retry_after, creating=True)
    internal = isinstance(document, dict) and str(document.get("code")).startswith("INTERNAL")
    if told.kind in (CallKind.DENIED, CallKind.REFUSED) and not internal:
        return _refusal(status, told.error)
    error = f"no Kaltura Session: the KS service says: {redacted(told.error)}"
    return CallResult(CallKind.NOT_TAKEN, status, told.retry_after_s, error)


def _refusal(status: int, error: str) -> CallResult:
    remedy = "check KALTURA_PARTNER_ID and the app token (its hash type, too) or the admin secret"
    return CallResult(CallKind.DENIED, status, error=f"no Kaltura Session: {redacted(error)}; {remedy}")
