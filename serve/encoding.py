"""Embeds the rows of a table batch by batch; rows that cannot be embedded are set aside and counted, never fatal."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from tqdm import tqdm

from idem import images
from serve.tables import Rows

Fields = Literal["image", "text", "both", "image_or_text"]  # the last: the text only where there is no picture


# encoded pictures and texts, either of them None as a whole, to vectors (n, d): train.embedder.Embedder.encode and its trivial twin
Encode = Callable[[Sequence[bytes | None] | None, Sequence[str] | None], np.ndarray]


def _usable(picture: bytes | None, text: str, fields: Fields) -> str:
    """Why an item cannot be embedded by `fields`, or ""."""
    if fields == "text":
        return "" if text.strip() else "text_empty"
    if not picture:
        return "" if fields in ("both", "image_or_text") and text.strip() else "image_missing"
    try:
        images.decode(picture)
    except images.ImageError as error:
        return error.reason
    return ""


def encode_batch(encode: Encode, pictures: Sequence[bytes | None], texts: Sequence[str], fields: Fields) -> tuple[np.ndarray, list[str]]:
    """Vectors (m, d) of the usable items and, for each item, why it was set aside ("" for the usable ones)."""
    reasons = [_usable(picture, text, fields) for picture, text in zip(pictures, texts, strict=True)]
    good = [i for i, reason in enumerate(reasons) if not reason]
    if not good:
        return np.zeros((0, 0), np.float32), reasons
    return encode(*_read([pictures[i] for i in good], [texts[i] for i in good], fields)), reasons


def _read(pictures: list[bytes | None], texts: list[str], fields: Fields) -> tuple[list[bytes | None] | None, list[str] | None]:
    """What the model is given of items by `fields`."""
    if fields == "image_or_text":
        texts = ["" if picture else text for picture, text in zip(pictures, texts, strict=True)]
    return None if fields == "text" else pictures, None if fields == "image" else texts


def encode_rows(encode: Encode, rows: Rows, fields: Fields, what: str) -> tuple[Rows, np.ndarray, Counter[str]]:
    """The rows that could be embedded, their vectors (n, d) float32, and how many were set aside for which reason.

    ValueError where none could.
    """
    kept: list[np.ndarray] = []
    vectors: list[np.ndarray] = []
    aside: Counter[str] = Counter()
    with tqdm(total=len(rows), desc=f"embed {what}", unit="row", mininterval=0.5) as bar:
        for places, pictures in rows.batches(pictures=fields != "text"):
            made, reasons = encode_batch(encode, pictures, list(rows.texts[places]), fields)
            good = np.array([not reason for reason in reasons])
            if good.any():
                kept.append(places[good])
                vectors.append(made)
            aside.update(reason for reason in reasons if reason)
            bar.update(len(places))
    if not kept:
        said = ", ".join(f"{count} {reason}" for reason, count in aside.items())
        raise ValueError(f"none of the {len(rows):,} rows of {rows.path} can be embedded by {fields}: {said}")
    return rows.keep(np.concatenate(kept)), np.concatenate(vectors), aside
