"""What an ingest tells at its end: aligned text for the terminal, and one HTML page with rejects as pictures. Pure, no Ray.

Everything shown comes from strangers: texts are cut, made visible and escaped, pictures are drawn anew as small JPEGs, and
the page has an upper size. It needs nothing outside of itself, no script either.
"""

import base64
import html
import io
import itertools
import json
import statistics
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from idem import images

THUMB = 176  # pixels, the longer side
DECODED = 2_000_000  # pixels held at once for a thumbnail; what would need more is not drawn
SCALED = 8_000_000  # pixels of a JPEG that is scaled while it is read: with many scans all its coefficients are held, 6 bytes a pixel
LOOKED_AT = 16_000_000  # bytes of a picture; its walk copies them
MISSING = "#9aa2ac"  # drawn where a picture ends too soon
EXAMPLES = 6  # of each reason
REASONS = 40
SLOWEST = 10
NAMES = 20
CARDS_BYTES = 2_200_000  # of all examples together
SHORT, MESSAGE, RECORD, ALL_FIGURES = 160, 400, 600, 40_000  # characters


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


def _tail(text: str) -> str:
    """Of a long path the end says more."""
    return visible(text if len(text) <= SHORT else "…" + text[-SHORT + 1 :], SHORT)


def _plural(count: int, one: str) -> str:
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
        return f"No record was read: {_plural(skipped, 'file')} unchanged, {stands} stands." if skipped else "No record was read."
    if figures.get("error"):
        return f"Nothing was published: {rejected:,} of {_plural(rows, 'record')} ({share(rejected, rows)}) cannot be used."
    if rejected >= rows:
        return f"None of the {_plural(rows, 'record')} can be used; each was set aside with a reason."
    kept = f"{rows:,}" if not rejected else f"{rows - rejected:,} of {rows:,}"
    said = f"{kept} records were accepted" + (f" (version {version})" if version is not None else "")
    reasons = len(figures.get("by_reason") or ())
    aside = f"{rejected:,} ({share(rejected, rows)}) were set aside" + (f" for {_plural(reasons, 'reason')}" if reasons else "")
    return f"{said}; {aside}." if rejected else f"All {said}."


def _speed(figures: Mapping[str, Any]) -> list[str]:
    told = [f"{number(figures['rows_per_s'])} records/s"] if figures.get("rows_per_s") else []
    told += [f"{number(figures['mb_per_s'])} MB/s"] if figures.get("mb_per_s") else []
    return told + ([seconds(figures["seconds"])] if figures.get("seconds") is not None else [])


def _memory(figures: Mapping[str, Any]) -> list[str]:
    told = [f"{figures['peak_mb'] / 1024:.2f} GiB all processes"] if figures.get("peak_mb") else []
    return told + ([f"{figures['worker_peak_mb'] / 1024:.2f} GiB the largest worker"] if figures.get("worker_peak_mb") else [])


def _read(figures: Mapping[str, Any]) -> list[str]:
    told = [_plural(figures["files_read"], "file")] if figures.get("files_read") is not None else []
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


def _by_reason(figures: Mapping[str, Any]) -> list[tuple[str, int]]:
    return sorted((figures.get("by_reason") or {}).items(), key=lambda pair: (-pair[1], pair[0]))


def slowest(sources: Sequence[SourceTime]) -> list[SourceTime]:
    """Where the workers' time went: the files with most seconds, at most SLOWEST."""
    return sorted(sources, key=lambda s: (-s.seconds, s.name))[:SLOWEST]


def _rate(source: SourceTime) -> float:
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
    reasons = _by_reason(figures)
    told += [(f"    {visible(name, 60)}", f"{count:,}", share(count, rows)) for name, count in reasons[:REASONS]]
    if rest := reasons[REASONS:]:
        told.append((f"    {_plural(len(rest), 'other reason')}", f"{sum(n for _, n in rest):,}", ""))
    return told


def _names(names: Sequence[str]) -> str:
    told = ", ".join(map(_tail, names[:NAMES]))
    return told + (f" and {len(names) - NAMES:,} more" if len(names) > NAMES else "")


