"""Which families of the training products a model may learn from (METHOD.md section 7).

Neither queries nor gallery of reranker training may hold products the embedder has learnt: families are dealt into
three folds by a hash of their name, so that every job deals alike without a table between them.
"""

import hashlib
from collections.abc import Iterable

import numpy as np

FOLDS = ("embedder", "rerank", "calibrate")
RERANKER_FOLDS = FOLDS[1:]  # whose products the embedder has not learnt


def uniform(name: str, salt: str) -> float:
    """A number in [0, 1) that depends on the name and the salt alone."""
    return int.from_bytes(hashlib.blake2b(f"{salt}/{name}".encode(), digest_size=8).digest()) / 2**64


def fold(family_id: str, fractions: tuple[float, float, float]) -> str:
    """The fold of one family. `fractions` are the shares of embedder, rerank and calibrate; they sum to 1."""
    u = uniform(family_id, "fold")
    return FOLDS[0] if u < fractions[0] else FOLDS[1] if u < fractions[0] + fractions[1] else FOLDS[2]


def folds(family_ids: Iterable[str], fractions: tuple[float, float, float]) -> np.ndarray:
    """The folds of many families, as an array of str."""
    known: dict[str, str] = {}
    return np.array([known.setdefault(f, fold(f, fractions)) if f not in known else known[f] for f in family_ids], dtype="<U9")
