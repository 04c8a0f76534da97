"""The KS service's rules: how a Kaltura Session is come by. It answers 200 to nearly everything, errors included.

`POST /api_v3/service/{service}/action/{action}`, a form with `format=1`; without that the real one answers XML.
"""

import base64
import hashlib
import secrets
import time
from collections.abc import Mapping
from typing import Final

from worker.local.simulator.api import Answer
from worker.local.simulator.model import KS_APP_TOKEN, KS_START, KS_WIDGET, Call, IssuedKs, World

KS_PATH: Final = "/api_v3/service/"

_ADMIN: Final = "2"
_NEEDED: Final = {
    KS_START: {"secret", "partnerId"},
    KS_WIDGET: {"widgetId"},
    KS_APP_TOKEN: {"ks", "id", "tokenHash"},
}
_ALLOWED: Final = {
    KS_START: {"type", "expiry", "privileges", "userId"},
    KS_WIDGET: {"expiry"},
    KS_APP_TOKEN: {"type", "expiry", "sessionPrivileges", "userId"},
}
ROUTES: Final = {
    "session/action/start": KS_START,
    "session/action/startWidgetSession": KS_WIDGET,
    "appToken/action/startSession": KS_APP_TOKEN,
}


class _Exception(Exception):  # noqa: N818  the vendor's name for an answer
    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code, self.message = code, message


def perform(world: World, call: Call, headers: Mapping[str, str]) -> Answer:
    """Judge the call and say what is answered."""
    form = call.form()
    if form.pop("format", None) != "1":
        return Answer(200, b'<?xml version="1.0"?><xml><result/></xml>', "text/xml")
    try:
        _check(call.route, form, headers)
        answer = _RULES[call.route](world, form)
    except _Exception as error:
        call.error = error.message
        body = {"objectType": "KalturaAPIException", "code": error.code, "message": error.message, "args": {}}
        return Answer.of(200, body)
    world.accept(call, time.monotonic())
    return answer


def _check(route: str, form: Mapping[str, str], headers: Mapping[str, str]) -> None:
    if not headers.get("Content-Type", "").startswith("application/x-www-form-urlencoded"):
        raise _Exception("INVALID_PARAMETERS_SYNTAX", "a form is expected")
    if missing := _NEEDED[route] - form.keys():
        raise _Exception("MISSING_MANDATORY_PARAMETER", f"Missing parameter {min(missing)}")
    if unknown := form.keys() - _NEEDED[route] - _ALLOWED[route]:
        raise _Exception("INVALID_PARAMETERS_SYNTAX", f"Unknown parameter {min(unknown)}")


def _start(world: World, form: Mapping[str, str]) -> Answer:
    settings = world.settings
    if form["partnerId"] != str(settings.partner_id) or form["secret"] != settings.admin_secret:
        raise _Exception("START_SESSION_ERROR", f"Error while starting session for partner [{form['partnerId']}]")
    admin = form.get("type") == _ADMIN and "disableentitlement" in form.get("privileges", "").split(",")
    ks, _ = _issue(world, admin=admin, expiry=form.get("expiry"))
    return Answer.of(200, ks)


def _start_widget_session(world: World, form: Mapping[str, str]) -> Answer:
    if form["widgetId"] != f"_{world.settings.partner_id}":
        raise _Exception("INVALID_WIDGET_ID", "Widget id is invalid")
    ks, _ = _issue(world, admin=False, expiry=form.get("expiry"))
    return Answer.of(200, {"objectType": "KalturaStartWidgetSessionResponse", "ks": ks, "userId": "0"})


def _start_by_app_token(world: World, form: Mapping[str, str]) -> Answer:
    settings = world.settings
    used = world.issued.get(form["ks"])
    if used is None or not used.good(time.monotonic()):
        raise _Exception("INVALID_KS", 'Invalid KS "…", Error "-1,INVALID_STR"')
    if form["id"] != settings.app_token_id:
        raise _Exception("APP_TOKEN_ID_NOT_FOUND", f'Application token id "{form["id"][:20]}" not found')
    if settings.app_token is None:
        raise _Exception("APP_TOKEN_NOT_ACTIVE", f'Application token id "{form["id"]}" not active')
    expected = hashlib.new(settings.app_token_hash, (form["ks"] + settings.app_token).encode()).hexdigest()
    if not secrets.compare_digest(form["tokenHash"].encode(), expected.encode()):
        raise _Exception("INVALID_APP_TOKEN_HASH", "Invalid application token hash")
    ks, expires_in_s = _issue(world, admin=form.get("type") == _ADMIN, expiry=form.get("expiry"))
    info = {"partnerId": settings.partner_id, "sessionType": int(form.get("type", "0"))}
    expiry = int(time.time() + expires_in_s)
    return Answer.of(200, {"objectType": "KalturaSessionInfo", "ks": ks, "expiry": expiry, **info})


_RULES: Final = {KS_START: _start, KS_WIDGET: _start_widget_session, KS_APP_TOKEN: _start_by_app_token}


def _issue(world: World, *, admin: bool, expiry: str | None) -> tuple[str, float]:
    """A new KS, and its life in seconds."""
    wanted = float(expiry) if expiry is not None and expiry.isdecimal() else world.settings.ks_life_s
    life_s = min(wanted, world.settings.ks_life_s)
    body = f"v2|{world.settings.partner_id}|".encode() + secrets.token_bytes(48)
    ks = base64.urlsafe_b64encode(body).decode()
    world.issued[ks] = IssuedKs(admin, time.monotonic() + life_s)
    return ks, life_s
