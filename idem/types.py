"""Values that cross stages."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """What a user asks with: a picture (encoded bytes), a text, or both."""

    image: bytes | None = None
    text: str = ""

    def __post_init__(self) -> None:
        if not self.image and not self.text.strip():
            raise ValueError("a query needs an image, a text, or both; found neither")


@dataclass(frozen=True, slots=True, kw_only=True)
class Hit:
    """One item found, with what is known of it without its picture. `score` is a cosine."""

    item_id: str
    product_id: str
    family_id: str
    category: str
    title: str
    score: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """A candidate as a reranker sees it; `score` is the retrieval's cosine."""

    item_id: str
    text: str
    image: bytes | None
    score: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """A reranker's verdict over N documents.

    order: a permutation of range(N), best first.
    relevance: for each document, in input order, the probability of level 0 (the very same product).
    null: for each document, in input order, the margin of its local score over NULL (above zero: preferred to NULL).
    degraded: nothing could be judged, because time ran out or the model gives no numbers: the order is retrieval's, and relevance
    and null are NaN.
    """

    order: tuple[int, ...]
    relevance: tuple[float, ...]
    null: tuple[float, ...]
    degraded: bool = False
