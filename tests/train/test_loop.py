"""The loop alone, without Ray: it learns, it replays, and its checkpoints move between numbers of workers."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image

from train import checkpoint
from train.backbones.compact import CompactConfig
from train.corpus import Corpus
from train.loop import LoopConfig, Trainer, computes_bf16

MODEL = CompactConfig(side=32, dim=16, widths=(8, 8, 16, 16), text_dim=16, text_layers=1)


def config(**changes) -> LoopConfig:
    said = {
        "model": MODEL,
        "minutes": 5,
        "steps": 12,
        "batch": 12,
        "prefixes": (8, 16),
        "refresh": 4,
        "checkpoint_seconds": 1e9,
        "bf16": False,
    }
    return LoopConfig(**(said | changes))


def corpus(products: int = 6, *, titles: bool = True, pictures: bool = True) -> Corpus:
    labels = np.repeat(np.arange(products), 3)

    def draw(row: int) -> bytes:
        random = np.random.default_rng(int(row))
        colour = np.random.default_rng(1000 + int(labels[row])).integers(0, 255, 3)
        out = io.BytesIO()
        Image.fromarray(np.clip(colour + random.integers(-20, 20, (24, 24, 3)), 0, 255).astype(np.uint8)).save(out, "PNG")
        return out.getvalue()

    return Corpus(
        fetch=lambda rows: [draw(r) if pictures else None for r in rows],
        titles=[f"thing number {u}" if titles else "" for u in labels],
        has_image=np.full(len(labels), pictures),
        labels=labels,
    )


def test_the_stages_follow_one_another_and_the_loss_falls():
    reports = []
    trained = Trainer(config(steps=80, lr=5e-3, margin=0.0, warm_up=0.2), corpus(), lambda figures, due: reports.append(figures)).run()
    assert [r["stage"] for r in reports[:1] + reports[-1:]] == ["warm-up", "margin"]
    margin = [r["loss"] for r in reports if r["stage"] == "margin"]
    assert np.mean(margin[-20:]) < np.mean(margin[:20])
    assert trained.step == 80
    assert trained.model.training


@pytest.mark.parametrize("kind", [{"titles": False}, {"pictures": False}])
def test_a_corpus_of_pictures_alone_or_texts_alone_trains(kind):
    reports = []
    Trainer(config(steps=6), corpus(**kind), lambda figures, due: reports.append(figures)).run()
    assert len(reports) == 6
    assert all(np.isfinite(r["loss"]) for r in reports)


def test_a_corpus_of_nothing_is_refused():
    with pytest.raises(ValueError, match="neither pictures nor texts"):
        Trainer(config(), corpus(titles=False, pictures=False), lambda figures, due: None)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step():
    trainer = Trainer(config(), corpus(), lambda figures, due: None)
    with torch.no_grad():
        trainer.model.image_out.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="at step 0"):
        trainer.run()


def _resumed(rank: int, world: int, meet: str, source: str, target: str, steps: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=world)
    trainer = Trainer(config(steps=steps), corpus(), lambda figures, due: None)
    if source:
        checkpoint.restore(trainer, Path(source))
    trainer.run()
    checkpoint.save(trainer, Path(target))
    dist.barrier()
    dist.destroy_process_group()


def test_a_checkpoint_moves_from_two_workers_to_one_to_three(tmp_path):
    folders = [tmp_path / name for name in ("two", "one", "three")]
    source = ""
    for world, folder, steps in zip((2, 1, 3), folders, (8, 10, 12), strict=True):
        folder.mkdir()
        mp.spawn(_resumed, args=(world, str(tmp_path / f"meet-{world}"), source, str(folder), steps), nprocs=world)
        source = str(folder)
        assert json.loads((folder / "state.json").read_text())["step"] == steps
        assert len(checkpoint.whole_head(folder)["weight"]) == 6


def test_a_resumed_run_is_the_run_that_was_never_cut_off(tmp_path):
    def save(figures: dict, due: bool) -> None:
        if figures["step"] == 6:  # in the margin stage, between two looks for similar prototypes
            checkpoint.save(whole, tmp_path)

    whole = Trainer(config(steps=12, warm_up=0.3), corpus(), save)
    whole.run()
    again = Trainer(config(steps=12, warm_up=0.3), corpus(), lambda figures, due: None)
    checkpoint.restore(again, tmp_path)
    assert again.step == 7
    again.run()
    differences = [(a - b).abs().max().item() for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True)]
    assert max(differences) < 1e-6
    assert (whole.head.weight - again.head.weight).abs().max() < 1e-6
    assert [c["step"] for c in whole.curves] == [c["step"] for c in again.curves]


@pytest.mark.parametrize("pictured", [1, 2])
def test_a_corpus_with_next_to_no_pictures_trains(pictured):
    made = corpus()
    made.has_image[pictured:] = False
    reports = []
    Trainer(config(steps=6), made, lambda figures, due: reports.append(figures)).run()
    assert len(reports) == 6
    assert all(np.isfinite(r["loss"]) for r in reports)


def test_restored_rows_are_bit_exact_and_a_missing_shard_is_named(tmp_path):
    trainer = Trainer(config(steps=8), corpus(), lambda figures, due: None)
    trainer.run()
    checkpoint.save(trainer, tmp_path)
    again = Trainer(config(steps=8), corpus(), lambda figures, due: None)
    checkpoint.restore(again, tmp_path)
    assert torch.equal(again.head.weight, trainer.head.weight)
    assert all(torch.equal(a, b) for a, b in zip(again.model.state_dict().values(), trainer.model.state_dict().values(), strict=True))
    (tmp_path / "head-0-of-1.safetensors").rename(tmp_path / "head-1-of-2.safetensors")
    with pytest.raises(ValueError, match=r"workers \[1\] of 2"):
        checkpoint.whole_head(tmp_path)


def test_bf16_is_used_only_where_it_is_computed(monkeypatch):
    """Without the instructions for it, a step would take longer in bf16 than in float32, by an order of magnitude."""
    cpu = torch.device("cpu")
    for known in (True, False):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda known=known: known)
        assert computes_bf16(cpu) is known
    assert not computes_bf16(torch.device("meta"))
