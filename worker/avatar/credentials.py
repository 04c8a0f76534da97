"""Where the Kaltura Session (KS) comes from: the environment, a file, or the KS service, which `ks_service` asks.

    source      what there is now                          after the API has refused it
    FixedKs     AVATAR_KS                                  the same: nobody but the operator can help
    KsFile      what AVATAR_KS_FILE holds at this moment   what it holds then: it may just have been rotated
    MintedKs    one of the KS service's, renewed ahead     another one, once

A KS is needed to create sessions, and for nothing else: without one, those that live go on.
"""

import asyncio
import contextlib
import random
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import structlog
from pydantic import SecretStr

from worker.core.model import CallKind, CallResult
from worker.core.retry import delay_s
from worker.errors import ConfigurationError
from worker.ops import logs
from worker.ports import Clock

_log = structlog.stdlib.get_logger(__name__)

LOOK_S = 1.0
RENEW_AT = 0.9
"""The part of its life after which a KS is renewed: of a day's KS, more than two hours are left to get another."""
REFUSED_PAUSE_S = 30.0
"""Until the service that refused our credentials is asked again: somebody may have put them right."""
SETTLED_S = 5.0
"""One refused so soon after it was made: another would be, too."""


class NoKs(Exception):  # noqa: N818 - it names what there is not
    """There is no Kaltura Session to be had; the `result` says whether it is worth trying again."""

    def __init__(self, result: CallResult) -> None:
        super().__init__(result.error)
        self.result = result


class KsSource(ABC):
    """Where the Kaltura Session comes from."""

    def __init__(self) -> None:
        self._refused = ""

    @property
    def ready(self) -> bool:
        """Whether there is one that the API is not known to refuse."""
        ks = self.at_hand()
        return bool(ks) and ks != self._refused

    async def current(self) -> str:
        """The Kaltura Session to use now.

        Raises:
            NoKs: there is none.
        """
        return self.at_hand()

    async def after(self, refused: str) -> str:
        """The Kaltura Session to use now that the API has refused that one; the same if there is no other.

        Raises:
            NoKs: there is none.
        """
        del refused
        return await self.current()

    def note(self, ks: str, *, accepted: bool) -> None:
        """What the API made of it."""
        if not accepted:
            self._refused = ks
        elif self._refused == ks:
            self._refused = ""

    @abstractmethod
    def at_hand(self) -> str:
        """The one there is, "" for none."""


class FixedKs(KsSource):
    """The session of `AVATAR_KS`."""

    def __init__(self, ks: SecretStr) -> None:
        super().__init__()
        self._ks = ks.get_secret_value().strip()

    def at_hand(self) -> str:
        """See `KsSource`."""
        return self._ks


