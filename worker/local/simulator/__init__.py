"""The Avatar API on loopback: strict, scriptable, and with a memory.

It is written from the vendor's documentation alone and shares no model with the worker's client, so that the two cannot
share a mistake. Rooms: `model` (what is remembered), `api` (the vendor's rules), `faults` (what is made to go wrong),
`transcript` (what is told about it), `control` (the `/_control` routes), `server` (the way of one request), `command`
(the process).
"""

from worker.local.simulator.command import main

__all__ = ["main"]
