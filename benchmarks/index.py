"""The index against bare FAISS, hnswlib, usearch and LanceDB: search at equal recall, building, and filters.

search   three sets of vectors; each contender over its settings, on two threads, ours and bare FAISS by turns
build    1 and 5 million vectors, from Lance to published shards, against FAISS on an array in memory; each a process of its own
filters  one million vectors, of which 50, 5 and 0.5 % are let through
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.tools import index_data, index_peers
from benchmarks.tools.curves import Point, front, rate_at, recall_of
from benchmarks.tools.index_data import SETS, Data, factory_of
from benchmarks.tools.index_peers import REPEATS, curves, seconds_of
from benchmarks.tools.measuring import (
    Figure,
    adopt_orphans,
    aligned,
    at_least,
    at_most,
    measure,
    rounded,
    save,
    surroundings,
    table,
    verdict,
)
from idem import job

JOB = "benchmarks.index"
PARTS = ("search", "build", "filters")
K, RECALL, SHARDS = 10, 0.95, 4
BATCH_BAR, PEER_BAR, BUILD_BAR, MEMORY_BAR, LINEAR_BAR, FILTER_BAR, LATENCY_BAR = 0.9, 0.9, 1.25, 4096.0, 1.15, 0.95, 2.0
STORES = {"fp16": "Refine(SQfp16)", "sq8": "Refine(SQ8)"}
PACKAGES = ("faiss-cpu", "numpy", "pylance", "pyarrow", "ray")
SHARES = (0.5, 0.05, 0.005)
SINGLE = 200  # queries asked one at a time


def searched(data: Data, folder: Path, lists: str, wanted: Sequence[str]) -> tuple[list[Figure], list[dict[str, Any]]]:
    """The figures of one set, and every point of every contender. lists: a factory without its refine step, "" for one that fits."""
    n, dim = data.vectors.shape
    points: dict[str, list[Point]] = {}
    sizes: dict[str, float] = {}
    for store, refine in STORES.items():
        factory = f"{lists},{refine}" if lists else factory_of(n, dim, refine)
        say(f"{data.name}: {n:,} x {dim}, {factory}")
        built = index_peers.build_sharded(folder / store, data.vectors, factory, SHARDS)
        pair = [index_peers.ours(built, f"ours {store}", factory), index_peers.bare(data.vectors, f"faiss {store}", factory)]
        points |= curves(pair, data)
        sizes |= {each.name: each.bytes_each for each in pair}
    for peer in index_peers.peers(data.vectors, folder, wanted):
        say(f"{data.name}: {peer.name}, {peer.bytes_each:,.0f} bytes a vector")
        points |= curves([peer], data)
        sizes[peer.name] = peer.bytes_each
    rates = {name: rate_at(found, RECALL) for name, found in points.items()}
    told = [
        {"set": data.name, "contender": name, "bytes": round(sizes[name], 1), "at": round(rates[name]), "points": list(map(_said, found))}
        for name, found in points.items()
    ]
    return compare(data.name, rates, sizes), [{**each, "vectors": n, "dim": dim, "made": data.made} for each in told]


def compare(name: str, rates: Mapping[str, float], sizes: Mapping[str, float]) -> list[Figure]:
    """Ours beside bare FAISS, and beside the fastest peer of no more bytes that reaches the recall; without one there is no such figure."""
    figures = []
    for store in STORES:
        mine, twin = f"ours {store}", f"faiss {store}"
        title = f"{name} {store}, queries/s at {RECALL}"
        figures.append(at_least(Figure(name=title, value=rates[mine], peer=twin, peer_value=rates[twin]), BATCH_BAR))
        others = [each for each in rates if each.startswith(index_peers.LIBRARIES) and sizes[each] <= sizes[mine] and rates[each]]
        if others:
            best = max(others, key=lambda each: rates[each])
            figures.append(at_least(Figure(name=title, value=rates[mine], peer=best, peer_value=rates[best]), PEER_BAR))
    return figures


def picture(told: Sequence[dict[str, Any]], path: Path) -> None:
    """Recall against queries a second, the front of each contender of one set."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure as Drawing

    drawing = Drawing(figsize=(9, 6), layout="constrained")
    axes = drawing.subplots()
    axes.set_prop_cycle(color=colormaps["tab20"].colors)  # pyright: ignore[reportAttributeAccessIssue]
    for each in told:
        best = front([Point(point["recall"], point["rate"]) for point in each["points"]])
        label = f"{each['contender']} ({each['bytes']:,.0f} B)"
        axes.plot([p.recall for p in best], [p.rate for p in best], "o-" if each["contender"].startswith("ours") else ".--", label=label)
    axes.axvline(RECALL, color="grey", linewidth=0.5)
    title = f"{told[0]['set']}: {told[0]['vectors']:,} x {told[0]['dim']}, {index_peers.THREADS} threads"
    axes.set(yscale="log", xlabel=f"recall@{K}", ylabel="queries/s", xlim=(0.5, 1.005), title=title)
    axes.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    drawing.savefig(path, dpi=120)


