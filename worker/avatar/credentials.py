"""Where the Kaltura Session comes from: the environment, or a file that is read again when it changes."""

import contextlib
from pathlib import Path

from pydantic import SecretStr

from worker.errors import ConfigurationError


class FixedKs:
    """The session of `AVATAR_KS`."""

    def __init__(self, ks: SecretStr) -> None:
        self._ks = ks.get_secret_value().strip()

    def current(self) -> str:
        """The Kaltura Session."""
        return self._ks


class KsFile:
    """The session in `AVATAR_KS_FILE`, e.g. a mounted secret. A file that vanishes or is emptied leaves the last one.

    Raises:
        ConfigurationError: at the start, if there is none to read.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: tuple[int, ...] = ()
        self._ks = ""
        try:
            self._read()
        except OSError as error:
            raise ConfigurationError(f"AVATAR_KS_FILE: {path} cannot be read: {error.strerror}") from None
        except ValueError as error:
            raise ConfigurationError(f"AVATAR_KS_FILE: {path}: {error}") from None

    def current(self) -> str:
        """The Kaltura Session as the file has it now."""
        # While a secret is rotated the file may be gone or half written; the last session is still the best guess.
        with contextlib.suppress(OSError, ValueError):
            self._read()
        return self._ks

    def _read(self) -> None:
        stat = self._path.stat()
        seen = (stat.st_mtime_ns, stat.st_ino, stat.st_size)
        if seen != self._seen:
            self._ks = _fit_for_a_header(self._path.read_bytes().strip())
            self._seen = seen


def _fit_for_a_header(ks: bytes) -> str:
    if not ks or not all(0x21 <= byte <= 0x7E for byte in ks):
        raise ValueError("it should hold a Kaltura Session: printable ASCII without blanks")
    return ks.decode("ascii")
