"""The process: `simulator [options]`, until SIGTERM or SIGINT."""

import argparse
import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import Final

import uvloop
from aiohttp import web
from pydantic import ValidationError

from worker.local.simulator.api import BASE_PATH
from worker.local.simulator.model import Settings
from worker.local.simulator.server import Simulator

_STOP_S: Final = 0.5
_BACKLOG: Final = 1024


def main(argv: list[str]) -> int:
    """Serve until a signal: 0. Wrong options or an address that cannot be had: 2, with the reason on stderr."""
    options = _parser().parse_args(argv)
    try:
        settings = Settings.model_validate(
            {name: getattr(options, name) for name in Settings.model_fields}, strict=False
        )
    except ValidationError as exc:
        first = exc.errors(include_url=False, include_context=False, include_input=False)[0]
        return _refuse(f"{first['loc'][0]}: {first['msg']}")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        try:
            runner.run(_serve(settings, options.host, options.port, options.port_file))
        except OSError as exc:
            what = f"write {exc.filename}" if exc.filename else f"listen on {options.host} port {options.port}"
            return _refuse(f"cannot {what}: {exc.strerror or exc}")
    return 0


def _refuse(reason: str) -> int:
    print(f"simulator: {reason}", file=sys.stderr)
    return 2


async def _serve(settings: Settings, host: str, port: int, port_file: Path | None) -> None:
    stop = asyncio.Event()
    for signum in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(signum, stop.set)
    runner = web.ServerRunner(web.Server(Simulator(settings).handle, access_log=None), shutdown_timeout=_STOP_S)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port, backlog=_BACKLOG).start()
        bound = runner.addresses[0][1]
        if port_file is not None:
            _write_port(port_file, bound)
        print(f"simulator listening on http://{f'[{host}]' if ':' in host else host}:{bound}{BASE_PATH}", flush=True)
        await stop.wait()
    finally:
        await runner.cleanup()


def _write_port(path: Path, port: int) -> None:
    """Write it so that whoever waits for the file never reads half of it."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(f"{port}\n")
    part.replace(path)


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65_535:
        raise argparse.ArgumentTypeError("must be a number from 0 to 65535")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    default = Settings()
    parser = argparse.ArgumentParser(
        prog="simulator", description="The Avatar API on this machine, with scriptable faults (POST /_control/faults)."
    )
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    add("--port", type=_port, default=0, metavar="N", help="port to listen on; 0, the default: a free one, printed")
    add("--port-file", type=Path, metavar="PATH", help="file to write the port to as soon as it listens")
    add(
        "--ks",
        default=os.environ.get("AVATAR_KS") or default.ks,
        help="expected Kaltura Session (AVATAR_KS or demo-ks)",
    )
    add("--partner-id", type=int, default=default.partner_id, metavar="N", help="of the KS service (%(default)s)")
    add("--admin-secret", default=default.admin_secret, help="session.start takes it (%(default)s)")
    add("--app-token-id", default=default.app_token_id, help="(%(default)s)")
    add("--app-token", default=default.app_token, help="(%(default)s)")
    add("--app-token-hash", default=default.app_token_hash, help="MD5, SHA1, SHA256 or SHA512 (%(default)s)")
    add("--ks-life-s", type=float, default=default.ks_life_s, metavar="S", help="at most (%(default)s)")
    add("--latency-ms", type=float, default=default.latency_ms, metavar="MS", help="of every answer (%(default)s)")
    add("--session-limit", type=int, default=default.session_limit, metavar="N", help="open sessions; 0: no limit")
    add("--idle-timeout-s", type=float, default=default.idle_timeout_s, metavar="S", help="(%(default)s); 0: never")
    add("--token-life-s", type=float, default=default.token_life_s, metavar="S", help="(%(default)s)")
    add("--avatar", dest="avatars", action="append", default=[], metavar="ID", help="a known avatar; default: any")
    add("--voice", dest="voices", action="append", default=[], metavar="ID", help="a known voice; default: any")
    add("--create-path", default=default.create_path, metavar="PATH", help="(%(default)s); empty: the base path itself")
    add("--avatar-field", default=default.avatar_field, help="avatarId or id, inside visualConfig (%(default)s)")
    return parser
