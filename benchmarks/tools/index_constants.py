"""What a vector, a list, a candidate and a shard cost on one core of this machine, and what that makes of 1e8, 1e9 and 1e10 items.

`python -m benchmarks.tools.index_constants [--rows 500000]` measures, prints the tables of docs/scale.md to standard error, and ends with
a JSON line of the constants. Times are of the processor (one thread), so that what else runs on the machine counts little.
"""

import argparse
import hashlib
import sys
import time
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import faiss
import numpy as np
import pyarrow as pa

from benchmarks.tools import index_data
from benchmarks.tools.curves import recall_of
from benchmarks.tools.measuring import surroundings
from idem import job
from idem.types import Hit
from index import plan, sizes
from index.merge import merge

JOB, PACKAGES = "benchmarks.tools.index_constants", ("faiss-cpu", "numpy", "pyarrow")
DIM, LISTS, CENTROIDS, NPROBE, K, K_FACTOR, REPEATS = 128, 1024, 131_072, 64, 10, 10, 3
CORES, MEMORY, COPIES, TOGETHER = 16, 64e9, 2, 4  # the machine that the tables are for, and shards on it
READS = 5e5  # random reads a second, assumed of a disk
TOTALS = (10**8, 10**9, 10**10)


@dataclass(frozen=True, kw_only=True)
class Constants:
    """Seconds on one core: train a point and list, all ten rounds of k-means; assign a vector and list; descend a vector through a graph
    over CENTROIDS centroids; encode a vector; coarse a query for NPROBE of CENTROIDS lists; ask a query, whatever it looks at; scan a
    code; refine a candidate; compare a vector exactly; merge a shard's K hits; digest an id: its hash, and that it is there once;
    checksum a byte.
    Bytes: known of an item in Arrow; entry of an item in a dict of ids to positions."""

    train: float
    assign: float
    descend: float
    encode: float
    coarse: float
    ask: float
    scan: float
    refine: float
    compare: float
    merge: float
    digest: float
    checksum: float
    known: float
    entry: float


def seconds(work: Callable[[], Any], repeats: int = REPEATS) -> float:
    """Least processor time of a few."""
    taken = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        taken.append(time.process_time() - start)
    return min(taken)


def building(vectors: np.ndarray) -> tuple[Any, dict[str, float]]:
    """A filled index of LISTS lists, and what training and adding cost."""
    n, points = len(vectors), min(len(vectors), 40 * LISTS)
    train = seconds(lambda: faiss.index_factory(DIM, f"IVF{LISTS},Flat", faiss.METRIC_INNER_PRODUCT).train(vectors[:points]), 1)
    index = faiss.index_factory(DIM, f"IVF{LISTS},PQ{DIM // 2}x4fs,Refine(SQfp16)", faiss.METRIC_INNER_PRODUCT)
    index.train(vectors[:points])
    coarse, some = faiss.downcast_index(index.base_index).quantizer, vectors[:50_000]
    assign = seconds(lambda: coarse.assign(some, 1)) / len(some)
    add = seconds(lambda: index.add(vectors), 1) / n
    return index, {"train": train / points / LISTS, "assign": assign / LISTS, "encode": add - assign}


def graphs(vectors: np.ndarray, queries: np.ndarray, centroids: int) -> dict[str, float]:
    """Finding lists among many. The centroids are vectors: what is asked is the way through the graph, not where it ends."""
    graph = faiss.IndexHNSWFlat(DIM, 32, faiss.METRIC_INNER_PRODUCT)
    graph.add(vectors[-centroids:])
    some = vectors[:20_000]
    return {"descend": seconds(lambda: graph.search(some, 1), 1) / len(some), "coarse": singly(graph, queries, NPROBE)}


def singly(index: Any, queries: np.ndarray, k: int) -> float:
    """Seconds a query, one at a time as in service."""
    return seconds(lambda: [index.search(query[None], k) for query in queries]) / len(queries)


def scanned(base: Any, queries: np.ndarray, nprobe: int) -> float:
    """Codes that a search looks at, a query."""
    lists = base.quantizer.assign(queries, nprobe)
    return float(np.array([base.get_list_size(i) for i in range(base.nlist)])[lists].sum()) / len(queries)


