"""A server by `apt-get`, as root or by a sudo that asks for nothing. Only the program: its service stays off."""

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from worker.local.broker.base import BrokerError

_INSTALL_S = 900.0

# policy-rc.d is Debian's way to say "install, but start nothing"; one that is already there is somebody else's rule.
_SCRIPT = """
set -eu
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
  trap 'rm -f "$policy"' EXIT
  printf '#!/bin/sh\\nexit 101\\n' >"$policy"
  chmod 755 "$policy"
fi
apt-get update -qq
apt-get install -y -qq --no-install-recommends "$1"
if command -v systemctl >/dev/null; then systemctl disable --quiet "$1"; fi
"""


def install(package: str, present: Callable[[], object]) -> None:
    """Installs the package of a server whose service has the same name; takes a minute or two.

    One process at a time: whoever waited for another looks first whether it is `present` by now.

    Raises:
        BrokerError: this is no Debian, we may not install here, or apt-get failed; the text holds its last lines.
    """
    with Path(__file__).open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not present():
            print(f"installing {package} with apt-get; this takes a minute or two, once", file=sys.stderr, flush=True)
            _install(package)


def _install(package: str) -> None:
    if shutil.which("apt-get") is None:
        raise BrokerError("not installed: there is no apt-get here")
    command = ["sh", "-c", _SCRIPT, "install", package]
    if os.geteuid() != 0:
        if not _sudo_works():
            raise BrokerError("not installed: neither root nor a sudo without password")
        command = ["sudo", "-n", *command]
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    try:
        done = subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_INSTALL_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise BrokerError(f"not finished within {_INSTALL_S:.0f} s") from None
    if done.returncode:
        raise BrokerError("\n".join(["failed:", *done.stderr.strip().splitlines()[-5:]]))


def _sudo_works() -> bool:
    if shutil.which("sudo") is None:
        return False
    return subprocess.run(["sudo", "-n", "true"], capture_output=True, check=False).returncode == 0
