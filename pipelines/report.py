"""What an ingest tells at its end, as aligned text for the terminal; the same as a page is pipelines.report_page. Pure, no Ray.

What comes from strangers is cut and made visible before it is shown.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SLOWEST = 10
NAMES = 20
SHORT, MESSAGE = 160, 400  # characters
REASONS = 40  # told one by one


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceTime:
    """One source file: the rows and bytes read of it, and the seconds that workers spent on them."""

    name: str
    rows: int
    bytes: int
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One reject, as in schema.REJECTS."""

    reason: str
    message: str
    source_file: str
    source_row: int
    item_id: str | None
    original: bytes | None
    record: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Some of the records read: `key` names what became of them, `label` tells it."""

    key: str
    label: str
    count: int


PARTS = {
    "inserted": "new items",
    "updated": "updated items",
    "committed": "items",
    "unchanged": "unchanged",
    "deleted": "deleted",
    "rejected": "set aside",
    "unaccounted": "unaccounted for",
}


def parts(figures: Mapping[str, Any]) -> list[Part]:
    """What became of the records read; the counts add up to `rows`, with a part of its own for what is unaccounted for.

    New and replaced items are told apart where both counts are known and make up all that was committed.
    """
    counts = {key: int(figures.get(key) or 0) for key in PARTS}
    if counts["inserted"] + counts["updated"] == counts["committed"]:
        counts["committed"] = 0
    else:
        counts["inserted"] = counts["updated"] = 0
    counts["unaccounted"] = max(0, int(figures.get("rows") or 0) - sum(counts.values()))
    return [Part(key=key, label=PARTS[key], count=count) for key, count in counts.items() if count]


def share(count: float, total: float) -> str:
    """A percentage that says 0 and 100 only where it is that."""
    if not total or not count:
        return "0 %"
    percent = 100 * count / total
    if count == total:
        return "100 %"
    if percent < 0.01:
        return "< 0.01 %"
    if 99.99 < percent < 100:
        return "> 99.99 %"
    return f"{percent:.2f} %" if percent < 1 or percent > 99 else f"{percent:.1f} %"


def size(count: float) -> str:
    """Bytes for people, in powers of ten."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.{1 if count >= 10 * factor else 2}f} {unit}"
    return f"{count:,.0f} bytes"


