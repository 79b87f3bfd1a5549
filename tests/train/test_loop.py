"""The loop alone, without Ray: it learns, stage after stage, and comes to the same on one worker, on several, and in pieces."""

import gc
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

from tests.train.small import config, corpus, ignore, join, leave, picture
from train import checkpoint, plan
from train.backbones.base import computes_bf16
from train.course import Looks
from train.embedder import Embedder
from train.feed import Feed
from train.head.capacity import Room
from train.labelling import Labelling
from train.loop import Trainer
from train.parallel import everyones


def run(said, made, **changes) -> tuple[Trainer, list[dict]]:
    """The trainer after its run, and the figures of its steps."""
    reports: list[dict] = []
    trainer = Trainer(said, made, lambda figures, due: reports.append(figures), **changes)
    trainer.run()
    return trainer, [figures for figures in reports if "loss" in figures]


def test_the_stages_follow_one_another_and_the_loss_falls():
    reports = []
    trainer = Trainer(config(steps=80, lr=5e-3, margin=0.0, warm_up=0.2), corpus(), lambda figures, due: reports.append((figures, due)))
    trained = trainer.run()
    assert list(dict.fromkeys(r["stage"] for r, _ in reports)) == ["warm-up", "centroids", "margin"]
    told = [r["encoded"] for r, _ in reports if "encoded" in r]
    assert told[-1] == 18
    assert [r["step"] for r, due in reports if due] == [16, 16], "a checkpoint before the centroids and one after them"
    margin = [r["loss"] for r, _ in reports if r["stage"] == "margin" and "loss" in r]
    assert np.mean(margin[-20:]) < np.mean(margin[:20])
    assert trained.step == 80
    assert trained.model.training
    assert {"lr", "margin", "images_per_second", "seconds"} <= set(trained.curves[1])


@pytest.mark.parametrize(("warm_up", "stages"), [(0.0, {"margin"}), (1.0, {"warm-up"})])
def test_either_objective_runs_all_the_way(warm_up, stages):
    trainer, steps = run(config(warm_up=warm_up, steps=6), corpus())
    assert {r["stage"] for r in steps} == stages
    assert len(steps) == 6
    if warm_up:  # the prototypes mean something all the same
        assert torch.allclose(trainer.head.whole(), trainer.centroids(), atol=1e-6)


@pytest.mark.parametrize("kind", [{"titles": False}, {"pictures": False}])
def test_a_corpus_of_pictures_alone_or_texts_alone_trains(kind):
    _, steps = run(config(steps=6), corpus(**kind))
    assert len(steps) == 6
    assert all(np.isfinite(r["loss"]) for r in steps)


@pytest.mark.parametrize("pictured", [1, 2])
def test_a_corpus_with_next_to_no_pictures_trains(pictured):
    made = corpus()
    made.has_image[pictured:] = False
    _, steps = run(config(steps=6, accumulate=3), made)
    assert len(steps) == 6
    assert all(np.isfinite(r["loss"]) for r in steps)


def test_mined_negatives_bring_similar_ids_together_in_the_warm_up():
    """Colours of two kinds: IDs of one kind should share batches once the centroids know."""
    made = corpus(24)
    made.fetch = lambda rows: [picture(r, 7000 + made.labels[r] % 2) for r in rows]

    def of_one_kind(share: float) -> float:
        trainer = Trainer(config(steps=9, warm_up=1.0, warm_up_similar=share, text_share=0.0), made, ignore)
        trainer.run()
        near = [{int(u) % 2 for u in made.labels[trainer._rows(step)]} for step in range(200)]
        assert (trainer.similar is None) == (share == 0)
        return float(np.mean([len(kinds) == 1 for kinds in near]))

    assert of_one_kind(1.0) > 10 * max(of_one_kind(0.0), 0.01)


def test_batches_are_the_same_with_and_without_prefetch():
    """Also across a change of plan: the stage of the centroids, and looks for similar prototypes."""
    seen = []
    for depth, threads in ((0, 1), (3, 2)):
        taken = []
        trainer = Trainer(config(prefetch=depth, decode_threads=threads), corpus(), ignore)
        take = trainer.feed.take
        trainer.feed.take = lambda step, take=take, taken=taken: taken.append(take(step)) or taken[-1]
        trainer.run()
        seen.append(taken)
    assert len(seen[0]) == len(seen[1]) == 12
    for one, other in zip(*seen, strict=True):
        assert np.array_equal(one.rows, other.rows)
        assert torch.equal(one.stored, other.stored)
        assert (one.seed, one.parts[0].texts) == (other.seed, other.parts[0].texts)


def test_an_error_ahead_surfaces_in_the_step_that_needs_it():
    def make(step: int) -> int:
        if step == 2:
            raise ValueError("step 2 cannot be made")
        return step

    with Feed(make, depth=3, threads=2) as feed:
        assert [feed.take(0), feed.take(1)] == [0, 1]
        with pytest.raises(ValueError, match="step 2"):
            feed.take(2)
        assert feed.take(3) == 3