def table(figures: Mapping[str, Any], sources: Sequence[SourceTime]) -> str:
    """The figures of an ingest as aligned text; what is missing among them is left out."""
    lines = [verdict(figures), *([visible(str(figures["error"]), MESSAGE)] if figures.get("error") else ()), ""]
    lines += _aligned(_counts(figures), right=(1, 2)) if figures.get("rows") else ()
    facts = {
        "files": _read(figures),
        "flagged": [f"{figures[key]:,} {FLAGS[key][0]}" for key in FLAGS if figures.get(key)],
        "products": [f"{figures[key]:,} {label}" for key, label in CATALOGUE.items() if figures.get(key) is not None],
        "catalogue": [f"{_plural(figures['items'], 'item')} now"] if figures.get("items") is not None else [],
        "speed": _speed(figures),
        "memory": _memory(figures),
        "not read": [_names(figures["not_read"])] if figures.get("not_read") else [],
    }
    said = [(name, ", ".join(told)) for name, told in facts.items() if told]
    lines += _aligned(said, right=()) if said else ()
    if len(sources) > 1:
        rows = [(_tail(s.name), f"{s.rows:,} rows", seconds(s.seconds), *_rates(s)) for s in slowest(sources)]
        lines += ["most time", *_aligned(rows, right=(1, 2, 3, 4), before="  ")]
    return "\n".join(lines)


def _rates(source: SourceTime) -> tuple[str, str]:
    if not source.seconds:
        return "-", "-"
    return f"{number(_rate(source))} rows/s", f"{number(source.bytes / source.seconds / 1e6)} MB/s"


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What can be shown of a picture: a data: URL or none, and what it is."""

    url: str | None
    told: str


def _drawn(image: Image.Image) -> str:
    image.thumbnail((THUMB, THUMB))
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()


def _as_far_as_it_goes(image: Image.Image) -> tuple[Image.Image, bool]:
    """Decode, grey where the bytes end too soon, and whether all of it was there. Pillow's own switch for this is one for all threads."""
    try:
        image.load()
        return image, True
    except Exception:
        image.tile = []  # pyright: ignore[reportAttributeAccessIssue]  # what was decoded so far is the picture
        box = image.getbbox()
        if not box:
            raise
    part = image.convert("RGB")
    part.paste(MISSING, (0, box[3], image.width, image.height))
    return part, False


def look(original: bytes | None) -> Seen:
    """A thumbnail of whatever can be decoded; never holds more than DECODED pixels, and nothing of `original` itself is embedded."""
    if not original:
        return Seen(url=None, told="no picture" if original is None else "a picture of 0 bytes")
    told = size(len(original))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, on what is known to be bad
        try:
            container = images.examine(original, max_bytes=LOOKED_AT)
            told = f"{container.format} {container.size[0]:,} x {container.size[1]:,}, {told}"
            image = images.open_container(container)
            small = image.width * image.height <= (SCALED if container.format == "JPEG" else DECODED)
            image.draft("RGB", (THUMB, THUMB))
            if not small or image.width * image.height > DECODED:
                return Seen(url=None, told=f"{told}; too large to draw")
            found, whole = _as_far_as_it_goes(image)
            return Seen(url=_drawn(images.render(found, container.orientation)), told=told if whole else f"{told}; decoded in part")
        except Exception:
            return Seen(url=None, told=f"{told}; not drawn")


def hexdump(data: bytes, rows: int = 8, across: int = 8) -> str:
    """The first bytes in hexadecimal, with what of them is printable ASCII beside it."""
    lines = (data[start : start + across] for start in range(0, min(len(data), rows * across), across))
    return "\n".join(f"{line.hex(' ').ljust(across * 3)} {''.join(chr(b) if 32 <= b < 127 else '.' for b in line)}" for line in lines)


def _text(value: object, limit: int = SHORT) -> str:
    return html.escape(visible(str(value), limit))


def _card(example: Example) -> str:
    seen = look(example.original)
    if seen.url:
        shot = f'<img alt="the rejected picture" src="{seen.url}">'
    else:
        shot = f'<pre class="tile">{html.escape(hexdump(example.original)) if example.original else "nothing to see"}</pre>'
    item = f"<code><bdi>{_text(example.item_id)}</bdi></code>" if example.item_id else '<span class="none">no item id</span>'
    return (
        f'<figure class="card"><div class="shot">{shot}</div><figcaption><small>{_text(seen.told)}</small>'
        f'<div class="where"><bdi>{html.escape(_tail(example.source_file))}</bdi>:{example.source_row}</div>{item}'
        f"<p><bdi>{_text(example.message, MESSAGE)}</bdi></p>"
        f"<details><summary>the other columns</summary><pre>{_text(example.record, RECORD)}</pre></details></figcaption></figure>"
    )


