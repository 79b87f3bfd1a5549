"""What goes wrong with an index: each a clear error, and nothing that looks finished."""

import subprocess
import sys
from pathlib import Path

import lance
import numpy as np
import pyarrow as pa
import pytest

from idem import manifest, storage
from index import run, shard, vectors
from index.searcher import Searcher, Shard
from pipelines.items import open_items

PROJECT = Path(__file__).parents[2]


def spoiled(root: str, change) -> str:
    """The folder of the run's vectors, after `change(matrix)` of the stored ones; the old index is gone."""
    layout = storage.Layout(root)
    folder = manifest.current(layout.vectors, kind="vectors")
    dataset = lance.dataset(storage.join(folder, vectors.NAME))
    table, matrix = dataset.to_table(), vectors.read(dataset.uri)[1].copy()
    change(matrix)
    again = pa.FixedSizeListArray.from_arrays(pa.array(matrix.ravel()), matrix.shape[1])
    at = table.schema.get_field_index("vector")
    lance.write_dataset(table.set_column(at, table.schema.field(at), again), dataset.uri, mode="overwrite")
    storage.remove_tree(layout.index)
    return folder


def trained_and_work(root: str, folder: str, out: Path) -> shard.Work:
    items = open_items(storage.Layout(root).items)
    chosen = run.choose(items, "", 0)
    uri = storage.join(folder, vectors.NAME)
    trained = shard.prepare(str(out / ".trained.faiss"), uri, "Flat", "")
    return shard.Work(
        folder=str(out),
        number=0,
        vectors=uri,
        rows=np.arange(len(chosen.offsets)),
        items=storage.Layout(root).items,
        version=items.version,
        offsets=chosen.offsets,
        trained=trained,
    )


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0, 2.0])
def test_a_vector_that_has_no_cosine_is_named_and_no_shard_is_made(indexed, tmp_path, value):
    def change(matrix):
        matrix[3] = value

    folder = spoiled(indexed, change)
    with pytest.raises(ValueError, match=r"length 1; 1 of 40 are not, such as those of p003-0"):
        shard.build_from(trained_and_work(indexed, folder, tmp_path / "new"))
    assert not list((tmp_path / "new").glob("shard-*"))


def test_a_query_of_zeros_is_refused(unit_vectors, make_index):
    searcher = Searcher.open(make_index(unit_vectors(9, 8), 2)[0])
    with pytest.raises(ValueError, match="1 of 2 are, the first is number 1"):
        searcher.search(np.stack([np.ones(8), np.zeros(8)]), 3)


@pytest.mark.parametrize("name", ["shard-000.faiss", "shard-001.parquet"])
@pytest.mark.parametrize("kept", [0, 0.5, -1])
def test_a_file_that_was_cut_off_is_named(unit_vectors, make_index, name, kept):
    folder = Path(make_index(unit_vectors(30, 8), 2)[0])
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: int(len(data) * kept) if kept >= 0 else -1])
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        Searcher.open(str(folder))
    other = 1 - int(name[8])
    assert Shard.open(str(folder), other).index.ntotal == 15


def test_an_index_of_another_dimension_than_the_queries_says_both(unit_vectors, make_index):
    searcher = Searcher.open(make_index(unit_vectors(9, 8), 2)[0])
    with pytest.raises(ValueError, match=r"\(n, 8\).*found \(1, 16\)"):
        searcher.search(unit_vectors(1, 16), 3)


def test_an_empty_shard_gives_no_answer(tmp_path):
    known = pa.table({name: pa.array([], pa.string()) for name in shard.META_COLUMNS})
    shard.write(str(tmp_path), 0, index=shard.empty_index(lambda: np.zeros((0, 8)), dim=8, total=0, factory="Flat"), meta=[known])
    empty = Shard.read(str(tmp_path), 0)
    assert empty.search(np.eye(2, 8), 5) == [[], []]
    scores, positions = Searcher([empty]).find(np.eye(2, 8), 5)
    assert scores.shape == positions.shape == (2, 0)


FULL = """
import resource, sys
import numpy as np, pyarrow as pa
from index import shard
vectors = np.eye(4096, 128, dtype=np.float32)
index = shard.make_index(vectors, factory="Flat")
meta = pa.table({name: [str(i) for i in range(4096)] for name in shard.META_COLUMNS})
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
try:
    shard.write(sys.argv[1], 0, index=index, meta=[meta])
except (OSError, RuntimeError) as error:
    print("refused:", error)
"""


def test_a_full_disk_leaves_nothing_that_looks_like_a_shard(tmp_path):
    """A limit on the size of files stands for the disk: both make a write fall short."""
    said = subprocess.run([sys.executable, "-c", FULL, str(tmp_path)], cwd=PROJECT, capture_output=True, text=True, check=True).stdout
    assert said.startswith("refused:")
    assert "shard-000.faiss" in said
    assert not list(tmp_path.glob("shard-*"))


FORK = """
import os, sys
import numpy as np, torch
from index import shard
from index.searcher import Searcher, Shard
import pyarrow as pa
vectors = np.random.default_rng(0).standard_normal((5000, 16)).astype(np.float32)
vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
meta = pa.table({name: [str(i) for i in range(5000)] for name in shard.META_COLUMNS})
searcher = Searcher([Shard(shard.make_index(vectors, factory="IVF16,Flat"), meta, threads=2)])
(torch.ones(200, 200) @ torch.ones(200, 200)).sum()
before = searcher.search(vectors[:200], 3)
child = os.fork()
if not child:
    os._exit(0 if searcher.search(vectors[:200], 3) == before else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_forked_child_answers_as_its_parent_does():
    environment = {"PATH": "", "OMP_NUM_THREADS": "2"}
    subprocess.run([sys.executable, "-c", FORK], cwd=PROJECT, timeout=60, check=True, env=environment)
