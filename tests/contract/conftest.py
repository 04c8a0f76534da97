"""The shipped simulator as a process, for whoever tests against it; and the stores, each of them empty."""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.support.postgres import Postgres
from tests.support.simulator import Simulator, process


@pytest.fixture(scope="session")
def simulator_process() -> Iterator[str]:
    with process() as url:
        yield url


@pytest.fixture
async def simulator(simulator_process: str) -> AsyncIterator[Simulator]:
    """A simulator that remembers nothing."""
    async with Simulator(simulator_process) as one:
        await one.control("POST", "reset")
        yield one


@pytest.fixture(params=["memory", "file", "postgres"])
async def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[str]:
    """The address of a new store."""
    async with _new_store(request, tmp_path) as url:
        yield url


@pytest.fixture(params=["file", "postgres"])
async def shared_url(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[str]:
    """The address of a new store that may be opened several times."""
    async with _new_store(request, tmp_path) as url:
        yield url


@asynccontextmanager
async def _new_store(request: pytest.FixtureRequest, folder: Path) -> AsyncIterator[str]:
    if request.param == "postgres":
        postgres: Postgres = request.getfixturevalue("postgres")
        async with postgres.schema() as url:
            yield url
    else:
        yield "sqlite://" if request.param == "memory" else f"sqlite:///{folder}/store.db"
