"""Who asks what, and how the avatar is interrupted. The answers are texts in `examples/texts`."""

from dataclasses import dataclass
from pathlib import Path

from worker.local.demo.processes import DemoError

_PLACES = (Path(__file__).parents[3] / "examples", Path(__file__).parent / "examples")
"""In the repository, and in an installed package."""


@dataclass(frozen=True, slots=True)
class Scene:
    """One conversation: a producer process of its own, a turn per question."""

    name: str
    questions: tuple[str, ...]
    answers: tuple[str, ...]
    interrupt_after_s: float | None = None


SCENES = (
    Scene("ada", ("Why is the sky blue?",), ("sky.txt",)),
    Scene("cleo", ("Tell me a long story.", "Stop, please."), ("story.txt", "stopped.txt"), interrupt_after_s=5.0),
    Scene("ben", ("How does a bicycle stay up?",), ("bicycle.txt",)),
)


def find_examples() -> Path:
    """The folder with `producer.py` and the texts.

    Raises:
        DemoError: it is not there.
    """
    for place in _PLACES:
        if (place / "producer.py").is_file():
            return place
    raise DemoError("the demo plays examples/producer.py, which is not here: run it in a clone of the repository")