def searching(index: Any, data: index_data.Data) -> tuple[dict[str, float], dict[str, float]]:
    """Slopes between searches that differ in one thing; and a query at NPROBE and K_FACTOR as it is, and as the slopes have it."""
    base, queries, few, many = faiss.downcast_index(index.base_index), data.queries, LISTS // 64, LISTS // 4

    def search(what: Any, k: int, nprobe: int, factor: float = 1.0) -> float:
        base.nprobe, index.k_factor = nprobe, factor
        return singly(what, queries, k)

    less, more = (search(base, K * K_FACTOR, nprobe) for nprobe in (few, many))
    codes = {nprobe: scanned(base, queries, nprobe) for nprobe in (few, NPROBE, many)}
    scan = (more - less) / (codes[many] - codes[few])
    ask = max(0.0, less - codes[few] * scan - singly(base.quantizer, queries, few))
    refine = (search(index, K, few, 40.0) - search(base, 40 * K, few)) / (40 * K)
    computed = ask + singly(base.quantizer, queries, NPROBE) + codes[NPROBE] * scan + K * K_FACTOR * refine
    own = {"query_ms": 1e3 * search(index, K, NPROBE, float(K_FACTOR)), "query_ms_computed": 1e3 * computed, "codes": codes[NPROBE]}
    return {"ask": ask, "scan": scan, "refine": refine}, {**own, "recall@10": recall_of(index.search(queries, K)[1], data.exact)}


def _hit(item_id: str, score: float) -> Hit:
    return Hit(item_id=item_id, product_id="p", family_id="f", category="c", title="t", score=score)


def around(vectors: np.ndarray, queries: np.ndarray) -> dict[str, float]:
    """What is beside FAISS: exact comparison of what was put since a release, merging, ids, checksums, and what is known of items."""
    exact, some = faiss.IndexFlatIP(DIM), vectors[:100_000]
    exact.add(some)
    compare = seconds(lambda: [exact.search(query[None], K) for query in queries[:50]]) / 50 / len(some)
    hits = [[_hit(f"i{s}-{i}", 1 - i / K - s * 1e-6) for i in range(K)] for s in range(64)]
    merging = (seconds(lambda: [merge(hits, K) for _ in range(100)]) - seconds(lambda: [merge(hits[:4], K) for _ in range(100)])) / 100 / 60
    ids = pa.chunked_array([names := index_data.names(0, len(vectors))])
    digest = seconds(lambda: plan.repeats(ids, plan.hashes(ids)), 1) / len(ids)
    block = bytes(1 << 26)
    titles = pa.array([f"a title of forty letters, as shops write {i % 10}" for i in range(len(ids))])
    categories = pa.array([f"category {i % 100}" for i in range(len(ids))]).dictionary_encode()
    texts = {"item_id": names, "product_id": names, "family_id": names, "title": titles}
    known = pa.table({"category": categories, **{name: column.cast(pa.large_string()) for name, column in texts.items()}})
    tracemalloc.start()
    entries = {item_id: place for place, item_id in enumerate(names.slice(0, 100_000).to_pylist())}
    entry = tracemalloc.get_traced_memory()[0] / len(entries)
    tracemalloc.stop()
    made = {"compare": compare, "merge": merging, "digest": digest, "checksum": seconds(lambda: hashlib.sha256(block)) / len(block)}
    return {**made, "known": known.nbytes / len(ids), "entry": entry}


def measured(rows: int, queries: int, centroids: int) -> tuple[Constants, dict[str, float]]:
    """The constants; and what the index that they were measured on does."""
    data = index_data.synthetic(rows, queries)
    faiss.omp_set_num_threads(1)
    (index, made), both = building(data.vectors), (data.vectors, data.queries)
    slopes, own = searching(index, data)
    return Constants(**made, **graphs(*both, centroids), **slopes, **around(*both)), own


@dataclass(frozen=True)
class Cost:
    """Minutes to train, flat and in two levels, on one machine, and to add, on all; of a query in one shard: codes scanned, seconds of a
    core, and reads of stored vectors that memory has no room for; cores, disks: queries a second that each of the two allow."""

    flat: float
    two_levels: float
    add: float
    codes: float
    query_s: float
    reads: float
    cores: float
    disks: float


