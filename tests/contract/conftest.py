"""The shipped simulator as a process, for whoever tests against it."""

from collections.abc import AsyncIterator, Iterator

import pytest

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
