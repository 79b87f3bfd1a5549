"""The rows that a training run learns from: pictures fetched when they are first needed, decoded once as long as they fit."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from idem import images as pictures


@dataclass
class Corpus:
    """Training rows: encoded pictures fetched by position, titles, and a label 0..U-1 each; and a held-back slice."""

    fetch: Callable[[np.ndarray], Sequence[bytes | None]]
    titles: Sequence[str]
    has_image: np.ndarray
    labels: np.ndarray
    held_fetch: Callable[[], tuple[Sequence[bytes | None], np.ndarray]] | None = None
    cache_bytes: int = 2 << 30
    _cache: dict[int, np.ndarray] = field(default_factory=dict)

    def pixels(self, rows: np.ndarray, side: int) -> np.ndarray:
        """(n, side, side, 3) uint8, decoded once as long as the cache holds."""
        missing = [int(r) for r in dict.fromkeys(rows.tolist()) if r not in self._cache]
        fresh: dict[int, np.ndarray] = {}
        if missing:
            data = self.fetch(np.array(missing))
            fresh = {r: pictures.pixels(d, side) for r, d in zip(missing, data, strict=True) if d}
            room = self.cache_bytes // (side * side * 3) - len(self._cache)
            self._cache.update(list(fresh.items())[: max(room, 0)])
        return np.stack([self._cache[r] if r in self._cache else fresh[r] for r in rows.tolist()])
