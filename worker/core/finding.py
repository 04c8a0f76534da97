"""What a check found, as a person is told it."""

from dataclasses import dataclass
from enum import StrEnum


class State(StrEnum):
    """How it stands."""

    OK = "ok"
    WRONG = "WRONG"
    NOTE = "note"
    """Neither right nor wrong, but worth knowing."""
    UNCHECKED = "unchecked"
    """It could not be looked at; the text says why."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of a report: `text` says how it is or, where that is wrong, what to do. It holds no secrets."""

    state: State
    item: str
    text: str

    @classmethod
    def ok(cls, item: str, text: str = "") -> "Finding":
        """As it should be."""
        return cls(State.OK, item, text)

    @classmethod
    def wrong(cls, item: str, text: str) -> "Finding":
        """Not as it should be."""
        return cls(State.WRONG, item, text)

    @classmethod
    def note(cls, item: str, text: str) -> "Finding":
        """Worth knowing."""
        return cls(State.NOTE, item, text)

    @classmethod
    def unchecked(cls, item: str, text: str) -> "Finding":
        """Nobody knows."""
        return cls(State.UNCHECKED, item, text)
