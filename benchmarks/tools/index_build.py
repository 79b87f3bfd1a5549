"""One build of an index of synthetic vectors: `python -m benchmarks.tools.index_build data|ours|faiss ROOT ROWS FACTORY`.

`data` writes what the others need. Times are of the work alone: neither ray.init nor making the vectors counts.
"""

import shutil
import sys
import time
from typing import Any

import faiss
import numpy as np

from benchmarks.tools import index_data
from idem import job, manifest, storage
from index import shard

SHARDS, THREADS = 4, 2


def data(root: str, rows: int, _: str) -> dict[str, Any]:
    layout = storage.Layout(root)
    if not storage.exists(storage.join(layout.vectors, manifest.POINTER)):
        shutil.rmtree(root, ignore_errors=True)
        index_data.fill(root, rows)
    return {"rows": rows}


def ours(root: str, rows: int, factory: str) -> dict[str, Any]:
    """The job of index.run behind the encoding, from Lance to published shards."""
    from idem import cluster
    from index import run, vectors
    from pipelines.items import open_items

    layout = storage.Layout(root)
    shutil.rmtree(layout.index, ignore_errors=True)
    cluster.connect(num_cpus=THREADS)
    start = time.perf_counter()
    items = open_items(layout.items)
    chosen = run.choose(items, "true", 0)
    settings = {"factory": factory, "parameters": "nprobe=64,k_factor_rf=10", "shards": SHARDS, "min_recall": 0.5}
    config = run.IndexConfig(root=root, **settings)
    made = manifest.Plan(parent=layout.index, kind="index", config={"factory": factory}, inputs={"embedder": "none"})
    uri = storage.join(manifest.current(layout.vectors, kind="vectors"), vectors.NAME)
    figures = run.make_shards(config, made, uri, items, chosen)
    seconds = time.perf_counter() - start
    kept = ("train_seconds", "shard_seconds", "check_seconds", "recall@10")
    return {"rows": figures["gallery"], "seconds": seconds, **{name: figures[name] for name in kept}}


def bare(_: str, rows: int, factory: str) -> dict[str, Any]:
    """FAISS alone on an array in memory, trained on the same sample."""
    vectors = np.concatenate(list(index_data.clustered(rows)))
    faiss.omp_set_num_threads(THREADS)
    start = time.perf_counter()
    index = faiss.index_factory(vectors.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
    index.train(vectors[shard.sampled(rows)])
    trained = time.perf_counter()
    index.add(vectors)
    return {"rows": index.ntotal, "seconds": time.perf_counter() - start, "train_seconds": trained - start}


KINDS = {"data": data, "ours": ours, "faiss": bare}

if __name__ == "__main__":
    kind, root, rows, factory = sys.argv[1:]
    sys.exit(job.guarded("benchmarks.tools.index_build", lambda: KINDS[kind](root, int(rows), factory)))
