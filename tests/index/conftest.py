"""A run root with a few hundred tiny items and an untrained compact embedder, written directly: no Ray, no training."""

import io

import lance
import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from idem import cluster, manifest, schema, storage
from index import plan, run, shard, vectors
from pipelines.table import ID_KEY
from pipelines.table import ITEMS as DATASET
from train.backbones.compact import Compact, CompactConfig

FRACTIONS = (0.4, 0.4, 0.2)
SMALL = CompactConfig(side=32, widths=(4, 4, 8, 8), dim=16, text_dim=8, text_layers=1, text_length=16)


def _png(rng: np.random.Generator) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def item_rows(products: int, photos: int) -> pa.Table:
    """`products` in families of two, each with one catalogue picture, `photos` photos, and a text-only row for every fifth."""
    rng = np.random.default_rng(0)
    rows = []
    for p in range(products):
        for j in range(photos + 1 + (p % 5 == 0)):
            image = _png(rng) if j <= photos else None
            rows.append(
                {
                    "item_id": f"p{p:03d}-{j}",
                    "product_id": f"p{p:03d}",
                    "family_id": f"f{p // 2:03d}",
                    "category": f"c{p % 3}",
                    "title": f"article {p}",
                    "lang": "en",
                    "image": image,
                    "mime": "image/png" if image else "",
                    "width": 8 if image else 0,
                    "height": 8 if image else 0,
                    "role": "catalog" if j == 0 else "photo",
                    "style": "",
                    "id_split": "dev_unseen" if p % 4 == 0 else "train",
                    "split": "",
                    "content_hash": f"{p}/{j}",
                    "source_file": "memory",
                    "source_row": len(rows),
                }
            )
    return pa.Table.from_pylist(rows, schema=schema.ITEMS)


def write_items(root: str, table: pa.Table) -> None:
    """One more version of the items of the run."""
    folder = storage.Layout(root).items
    known = {ID_KEY: manifest.fingerprint("items", {"rows": table.num_rows}, {})}
    lance.write_dataset(table.replace_schema_metadata(known), storage.join(folder, DATASET), mode="overwrite", max_rows_per_file=50)


def write_embedder(root: str, seed: int = 0) -> str:
    config = {"seed": seed, "fractions": FRACTIONS}
    made = manifest.Plan(parent=storage.Layout(root).embedder, kind="embedder", config=config, inputs={})
    folder = storage.local_path(made.folder)
    folder.mkdir(parents=True)
    torch.manual_seed(seed)
    files = Compact(SMALL).save(folder)
    weights = {key: value.clone() for key, value in Compact(SMALL).state_dict().items()}  # save_file refuses shared storage
    save_file(weights, folder / "untrained.safetensors")
    made.write(figures={}, files=[*files, "untrained.safetensors"])
    return made.id


@pytest.fixture
def root(tmp_path):
    """A run root with items and an embedder; 40 products, 3 photos each."""
    write_items(str(tmp_path), item_rows(40, 3))
    write_embedder(str(tmp_path))
    return str(tmp_path)


def encode_plainly(offsets, source, *, folder, encoders):
    """The obvious twin of index.vectors.encode: the same batch function, one call after the other, no Ray."""
    told, left = vectors.pieces(offsets, source, folder=folder, encoders=encoders)
    encoder = vectors.Encoder(source, folder)
    return vectors.commit(folder, told + [{k: v[0] for k, v in encoder(batch(each)).items()} for each in left])


def batch(piece: dict) -> dict[str, np.ndarray]:
    return {"chunk": np.array([piece["chunk"]]), "offsets": np.array([piece["offsets"]]), "known": np.array([piece["known"]])}


@pytest.fixture
def without_ray(monkeypatch):
    """index.run with its two Ray calls replaced by loops."""
    monkeypatch.setattr(cluster, "connect", lambda: None)
    monkeypatch.setattr(vectors, "encode", encode_plainly)
    monkeypatch.setattr(run, "in_parallel", lambda task, arguments, *, desc, on_gpu=False: [task(*each) for each in arguments])


@pytest.fixture
def indexed(root, without_ray):
    """A run root with an index of the catalogue pictures, built without Ray."""
    run.run(run.IndexConfig(root=root, fields="image"))
    return root


def unit(n: int, dim: int, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((n, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.fixture
def unit_vectors():
    """unit_vectors(n, dim, seed): random L2-normalised float32."""
    return unit


@pytest.fixture
def make_index(tmp_path):
    """make_index(vectors, shards, factory) -> (folder, item_ids): a finished index of made-up items, item 0 first."""

    def make(matrix: np.ndarray, shards: int, factory: str = "Flat") -> tuple[str, list[str]]:
        item_ids = [f"item-{i:05d}" for i in range(len(matrix))]
        known = {"product_id": "p", "family_id": "f", "category": "c", "title": "t"}
        meta = pa.table({"item_id": item_ids, **{key: [f"{v}{i // 3}" for i in range(len(matrix))] for key, v in known.items()}})
        made = manifest.Plan(parent=str(tmp_path / "index"), kind="index", config={"shards": shards, "factory": factory}, inputs={})
        files = []
        for number, rows in enumerate(plan.shards(item_ids, shards)):
            files += shard.write(
                made.folder, number, index=shard.make_index(matrix[rows], factory=factory), meta=[meta.take(pa.array(rows))]
            )
        made.write(figures={}, files=files)
        return made.folder, item_ids

    return make


@pytest.fixture
def items_again(root):
    """items_again(products): another version of the items."""
    return lambda products: write_items(root, item_rows(products, 3))


@pytest.fixture
def embedder_again(root):
    """embedder_again(seed): another embedder, made current."""
    return lambda seed: write_embedder(root, seed)


@pytest.fixture
def embedder_alone(tmp_path):
    """A run root with an embedder and nothing else."""
    write_embedder(str(tmp_path))
    return str(tmp_path)
