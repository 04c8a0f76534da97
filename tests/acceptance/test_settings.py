"""Missing or wrong settings: exit code 2, a line that names the variable and not its value, and no socket is opened."""

import asyncio
import os
import sys
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.acceptance.conftest import ROOT, Finished, finished, started

SECRET = "s3cret-value"
GOOD = {"AVATAR_KS": "ks", "OPS_PORT": "0"}


class Trap:
    """A server that nobody should call."""

    def __init__(self) -> None:
        self.calls = 0

    async def answer(self, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.calls += 1
        writer.close()


@pytest.fixture
async def trap() -> AsyncIterator[str]:
    """An address where nobody calls as long as the settings are wrong."""
    trap = Trap()
    server = await asyncio.start_server(trap.answer, "127.0.0.1", 0)
    yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    server.close()
    assert trap.calls == 0


async def run(trap: str, cwd: Path, **env: str) -> Finished:
    addresses = {"AMQP_URL": f"amqp://u:{SECRET}@{trap}/", "AVATAR_BASE_URL": f"http://{trap}/v1"}
    async with started("-m", "worker", "run", env=addresses | GOOD | env, cwd=cwd) as process:
        return await finished(process)


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("AVATAR_KS", ""),
        ("AVATAR_KS", "  "),
        ("AVATAR_KS", f"{SECRET}\nwith a second line"),
        ("AVATAR_KS_FILE", f"/nowhere/{SECRET}"),
        ("AMQP_URL", f"http://u:{SECRET}@localhost/"),
        ("AMQP_URL", f"amqp://u:{SECRET}@localhost:port/"),
        ("AMQP_URL", SECRET),
        ("AMQP_URL", f"amqp://u:12#{SECRET}@localhost/"),
        ("AMQP_URL", f"amqp://u:12/{SECRET}@localhost/"),
        ("AMQP_URL", f"amqp://u:12?{SECRET}@localhost/"),
        ("AVATAR_BASE_URL", f"ftp://{SECRET}/"),
        ("AVATAR_BASE_URL", f"http://localhost/v1?key={SECRET}"),
        ("AVATAR_CREATE_PATH", SECRET),
        ("AVATAR_CREATE_EXTRA", f"[{SECRET}"),
        ("PARTITIONS", SECRET),
        ("PARTITIONS", "0"),
        ("PARTITIONS", "101"),
        ("PREFETCH", "0"),
        ("HEARTBEAT_S", "0"),
        ("MANAGEMENT_URL", f"127.0.0.1:15672/{SECRET}"),
        ("MANAGEMENT_URL", f"amqp://u:{SECRET}@localhost/"),
        ("MANAGEMENT_URL", f"http://u:12/{SECRET}@localhost/"),
        ("STORE_URL", f"mysql://{SECRET}/"),
        ("STORE_URL", "sqlite:///"),
        ("STORE_URL", f"sqlite:////nowhere/{SECRET}.db"),
        ("STORE_URL", f"postgresql://u:{SECRET}@127.0.0.1:1/d"),
        ("SPEECH_SHAPING", SECRET),
        ("SPEECH_MAX_AGE_S", "-1"),
        ("SPEECH_MAX_AGE_S", "nan"),
        ("AMBIGUOUS_SAY", SECRET),
        ("LOG_FORMAT", SECRET),
        ("OPS_PORT", "70000"),
    ],
)
async def test_a_wrong_setting_is_named(trap: str, tmp_path: Path, variable: str, value: str) -> None:
    found = await run(trap, tmp_path, **{variable: value})
    assert found.code == 2
    assert f"\n{variable}: " in found.err.replace("avatar-worker: ", "\n")
    assert "Traceback" not in found.err
    if "_FILE" not in variable and "nowhere" not in value:
        assert SECRET not in found.err + found.out


async def test_all_wrong_settings_are_named_at_once(trap: str, tmp_path: Path) -> None:
    found = await run(trap, tmp_path, PARTITIONS="many", OPS_PORT="none", AVATAR_KS="")
    assert found.code == 2
    assert {"PARTITIONS", "OPS_PORT"} <= {line.partition(":")[0] for line in found.err.splitlines()}


