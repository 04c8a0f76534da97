"""`tail`: prints the events as they come, until Ctrl-C. They hold what was said, but never a token."""

import json
import sys

from worker.amqp import listener, topology
from worker.amqp.lenient import printable
from worker.errors import ConfigurationError
from worker.operate import connected
from worker.settings import BrokerSettings


async def tail(settings: BrokerSettings, conversation_id: str | None, *, as_json: bool) -> int:
    """Print the events of one conversation, or of all.

    Raises:
        ConfigurationError: there is no broker, or no worker has ever run on it.
        LinkLost: the connection went away.
    """
    async with connected(settings) as connection:
        try:
            events = await listener.listen(connection)
        except topology.QueueMissing:
            raise ConfigurationError("the broker has no exchange avatar.events: has a worker ever run on it?") from None
        sys.stderr.write("listening; Ctrl-C ends\n")
        sys.stderr.flush()
        async for body in events:
            _print(body, conversation_id, as_json=as_json)
    return 0


def _print(body: bytes, conversation_id: str | None, *, as_json: bool) -> None:
    try:
        event = json.loads(body)
        when, kind, subject, data = event["time"], event["type"], event["subject"], dict(event["data"])
    except (ValueError, LookupError, TypeError):
        return  # somebody else's: anybody may publish there
    if conversation_id not in (None, subject):
        return
    if as_json:
        line = json.dumps(event, ensure_ascii=False)
    else:
        data.pop("conversationId", None)
        line = printable(f"{when}  {kind:<26} {subject}  {json.dumps(data, ensure_ascii=False)}")
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
