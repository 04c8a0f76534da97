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
        self._seen: tuple[int, int] | None = None
        self._ks = ""
        try:
            self._read()
        except OSError as error:
            raise ConfigurationError(f"AVATAR_KS_FILE: {path} cannot be read: {error.strerror}") from None
        if not self._ks:
            raise ConfigurationError(f"AVATAR_KS_FILE: {path} is empty; it should hold a Kaltura Session")

    def current(self) -> str:
        """The Kaltura Session as the file has it now."""
        # While a secret is rotated the file may be gone for a moment; the last session is still the best guess.
        with contextlib.suppress(OSError):
            self._read()
        return self._ks

    def _read(self) -> None:
        stat = self._path.stat()
        if (stat.st_mtime_ns, stat.st_ino) != self._seen:
            self._ks = self._path.read_text(encoding="utf-8").strip() or self._ks
            self._seen = (stat.st_mtime_ns, stat.st_ino)
