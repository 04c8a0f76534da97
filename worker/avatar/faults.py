"""What came of a call, as one table (KALTURA.md): the status and the body, or the exception, → a `CallKind`.

Only what was surely not taken may be tried again freely; where nobody can know, the ambiguity policy decides.
"""

import email.utils
import json
import time
from typing import Any

import aiohttp

from worker.core.model import CallKind, CallResult
from worker.ops.logs import redacted

_NOT_TAKEN = {408, 425, 429, 503}
_UNKNOWN = {500, 502, 504}
_GONE = {401, 404, 410}

_RETRY_AFTER_CAP_S = 60.0


def of_answer(
    status: int, document: object, retry_after: str | None, *, creating: bool, secret: str = ""
) -> CallResult:
    """The result of a call that was answered. `document` is the parsed body, None where it is not JSON.

    `creating`: the call was authorised by the Kaltura Session, so that 401 and 403 speak of it; elsewhere they speak of
    the avatar session, and an end of it may be told as 401, 404 or 410. The `secret` that was sent is taken out of what
    the vendor says.
    """
    error = _error(document)
    error = redacted(error.replace(secret, "[redacted]") if secret else error)[:200]
    if 200 <= status < 300:
        if isinstance(document, dict) and document.get("success") is True:
            return CallResult(CallKind.OK, status)
        if document is None:
            return CallResult(CallKind.UNKNOWN, status, error="the answer is not JSON")
        return CallResult(CallKind.REFUSED, status, error=error or "the answer says no success")
    if creating and status in (401, 403):
        kind = CallKind.DENIED
    elif not creating and status in _GONE:
        kind = CallKind.GONE
    elif status in _NOT_TAKEN:
        kind = CallKind.NOT_TAKEN
    elif status in _UNKNOWN or status > 504:
        kind = CallKind.UNKNOWN
    else:
        kind = CallKind.REFUSED
    return CallResult(kind, status, _seconds(retry_after), error or f"HTTP {status}")


def parsed(body: bytes) -> Any:
    """The body of an answer; None where it is not JSON."""
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None


def of_exception(error: Exception) -> CallResult:
    """The result of a call that was not answered. No connection: nothing was sent. Anything later: nobody can know."""
    if isinstance(error, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError):
        return CallResult(CallKind.NOT_TAKEN, error=f"no connection to the Avatar API ({type(error).__name__})")
    return CallResult(CallKind.UNKNOWN, error=f"no answer from the Avatar API ({type(error).__name__})")


def _error(document: object) -> str:
    """The vendor's own words."""
    if not isinstance(document, dict):
        return ""
    if document.get("objectType") == "KalturaAPIException":
        return f"{document.get('code', '')}: {document.get('message', '')}"
    error = document.get("error")
    if isinstance(error, dict):
        error = error.get("message")
    return str(error) if error is not None else ""


def _seconds(retry_after: str | None) -> float | None:
    """`Retry-After` as seconds or as a date; None where it is neither. Capped: nobody means an hour."""
    if retry_after is None:
        return None
    try:
        seconds = float(retry_after)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time()
        except (ValueError, OverflowError):
            return None
    return min(max(seconds, 0.0), _RETRY_AFTER_CAP_S) if seconds == seconds else None  # noqa: PLR0124 - not a NaN