class WithoutBatchStatistics(Trainer):
    """Batch norm by running statistics: what a vector is does not depend on who is in its batch."""

    def __init__(self, *args, **changes) -> None:
        super().__init__(*args, **changes)
        for module in self.model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.train = lambda mode=True: None  # pyright: ignore[reportAttributeAccessIssue]
                module.training = False


@pytest.mark.parametrize("warm_up", [0.0, 1.0])
def test_micro_batches_come_to_what_the_big_batch_does(warm_up):
    """Gradients of one step, texts and pictures, in one piece and in three."""
    found = []
    for parts in (1, 3):
        said = config(warm_up=warm_up, accumulate=parts, text_share=0.3, batch=36)
        trainer = WithoutBatchStatistics(said, corpus(12), ignore)
        trainer.course.stage = "warm-up" if warm_up else "margin"
        views = trainer.feed.take(0)
        assert len(views.parts) == parts
        assert all(part.count == part.asked for part in views.parts), "nothing fills up a part here"
        loss = trainer.descent.backward(views, lambda h, t=trainer, v=views: t._loss(h, v.rows, 0.2))
        gradients = [p.grad for p in trainer.model.parameters()]
        trainer.head.update(0.1)
        found.append((loss, gradients, trainer.head.whole()))
    (one, gradients, rows), (three, others, their_rows) = found
    assert one == pytest.approx(three, abs=1e-6)
    scale = max(float(g.abs().max()) for g in gradients if g is not None)
    differences = [float((a - b).abs().max()) / scale for a, b in zip(gradients, others, strict=True) if a is not None]
    print(f"largest difference of a gradient {max(differences):.1e} of the largest gradient")  # noqa: T201
    assert max(differences) < 1e-5
    assert torch.allclose(rows, their_rows, atol=1e-5)


def test_running_statistics_move_once_a_step_in_micro_batches():
    trainer = Trainer(config(accumulate=2, text_share=0.0), corpus(), ignore)
    trainer.descent.backward(trainer.feed.take(0), lambda h: h.sum())
    assert trainer.model.vision.stem[1].num_batches_tracked == 2  # once a micro-batch


def _losses(rank: int, world: int, folder: str, parallel: str) -> None:
    """Writes the losses of a run, and those of its second half begun again from a checkpoint."""
    join(rank, world, f"{folder}/meet")
    said, kept = config(parallel=parallel, steps=10, lr=5e-3), Path(folder) / "checkpoints"
    losses: list[list[float]] = [[], []]

    def report(figures: dict, due: bool) -> None:
        if "loss" in figures:
            losses[0].append(figures["loss"])
        if figures["step"] == 6:
            checkpoint.keep(trainer, kept)

    trainer = Trainer(said, corpus(pictures=False, words=True), report)
    trainer.run()
    again = Trainer(said, corpus(pictures=False, words=True), lambda figures, due: losses[1].append(figures["loss"]))
    checkpoint.restore(again, checkpoint.found(kept)[0])
    again.run()
    if rank == 0:
        (Path(folder) / "losses.json").write_text(json.dumps(losses))
    leave()


def test_ddp_fsdp2_and_one_worker_agree_on_the_loss(tmp_path):
    """Texts alone, since batch norm of pictures sees another batch on another number of workers."""
    curves = {}
    for name, world in (("ddp", 1), ("ddp", 2), ("fsdp2", 2)):
        folder = tmp_path / f"{name}-{world}"
        folder.mkdir()
        mp.spawn(_losses, args=(world, str(folder), name), nprocs=world)
        curves[name, world], again = json.loads((folder / "losses.json").read_text())
        assert again == pytest.approx(curves[name, world][7:], abs=1e-5)
    alone = curves["ddp", 1]
    assert len(alone) == 10
    assert alone[3] < alone[0]  # of the warm-up; the margin begins at step 4
    differences = {key: max(abs(a - b) for a, b in zip(alone, curve, strict=True)) for key, curve in curves.items()}
    print("largest difference from one worker's loss:", differences)  # noqa: T201
    assert max(differences.values()) < 1e-4


def _encoded_alike(rank: int, world: int, folder: str, kind: str) -> None:
    """Largest differences between workers of the buffers after a step, and of the vectors after each thing that all do together."""
    join(rank, world, f"{folder}/meet")
    trainer = Trainer(config(parallel=kind, purge=0.2, text_share=0.0), corpus(held=6), ignore)
    together = {
        "centroids": trainer.centroids,
        "centroids of some": lambda: trainer.centroids(2),
        "purge": trainer.purge,
        "held_recall": trainer.encoder.held_recall,
        "save": lambda: checkpoint.keep(trainer, Path(folder) / "checkpoints"),
    }

    def apart(x: torch.Tensor) -> float:
        one, other = (torch.tensor(said) for said in everyones(x.tolist(), trainer.device))
        return float((one - other).abs().max())

    found = {}
    for name, do in together.items():
        trainer._one(0.2)
        buffers = torch.cat([b.reshape(-1).double() for b in trainer.model.buffers()])
        do()
        found[name] = (apart(buffers), apart(trainer.encode_rows(np.arange(18))))
    if rank == 0:
        (Path(folder) / "found.json").write_text(json.dumps(found))
    leave()


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_all_workers_encode_alike(kind, tmp_path):
    """Batch norm's running statistics are each worker's own until something is encoded together."""
    mp.spawn(_encoded_alike, args=(2, str(tmp_path), kind), nprocs=2)
    found = json.loads((tmp_path / "found.json").read_text())
    assert len(found) == 5
    assert all(buffers > 1e-4 for buffers, _ in found.values()), found
    assert all(vectors == 0 for _, vectors in found.values()), found