def _said(point: Point) -> dict[str, Any]:
    return {"recall": round(point.recall, 4), "rate": round(point.rate), "setting": point.setting}


def search(arguments: argparse.Namespace) -> tuple[list[Figure], dict[str, Any]]:
    figures: list[Figure] = []
    told: list[dict[str, Any]] = []
    keep = Path(arguments.keep)
    for name in arguments.sets:
        own = {"embedder": arguments.embedder, "embeddings": arguments.embeddings}
        data = index_data.named(name, Path(arguments.data), rows=arguments.rows, queries=arguments.queries, **own)
        with tempfile.TemporaryDirectory() as folder:
            made, points = searched(data, Path(folder), arguments.factory, arguments.peers)
        picture(points, keep / f"search-{name}.png")
        (keep / f"search-{name}.json").write_text(json.dumps(points, indent=1) + "\n")
        figures += made
        told += points
    rows = [(each["set"], each["contender"], f"{each['bytes']:,.0f}", f"{each['at']:,}" if each["at"] else "-") for each in told]
    say(aligned([("set", "contender", "bytes a vector", f"queries/s at recall {RECALL}"), *rows], left=2))
    return figures, {"curves": told}


def build(arguments: argparse.Namespace) -> tuple[list[Figure], dict[str, Any]]:
    """The largest number of `--builds` has the bars of time and memory, the smallest that of growing in proportion."""
    adopt_orphans()
    runs, keep = [], Path(arguments.keep)
    for rows in arguments.builds:
        root = str((keep / f"build-{rows}").absolute())
        mb = rows * index_data.DIM * 4 / 1e6
        for kind in ("data", "ours", "faiss"):
            words = ["benchmarks.tools.index_build", kind, root, str(rows), arguments.build_factory]
            made = measure(kind, words, rows=rows, mb=mb, counts=("rows",), logs=keep / f"{kind}-{rows}")
            runs += [made] if kind != "data" else []
    of = {(run.contender, run.rows): run for run in runs}
    small, large = min(arguments.builds), max(arguments.builds)

    def taken(kind: str, rows: int, what: str = "seconds") -> float:
        return float(of[kind, rows].figures[what])

    name = f"build of {large / 1e6:g}M, "
    figures = [
        at_most(Figure(name=f"{name}seconds", value=taken("ours", large), peer="faiss", peer_value=taken("faiss", large)), BUILD_BAR),
        at_most(Figure(name=f"{name}peak MiB", value=of["ours", large].peak_mb, peer="limit", peer_value=MEMORY_BAR), 1.0),
    ]
    if small < large:
        # Training costs the same whatever the number: it is on a sample. What is left must grow with the vectors.
        grown = [taken("ours", rows) - taken("ours", rows, "train_seconds") for rows in (large, small)]
        title = f"seconds a million beyond training, {large / 1e6:g}M and {small / 1e6:g}M"
        per = [seconds / rows * 1e6 for seconds, rows in zip(grown, (large, small), strict=True)]
        figures.append(at_most(Figure(name=title, value=per[0], peer="ours", peer_value=per[1]), LINEAR_BAR))
    say(table(runs, []))
    return figures, {"builds": [rounded({"contender": r.contender, "peak_mb": r.peak_mb, **r.figures}) for r in runs]}


