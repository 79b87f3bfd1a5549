"""Which rows come together in a step: a pure function of seed and step, so that every worker, and a replay, draws alike."""

import numpy as np


class Members:
    """Rows of each ID: `rows` sorted by label, `offsets[u]:offsets[u + 1]` those of label u."""

    def __init__(self, labels: np.ndarray) -> None:
        self.rows = np.argsort(labels, kind="stable")
        self.offsets = np.searchsorted(labels[self.rows], np.arange(labels.max() + 2))
        self.several = np.flatnonzero(np.diff(self.offsets) > 1)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def draw(self, label: int, count: int, random: np.random.Generator) -> np.ndarray:
        """`count` rows of one label, different ones as long as there are enough."""
        rows = self.rows[self.offsets[label] : self.offsets[label + 1]]
        return random.permutation(rows)[:count] if len(rows) >= count else random.choice(rows, count)


def batch(
    members: Members,
    *,
    seed: int,
    step: int,
    size: int,
    per_id: int = 2,
    neighbours: np.ndarray | None = None,
    similar: float = 0.0,
    group: int = 4,
) -> np.ndarray:
    """`size` rows of size / per_id IDs for one global step.

    A share `similar` of the IDs comes in groups of `group` that are near one another by `neighbours` (U, k), because telling
    siblings apart is what a batch should be about (METHOD.md section 2, stage 3); the rest is uniform over IDs.
    """
    random = np.random.default_rng((seed, step))
    wanted = size // per_id
    chosen: list[int] = []
    if neighbours is not None and neighbours.shape[1]:
        while len(chosen) < similar * wanted:
            first = int(random.integers(len(members)))
            near = random.permutation(neighbours[first])[: group - 1]
            chosen += [first, *map(int, near)]
    chosen += map(int, random.integers(len(members), size=4 * wanted))  # enough to be distinct, at a cost that ignores U
    ids = list(dict.fromkeys(chosen))[:wanted]
    while len(ids) < wanted:  # fewer IDs than places: go round again
        ids += ids[: wanted - len(ids)]
    return np.concatenate([members.draw(u, per_id, random) for u in ids])


def share(rows: np.ndarray, rank: int, world: int, per_id: int) -> np.ndarray:
    """This worker's equal share; rows of one ID stay together, siblings are dealt over the workers."""
    return rows.reshape(-1, per_id)[rank::world].reshape(-1)
