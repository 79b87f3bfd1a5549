"""A few rejects of every reason, read from fragments whether they are committed or not."""

from collections import Counter
from collections.abc import Mapping, Sequence

from lance.file import LanceFileReader

from idem import storage
from pipelines import table
from pipelines.report import Example

EACH = 6  # of a reason


def _chosen(reasons: Sequence[str], wanted: Mapping[str, int], found: Counter[str]) -> list[int]:
    """Rows that show a wanted reason which is not shown EACH times yet."""
    rows = []
    for row, reason in enumerate(reasons):
        if reason in wanted and found[reason] < EACH:
            found[reason] += 1
            rows.append(row)
    return rows


def read(uri: str, fragments: Sequence[str], by_reason: Mapping[str, int]) -> list[Example]:
    """Up to EACH of every reason in `by_reason`; reads no more files than that takes."""
    found: Counter[str] = Counter()
    shown: list[Example] = []
    options = storage.lance_options(uri)
    for path in [path for text in fragments for path in sorted(table.files_of([text]))]:
        if all(found[reason] >= min(EACH, count) for reason, count in by_reason.items()):
            break
        file = storage.join(uri, path)
        reasons = LanceFileReader(file, options, columns=["reason"]).read_all().to_table().column("reason").to_pylist()
        if rows := _chosen(reasons, by_reason, found):
            taken = LanceFileReader(file, options).take_rows(rows).to_table()
            shown += [Example(**{name: row[name] for name in Example.__slots__}) for row in taken.to_pylist()]
    return shown