def costs(fleet: sizes.Sized, known: Constants) -> Cost:
    """Computed: a graph's depth grows with the logarithm of its size; pages of stored vectors have what memory the shards leave."""
    told, machines = fleet.outline, fleet.machines
    depth, minute = np.log(told.lists) / np.log(CENTROIDS), known.train * told.training_rows / CORES / 60
    assign = known.assign * told.lists if told.lists <= sizes.FLAT_COARSE else known.descend * depth
    codes, candidates = NPROBE * told.rows[1] / told.lists, K * K_FACTOR
    query = known.ask + known.coarse * depth + codes * known.scan + candidates * known.refine
    reads = candidates * max(0.0, 1 - (MEMORY / TOGETHER - told.resident_bytes) / (told.bytes.stored * told.rows[1]))
    add = (assign + known.encode) * told.total / machines / CORES / 60
    cores, disks = machines * CORES / told.shards / query, machines * READS / told.shards / reads if reads else np.inf
    return Cost(minute * told.lists, minute * 2 * told.lists**0.5, add, codes, query, reads, cores, disks)


def estimated(total: int, known: Constants) -> dict[str, str]:
    """Computed, of an index of `total` items on machines of CORES cores and MEMORY bytes: for people."""
    fleet = sizes.sized(total, DIM, MEMORY, copies=COPIES, together=TOGETHER)
    told, rows, cost = fleet.outline, fleet.outline.rows[1], costs(fleet, known)
    checked = known.checksum * told.shard_bytes / 60
    return {
        "factory": told.factory,
        "shards; machines": f"{told.shards}; {fleet.machines}, {COPIES} copies",
        "rows of a shard": f"{told.rows[0]:,} to {rows:,} (+{100 * (told.spread - 1):.2f} %)",
        "memory of a shard": f"{told.resident_bytes / 1e9:.1f} GB, {told.opening_bytes / 1e9:.1f} GB while it is opened",
        "disk of a shard": f"{told.shard_bytes / 1e9:.1f} GB",
        "training": f"{told.training_rows:,} vectors: {cost.flat:,.1f} min, {cost.two_levels:.2f} in two levels",
        "adding": f"{cost.add:.0f} min on all machines",
        "a query in a shard": f"{cost.codes:,.0f} codes, {1e3 * cost.query_s:.2f} ms of a core, {cost.reads:.0f} reads",
        "queries a second": f"{min(cost.cores, cost.disks):,.0f}, bound by {'cores' if cost.cores < cost.disks else 'disks'}",
        "meet a shard's slowest 1 %": f"{100 * (1 - 0.99**told.shards):.0f} % of queries",
        "merging": f"{1e6 * known.merge * told.shards:.1f} us a query",
        "ids in one dict": f"{known.entry * total / 1e9:,.0f} GB",
        "known of items, in memory": f"{known.known * total / 1e9:,.0f} GB, {known.known * rows / 1e9:.1f} GB of a shard",
        "ids twice?": f"{known.digest * total / 60:.1f} min and {16 * total / 1e9:,.1f} GB at once, {16 * rows / 1e9:.1f} GB by shard",
        "checksums": f"{checked * told.shards:,.1f} min in one process, {checked:,.1f} min a shard",
        "changes that double a query in a shard": f"{cost.query_s / known.compare:,.0f}",
    }


def tables(known: Constants) -> str:
    """Markdown: a row a figure, a column a size."""
    columns = [estimated(total, known) for total in TOTALS]
    head = ["| | " + " | ".join(f"{total:.0e}".replace("e+0", "e").replace("e+", "e") for total in TOTALS) + " |", "|---" * 4 + "|"]
    return "\n".join([*head, *(f"| {name} | " + " | ".join(column[name] for column in columns) + " |" for name in columns[0])])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=f"python -m {JOB}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=500_000, help="synthetic clustered vectors of 128 dimensions")
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--centroids", type=int, default=CENTROIDS, help="of the graph that lists are found by; fewer only to try it out")
    arguments = parser.parse_args(argv)

    def run() -> dict[str, Any]:
        known, own = measured(arguments.rows, arguments.queries, arguments.centroids)
        print(tables(known), file=sys.stderr)  # noqa: T201
        own, told = ({name: float(f"{value:.4g}") for name, value in each.items()} for each in (own, asdict(known)))
        return {**surroundings(JOB, PACKAGES), "rows": arguments.rows, **own, "constants": told}

    return job.guarded(JOB, run)


if __name__ == "__main__":
    sys.exit(main())
