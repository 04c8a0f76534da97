"""Everything that `/metrics` shows, on one screen. A registry for each worker: nothing here is shared by a process.

No label holds what others choose, such as a conversation's id: all of them are words of closed sets.
"""

from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info, ProcessCollector
from prometheus_client.exposition import choose_encoder

from schemas.commands import RejectReason
from schemas.events import (
    EVENT_TYPES,
    CommandRejected,
    Data,
    DiscardReason,
    EndReason,
    InterruptDone,
    SessionEnded,
    SessionFailed,
    SessionFailure,
    SessionReady,
    SpeechAccepted,
    SpeechDiscarded,
    SpeechFailed,
    SpeechFailure,
)
from worker.core.model import CallResult
from worker.core.verdict import Conclusion

_CALL_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0)
_SPEECH_S = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_FIRST_WORDS_S = (0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.08, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0)
_INTERRUPT_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)

_ENDS: dict[type[Data], Iterable[str]] = {
    SpeechAccepted: ("",),
    SpeechDiscarded: DiscardReason,
    SpeechFailed: SpeechFailure,
    CommandRejected: RejectReason,
    InterruptDone: ("",),
    SessionReady: ("",),
    SessionEnded: (EndReason.REQUESTED,),
    SessionFailed: SessionFailure,
}
"""Every word that a command can end as: shown from the start, so that the first one is seen as an increase."""


class Metrics:
    """What one worker counts. Counters begin at 0 with the process; gauges are read when they are asked for."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"avatar_worker_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"avatar_worker_{name}", text, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(f"avatar_worker_{name}", text, labels, buckets=buckets, registry=registry)

        Info("avatar_worker_build", "What is running", registry=registry).info({"version": _version()})

        # Commands.
        self.ended = counter("commands_ended", "Commands by the event they ended with", "event", "reason")
        self.repeated = counter("commands_repeated", "Commands that came again and were told again as they had ended")
        self.latency = histogram("speech_latency_seconds", "Age of a piece's oldest chunk when it was taken", _SPEECH_S)
        self.first_words = histogram(
            "first_words_seconds", "From the chunk that decided a turn's first piece to its call", _FIRST_WORDS_S
        )
        self.interrupts = histogram("interrupt_latency_seconds", "Age of an interrupt when it had acted", _INTERRUPT_S)
        self.retries = counter("speech_retries", "Calls of say-text beyond the first, for pieces that have ended")
        self.duplicates = counter("possible_duplicates", "Pieces that were said again and may have been heard twice")
        self.disorders = counter("chunks_out_of_order", "Chunks whose seq does not follow that before it", "kind")
        self.in_hand = gauge("commands_in_hand", "Commands delivered and neither acknowledged nor kept in the store")
        self.kept = gauge("commands_kept", "Commands that wait in the store for a conversation served here")
        self.conversations = gauge("conversations_served", "Conversations that have something to do here")

        # The Avatar API.
        self.calls = counter("api_calls", "Calls of the Avatar API by what became of them", "route", "outcome")
        self.call_time = histogram("api_call_duration_seconds", "How long calls took", _CALL_S, "route")
        self.breaker_open = gauge("breaker_open", "1 while the Avatar API is taken to be down and calls are held")
        self.sessions = gauge("sessions_held", "Sessions that this worker keeps alive")

        # Broker and store.
        self.partitions = gauge("partitions_owned", "Partitions whose commands this worker gets")
        self.left = counter("partitions_left", "Partitions that went to another worker", "how")
        self.moved = counter("conversations_moved", "Conversations that the broker has moved to another partition")
        self.dropped = counter("events_dropped", "Events given up after EVENT_RETRY_S: a listener's queue is full")
        self.store_failures = counter("store_failures", "Times the store could not be reached")

        for data, reasons in _ENDS.items():
            for reason in reasons:
                self.ended.labels(EVENT_TYPES[data], reason)
        for kind in ("gap", "step_back"):
            self.disorders.labels(kind)
        for how in ("lost", "handed_over"):
            self.left.labels(how)

    def conclude(self, conclusion: Conclusion) -> None:
        """Something has ended, and was told and acknowledged. Which metrics that is, is a function of the word."""
        if conclusion.told:
            return
        if conclusion.again:
            self.repeated.inc(len(conclusion.entries))
            return
        data, ending, attempts = conclusion.event.data, len(conclusion.entries), 0
        match data:
            case SpeechAccepted():
                attempts = data.attempts
                self.latency.observe(data.latency_ms / 1000)
                self.duplicates.inc(data.possible_duplicate is True)
            case SpeechFailed() if conclusion.parked is not None:
                attempts = conclusion.parked.attempts
            case InterruptDone():
                ending = 1  # its ordered copy may be still to come
                self.interrupts.observe(data.latency_ms / 1000)
        self.retries.inc(max(0, attempts - 1))
        if ending:
            self.ended.labels(conclusion.event.type, getattr(data, "reason", "")).inc(ending)

    def call(self, route: str, result: CallResult, seconds: float) -> None:
        """One call of the Avatar API is over."""
        self.calls.labels(route, result.kind).inc()
        self.call_time.labels(route).observe(seconds)

    def exposition(self, accept: str) -> tuple[bytes, str]:
        """All of it as text, and its content type: OpenMetrics where the `Accept` header asks for that."""
        encode, content_type = choose_encoder(accept)
        return encode(self.registry), content_type


def _version() -> str:
    try:
        return version("avatar-worker")
    except PackageNotFoundError:  # run from a checkout that is not installed
        return "unknown"