@pytest.mark.parametrize(
    ("given", "missing"),
    [
        ({}, "KALTURA_APP_TOKEN"),
        ({"KALTURA_APP_TOKEN": SECRET, "KALTURA_APP_TOKEN_ID": "0_a"}, "KALTURA_PARTNER_ID"),
        ({"KALTURA_ADMIN_SECRET": SECRET}, "KALTURA_PARTNER_ID"),
        ({"KALTURA_PARTNER_ID": "101"}, "KALTURA_APP_TOKEN"),
        ({"KALTURA_PARTNER_ID": "101", "KALTURA_APP_TOKEN": SECRET}, "KALTURA_APP_TOKEN_ID"),
        (
            {"KALTURA_PARTNER_ID": "101", "KALTURA_APP_TOKEN_ID": "0_a", "KALTURA_ADMIN_SECRET": SECRET},
            "KALTURA_APP_TOKEN",
        ),
    ],
)
async def test_what_is_missing_to_ask_for_a_kaltura_session_is_named(
    trap: str, tmp_path: Path, given: dict[str, str], missing: str
) -> None:
    found = await run(trap, tmp_path, AVATAR_KS="", **given)
    assert found.code == 2
    (line,) = [line for line in found.err.splitlines() if line.startswith("AVATAR_KS: ")]
    assert missing in line
    assert SECRET not in found.err + found.out


async def test_a_port_that_is_taken_is_named(trap: str, tmp_path: Path) -> None:
    found = await run(trap, tmp_path, OPS_HOST="127.0.0.1", OPS_PORT=trap.partition(":")[2])
    assert found.code == 2
    assert "OPS_PORT: " in found.err


async def test_an_empty_ks_file_is_named(trap: str, tmp_path: Path) -> None:
    file = tmp_path / "ks"
    file.write_text("\n")
    found = await run(trap, tmp_path, AVATAR_KS="", AVATAR_KS_FILE=str(file))
    assert found.code == 2
    assert "AVATAR_KS_FILE: " in found.err


@pytest.mark.parametrize(
    "arguments",
    [
        ("parked",),
        ("parked", "list", "--limit", "x"),
        ("parked", "list", "--limit", "0"),
        ("parked", "list", "--limit", "-1"),
        ("parked", "drop", "--yes", "--age", "-1"),
        ("parked", "drop", "--yes", "--age", "nan"),
        ("parked", "drop", "--yes", "--age", "soon"),
        ("parked", "drop", "--yes", "--reason", "refussed"),
        ("fly",),
        ("simulator", "--port", "70000"),
        (),
    ],
)
async def test_a_wrong_command_shows_the_usage(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    async with started("-m", "worker", *arguments, env={}, cwd=tmp_path) as process:
        found = await finished(process)
    assert found.code == 2
    assert "usage:" in found.err
    assert "invalid _" not in found.err, "a rule is named, not a function"


@pytest.mark.parametrize("arguments", [("parked", "list"), ("topology",)])
async def test_an_operator_is_told_that_there_is_no_broker(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    """Neither of these commands needs to know how to reach the Avatar API."""
    env = {"AMQP_URL": f"amqp://u:{SECRET}@127.0.0.1:1/"}
    async with started("-m", "worker", *arguments, env=env, cwd=tmp_path) as process:
        found = await finished(process)
    assert found.code == 2
    assert "AMQP_URL: no broker at 127.0.0.1:1/" in found.err
    assert SECRET not in found.err


async def test_a_reader_that_has_enough_is_no_error(tmp_path: Path) -> None:
    """As `head`, which closes its end of the pipe."""
    reading, writing = os.pipe()
    os.close(reading)
    command = (sys.executable, "-m", "worker", "doctor")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "AMQP_URL": "amqp://127.0.0.1:1/"}
    process = await asyncio.create_subprocess_exec(*command, stdout=writing, stderr=PIPE, env=env, cwd=tmp_path)
    os.close(writing)
    _, err = await process.communicate()
    assert (process.returncode, err.decode()) == (1, "")


async def test_a_virtual_host_that_is_not_there_is_named(tmp_path: Path, amqp_url: str) -> None:
    env = {"AMQP_URL": f"{amqp_url}nowhere"}
    async with started("-m", "worker", "topology", env=env, cwd=tmp_path) as process:
        found = await finished(process)
    assert found.code == 2
    assert "virtual host" in found.err


async def test_the_topology_is_declared_and_shown(tmp_path: Path, amqp_url: str) -> None:
    env = {"AMQP_URL": amqp_url, "PARTITIONS": "2"}
    async with started("-m", "worker", "topology", env=env, cwd=tmp_path) as process:
        found = await finished(process)
    assert found.code == 0
    for queue in ("avatar.commands.v1.p00", "avatar.commands.v1.p01", "avatar.parked", "avatar.dead"):
        assert queue in found.out