def test_held_back_recall_sees_what_the_served_embedder_sees():
    trainer = Trainer(config(), corpus(held=6), ignore)
    trainer.model.eval()
    blocks = list(trainer.encoder.blocks(trainer.corpus.held_blocks(0, 1, trainer.model.side), held=True))
    served = Embedder(trainer.model).encode([picture(500 + r, 100 + r // 3) for r in range(6)], None)
    assert np.abs(blocks[0][1].numpy() - served).max() < 1e-5
    rows = trainer.encode_rows(np.array([3, 0, 3])).numpy()
    assert np.abs(rows - Embedder(trainer.model).encode([picture(r, r // 3) for r in (3, 0, 3)], None)).max() < 1e-5
    assert 0 <= trainer.encoder.held_recall() <= 1


def test_centroids_are_the_means_of_all_members():
    trainer = Trainer(config(), corpus(), ignore)
    h = trainer.encode_rows(np.arange(18)).reshape(6, 3, -1)
    assert torch.allclose(trainer.centroids(), nn.functional.normalize(h.mean(1), dim=1), atol=1e-6)
    trainer.labelling.set(trainer.corpus.labels, np.tile([1.0, 0.5, 0.0], 6))
    assert torch.allclose(trainer.centroids(), nn.functional.normalize(h[:, 0] + 0.5 * h[:, 1], dim=1), atol=1e-6)
    assert torch.allclose(trainer.centroids(1), h[:, 0], atol=1e-6)


def test_what_curation_changes_decides_which_rows_are_drawn():
    made = Labelling(np.repeat(np.arange(6), 3), 6)
    assert not made.tensors()
    weights = np.ones(18, np.float32)
    weights[[1, 4]] = 0
    made.set(made.labels, weights)
    drawn = np.concatenate([plan.batch(made.members, seed=0, step=s, size=12) for s in range(20)])
    assert set(drawn.tolist()) == set(range(18)) - {1, 4}
    assert set(made.tensors()) == {"labels", "weights"}


def test_patience_ends_a_run_that_gets_no_better():
    looks = Looks()
    for step, recall in enumerate([0.2, None, 0.4, 0.4, 0.3]):
        looks.note(recall, step)
    assert (looks.best, looks.step, looks.since) == (0.4, 2, 2)
    assert [looks.exhausted(patience) for patience in (0, 2, 3)] == [False, True, False]
    trainer, steps = run(config(steps=500, warm_up=0.0, patience=3, checkpoint_seconds=1e-6), corpus(held=6))
    assert len(steps) < 500
    assert trainer.course.looks.since >= 3


def test_bf16_is_used_only_where_it_is_computed(monkeypatch):
    """Without the instructions for it, a step would take longer in bf16 than in float32, by an order of magnitude."""
    cpu = torch.device("cpu")
    for known in (True, False):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda known=known: known)
        assert computes_bf16(cpu) is known
    assert not computes_bf16(torch.device("meta"))


def test_the_loop_needs_no_ray_no_tables_no_index():
    """A machine with a GPU may have torch and transformers alone."""
    said = "import sys; import train.loop, train.local; print(*{name.partition('.')[0] for name in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", said], capture_output=True, text=True, check=True).stdout.split()
    assert "torch" in loaded
    assert not {"ray", "lance", "pyarrow", "faiss", "pandas"} & set(loaded)


def test_a_head_that_cannot_be_held_is_refused_before_it_is_made(monkeypatch):
    monkeypatch.setattr("train.head.capacity.room_here", lambda *_, **__: Room(device=100, host=100, file=10**9))
    monkeypatch.setattr("train.loop.PrototypeHead", None)
    with pytest.raises(ValueError, match=r"6 prototypes over 1 worker.*what would hold them: 4 workers"):
        Trainer(config(), corpus(), ignore)


def test_the_folder_for_rows_must_be_there_and_is_left_as_it_was(tmp_path):
    with pytest.raises(ValueError, match=r"head.folder = .*nowhere' is no folder"):
        Trainer(config(head={"folder": str(tmp_path / "nowhere")}), corpus(), ignore)
    trainer = Trainer(config(head={"storage": "file", "folder": str(tmp_path)}), corpus(), ignore)
    assert trainer.folder.parent == tmp_path
    assert list(trainer.folder.glob("*.rows"))
    trainer.run()
    del trainer
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_of_more_prototypes_than_can_all_be_looked_up_none_are(monkeypatch):
    monkeypatch.setattr("train.loop.MOST_SIMILAR", 3)
    trainer = Trainer(config(similar=0.5, steps=8), corpus(), ignore)
    trainer.run()
    assert trainer.similar is None