class KsFile(KsSource):
    """The session in `AVATAR_KS_FILE`, e.g. a mounted secret. A file that vanishes or is emptied leaves the last one.

    Raises:
        ConfigurationError: at the start, if there is none to read.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        self._seen: tuple[int, ...] = ()
        self._ks = ""
        try:
            self._read()
        except OSError as error:
            raise ConfigurationError(f"AVATAR_KS_FILE: {path} cannot be read: {error.strerror}") from None
        except ValueError as error:
            raise ConfigurationError(f"AVATAR_KS_FILE: {path}: {error}") from None

    def at_hand(self) -> str:
        """As the file has it now, or had it last."""
        # While a secret is rotated the file may be gone or half written; the last session is still the best guess.
        with contextlib.suppress(OSError, ValueError):
            self._read()
        return self._ks

    def _read(self) -> None:
        # Through all symbolic links: a mounted secret changes by having one of them point elsewhere.
        stat = self._path.stat()
        seen = (stat.st_mtime_ns, stat.st_dev, stat.st_ino, stat.st_size)
        if seen == self._seen:
            return
        ks = fit_for_a_header(self._path.read_bytes().strip())
        if self._ks and ks != self._ks:
            _log.info(logs.KS_RENEWED, source="AVATAR_KS_FILE")
        self._ks, self._seen = ks, seen


@dataclass(frozen=True, slots=True)
class Minted:
    """A new Kaltura Session, and how many seconds it is good for."""

    ks: str = field(repr=False)
    life_s: float


class MintedKs(KsSource):
    """Sessions that a service makes: `mint` asks it once, and answers with one or with why there is none.

    `run` renews ahead of time, and tries again while it does not succeed. One attempt at a time, for all who wait.
    """

    def __init__(self, mint: Callable[[], Awaitable[Minted | CallResult]], clock: Clock) -> None:
        super().__init__()
        self._mint = mint
        self._clock = clock
        self._ks = ""
        self._made = 0.0
        self._expires = 0.0
        self._due = 0.0
        self._failures = 0
        self._why_not = CallResult(CallKind.NOT_TAKEN, error="no Kaltura Session yet", local=True)
        self._attempt: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Renew whenever it is due, until cancelled."""
        try:
            while True:
                if self._clock() >= self._due:
                    await self._renew()
                await asyncio.sleep(LOOK_S)
        finally:
            if self._attempt is not None:
                self._attempt.cancel()

    async def current(self) -> str:
        """The newest. Whoever needs one while there is none asks for it, but not more often than the pauses allow."""
        if not self.at_hand() and (self._attempt is not None or self._clock() >= self._due):
            await self._renew()
        ks = self.at_hand()
        if not ks:
            why, again_s = self._why_not, max(0.0, self._due - self._clock())
            raise NoKs(CallResult(why.kind, why.status, again_s, why.error, local=True))
        return ks

    async def after(self, refused: str) -> str:
        """Another one, unless the one that was refused is new.

        One that may be good for another avatar stays until there is another.
        """
        if self._ks == refused and self._clock() - self._made >= SETTLED_S:
            if refused == self._refused:
                self._ks = ""
            self._due = min(self._due, self._clock()) if not self._failures else self._due
            if self._attempt is not None or self._clock() >= self._due:
                await self._renew()
        return await self.current()

    def at_hand(self) -> str:
        """Unless it has expired."""
        return self._ks if self._clock() < self._expires else ""

    async def _renew(self) -> None:
        if self._attempt is None:
            self._attempt = asyncio.create_task(self._try())
        # Whoever waits may be cancelled, and the others wait on.
        await asyncio.shield(self._attempt)

    async def _try(self) -> None:
        try:
            made = await self._mint()
        except Exception as error:  # noqa: BLE001 - whatever it was, sessions that live do not need a KS
            made = CallResult(CallKind.NOT_TAKEN, error=type(error).__name__)
            _log.exception(logs.KS_FAILED)
        finally:
            self._attempt = None
        now = self._clock()
        if isinstance(made, Minted):
            self._ks, self._made, self._expires = made.ks, now, now + made.life_s
            self._due, self._failures = now + made.life_s * RENEW_AT, 0
            _log.info(logs.KS_RENEWED, source="KS service", valid_s=round(made.life_s))
            return
        self._failures += 1
        self._why_not = made
        if made.kind is CallKind.DENIED:
            pause_s = REFUSED_PAUSE_S
        else:
            pause_s = delay_s(self._failures, random.uniform(0.5, 1), made.retry_after_s)  # noqa: S311 - spreads retries
        self._due = now + pause_s
        _log.error(
            logs.KS_FAILED,
            outcome=str(made.kind),
            status=made.status,
            error=made.error,
            again_in_s=round(pause_s, 1),
            valid_s=round(max(0.0, self._expires - now)) if self._ks else 0,
        )


def fit_for_a_header(ks: bytes) -> str:
    """The KS as text.

    Raises:
        ValueError: it cannot be one.
    """
    if not ks or not all(0x21 <= byte <= 0x7E for byte in ks):
        raise ValueError("it should hold a Kaltura Session: printable ASCII without blanks")
    return ks.decode("ascii")
