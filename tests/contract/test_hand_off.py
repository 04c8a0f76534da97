"""How an answer finds whoever asked, and how long it is of use."""

import pytest

from worker.amqp.reading import _reply_to
from worker.core.model import ReplyTo


@pytest.mark.parametrize(
    ("header", "expires_ms"),
    [(None, 30_000), (5_000, 5_000), (1, 1), (0, 30_000), (-1, 30_000), (3_600_001, 30_000), ("5000", 30_000)],
)
def test_it_expires_when_the_asker_says_or_after_half_a_minute(header: object, expires_ms: int) -> None:
    assert _reply_to("answers", "corr-1", header) == ReplyTo("answers", "corr-1", expires_ms)


@pytest.mark.parametrize("queue", [None, "", "avatar.parked", "avatar.commands.v1.p00"])
def test_never_to_a_queue_of_ours(queue: str | None) -> None:
    assert _reply_to(queue, "corr-1", None) is None
