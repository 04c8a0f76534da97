"""What a worker's metrics say."""

from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

Sample = tuple[str, tuple[tuple[str, str], ...]]


def value(registry: CollectorRegistry, name: str, **labels: str) -> float:
    """Of one metric of ours, by its name as Prometheus has it; it must be there."""
    found = registry.get_sample_value(f"avatar_worker_{name}", labels)
    assert found is not None, f"{name} {labels} is not shown"
    return found


def samples(text: str) -> dict[Sample, float]:
    """All of an exposition, by name and labels."""
    return {
        (one.name, tuple(sorted(one.labels.items()))): one.value
        for family in text_string_to_metric_families(text)
        for one in family.samples
    }