def filters(arguments: argparse.Namespace) -> tuple[list[Figure], dict[str, Any]]:
    data = index_data.synthetic(arguments.rows, arguments.queries)
    drawn = np.random.default_rng(2).random(len(data.vectors))
    names = [f"below {share}" for share in SHARES]
    categories = np.select([drawn < share for share in SHARES[::-1]], names[::-1], default="others")
    factory = factory_of(len(data.vectors), data.vectors.shape[1], STORES["fp16"])
    figures, told = [], []
    with tempfile.TemporaryDirectory() as folder:
        built = index_peers.build_sharded(Path(folder), data.vectors, factory, SHARDS, categories)
        contender = index_peers.ours(built, "ours", factory)
        contender.search(data.queries, K, {"nprobe": 32, "k_factor_rf": 10})
        searcher = contender.searcher
        for i, share in enumerate(SHARES):
            where = {"category": names[i:]}
            cold = seconds_of(partial(searcher.allowed, where))
            rows = np.flatnonzero(drawn < share)
            exact = rows[index_data.exact(data.queries, data.vectors[rows], K)]
            found = contender.numbered(searcher.find(data.queries, K, where=where)[1])
            times = np.array([[_alone(searcher, data.queries, w) for w in (None, where)] for _ in range(REPEATS)])
            plain, filtered = np.median(times, axis=0).tolist()
            title, recall = f"filter of {share:.1%}", recall_of(found, exact)
            figures.append(at_least(Figure(name=f"{title}, recall@10", value=recall, peer="exact", peer_value=1.0), FILTER_BAR))
            figures.append(at_most(Figure(name=f"{title}, ms", value=filtered, peer="unfiltered", peer_value=plain), LATENCY_BAR))
            told.append({"share": share, "first_time_ms": round(cold * 1e3, 1), "ms": round(filtered, 3), "unfiltered_ms": round(plain, 3)})
    return figures, {"filters": told}


def _alone(searcher: Any, queries: np.ndarray, where: Any) -> float:
    """Median milliseconds of a query that is asked alone. What is known of the hits is not looked up: it costs both the same."""
    return float(np.median([seconds_of(lambda q=q: searcher.find(q[None], K, where=where)) for q in queries[:SINGLE]]) * 1e3)


def say(text: str) -> None:
    sys.stderr.write(f"{text}\n")


def bench(arguments: argparse.Namespace) -> dict[str, Any]:
    figures: list[Figure] = []
    told: dict[str, Any] = {}
    for part in arguments.parts:
        made, more = {"search": search, "build": build, "filters": filters}[part](arguments)
        figures, told = figures + made, told | more
    say(table([], figures))
    known = [rounded({**asdict(figure), "ratio": figure.ratio}) for figure in figures]
    libraries = [each for each in index_peers.LIBRARIES if any(peer.startswith(each) for peer in arguments.peers)]
    searching = libraries if "search" in arguments.parts else []
    result = {"figures": known, "holds": verdict(figures), **surroundings(JOB, [*PACKAGES, *searching])}
    return {**result, "saved": save("index", {**result, **told})} if arguments.save else result


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=f"python -m {JOB}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--rows", type=int, default=1_000_000, help="vectors of the synthetic set")
    parser.add_argument("--queries", type=int, default=1000, help="of each set")
    parser.add_argument("--builds", type=int, nargs="+", default=[1_000_000, 5_000_000], help="vectors of the builds")
    parser.add_argument("--peers", nargs="*", choices=index_peers.PEERS, default=list(index_peers.PEERS), help="beside bare FAISS")
    parser.add_argument("--factory", default="", help="of the search, without its refine step, e.g. IVF2048,PQ64x4fs; by each set's size")
    parser.add_argument("--build-factory", default="IVF4096,PQ64x4fs,Refine(SQfp16)", help="of the builds")
    parser.add_argument("--data", default="../shared/data", help="folder of the public sets")
    parser.add_argument("--embedder", default="", help="folder of an embedder for the emoji; without one, random weights encode them")
    parser.add_argument("--embeddings", default="", help="an .npy (n, dim) in place of encoding the emoji")
    parser.add_argument("--keep", default="out/bench-index", help="folder for the curves and their pictures, and the vectors of the builds")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/index_<cores>cpu_<date>.json as well")
    arguments = parser.parse_args(argv)
    return job.guarded(JOB, lambda: bench(arguments))


if __name__ == "__main__":
    sys.exit(main())
