"""Merge what the shards found; pure."""

import heapq
from collections.abc import Sequence
from itertools import islice

from idem.types import Hit


def best_first(hit: Hit) -> tuple[float, str]:
    """Sort key: larger score first; ties go to the smaller item_id, so that answers do not depend on the sharding."""
    return -hit.score, hit.item_id


def merge(per_shard: Sequence[Sequence[Hit]], k: int) -> list[Hit]:
    """The k best of one query over all shards, best first. Each list comes sorted by `best_first`, as shards give it."""
    return list(islice(heapq.merge(*per_shard, key=best_first), k))
