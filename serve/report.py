"""Write report.html: what was measured, queries with their answers before and after reranking, curves, and what it cost.

One file without anything outside of it. The queries shown are drawn by a seed among those that reranking improved, spoilt
and left alone; how many there are of each is told.
"""

import base64
import html
import io
import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from idem import images, job, manifest, storage
from index.release import Release
from pipelines.items import Items, open_items
from serve import measured, plots, stages
from serve.measured import Answered, EvaluateConfig, Measured

NAME = "report.html"
SHOWN = {"won": 4, "lost": 4, "unchanged": 4}
VERDICTS = {"won": "reranking improved it", "lost": "reranking spoilt it", "unchanged": "unchanged"}
STRIP = 6
THUMB = 132
HEADINGS = {"sibling_R@1": "sibling R@1", "p50_ms": "p50 ms", "p99_ms": "p99 ms"}


def rank(levels: Sequence[int]) -> int:
    """The place of the very same product, from 1; beyond the list where it is not there."""
    return levels.index(0) + 1 if 0 in levels else len(levels) + 1


def verdict(answer: Answered) -> str:
    before, after = rank(answer.retrieved_levels), rank(answer.reranked_levels)
    return "won" if after < before else "lost" if after > before else "unchanged"


def draw(answers: Sequence[Answered], seed: int) -> tuple[list[tuple[str, Answered]], dict[str, int]]:
    """Some queries of each verdict, drawn by the seed, and how many there are of each."""
    by: dict[str, list[Answered]] = {name: [] for name in SHOWN}
    for answer in answers:
        by[verdict(answer)].append(answer)
    rng = np.random.default_rng(seed)
    drawn = [(name, by[name][i]) for name, few in SHOWN.items() for i in rng.permutation(len(by[name]))[:few]]
    return drawn, {name: len(found) for name, found in by.items()}


def thumbnail(picture: bytes | None) -> str:
    """A data: URL of the picture, at most THUMB pixels a side; grey where there is none that decodes."""
    try:
        image = images.decode(picture or b"", draft=THUMB)
    except images.ImageError:
        image = Image.new("RGB", (THUMB, THUMB), "#d5d9de")
    image.thumbnail((THUMB, THUMB))
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()


def _strip(name: str, ids: Sequence[str], levels: Sequence[int], notes: Sequence[str], thumbs: Mapping[str, str]) -> str:
    hits = [
        f'<div class="hit l{level}" title="{html.escape(item_id)}"><img alt="" src="{thumbs[item_id]}"><small>{note}</small></div>'
        for item_id, level, note in zip(ids[:STRIP], levels, notes, strict=False)
    ]
    return f'<div class="strip"><span>{name}</span>{"".join(hits)}</div>'


def _place(levels: Sequence[int]) -> str:
    return f"place {rank(levels)}" if 0 in levels else f"not among {len(levels)}"


def _query(name: str, answer: Answered, thumbs: Mapping[str, str]) -> str:
    told = f"{VERDICTS[name]}: {_place(answer.retrieved_levels)}"
    if name != "unchanged":
        told += f" → {_place(answer.reranked_levels)}"
    seen = ["" if r is None else f"r = {r:.2f}" for r in answer.relevance]
    places = [f"{place}." for place in range(1, STRIP + 1)]
    return (
        f'<div class="query"><div class="asked"><img alt="query" src="{thumbs[answer.item_id]}">'
        f"<div>{html.escape(answer.item_id)}</div></div>"
        f'<div><span class="verdict {name}">{told}</span>'
        + _strip("retrieval", answer.retrieved, answer.retrieved_levels, places, thumbs)
        + _strip("reranked", answer.reranked, answer.reranked_levels, [f"{p} {r}" for p, r in zip(places, seen, strict=False)], thumbs)
        + "</div></div>"
    )


def queries(result: Measured, items: Items, seed: int) -> str:
    drawn, counts = draw(result.answers, seed)
    needed = {item_id for _, a in drawn for item_id in (a.item_id, *a.retrieved[:STRIP], *a.reranked[:STRIP])}
    ordered = sorted(needed)
    thumbs = {item_id: thumbnail(picture) for item_id, picture in zip(ordered, items.images(ordered), strict=True)}
    said = ", ".join(f"{counts[name]} {VERDICTS[name]}" for name in SHOWN)
    return (
        f"<h2>Queries</h2><p>Of {len(result.answers)} photos: {said}. Drawn by seed {seed} from each kind. "
        'Frames: <span class="key l0">the very same product</span>, <span class="key l1">a sibling of its family</span>, others plain; '
        "r is the reranker's probability of the very same product.</p>" + "".join(_query(name, answer, thumbs) for name, answer in drawn)
    )