def _cards(reasons: Sequence[str], examples: Sequence[Example]) -> dict[str, list[str]]:
    """EXAMPLES cards of each reason, the first of every reason before the second of any, until CARDS_BYTES are spent."""
    by: dict[str, list[Example]] = {reason: [] for reason in reasons}
    for example in examples:
        if len(by.get(example.reason, range(EXAMPLES))) < EXAMPLES:
            by[example.reason].append(example)
    cards: dict[str, list[str]] = {reason: [] for reason in reasons}
    left = CARDS_BYTES
    for example in itertools.chain(*itertools.zip_longest(*by.values())):
        if example is None:
            continue
        card = _card(example)
        left -= len(card.encode())
        if left < 0:
            break
        cards[example.reason].append(card)
    return cards


def _explained(reason: str) -> str:
    """The reason in plain words, "" where nobody wrote them."""
    from pipelines import normalize

    return getattr(normalize, "REASONS", {}).get(reason, "")


def _rejects(figures: Mapping[str, Any], examples: Sequence[Example]) -> str:
    reasons = _by_reason(figures)
    if not reasons:
        return ""
    rows, rejected = int(figures.get("rows") or 0), sum(count for _, count in reasons)
    cards = _cards([name for name, _ in reasons[:REASONS]], examples)
    lines, blocks = [], []
    for number, (name, count) in enumerate(reasons[:REASONS]):
        words = f"<p>{_text(_explained(name), MESSAGE)}</p>"
        gauge = f'<span class="gauge" style="width:{max(0.5, 100 * count / rejected):.1f}%"></span>'
        lines.append(
            f'<tr><td><a href="#reason-{number}"><code>{_text(name)}</code></a></td><td>{count:,}</td><td>{share(count, rejected)}</td>'
            f'<td>{share(count, rows)}</td><td class="long">{gauge}</td></tr>'
        )
        shown = f"{len(cards[name])} of {count:,}" if cards[name] else f"{count:,}, none shown"
        grid = f'<div class="cards">{"".join(cards[name])}</div>' if cards[name] else ""
        blocks.append(f'<section id="reason-{number}"><h3><code>{_text(name)}</code> <small>{shown}</small></h3>{words}{grid}</section>')
    if rest := reasons[REASONS:]:
        lines.append(
            f"<tr><td>{_plural(len(rest), 'other reason')}</td><td>{sum(n for _, n in rest):,}</td><td></td><td></td><td></td></tr>"
        )
    return (
        "<h2>Set aside</h2><p>Each with its reason, its source and row, and what it takes to put it through again: "
        '<code>python -m pipelines.replay</code>.</p><div class="scroll"><table class="wide"><tr><th>reason</th><th>records</th>'
        f"<th>share</th><th>of all read</th><th></th></tr>{''.join(lines)}</table></div>{''.join(blocks)}"
    )


def _bar(figures: Mapping[str, Any]) -> str:
    found, rows = parts(figures), int(figures.get("rows") or 0)
    if not found:
        return ""
    told = "; ".join(f"{part.label} {part.count:,}" for part in found)
    blocks = "".join(f'<span class="{part.key}" style="flex-grow:{part.count}"></span>' for part in found)
    lines = "".join(
        f'<tr><td><i class="{part.key}"></i>{part.label}</td><td>{part.count:,}</td><td>{share(part.count, rows)}</td></tr>'
        for part in found
    )
    total = sum(part.count for part in found)
    if total != rows:
        lines += f'<tr><td colspan="3"><b>The books do not balance: these are {total:,} of {rows:,} records read.</b></td></tr>'
    return (
        f'<h2>What became of the records</h2><div class="bar" role="img" aria-label="{told}">{blocks}</div>'
        f'<div class="scroll"><table>{lines}<tr class="total"><td>read</td><td>{rows:,}</td><td></td></tr></table></div>'
    )


