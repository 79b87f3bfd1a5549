"""Checkpoints: they move between numbers of workers and prototypes, say what is damaged, and leave the last good one standing."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from safetensors.torch import load_file
from torch.nn.functional import normalize

from tests.train.small import config, corpus, ignore, join, largest_difference, leave
from train import checkpoint
from train.head.prototypes import whole_head
from train.labelling import mapping
from train.loop import Trainer


def trained(folder: Path, steps: int = 8, **changes) -> Trainer:
    """A trainer after its run, with a checkpoint below `folder`."""
    trainer = Trainer(config(steps=steps, **changes), corpus(), ignore)
    trainer.run()
    checkpoint.keep(trainer, folder)
    return trainer


def _resumed(rank: int, world: int, meet: str, source: str, target: str, steps: int) -> None:
    join(rank, world, meet)
    trainer = Trainer(config(steps=steps, patience=50), corpus(held=6), ignore)
    if source:
        checkpoint.restore(trainer, Path(source))
    trainer.run()
    checkpoint.keep(trainer, Path(target))
    leave()


def test_a_checkpoint_moves_from_two_workers_to_one_to_three(tmp_path):
    source = ""
    for world, steps in ((2, 8), (1, 10), (3, 12)):
        folder = tmp_path / str(world)
        mp.spawn(_resumed, args=(world, str(tmp_path / f"meet-{world}"), source, str(folder), steps), nprocs=world)
        (found,) = checkpoint.found(folder)
        source = str(found)
        assert json.loads((found / checkpoint.STATE).read_text())["step"] == steps
        assert not checkpoint.damage(found)
        assert len(list(found.glob("head-*"))) == world
        assert len(whole_head(found)["weight"]) == len(whole_head(found / checkpoint.BEST)["weight"]) == 6


@pytest.mark.parametrize("changes", [{}, {"warm_up_similar": 0.5, "warm_up": 0.6}, {"accumulate": 2}])
@pytest.mark.parametrize("at", [3, 6])
def test_a_resumed_run_is_the_run_that_was_never_cut_off(changes, at, tmp_path):
    """`at` is in the warm-up or in the margin, between two looks for similar prototypes."""
    said = config(**({"warm_up": 0.4, "text_share": 0.0, "minutes": 1e9} | changes))  # texts: AdamW makes much of what is rounding alone

    def save(figures: dict, due: bool) -> None:
        if figures["step"] == at and "loss" in figures:
            checkpoint.keep(whole, tmp_path)

    whole = Trainer(said, corpus(), save)
    whole.run()
    again = Trainer(said, corpus(), ignore)
    checkpoint.restore(again, checkpoint.found(tmp_path)[0])
    assert again.course.step == at + 1
    again.run()
    assert largest_difference(whole, again) < 1e-5
    assert [c["step"] for c in whole.course.curves] == [c["step"] for c in again.course.curves]


def test_a_kill_among_the_centroids_does_them_again_and_nothing_else(tmp_path):
    class Killed(Exception):
        pass

    def report(figures: dict, due: bool) -> None:
        if due:
            checkpoint.keep(trainer, tmp_path)
        if "encoded" in figures:
            raise Killed

    said = config(text_share=0.0, minutes=1e9)  # no clock in the schedules
    trainer = Trainer(said, corpus(), report)
    with pytest.raises(Killed):
        trainer.run()
    seen = []
    again = Trainer(said, corpus(), lambda figures, due: seen.append(figures))
    checkpoint.restore(again, checkpoint.found(tmp_path)[0])
    assert (again.course.stage, again.course.step) == ("centroids", 5)
    again.run()
    assert [f["stage"] for f in seen[:3]] == ["centroids", "margin", "margin"]
    assert [f["step"] for f in seen if "loss" in f] == list(range(5, 12))
    whole = Trainer(said, corpus(), ignore)
    whole.run()
    assert largest_difference(whole, again) < 1e-5


def test_restored_tensors_are_bit_exact_and_a_missing_shard_is_named(tmp_path):
    trainer = trained(tmp_path)
    (folder,) = checkpoint.found(tmp_path)
    again = Trainer(config(steps=8), corpus(), ignore)
    checkpoint.restore(again, folder)
    assert torch.equal(again.head.whole(), trainer.head.whole())
    assert all(torch.equal(a, b) for a, b in zip(again.model.state_dict().values(), trainer.model.state_dict().values(), strict=True))
    slots = [trainer.optimizer.state_dict()["state"], again.optimizer.state_dict()["state"]]
    assert all(torch.equal(slots[0][i][k], slots[1][i][k]) for i in slots[0] for k in slots[0][i])
    (folder / "head-0-of-1.safetensors").rename(folder / "head-1-of-2.safetensors")
    with pytest.raises(ValueError, match=r"head-0-of-1\.safetensors is missing"):
        checkpoint.restore(again, folder)


def test_the_mapping_of_prototypes_goes_by_their_names():
    found = mapping(["a", "b", "c", "d#part-7"], ["c", "new", "a", "a#part-3", "d#part-7", "x#part-1"])
    assert found.tolist() == [2, -1, 0, 0, 3, -1]


def test_prototypes_come_and_go_and_those_that_stay_are_bit_exact(tmp_path):
    old = Trainer(config(steps=8), corpus(names=["a", "b", "c", "d", "e", "f"]), ignore)
    old.run()
    folder = checkpoint.keep(old, tmp_path)
    # a and b were merged into a, d is gone, g is new, and rows come in another order
    names = ["g", "f", "a", "e", "c"]
    made = corpus(5, names=names)
    again = Trainer(config(steps=12), made, ignore)
    checkpoint.restore(again, folder)
    before, now = old.head.whole(), again.head.whole()
    for name in "face":
        assert torch.equal(now[names.index(name)], before["abcdef".index(name)])
    assert torch.allclose(now[0], normalize(again.encode_rows(np.arange(3)).mean(0), dim=0), atol=1e-5), "new ones start as centroids"
    assert again.similar is not None
    assert again.similar.max() < 5
    assert again.run().step == 12


def test_a_larger_catalogue_goes_on_from_what_an_earlier_run_learnt(tmp_path):
    old = Trainer(config(steps=8), corpus(5, names=list("abcde")), ignore)
    old.run()
    earlier = checkpoint.keep(old, tmp_path / "earlier")
    new = Trainer(config(steps=6), corpus(6, names=list("fedcba")), ignore)
    checkpoint.begin(new, tmp_path / "now", str(earlier))
    assert (new.course.stage, new.course.step) == ("margin", 0)
    assert torch.equal(new.head.whole()[1:].flip(0), old.head.whole())
    assert new.run().step == 6
    own = checkpoint.keep(new, tmp_path / "now")
    again = Trainer(config(steps=6), corpus(6, names=list("fedcba")), ignore)
    checkpoint.begin(again, own.parent, str(earlier))
    assert again.course.step == 6, "its own checkpoint goes before the earlier run's"


def test_a_flipped_byte_is_named_and_the_checkpoint_before_it_is_used(tmp_path, caplog):
    trainer = trained(tmp_path)
    older = checkpoint.found(tmp_path)[0]
    trainer.course.step += 1
    newer = checkpoint.keep(trainer, tmp_path)
    assert checkpoint.found(tmp_path) == [newer, older]
    damaged = newer / checkpoint.OPTIMIZER
    data = bytearray(damaged.read_bytes())
    data[-3] ^= 1
    damaged.write_bytes(data)
    assert checkpoint.newest_good(checkpoint.found(tmp_path)) == older
    assert "optimizer.safetensors does not match its checksum" in caplog.text
    with pytest.raises(ValueError, match=r"cannot be used: .*optimizer\.safetensors does not match"):
        checkpoint.restore(trainer, newer)
    (older / checkpoint.MODEL).unlink()
    with pytest.raises(ValueError, match=r"none of the 2 checkpoints is whole: .*model\.safetensors is missing"):
        checkpoint.newest_good(checkpoint.found(tmp_path))
    (older / checkpoint.MANIFEST).write_text("{}")
    assert "is damaged" in checkpoint.damage(older)[0]
    assert checkpoint.newest_good([]) is None


def _killed_while_saving(rank: int, folder: str, files: int) -> None:
    """Dies once `files` files of its second checkpoint are written."""
    trainer = Trainer(config(steps=8), corpus(), ignore)
    trainer.run()
    checkpoint.keep(trainer, Path(folder))
    trainer.course.step += 1
    written = checkpoint._checksum if files >= 6 else None
    left = [files]
    save_file = checkpoint.save_file

    def and_die(*args, **named) -> None:
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
        save_file(*args, **named)

    def checksum_and_die(path: Path):
        if path.name == checkpoint.STATE:
            os.kill(os.getpid(), signal.SIGKILL)
        assert written
        return written(path)

    checkpoint.save_file = and_die
    if written:
        checkpoint._checksum = checksum_and_die
    checkpoint.keep(trainer, Path(folder))


@pytest.mark.parametrize("files", [0, 2, 6])
def test_a_kill_while_saving_leaves_the_last_good_one(files, tmp_path):
    """Before the first file, between two, and with all written but the manifest."""
    with pytest.raises(mp.ProcessExitedException, match="SIGKILL"):
        mp.spawn(_killed_while_saving, args=(str(tmp_path), files), nprocs=1)
    assert (tmp_path / "partial-000000009").exists(), "it was killed at another time than it should"
    trainer = Trainer(config(steps=8), corpus(), ignore)
    checkpoint.begin(trainer, tmp_path)
    assert trainer.course.step == 8
    assert not (tmp_path / "partial-000000009").exists(), "what the dead one left is removed"
    trainer.course.step = 9
    checkpoint.keep(trainer, tmp_path)
    assert [path.name for path in checkpoint.found(tmp_path)] == ["step-000000009", "step-000000008"]


def test_the_best_look_is_kept_with_its_prototypes(tmp_path):
    recalls = iter([0.5, 0.9, 0.1, 0.2, 0.3, 0.4])
    weights = {}

    def report(figures: dict, due: bool) -> None:
        if due and figures.get("held_R@1") is not None:
            weights[trainer.course.step] = (trainer.model.image_out.weight.detach().clone(), trainer.head.whole())
        if due:
            checkpoint.keep(trainer, tmp_path)

    trainer = Trainer(config(warm_up=0.0, patience=3, checkpoint_seconds=1e-6), corpus(held=6), report)
    trainer.encoder.held_recall = lambda: next(recalls)
    trainer.run()
    assert trainer.course.step == 5, "the look after step 2 was the best, three more were no better"
    folder = checkpoint.found(tmp_path)[0]
    kept = load_file(folder / checkpoint.BEST / checkpoint.MODEL)
    assert torch.equal(kept["image_out.weight"], weights[2][0])
    assert not torch.equal(load_file(folder / checkpoint.MODEL)["image_out.weight"], weights[2][0])
    assert torch.equal(normalize(whole_head(folder / checkpoint.BEST)["weight"], dim=1), weights[2][1])


def test_what_curation_changed_goes_on(tmp_path):
    class Curious(Trainer):
        def purge(self) -> None:
            if not self.labelling.changed:
                self.labelling.set(np.roll(self.labelling.labels, 1), np.where(np.arange(18) == 4, 0.0, 1.0))

    trainer = Curious(config(steps=8), corpus(), ignore)
    trainer.run()
    assert trainer.labelling.changed
    folder = checkpoint.keep(trainer, tmp_path)
    again = Trainer(config(steps=12), corpus(), ignore)
    checkpoint.restore(again, folder)
    assert np.array_equal(again.labelling.labels, trainer.labelling.labels)
    assert again.labelling.weights[4] == 0
    assert 4 not in again.labelling.members.rows