def _cell(column: str, value: float | int | None, best: float | int | None) -> str:
    told = "-" if value is None else f"{value:.0f}" if column.endswith("_ms") else f"{value:.3f}"
    return f'<td class="best">{told}</td>' if value is not None and value == best and not column.endswith("_ms") else f"<td>{told}</td>"


def summary(result: Measured) -> str:
    best = [max((v for v in column if v is not None), default=None) for column in zip(*(row.cells() for row in result.rows), strict=True)]
    head = "".join(f"<th>{HEADINGS.get(column, column)}</th>" for column in measured.COLUMNS)
    body = "".join(f"<tr><td>{row.name}</td>" + "".join(map(_cell, measured.COLUMNS, row.cells(), best)) + "</tr>" for row in result.rows)
    return (
        f"<p>{len(result.answers)} photos of {result.query_products} products asked the running service by their picture alone "
        f"(<code>{html.escape(result.queries)}</code>); the gallery holds {result.gallery_items:,} items of {result.gallery_products:,} "
        f"products. Latency: {result.timed} requests, one at a time, over HTTP. The baselines search the same gallery exactly.</p>"
        + (f"<p><b>{html.escape(said)}.</b></p>" if (said := measured.caution(result)) else "")
        + f'<div class="scroll"><table class="wide"><tr><th></th>{head}</tr>{body}</table></div>'
    )


def cost(noted: stages.Noted | None) -> str:
    if noted is None:
        return "<h2>Cost</h2><p>The jobs were run one by one; the demo notes seconds and memory.</p>"
    rows = "".join(
        f'<tr><td>{html.escape(s.title)}</td><td>{s.seconds:.1f} s</td><td class="note">{_unchanged(s)}</td></tr>' for s in noted.stages
    )
    total = sum(stage.seconds for stage in noted.stages)
    return (
        f"<h2>Cost</h2><p>{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}. Peak memory of all processes "
        f"together: <b>{noted.peak_mb / 1024:.2f} GiB</b> ({html.escape(noted.memory)}).</p>"
        f'<table>{rows}<tr class="total"><td>until this report</td><td>{total:.1f} s</td><td></td></tr></table>'
    )


def _unchanged(stage: stages.StageTime) -> str:
    if not stage.skipped:
        return ""
    return "unchanged, skipped" + (f"; made in {stage.made_in:.1f} s" if stage.made_in else "")


def _figure(caption: str, svg: bytes) -> str:
    url = "data:image/svg+xml;base64," + base64.b64encode(svg).decode()
    return f'<figure><figcaption>{caption}</figcaption><img alt="{caption}" src="{url}"></figure>'


def _curve(folder: str | None) -> list[dict[str, Any]]:
    uri = storage.join(folder, "curves.json") if folder else ""
    return json.loads(storage.read_bytes(uri)) if uri and storage.exists(uri) else []


def curves(result: Measured, release: Release) -> str:
    figures = [_figure("Recall against K", plots.recall(result.rows))]
    for name, folder in (("embedder", release.embedder), ("reranker", release.reranker)):
        if curve := _curve(folder):
            figures.append(_figure(f"Training of the {name}", plots.training(curve)))
    return f'<h2>Curves</h2><div class="plots">{"".join(figures)}</div>'


def page(result: Measured, release: Release, items: Items, noted: stages.Noted | None, *, made: str, seed: int) -> str:
    style = Path(__file__).with_name("report.css").read_text()
    parts = [summary(result), curves(result, release), queries(result, items, seed), cost(noted)]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Idem: what was measured</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,"><style>{style}</style></head>'
        f"<body><main><h1>What was measured</h1><p>Release {html.escape(release.name)}, measured {html.escape(made)}.</p>{''.join(parts)}"
        "</main></body></html>"
    )


def run(config: EvaluateConfig) -> dict[str, Any]:
    result = measured.load(config.root)
    folder = manifest.current(storage.join(config.root, measured.KIND), kind=measured.KIND)
    release = Release.open(storage.join(storage.Layout(config.root).releases, result.release))
    items = open_items(release.items, release.items_version)
    made = manifest.read(folder, kind=measured.KIND).created
    written = page(result, release, items, stages.load(config.root), made=made, seed=config.seed)
    uri = storage.join(config.root, NAME)
    storage.write_bytes(uri, written.encode())
    return {"report": uri, "bytes": len(written), "queries_shown": written.count('class="query"')}


if __name__ == "__main__":
    sys.exit(job.main("serve.report", "evaluate", EvaluateConfig, run))