def _facts(title: str, lines: Sequence[tuple[str, str, str]]) -> str:
    body = "".join(f'<tr><td>{name}</td><td>{value}</td><td class="note">{note}</td></tr>' for name, value, note in lines)
    return f'<h2>{title}</h2><div class="scroll"><table>{body}</table></div>' if lines else ""


def _slowest(sources: Sequence[SourceTime]) -> str:
    if not sources:
        return ""
    middle = statistics.median(map(_rate, sources))
    body = ""
    for source in slowest(sources):
        ratio = f"{_rate(source) / middle:.2f} x" if middle else "-"
        cells = (f"{source.rows:,}", size(source.bytes), seconds(source.seconds), *_rates(source), ratio)
        body += f"<tr><td><bdi>{html.escape(_tail(source.name))}</bdi></td>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
    head = "".join(f"<th>{name}</th>" for name in ("file", "rows", "bytes", "worker time", "rate", "", "of the median"))
    return (
        f"<h2>Slowest sources</h2><p>Where the workers' time went, of {_plural(len(sources), 'file')}; the last column compares a file's "
        f'rows a second with the median of all.</p><div class="scroll"><table class="wide"><tr>{head}</tr>{body}</table></div>'
    )


def _tiles(figures: Mapping[str, Any]) -> str:
    found = [
        (figures.get("rows"), "records read", lambda v: f"{v:,}"),
        (figures.get("items"), "items in the catalogue now", lambda v: f"{v:,}"),
        (figures.get("rows_per_s"), "records a second", number),
        (figures.get("mb_per_s"), "MB a second", number),
        (figures.get("seconds"), "wall time", seconds),
        (figures.get("peak_mb"), "peak memory, all processes", lambda v: f"{v / 1024:.2f} GiB"),
        (figures.get("worker_peak_mb"), "the largest worker", lambda v: f"{v / 1024:.2f} GiB"),
    ]
    tiles = "".join(f"<div><b>{told(value)}</b><small>{name}</small></div>" for value, name, told in found if value is not None)
    return f'<div class="tiles">{tiles}</div>' if tiles else ""


def _asked(figures: Mapping[str, Any]) -> str:
    told = [f"<code><bdi>{html.escape(_tail(str(figures['source'])))}</bdi></code>"] if figures.get("source") else []
    told += [f"run <code>{_text(figures['run'])}</code>"] if figures.get("run") else []
    told += [html.escape(said) for said in _read(figures)]
    left = f" Not read: {html.escape(_names(figures['not_read']))}." if figures.get("not_read") else ""
    error = f'<p class="error"><bdi>{_text(figures["error"], MESSAGE)}</bdi></p>' if figures.get("error") else ""
    return error + (f"<p>{', '.join(told)}.{left}</p>" if told or left else "")


