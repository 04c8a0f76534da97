"""`explain CONVERSATION`: what the store and the broker know of it. Never a token, never what was said."""

import json
import sys
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from rich.table import Table

from schemas import routes
from worker.amqp import shelf, topology
from worker.amqp.lenient import printable
from worker.amqp.shelf import ParkedCommand, Wanted
from worker.errors import ConfigurationError, LinkLost
from worker.operate import connected, show
from worker.parking import parked_table
from worker.settings import TopologySettings
from worker.stores import records
from worker.stores.database import Database
from worker.stores.records import Dossier


@dataclass(frozen=True, slots=True)
class _OnBroker:
    """What the broker has: commands ready in the conversation's partition, where that is known, and those parked."""

    waiting: int | None
    parked: list[ParkedCommand]
    trouble: str = ""


async def explain(settings: TopologySettings, conversation_id: str, *, as_json: bool) -> int:
    """Print it; returns the exit code: 1 where the broker could not be asked.

    Raises:
        ConfigurationError: this is no conversation id, or there is no store.
    """
    if not routes.is_conversation_id(conversation_id):
        raise ConfigurationError("a conversation id is 1 to 128 characters of A-Z a-z 0-9 . _ : -")
    records.demand_store(settings.store_url)
    database = await Database.open(settings.store_url)
    try:
        dossier = await records.collect(database, conversation_id)
    finally:
        await database.close()
    partition = _partition(settings, dossier)
    found = await _ask_broker(settings, conversation_id, partition)
    document = _document(conversation_id, partition, dossier, found)
    if as_json:
        sys.stdout.write(json.dumps(document, ensure_ascii=False) + "\n")
    else:
        _show(document, found)
    return 1 if found.trouble else 0


def _partition(settings: TopologySettings, dossier: Dossier) -> int | None:
    """Where its commands came from last. Before any has come only the broker knows which it is."""
    known = dossier.memory.state.partition
    return 0 if known is None and settings.partitions == 1 and set(dossier.epochs) <= {0} else known


async def _ask_broker(settings: TopologySettings, conversation_id: str, partition: int | None) -> _OnBroker:
    try:
        async with connected(settings) as connection:
            parked = await shelf.find(connection, Wanted(conversation_id=conversation_id))
            waiting = None
            if partition is not None:
                rows = await topology.survey(connection, partition + 1)
                waiting = rows[partition].messages
            return _OnBroker(waiting, parked)
    except topology.QueueMissing:
        return _OnBroker(None, [], "the broker has no queues of ours: has a worker ever run on it?")
    except (ConfigurationError, LinkLost) as error:
        return _OnBroker(None, [], str(error))


def _document(conversation_id: str, partition: int | None, dossier: Dossier, found: _OnBroker) -> dict[str, Any]:
    """All there is to tell. Times are ISO 8601, UTC."""
    memory, session, attempt = dossier.memory, dossier.session, dossier.memory.state.attempt
    return {
        "conversation_id": conversation_id,
        "known": dossier.touched is not None,
        "touched": _time(dossier.touched),
        "partition": partition,
        "epoch": None if partition is None else dossier.epochs.get(partition),
        "session": session
        and asdict(session)
        | {
            "held": session.lease_until > time.time(),
            "lease_until": _time(session.lease_until),
            "last_used": _time(session.last_used),
        },
        "playing_until": _time(memory.playing_until),
        "turns": [
            {"turn_id": turn_id, "state": turn.state, "pieces": turn.pieces, "text_length": turn.text_length}
            | {"touched": _time(turn.touched)}
            for turn_id, turn in sorted(memory.turns.items(), key=lambda item: item[1].touched)
        ],
        "attempt": attempt
        and {"turn_id": attempt.turn_id, "text_length": len(attempt.text), "begun": _time(attempt.begun)}
        | {"is_final": attempt.is_final, "count": attempt.count, "commands": [part.key for part in attempt.parts]},
        "kept": dossier.kept,
        "ended": dossier.ended,
        "last_ends": [
            {"command": known_as, "event": ended.event.type, "at": _time(ended.at)}
            | {
                "reason": getattr(ended.event.data, "reason", None),
                "turn_id": getattr(ended.event.data, "turn_id", None),
            }
            for known_as, ended in dossier.ends
        ],
        "waiting_in_partition": found.waiting,
        "parked": [asdict(row) for row in found.parked],
        "broker_trouble": found.trouble or None,
    }


def _show(document: dict[str, Any], found: _OnBroker) -> None:
    facts = Table("what", "", title=document["conversation_id"], show_header=False)
    for name, value in _facts(document):
        facts.add_row(name, value)
    show(facts)
    if document["turns"]:
        turns = Table("turn", "state", "pieces", "characters", "last touched", title="turns, latest last")
        for turn in document["turns"]:
            turns.add_row(
                printable(turn["turn_id"]),
                turn["state"],
                str(turn["pieces"]),
                str(turn["text_length"]),
                turn["touched"],
            )
        show(turns)
    if document["last_ends"]:
        ends = Table(
            "at", "command", "event", "reason", "turn", title=f"the latest of {document['ended']} ended commands"
        )
        for end in document["last_ends"]:
            turn_id = printable(end["turn_id"] or "")
            ends.add_row(end["at"], printable(end["command"]), end["event"], end["reason"] or "", turn_id)
        show(ends)
    if found.parked:
        show(parked_table(found.parked, f"{len(found.parked)} parked"))


def _facts(document: dict[str, Any]) -> list[tuple[str, str]]:
    facts = [("known to the ledger", f"yes, last touched {document['touched']}" if document["known"] else "no")]
    partition, epoch, waiting = document["partition"], document["epoch"], document["waiting_in_partition"]
    where = "one of several; only the broker knows which" if partition is None else routes.partition_queue(partition)
    facts.append(("partition", where if epoch is None else f"{where}, epoch {epoch}"))
    facts.append(("kept in the store, waiting", str(document["kept"])))
    if waiting is not None:
        facts.append(("ready there, of all conversations", str(waiting)))
    session = document["session"]
    if session is None:
        facts.append(("session", "none"))
    else:
        made = (
            "attached" if session["attached"] else f"avatar {session['avatar_id']}, voice {session['voice_id'] or '-'}"
        )
        facts.append(
            (
                "session",
                f"{session['session_id'] or '-'}, {session['state']} ({made}), last used {session['last_used']}",
            )
        )
        until = "holds it until" if session["held"] else "let go of it, or died; the lease ran until"
        facts.append(("owner", f"{session['owner']} {until} {session['lease_until']}"))
    attempt = document["attempt"]
    if attempt is not None:
        commands = ", ".join(map(printable, attempt["commands"]))
        told = f"{attempt['text_length']} characters of turn {printable(attempt['turn_id'])}, begun {attempt['begun']}"
        facts.append(("attempt without outcome", f"{told} ({commands})"))
    facts.append(("parked", document["broker_trouble"] or str(len(document["parked"]))))
    return facts


def _time(seconds: float | None) -> str | None:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds") if seconds else None
