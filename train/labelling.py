"""Which ID each training row is taken for, and how much it counts: what curation may change in the course of a run."""

import hashlib
import json
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from train import plan

PART = "#part-"  # between a product and a number, in the name of a prototype that is only a part of it
TOGETHER = 1 << 16  # texts that are hashed at a time


def fingerprint(labels: np.ndarray, weights: np.ndarray, names: Sequence[str], item_ids: Sequence[str] | np.ndarray) -> str:
    """Which rows a run learns from, in their order, and as what: SHA-256 of the labels and weights (n,) that were given, the names (U,)
    of the labels and the items' ids (n,), where they are known."""
    digest = hashlib.sha256()
    digest.update(np.ascontiguousarray(labels, np.int64).data)
    digest.update(np.ascontiguousarray(weights, np.float32).data)
    for texts in (names, item_ids):
        digest.update(len(texts).to_bytes(8, "little"))
        for start in range(0, len(texts), TOGETHER):
            digest.update(json.dumps([str(text) for text in texts[start : start + TOGETHER]]).encode())
    return digest.hexdigest()


def mapping(old: Sequence[str], new: Sequence[str]) -> np.ndarray:
    """(U_new,): the old row of each new prototype by its name, -1 for a new one.

    A prototype split off from a product ("mug#part-1") goes on from the product's row, where it has none itself. One that was
    merged into another is not asked for any more.
    """
    rows = {name: row for row, name in enumerate(old)}
    return np.array([rows.get(name, rows.get(name.rpartition(PART)[0], -1)) for name in new], np.int64)


class Labelling:
    """`labels` (n,) in 0..U-1 and `weights` (n,) of 0 (left out) or more, `given_labels` and `given` those at the start;
    `members` are the rows of each ID that count.

    In the warm-up a row counts or does not: how much is for the centroids and the margin stage alone, since InfoNCE
    (`train.losses.info_nce`) takes no weights.
    ValueError for a label outside 0..U-1 and for an ID of which no row is left.
    """

    def __init__(self, labels: np.ndarray, ids: int, weights: np.ndarray | None = None) -> None:
        self.ids = ids
        self.given = np.ones(len(labels), np.float32) if weights is None else weights.astype(np.float32)
        self.given_labels = labels.astype(np.int64)
        self.set(labels, self.given)
        self.changed = False

    def set(self, labels: np.ndarray, weights: np.ndarray) -> None:
        """Change all at once; it is part of every later checkpoint."""
        if len(bad := np.flatnonzero((labels < 0) | (labels >= self.ids))):
            raise ValueError(f"row {bad[0]} has the label {labels[bad[0]]}; allowed are 0..{self.ids - 1} ({len(bad)} such rows)")
        kept = np.flatnonzero(weights > 0)
        if len(empty := np.setdiff1d(np.arange(self.ids), labels[kept])):
            raise ValueError(f"no row is left of ID {empty[0]} ({len(empty)} such IDs of {self.ids}); each needs one that counts")
        self.labels, self.weights, self.changed = labels.astype(np.int64), weights.astype(np.float32), True
        self.members = plan.Members(self.labels[kept])
        self.members.rows = kept[self.members.rows]
        self.weighted = bool((self.weights[kept] != 1).any())

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint has to know: nothing as long as nothing was changed."""
        if not self.changed:
            return {}
        return {"labels": torch.from_numpy(self.labels).clone(), "weights": torch.from_numpy(self.weights).clone()}
