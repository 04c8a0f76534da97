"""What a lane can ask its owner to do, one at a time, and what a deployment may choose about it."""

from dataclasses import dataclass, field
from typing import Literal

from schemas.events import EndReason
from worker.core.model import Piece, Session
from worker.core.shaping.shaper import Shaping
from worker.core.verdict import Conclusion

INTENT_S = 1.0
"""How long after it was handed out a call may begin: its intent is written first. Later it is handed out anew."""


@dataclass(frozen=True, slots=True)
class Rules:
    """What a deployment may choose. Times in seconds.

    `stall_first_s`, `stall_s`: how long the tail of a turn waits for more text, before its first piece and later.
    `auto_final_s`: how long after its last chunk a turn is closed; 0: never. `final_text`: what carries the final where
    nothing else is left to. `pause_chars`, `resume_chars`: marks of what waits for the API.
    """

    shaping: Literal["sentences", "off"] = "sentences"
    speech: Shaping = field(default_factory=Shaping)
    stall_first_s: float = 0.5
    stall_s: float = 1.0
    auto_final_s: float = 30.0
    final_text: str = ""
    pause_chars: int = 1000
    resume_chars: int = 200
    pause_valid_s: float = 10.0
    max_age_s: float = 120.0
    ambiguous: Literal["repeat", "skip"] = "repeat"
    ambiguous_wait_s: float = 2.0
    on_lost: Literal["recreate", "fail"] = "recreate"
    session_wait_s: float = 10.0
    session_end_wait_s: float = 30.0
    default_avatar: str | None = None
    default_voice: str | None = None


@dataclass(frozen=True, slots=True)
class Open:
    """Create a session with the API; before `not_before` only take a place in the line of those who want one."""

    avatar_id: str
    voice_id: str | None
    voice_speed: float | None
    not_before: float = 0.0


@dataclass(frozen=True, slots=True)
class Attach:
    """Take over a session somebody else created; calls nobody."""

    session: Session


@dataclass(frozen=True, slots=True)
class InitClient:
    """Fetch what a viewer needs; the API allows it once a session."""


@dataclass(frozen=True, slots=True)
class Say:
    """Call `say-text` once."""

    piece: Piece


@dataclass(frozen=True, slots=True)
class CallInterrupt:
    """Call `interrupt` once more, now that the say it met has returned."""


@dataclass(frozen=True, slots=True)
class Close:
    """Call `end` once; after the `last_attempt` the session is forgotten, whatever the answer."""

    last_attempt: bool
    reason: EndReason = EndReason.REQUESTED


@dataclass(frozen=True, slots=True)
class Wait:
    """Nothing to do before that time, unless something is offered."""

    until: float


Call = Open | Attach | InitClient | Say | CallInterrupt | Close
Work = Call | Wait


@dataclass(frozen=True, slots=True)
class Step:
    """What has ended, in order, and what is to be done; no work: the lane is idle."""

    conclusions: tuple[Conclusion, ...]
    work: Work | None