def number(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def seconds(count: float) -> str:
    if count < 120:
        return f"{count:.1f} s"
    minutes, rest = divmod(round(count), 60)
    return f"{minutes} min {rest} s" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def visible(text: str, limit: int) -> str:
    """At most `limit` characters of `text`, and none that moves, hides or breaks others: controls, bidi marks, lone surrogates."""
    cut = text if len(text) <= limit else text[: limit - 1] + "…"
    return "".join(c if c.isprintable() else " " if c in "\r\n\t" else c.encode("unicode_escape").decode() for c in cut)


def tail(text: str) -> str:
    """Of a long path the end says more."""
    return visible(text if len(text) <= SHORT else "…" + text[-SHORT + 1 :], SHORT)


def plural(count: int, one: str) -> str:
    return f"{count:,} {one}" if count == 1 else f"{count:,} {one}s"


def verdict(figures: Mapping[str, Any]) -> str:
    """One sentence: how many records became items, where those are, and how many were set aside."""
    rows, rejected = int(figures.get("rows") or 0), int(figures.get("rejected") or 0)
    version = figures.get("version")
    stands = f"version {version}" if version is not None else "no version"
    if figures.get("skipped") is True:
        return f"Nothing to do: this source was ingested before, and {stands} holds it."
    if not rows:
        skipped = int(figures.get("files_skipped") or 0)
        return f"No record was read: {plural(skipped, 'file')} unchanged, {stands} stands." if skipped else "No record was read."
    if figures.get("error"):
        return f"Nothing was published: {rejected:,} of {plural(rows, 'record')} ({share(rejected, rows)}) cannot be used."
    if rejected >= rows:
        return f"None of the {plural(rows, 'record')} can be used; each was set aside with a reason."
    kept = f"{rows:,}" if not rejected else f"{rows - rejected:,} of {rows:,}"
    said = f"{kept} records were accepted" + (f" (version {version})" if version is not None else "")
    reasons = len(figures.get("by_reason") or ())
    aside = f"{rejected:,} ({share(rejected, rows)}) were set aside" + (f" for {plural(reasons, 'reason')}" if reasons else "")
    return f"{said}; {aside}." if rejected else f"All {said}."


def _speed(figures: Mapping[str, Any]) -> list[str]:
    told = [f"{number(figures['rows_per_s'])} records/s"] if figures.get("rows_per_s") else []
    told += [f"{number(figures['mb_per_s'])} MB/s"] if figures.get("mb_per_s") else []
    return told + ([seconds(figures["seconds"])] if figures.get("seconds") is not None else [])


def _memory(figures: Mapping[str, Any]) -> list[str]:
    told = [f"{figures['peak_mb'] / 1024:.2f} GiB all processes"] if figures.get("peak_mb") else []
    return told + ([f"{figures['worker_peak_mb'] / 1024:.2f} GiB the largest worker"] if figures.get("worker_peak_mb") else [])


def files_told(figures: Mapping[str, Any]) -> list[str]:
    told = [plural(figures["files_read"], "file")] if figures.get("files_read") is not None else []
    told += [f"{figures['files_skipped']:,} skipped as unchanged"] if figures.get("files_skipped") else []
    told += [f"{size(figures['bytes_read'])} read"] if figures.get("bytes_read") else []
    return told + ([f"{size(figures['bytes_written'])} written"] if figures.get("bytes_written") else [])


FLAGS = {
    "duplicates": ("exact duplicates", "same picture and title as an earlier item; kept and flagged (duplicate_of)"),
    "near_duplicates": ("near-duplicates", "the picture looks like that of an earlier item; kept and flagged (near_duplicate_of)"),
    "conflicting_ids": ("conflicting ids", "one item id with different content; the highest version holds, else the last"),
    "split_conflicts": ("split conflicts", "products given more than one id_split; none of them is trained on"),
    "families_in_both_splits": ("families in both splits", "as given: a sibling in training makes an unseen product familiar"),
}
CATALOGUE = {  # of the records that this run read
    "products": "products",
    "products_train": "products to train on",
    "products_unseen": "products held back as unseen",
    "families": "families",
    "images": "pictures",
}


def by_reason(figures: Mapping[str, Any]) -> list[tuple[str, int]]:
    return sorted((figures.get("by_reason") or {}).items(), key=lambda pair: (-pair[1], pair[0]))


def slowest(sources: Sequence[SourceTime]) -> list[SourceTime]:
    """Where the workers' time went: the files with most seconds, at most SLOWEST."""
    return sorted(sources, key=lambda s: (-s.seconds, s.name))[:SLOWEST]


def rate(source: SourceTime) -> float:
    return source.rows / source.seconds if source.seconds else 0.0


def _aligned(rows: Iterable[tuple[str, ...]], right: Sequence[int], before: str = "") -> Iterator[str]:
    """Lines of cells, columns aligned; those of `right` at their right end."""
    held = list(rows)
    widths = [max(map(len, column)) for column in zip(*held, strict=True)]
    for row in held:
        cells = [cell.rjust(w) if i in right else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
        yield (before + "  ".join(cells)).rstrip()


def _counts(figures: Mapping[str, Any]) -> list[tuple[str, ...]]:
    rows = int(figures.get("rows") or 0)
    told = [("read", f"{rows:,}", "")]
    told += [(f"  {part.label}", f"{part.count:,}", share(part.count, rows)) for part in parts(figures)]
    reasons = by_reason(figures)
    told += [(f"    {visible(name, 60)}", f"{count:,}", share(count, rows)) for name, count in reasons[:REASONS]]
    if rest := reasons[REASONS:]:
        told.append((f"    {plural(len(rest), 'other reason')}", f"{sum(n for _, n in rest):,}", ""))
    return told


def names(names: Sequence[str]) -> str:
    told = ", ".join(map(tail, names[:NAMES]))
    return told + (f" and {len(names) - NAMES:,} more" if len(names) > NAMES else "")


def table(figures: Mapping[str, Any], sources: Sequence[SourceTime]) -> str:
    """The figures of an ingest as aligned text; what is missing among them is left out."""
    lines = [verdict(figures), *([visible(str(figures["error"]), MESSAGE)] if figures.get("error") else ()), ""]
    lines += _aligned(_counts(figures), right=(1, 2)) if figures.get("rows") else ()
    facts = {
        "files": files_told(figures),
        "flagged": [f"{figures[key]:,} {FLAGS[key][0]}" for key in FLAGS if figures.get(key)],
        "products": [f"{figures[key]:,} {label}" for key, label in CATALOGUE.items() if figures.get(key) is not None],
        "catalogue": [f"{plural(figures['items'], 'item')} now"] if figures.get("items") is not None else [],
        "speed": _speed(figures),
        "memory": _memory(figures),
        "not read": [names(figures["not_read"])] if figures.get("not_read") else [],
    }
    said = [(name, ", ".join(told)) for name, told in facts.items() if told]
    lines += _aligned(said, right=()) if said else ()
    if len(sources) > 1:
        rows = [(tail(s.name), f"{s.rows:,} rows", seconds(s.seconds), *rates(s)) for s in slowest(sources)]
        lines += ["most time", *_aligned(rows, right=(1, 2, 3, 4), before="  ")]
    return "\n".join(lines)


def rates(source: SourceTime) -> tuple[str, str]:
    if not source.seconds:
        return "-", "-"
    return f"{number(rate(source))} rows/s", f"{number(source.bytes / source.seconds / 1e6)} MB/s"
