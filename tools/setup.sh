#!/bin/sh
# Creates .venv as requirements-dev.lock says, and does nothing when that is done already: `make setup`.
# PYTHON may name the interpreter; otherwise the newest suitable one is taken.
set -eu
cd "$(dirname "$0")/.."

say() { printf 'setup: %s\n' "$*" >&2; }
suitable() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }
with_venv() { "$1" -c 'import ensurepip, venv' >/dev/null 2>&1; }
identity() { "$1" -c 'import sys; print(sys.version, sys.base_prefix)' 2>/dev/null; }

stamp=.venv/.stamp
wanted=$(pwd; cat requirements-dev.lock pyproject.toml tools/setup.sh | cksum)

up_to_date() {
  [ "$(cat $stamp 2>/dev/null)" = "$wanted" ] && suitable .venv/bin/python || return 1
  [ -z "${PYTHON:-}" ] || [ "$(identity "$PYTHON")" = "$(identity .venv/bin/python)" ]
}

# find_python TEST -> the first candidate that is recent enough and passes the test
find_python() {
  for candidate in ${PYTHON:-python3.14 python3.13 python3.12 python3.11 python3}; do
    if suitable "$candidate" && "$1" "$candidate"; then command -v "$candidate"; return; fi
  done
  return 1
}

# Debian keeps the venv module in a package of its own; as root, or by a sudo that does not ask, it is installed here.
install_venv() {
  command -v apt-get >/dev/null || return 1
  sudo=
  if [ "$(id -u)" != 0 ]; then sudo -n true 2>/dev/null || return 1; sudo='sudo -n'; fi
  say "installing $1"
  $sudo apt-get update -qq >/dev/null && $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$1" >/dev/null
}

if up_to_date; then exit 0; fi

if ! python=$(find_python with_venv); then
  if ! python=$(find_python true); then
    say "Python 3.11 or later is needed${PYTHON:+, and $PYTHON is not}."
    say "  Debian, Ubuntu: sudo apt-get install python3-venv      macOS: brew install python"
    say "  or name one that is not on the path: make setup PYTHON=/path/to/python3"
    exit 1
  fi
  package=$("$python" -c 'import sys; print("python{}.{}-venv".format(*sys.version_info))')
  if ! install_venv "$package" || ! with_venv "$python"; then
    say "$python has no venv module. Debian, Ubuntu: sudo apt-get install $package"
    exit 1
  fi
fi

say "$("$python" --version) -> .venv, about half a minute, once"
rm -rf .venv
"$python" -m venv .venv
pip() { .venv/bin/python -m pip -qq --disable-pip-version-check install "$@"; }
pip --require-hashes --requirement requirements-dev.lock
pip --no-deps --no-build-isolation --editable .
printf '%s\n' "$wanted" >$stamp
