"""The last checkpoint becomes the artifact: the embedder without its head, its prototypes and who belongs to them, curves, card."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file, save_file

from idem import schema
from train import checkpoint
from train.backbones import build
from train.export import model_card
from train.head import files
from train.selection import Selection
from train.settings import LoopConfig


def publish(folder: Path, out: Path, selection: Selection, config: LoopConfig) -> tuple[dict[str, Any], list[str]]:
    """Write the artifact's files into `out`; its figures, and the names of the files. ValueError for weights that are not finite.

    Where the run had patience, weights, prototypes and labels are those that looked best on the held-back slice.
    """
    out.mkdir(parents=True, exist_ok=True)
    best = folder / checkpoint.BEST
    source = best if config.patience and best.exists() else folder
    weights = load_file(source / checkpoint.MODEL)
    if bad := [name for name, value in weights.items() if not value.isfinite().all()]:
        raise ValueError(f"the trained weights are not finite in {bad[:3]}")
    torch.manual_seed(config.seed)  # as the trainer does: the weights that it started from
    model = build(config.model)
    model.hear(selection.corpus(0).said())
    names = []
    if config.model.backbone == "compact":
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, out / "untrained.safetensors")
        names.append("untrained.safetensors")
    model.load_checkpoint(weights)
    names += model.save(out)
    state = json.loads((folder / checkpoint.STATE).read_text())
    labels, counts = _labels(source, selection)
    members = np.bincount(labels[counts > 0], minlength=len(selection.names))
    names += [_prototypes(out, source, selection.names, members, model.dim), _assignments(out, selection, labels, counts)]
    (out / "curves.json").write_text(json.dumps(state["curves"]))
    figures = {
        "products": len(selection.names),
        "pictures": int(selection.has_image.sum()),
        "steps": state["step"],
        "images_seen": state["images"],
        "train_seconds": round(state["seconds"], 1),
        "parameters": sum(v.numel() for v in weights.values()),
        "skipped_steps": state["skipped"],
        "held_R@1": _held(state, best=source is best),
    }
    (out / "README.md").write_text(model_card(figures, config.model.model_dump()))
    return figures, [*names, "curves.json", "README.md"]


def _held(state: dict[str, Any], *, best: bool) -> float | None:
    if best:
        return state["looks"]["best"]
    return state["curves"][-1].get("held_R@1") if state["curves"] else None


def _labels(folder: Path, selection: Selection) -> tuple[np.ndarray, np.ndarray]:
    """Labels and weights of the rows as the checkpoint has them: as selected, unless curation changed them."""
    kept = load_file(folder / checkpoint.ROWS)
    if "labels" not in kept:
        return selection.labels, selection.weights
    return kept["labels"].numpy(), kept["weights"].numpy()


def _prototypes(out: Path, source: Path, names: np.ndarray, members: np.ndarray, dim: int) -> str:
    """PROTOTYPES, block by block; `names` and `members` (U,)."""
    columns, start = schema.prototypes(dim), 0
    with pq.ParquetWriter(out / "prototypes.parquet", columns) as writer:
        for rows in files.normalised(source):
            ids = np.arange(start, start + len(rows))
            vector = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), dim)
            table = {"prototype_id": ids, "product_id": names[ids], "vector": vector, "members": members[ids]}
            writer.write_table(pa.table(table, schema=columns))
            start += len(rows)
    assert start == len(names)
    return "prototypes.parquet"


def _assignments(out: Path, selection: Selection, labels: np.ndarray, weights: np.ndarray) -> str:
    """ASSIGNMENTS of every row that counts; a label that curation gave is inferred."""
    kept = weights > 0
    layers = np.where(labels == selection.labels, selection.layers, "inferred")
    table = {
        "item_id": selection.item_ids[kept],
        "prototype_id": labels[kept].astype(np.int64),
        "confidence": weights[kept].astype(np.float32),
        "layer": layers[kept].astype(str),
    }
    pq.write_table(pa.table(table, schema=schema.ASSIGNMENTS), out / "assignments.parquet")
    return "assignments.parquet"
