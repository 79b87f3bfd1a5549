"""The peer of text search: TF-IDF of character n-grams within words, by cosine."""

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np


def grams(text: str, shortest: int = 3, longest: int = 5) -> Iterator[str]:
    """Character n-grams of each word, its ends marked (what scikit-learn calls char_wb)."""
    for word in text.lower().split():
        marked = f" {word} "
        for length in range(shortest, longest + 1):
            yield from (marked[i : i + length] for i in range(len(marked) - length + 1))


def scores(documents: Sequence[str], queries: Sequence[str]) -> np.ndarray:
    """(queries, documents) cosines, with smoothed inverse document frequencies of the documents."""
    frequency = Counter(gram for document in documents for gram in set(grams(document)))
    place = {gram: i for i, gram in enumerate(frequency)}
    idf = np.log((1 + len(documents)) / (1 + np.array(list(frequency.values())))) + 1

    def vectors(texts: Sequence[str]) -> np.ndarray:
        counts = np.zeros((len(texts), len(place)))
        for i, text in enumerate(texts):
            for gram in grams(text):
                if gram in place:
                    counts[i, place[gram]] += 1
        counts *= idf
        return counts / np.maximum(np.linalg.norm(counts, axis=1, keepdims=True), 1e-12)

    return vectors(queries) @ vectors(documents).T
