"""What becomes of a checkpoint: prototypes and members of one moment, read by blocks."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch.nn.functional import normalize

from idem import schema
from tests.train.small import config, corpus, ignore
from train import checkpoint, publish
from train.head import files
from train.head.prototypes import HeadConfig, whole_head
from train.loop import Trainer
from train.selection import Selection


def selection(trainer: Trainer) -> Selection:
    """What the artifact is told of the items, without any."""
    made, rows = trainer.corpus, len(trainer.corpus.labels)
    told = {
        "labels": made.labels,
        "weights": np.ones(rows, np.float32),
        "layers": np.full(rows, "metadata"),
        "item_ids": np.array([f"sku-{row}" for row in range(rows)]),
        "names": np.array(made.names),
        "has_image": made.has_image,
        "corpus": lambda cache: made,
    }
    return cast(Selection, SimpleNamespace(**told))


def tables(folder: Path, out: Path, trainer: Trainer) -> tuple[Any, Any]:
    publish.publish(folder, out, selection(trainer), trainer.config)
    return pq.read_table(out / "prototypes.parquet"), pq.read_table(out / "assignments.parquet")


def test_members_are_the_rows_that_count(tmp_path):
    trainer = Trainer(config(steps=3), corpus(), ignore)
    trainer.run()
    weights = np.where(np.isin(np.arange(18), [1, 2, 4]), 0.0, 0.5)
    trainer.labelling.set(trainer.labelling.labels, weights)
    prototypes, assignments = tables(checkpoint.keep(trainer, tmp_path / "run"), tmp_path / "out", trainer)
    assert prototypes["members"].to_pylist() == [1, 2, 3, 3, 3, 3]
    assert len(assignments) == 15
    assert prototypes.schema.equals(schema.prototypes(16))


def test_labels_are_of_the_moment_that_looked_best(tmp_path):
    """As weights and prototypes are: here the look after step 2, while rows are given another label and weight before every step."""
    recalls = iter([0.5, 0.9, 0.1, 0.2, 0.3])
    best = {}

    def report(figures: dict, due: bool) -> None:
        step = trainer.course.step
        if due:
            checkpoint.keep(trainer, tmp_path / "run")
        if step == 2 and "loss" in figures:
            best.update(labels=trainer.labelling.labels, weights=trainer.labelling.weights, rows=trainer.head.whole())
        if "loss" in figures:
            labels, weights = np.repeat(np.arange(6), 3), np.ones(18)
            labels[step], weights[3 * step + 1] = 5, 0
            trainer.labelling.set(labels, weights)

    trainer = Trainer(config(warm_up=0.0, patience=2, checkpoint_seconds=1e-6), corpus(held=6), report)
    trainer.encoder.held_recall = lambda: next(recalls)
    trainer.run()
    assert trainer.course.step == 4
    prototypes, assignments = tables(checkpoint.keep(trainer, tmp_path / "run"), tmp_path / "out", trainer)
    counts = best["weights"] > 0
    assert assignments["item_id"].to_pylist() == [f"sku-{row}" for row in np.flatnonzero(counts)]
    assert assignments["prototype_id"].to_pylist() == best["labels"][counts].tolist()
    assert assignments["layer"].to_pylist().count("inferred") == 1
    assert prototypes["members"].to_pylist() == np.bincount(best["labels"][counts]).tolist()
    assert np.array_equal(np.stack(prototypes["vector"].to_numpy()), best["rows"].numpy())


@pytest.mark.parametrize("block", [4, 1000])
@pytest.mark.parametrize("changes", [{}, {"subcentres": 2}, {"dtype": "bfloat16"}, {"kind": "sparse", "neighbours": 2, "random": 1}])
def test_prototypes_by_blocks_are_those_of_the_whole_head(changes, block, tmp_path):
    """Also rows that were never written, which their rule gives."""
    trainer = Trainer(config(warm_up=0.0, head=HeadConfig(**changes)), corpus(), ignore)
    trainer.course.stage = "margin"
    for _ in range(3):
        trainer._one(0.5)
    folder = checkpoint.keep(trainer, tmp_path)
    expected = normalize(whole_head(folder)["weight"].float(), dim=1)
    found = list(files.normalised(folder, block))
    assert max(len(rows) for rows in found) <= block
    assert torch.equal(torch.from_numpy(np.concatenate(found)), expected)
