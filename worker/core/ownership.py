"""Who should have which partition: every worker computes the same ranking, without knowing the others."""

import hashlib

_RANGE = 2**31 - 1


def score(worker: str, partition: int) -> int:
    """The rendezvous score of a worker for a partition, 0 … 2³¹-2: the highest of those present should have it."""
    digest = hashlib.blake2b(f"{worker}\n{partition}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % _RANGE
