"""The report of an ingest as one HTML page with rejects as pictures. Pure, no Ray.

Everything shown comes from strangers: texts are cut, made visible and escaped, pictures are drawn anew as small JPEGs, and
the page has an upper size. It needs nothing outside of itself, no script either.
"""

import html
import itertools
import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.normalize import REASONS as EXPLAINED
from pipelines.report import (
    CATALOGUE,
    FLAGS,
    MESSAGE,
    REASONS,
    SHORT,
    Example,
    SourceTime,
    by_reason,
    files_told,
    names,
    number,
    parts,
    plural,
    rate,
    rates,
    seconds,
    share,
    size,
    slowest,
    tail,
    verdict,
    visible,
)
from pipelines.thumbnails import hexdump, look

EXAMPLES = 6  # of each reason
CARDS_BYTES = 2_200_000  # of all examples together
RECORD, ALL_FIGURES = 600, 40_000  # characters


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
        f'<div class="where"><bdi>{html.escape(tail(example.source_file))}</bdi>:{example.source_row}</div>{item}'
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
    return EXPLAINED.get(reason, "")


def _rejects(figures: Mapping[str, Any], examples: Sequence[Example]) -> str:
    reasons = by_reason(figures)
    if not reasons:
        return ""
    rows, rejected = int(figures.get("rows") or 0), sum(count for _, count in reasons)
    cards = _cards([name for name, _ in reasons[:REASONS]], examples)
    lines, blocks = [], []
    for place, (name, count) in enumerate(reasons[:REASONS]):
        words = f"<p>{_text(_explained(name), MESSAGE)}</p>"
        gauge = f'<span class="gauge" style="width:{max(0.5, 100 * count / rejected):.1f}%"></span>'
        lines.append(
            f'<tr><td><a href="#reason-{place}"><code>{_text(name)}</code></a></td><td>{count:,}</td><td>{share(count, rejected)}</td>'
            f'<td>{share(count, rows)}</td><td class="long">{gauge}</td></tr>'
        )
        shown = f"{len(cards[name])} of {count:,}" if cards[name] else f"{count:,}, none shown"
        grid = f'<div class="cards">{"".join(cards[name])}</div>' if cards[name] else ""
        blocks.append(f'<section id="reason-{place}"><h3><code>{_text(name)}</code> <small>{shown}</small></h3>{words}{grid}</section>')
    if rest := reasons[REASONS:]:
        lines.append(
            f"<tr><td>{plural(len(rest), 'other reason')}</td><td>{sum(n for _, n in rest):,}</td><td></td><td></td><td></td></tr>"
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
    middle = statistics.median(map(rate, sources))
    body = ""
    for source in slowest(sources):
        ratio = f"{rate(source) / middle:.2f} x" if middle else "-"
        cells = (f"{source.rows:,}", size(source.bytes), seconds(source.seconds), *rates(source), ratio)
        body += f"<tr><td><bdi>{html.escape(tail(source.name))}</bdi></td>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
    head = "".join(f"<th>{name}</th>" for name in ("file", "rows", "bytes", "worker time", "rate", "", "of the median"))
    return (
        f"<h2>Slowest sources</h2><p>Where the workers' time went, of {plural(len(sources), 'file')}; the last column compares a file's "
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
    told = [f"<code><bdi>{html.escape(tail(str(figures['source'])))}</bdi></code>"] if figures.get("source") else []
    told += [f"run <code>{_text(figures['run'])}</code>"] if figures.get("run") else []
    told += [html.escape(said) for said in files_told(figures)]
    left = f" Not read: {html.escape(names(figures['not_read']))}." if figures.get("not_read") else ""
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
