"""Tries the Avatar API in earnest: which of its contradictory forms (KALTURA.md) work, one session after the other.

Every session that is created is ended at once. What is told holds no secrets: statuses, and the vendor's own words.
"""

from collections.abc import AsyncIterator
from dataclasses import replace
from itertools import product

from worker.avatar.client import Api, AvatarClient
from worker.avatar.credentials import KsSource
from worker.core.finding import Finding
from worker.core.model import CallKind, CallResult, Piece
from worker.core.work import Open
from worker.ops.logs import redacted

SENTENCE = "Hello, this is a test."
_PATHS = ("/create", "")
_FIELDS = ("avatarId", "id")


async def reach(client: AvatarClient) -> Finding:
    """Whether there is an Avatar API: it must refuse to create a session for nobody."""
    item, result = "Avatar API", await client.knock()
    status = result.status
    if status is None:
        return Finding.wrong(item, f"{result.error}: check AVATAR_BASE_URL, and name server, firewall and proxy")
    if status in (404, 405):
        return Finding.wrong(item, f"it answers {status}: check AVATAR_BASE_URL and AVATAR_CREATE_PATH")
    if status >= 500 or status == 429:
        return Finding.wrong(item, f"it answers {status}: it has trouble of its own; try again later")
    if 400 <= status < 500:
        return Finding.ok(item, f"it is there, and answers {status} to a call without credentials")
    return Finding.wrong(item, f"it answers {status} to a call without credentials: check AVATAR_BASE_URL")


async def rehearse(api: Api, ks: KsSource, wanted: Open) -> AsyncIterator[Finding]:
    """Try the configured form, then the others; with the first that works, all calls, with the voice and without."""
    forms = [replace(api, create_path=path, avatar_field=field) for path, field in product(_PATHS, _FIELDS)]
    working: list[Api] = []
    for form in (api, *(form for form in forms if form != api)):
        async with AvatarClient(form, ks) as client:
            result, session = await client.create(wanted)
            if session is not None:
                working.append(form)
                result = await client.end(session)
            item = f"create, {form.create_path or 'bare base'}, {form.avatar_field}"
            yield _told(item, result, needed=form == api, secret=ks.at_hand())
    if not working:
        return
    async with AvatarClient(working[0], ks) as client:
        for voice_id in dict.fromkeys((wanted.voice_id, None)):
            variant = replace(wanted, voice_id=voice_id)
            async for finding in _converse(client, variant, ks, needed=variant == wanted):
                yield finding
    yield Finding.note("settings", f"use {_settings(working[0])}")


async def _converse(client: AvatarClient, wanted: Open, ks: KsSource, *, needed: bool) -> AsyncIterator[Finding]:
    """All calls of a session. Its end is called whatever happens before."""
    how = "with VOICE_ID" if wanted.voice_id else "without voice"
    result, session = await client.create(wanted)
    if session is None:
        yield _told(f"create {how}", result, needed=needed, secret=ks.at_hand())
        return
    piece = Piece("doctor", SENTENCE, is_final=True, parts=())
    results: dict[str, CallResult] = {}
    try:
        results["say-text"] = await client.say(session, piece)
        results["keep-alive"] = await client.keep_alive(session)
        results["interrupt"] = await client.interrupt(session)
    finally:
        results["end"] = await client.end(session)
    for verb, result in results.items():
        yield _told(f"{verb} {how}", result, needed=needed, secret=session.token)


def _told(item: str, result: CallResult, *, needed: bool, secret: str) -> Finding:
    """A line about a call that was made with a `secret`; `needed`: as the settings have it, so that it should work."""
    if result.kind is CallKind.OK:
        return Finding.ok(item, "works")
    error = result.error.replace(secret, "[redacted]") if secret else result.error
    text = f"{result.status or 'no answer'}: {redacted(error)}"
    if not needed:
        return Finding.note(item, f"does not work here: {text}")
    match result.kind:
        case CallKind.DENIED:
            text += (
                "; the KS is refused: it must be current, an admin KS (type 2) with the privilege disableentitlement"
            )
        case CallKind.NOT_TAKEN if result.status == 429:
            text += "; no session is free, or too many calls: try again later"
        case CallKind.NOT_TAKEN if item == "say-text without voice":
            text += "; set VOICE_ID: some sessions cannot speak without"
        case CallKind.UNKNOWN if item.startswith("create"):
            text += "; a session may have been opened that ends by itself"
    return Finding.wrong(item, text)


def _settings(form: Api) -> str:
    return f"AVATAR_CREATE_PATH={form.create_path} AVATAR_ID_FIELD={form.avatar_field}"
