"""Ray Data as this package uses it: one pure function over many pieces of work, each small to send and to answer. Wiring."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import ray.data

from idem import storage

ERRORS = {kind.__name__: kind for kind in (ValueError, OSError, storage.Unreachable)}  # the last that fits


def _kind(error: Exception) -> str:
    return [name for name, kind in ERRORS.items() if isinstance(error, kind)][-1]


def each(function: Callable[[str], str], work: Sequence[str]) -> Iterator[tuple[int, str]]:
    """Call `function` on every piece, on the cluster; (place of the piece, answer) as they come. Pieces and answers are JSON.

    A piece whose worker dies is given to another; so `function` must bear being called twice. A ValueError and an OSError of
    `function` (bad input, a store that cannot be reached, a full disk) come back as values and are raised as what they are.
    """
    if not work:
        return
    ray.data.DataContext.get_current().enable_progress_bars = False  # ours count records

    def call(row: dict[str, Any]) -> dict[str, Any]:
        try:
            return {"place": row["place"], "answer": function(row["work"]), "error": ""}
        except (ValueError, OSError) as error:
            return {"place": row["place"], "answer": " ".join(str(error).split()), "error": _kind(error)}

    rows = [{"place": place, "work": piece} for place, piece in enumerate(work)]
    for row in ray.data.from_items(rows, override_num_blocks=len(rows)).map(call).iter_rows():
        if row["error"]:
            raise ERRORS[row["error"]](row["answer"])
        yield int(row["place"]), str(row["answer"])