STYLE = """
:root { color-scheme: light dark; --ink: #16191d; --soft: #5d6671; --line: #e3e6ea; --paper: #fff; --wash: #f4f5f7; --accent: #1f5fd6;
  --new: #0b7a4b; --updated: #4fae85; --same: #b6bec8; --gone: #6b7683; --bad: #c8372d; --odd: #d98a29; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaed; --soft: #a0a8b2; --line: #30353c; --paper: #14171a; --wash: #1e2227;
  --accent: #82aaff; --new: #35b27e; --updated: #1f7a55; --same: #545d68; --gone: #8a95a3; --bad: #ef6a5f; --odd: #e5a14b; } }
* { box-sizing: border-box; }
body { margin: 0; color: var(--ink); background: var(--paper); font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 48px 24px 96px; }
h1 { margin: 0 0 4px; font-size: 30px; font-weight: 650; letter-spacing: -.02em; }
h2 { margin: 56px 0 6px; font-size: 21px; font-weight: 650; letter-spacing: -.01em; }
h3 { margin: 36px 0 2px; font-size: 17px; font-weight: 600; overflow-wrap: anywhere; }
h3 small { margin-left: 8px; font-weight: 400; color: var(--soft); }
p { margin: 4px 0 14px; max-width: 78ch; color: var(--soft); overflow-wrap: anywhere; }
p.verdict { max-width: none; font-size: 19px; color: var(--ink); }
p.error { padding: 10px 16px; color: var(--ink); border-left: 4px solid var(--bad); background: var(--wash); }
code, pre { font: .9em/1.45 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
a { color: var(--accent); text-decoration: none; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap; }
table.wide { width: 100%; }
th, td { padding: 8px 16px; text-align: right; border-bottom: 1px solid var(--line); }
th { font-size: 13.5px; font-weight: 550; color: var(--soft); }
th:first-child, td:first-child { padding-left: 0; text-align: left; }
tr.total td { border-top: 2px solid var(--ink); border-bottom: 0; font-weight: 600; }
td.note { color: var(--soft); text-align: left; white-space: normal; }
td.long { width: 34%; text-align: left; }
.gauge { display: block; height: 8px; border-radius: 4px; background: var(--bad); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(132px, 1fr)); gap: 12px; margin-top: 24px; }
.tiles div { padding: 14px; border-radius: 12px; background: var(--wash); }
.tiles b { display: block; font-size: 22px; font-weight: 620; letter-spacing: -.01em; font-variant-numeric: tabular-nums; }
.tiles small { color: var(--soft); }
.bar { display: flex; gap: 2px; height: 28px; margin: 14px 0 10px; border-radius: 8px; overflow: hidden; }
.bar span { flex-basis: 0; min-width: 4px; }
td i { display: inline-block; width: 11px; height: 11px; margin-right: 10px; border-radius: 3px; }
.inserted, .committed { background: var(--new); }
.updated { background: var(--updated); }
.unchanged { background: var(--same); }
.deleted { background: var(--gone); }
.rejected { background: var(--bad); }
.unaccounted { background: repeating-linear-gradient(45deg, var(--odd) 0 6px, transparent 6px 10px); }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px), 1fr)); gap: 16px; }
.card { margin: 0; border: 1px solid var(--line); border-radius: 12px; overflow: hidden; min-width: 0; }
.shot { display: flex; align-items: center; justify-content: center; height: 200px; background: var(--wash); overflow: hidden; }
.shot img { max-width: 100%; max-height: 100%; border-radius: 4px; }
.tile { margin: 0; font-size: 12px; color: var(--soft); }
figcaption { padding: 10px 14px 12px; font-size: 14px; overflow-wrap: anywhere; overflow: hidden; }
figcaption small, .none { color: var(--soft); }
figcaption p { margin: 4px 0 6px; color: var(--ink); }
.where { margin-top: 2px; font-weight: 550; }
summary { cursor: pointer; color: var(--soft); font-size: 13px; }
details pre { margin: 6px 0 0; white-space: pre-wrap; overflow-wrap: anywhere; font-size: 12px; color: var(--soft); }
footer { margin-top: 56px; }
@media (max-width: 720px) { main { padding: 28px 16px 64px; } h1 { font-size: 25px; }
  table { font-size: 14.5px; } th, td { padding: 7px 8px; } th:last-child:empty, td.long { display: none; } }
"""
# Nothing of a record reaches the page unescaped; should that fail one day, this is the second lock.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def page(figures: Mapping[str, Any], sources: Sequence[SourceTime], examples: Sequence[Example]) -> str:
    """The figures of an ingest with examples of its rejects as one HTML page, below 3 MB; what is missing is left out."""
    flags = [(name, f"{figures[key]:,}", note) for key, (name, note) in FLAGS.items() if figures.get(key) is not None]
    held = [(label, f"{figures[key]:,}", "") for key, label in CATALOGUE.items() if figures.get(key) is not None]
    body = [
        _asked(figures),
        _tiles(figures),
        _bar(figures),
        _rejects(figures, examples),
        _facts("Flagged", flags),
        _facts("Products in these records", held),
        _slowest(sources),
    ]
    every = html.escape(visible(json.dumps(figures, ensure_ascii=False, default=str), ALL_FIGURES))
    last = f"<footer><details><summary>all figures, as the job printed them</summary><pre>{every}</pre></details></footer>"
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f'<title>Idem: ingest</title><meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f'<style>{STYLE}</style></head><body><main><h1>Ingest</h1><p class="verdict">{html.escape(verdict(figures))}</p>'
        f"{''.join(body)}{last}</main></body></html>"
    )
