"""Whose labels a run goes on with, where its schedules begin, and that all workers say alike why it cannot."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp

from tests.train.small import config, corpus, ignore, join, leave
from train import checkpoint
from train.corpus import Corpus
from train.course import Looks
from train.labelling import fingerprint
from train.loop import Trainer
from train.settings import LoopConfig


class Counting(Trainer):
    """Knows how often it set rows aside, and does it in a way of its own that can be told from any other."""

    purges = 0

    def purge(self) -> None:
        self.purges += 1
        self.labelling.set(self.labelling.labels, np.where(np.arange(len(self.labelling.labels)) % 3 == self.purges - 1, 0.0, 0.5))


def items() -> Corpus:
    made = corpus(names=list("abcdef"))
    made.item_ids = [f"sku-{row}" for row in range(18)]
    return made


def cut_off(said: LoopConfig, at: int, folder: Path, made: Corpus | None = None, kind: type[Trainer] = Trainer) -> Path:
    """A checkpoint of a run that was killed after the step `at`; of one that came to its end for a step that is never made."""

    class Killed(Exception):
        pass

    def report(figures: dict, due: bool) -> None:
        if figures["step"] == at and "loss" in figures:
            checkpoint.keep(trainer, folder)
            raise Killed

    trainer = kind(said, made or items(), report)
    try:
        trainer.run()
        return checkpoint.keep(trainer, folder)
    except Killed:
        return checkpoint.found(folder)[0]


def other_items(made: Corpus) -> None:
    made.item_ids = [f"sku-{row + 1}" for row in range(18)]


def other_order(made: Corpus) -> None:
    made.item_ids = made.item_ids[::-1]


def other_labels(made: Corpus) -> None:
    made.labels = np.roll(made.labels, 1)


def other_weights(made: Corpus) -> None:
    made.weights = np.linspace(0.5, 1.0, 18)


def fewer_rows(made: Corpus) -> None:
    made.labels, made.has_image, made.item_ids = made.labels[:-1], made.has_image[:-1], made.item_ids[:-1]


def other_names(made: Corpus) -> None:
    made.names = list("fedcba")


CHANGES = [other_items, other_order, other_labels, other_weights, fewer_rows, other_names]


@pytest.mark.parametrize("similar", [0.0, 0.5])
@pytest.mark.parametrize("change", CHANGES)
def test_labels_of_other_rows_are_made_anew(change: Callable[[Corpus], None], similar: float, tmp_path):
    said = config(purge=0.2, similar=similar)
    earlier = cut_off(said, 8, tmp_path / "earlier", kind=Counting)
    made = items()
    change(made)
    for begin in (lambda new: checkpoint.begin(new, tmp_path / "now", str(earlier)), lambda new: checkpoint.restore(new, earlier)):
        new = Counting(said, made, ignore)
        begin(new)
        assert new.purges == 1
        assert np.array_equal(new.labelling.labels, made.labels)
        assert np.array_equal(new.labelling.weights == 0, np.arange(len(made.labels)) % 3 == 0)
        assert (new.similar is None) == (similar == 0)


def test_what_looked_best_of_other_rows_is_forgotten(tmp_path):
    """Its labels and prototypes are theirs."""
    said = config(patience=50)
    earlier = cut_off(said, -1, tmp_path, corpus(held=6))
    for change, known in ((lambda made: None, True), (other_labels, False)):
        made = corpus(held=6)
        change(made)
        again = Trainer(said, made, ignore)
        checkpoint.restore(again, earlier)
        assert (again.course.looks != Looks()) == known
        assert (again.folder / checkpoint.BEST).exists() == known


@pytest.mark.parametrize("similar", [0.0, 0.5])
def test_labels_of_the_same_rows_are_kept_to_the_bit(similar, tmp_path):
    """Also where nobody knows the items' ids."""
    said = config(purge=0.2, similar=similar)
    for made in (items(), corpus()):
        folder = tmp_path / str(len(made.item_ids))
        earlier = cut_off(said, 8, folder / "earlier", made, Counting)
        for begin in (lambda t, f=folder, e=earlier: checkpoint.begin(t, f / "now", str(e)), lambda t, e=earlier: checkpoint.restore(t, e)):
            again = Counting(said, made, ignore)
            begin(again)
            assert again.purges == 0
            assert np.array_equal(again.labelling.labels, made.labels)
            kept = np.array([0.0 if row % 3 == 1 else 0.5 for row in range(18)], np.float32)  # of the second time, at step 8
            assert again.labelling.weights.tobytes() == kept.tobytes()


@pytest.mark.parametrize(("similar", "most"), [(0.0, 10), (0.5, 10), (0.5, 3)])  # the last with more prototypes than are all looked up
def test_a_resumed_run_sets_the_same_rows_aside_at_the_same_steps(similar, most, tmp_path, monkeypatch):
    monkeypatch.setattr("train.loop.MOST_SIMILAR", most)
    said = config(purge=0.2, similar=similar, purge_every=1, text_share=0.0, minutes=1e9)
    whole = Trainer(said, items(), ignore)
    whole.run()
    cut_off(said, 7, tmp_path)
    again = Trainer(said, items(), ignore)
    checkpoint.begin(again, tmp_path)
    assert again.course.step == 8, "where both purging and a look for similar prototypes are due"
    again.run()
    assert again.labelling.weights.tobytes() == whole.labelling.weights.tobytes()


def test_the_fingerprint_tells_rows_apart():
    labels, weights = np.repeat(np.arange(3), 2), np.ones(6, np.float32)
    ids = [f"i{row}" for row in range(6)]
    made = [
        fingerprint(labels, weights, list("abc"), ids),
        fingerprint(labels[::-1], weights, list("abc"), ids),
        fingerprint(labels, weights / 2, list("abc"), ids),
        fingerprint(labels, weights, list("abd"), ids),
        fingerprint(labels, weights, list("abc"), ["i0i1", "", *ids[2:]]),
        fingerprint(labels, weights, list("abc"), ["i0", "i1", *ids[:1:-1]]),
        fingerprint(labels, weights, list("abc"), []),
    ]
    assert len(set(made)) == len(made)
    assert fingerprint(labels.astype(np.int32), weights.astype(np.float64), np.array(list("abc")).tolist(), np.array(ids)) == made[0]


ENDED = {
    "cut off in the warm-up": ({}, 2, "warm-up"),
    "cut off in the margin": ({}, 8, "margin"),
    "complete": ({}, -1, "margin"),
    "complete, all of it warm-up": ({"warm_up": 1.0}, -1, "margin"),
}


@pytest.mark.parametrize("ended", list(ENDED))
def test_from_an_earlier_run_the_schedules_begin_anew(ended, tmp_path):
    changes, at, stage = ENDED[ended]
    earlier = cut_off(config(patience=50, **changes), at, tmp_path / "earlier", corpus(held=6))
    for warm_up, first in ((0.4, "warm-up"), (0.0, "centroids")):
        new = Trainer(config(steps=6, patience=50, warm_up=warm_up), corpus(7, held=6), ignore)
        checkpoint.begin(new, tmp_path / "now", str(earlier))
        course = new.course
        assert course.stage == (stage if stage == "margin" else first)
        assert (course.step, course.images, course.before, course.skipped, course.saved) == (0, 0, 0.0, 0, -1)
        assert (course.curves, course.looks) == ([], Looks())
        assert not (new.folder / checkpoint.BEST).exists()
        assert new.progress() < 0.1
        assert new.run().step == 6
        assert {c["stage"] for c in course.curves if "lr" in c} <= ({"margin"} if stage == "margin" else {"warm-up", "margin"})


def test_after_a_warm_up_that_is_over_the_margin_rises_from_the_first_step(tmp_path):
    earlier, seen = cut_off(config(), 8, tmp_path / "earlier"), []
    new = Trainer(config(steps=10, margin=0.2, warm_up=0.5), items(), lambda figures, due: seen.append(figures.get("margin")))
    checkpoint.begin(new, tmp_path / "now", str(earlier))
    new.run()
    assert [m for m in seen if m is not None][:4] == pytest.approx([0, 0.2 / 7, 0.4 / 7, 0.6 / 7], abs=1e-4)


def test_a_run_of_warm_up_alone_stays_one_whatever_it_starts_from(tmp_path):
    earlier = cut_off(config(), -1, tmp_path / "earlier")
    new = Trainer(config(steps=6, warm_up=1.0), items(), ignore)
    checkpoint.begin(new, tmp_path / "now", str(earlier))
    assert new.course.stage == "warm-up"


def test_prototypes_of_an_earlier_run_grow_stale_by_the_steps_of_this_one(tmp_path):
    earlier = cut_off(config(steps=30), -1, tmp_path / "earlier")
    new = Trainer(config(), items(), ignore)
    checkpoint.begin(new, tmp_path / "now", str(earlier))
    assert new.head.store.used == 6, "their optimizer's state is kept"
    assert new.head.stale_share(20, 10) == 0, "not a step was made"
    h = new.encode_rows(np.arange(4))
    new.head.loss(h, torch.arange(4), prefixes=(16,), scale=16.0, margin=0.1, step=0)  # which moves no row
    assert new.head.stale_share(10, 10) == 1


def test_an_earlier_run_that_is_damaged_is_not_to_be_removed(tmp_path):
    earlier = cut_off(config(), 2, tmp_path / "earlier")
    (earlier / checkpoint.MODEL).unlink()
    new = Trainer(config(), items(), ignore)
    with pytest.raises(ValueError, match=r"model\.safetensors is missing; choose another start_from, or none") as error:
        checkpoint.begin(new, tmp_path / "now", str(earlier))
    assert f"the checkpoint at {earlier} cannot be used" in str(error.value)
    assert "emove" not in str(error.value)
    with pytest.raises(ValueError, match=r"never finished; choose another start_from"):
        checkpoint.begin(new, tmp_path / "now", str(tmp_path))


def test_what_earlier_tries_left_half_written_goes_when_a_run_begins(tmp_path):
    left = tmp_path / f"{checkpoint.PARTIAL}000000003" / checkpoint.BEST
    left.mkdir(parents=True)
    (left / checkpoint.MODEL).write_bytes(b"half")
    stands = cut_off(config(), 2, tmp_path)
    checkpoint.begin(Trainer(config(), items(), ignore), tmp_path)
    assert list(tmp_path.iterdir()) == [stands]


def test_a_run_that_goes_on_computes_each_checksum_once(tmp_path, monkeypatch):
    stands = cut_off(config(), 2, tmp_path)
    seen: list[str] = []
    checksum = checkpoint._checksum
    monkeypatch.setattr(checkpoint, "_checksum", lambda path: seen.append(path.name) or checksum(path))
    checkpoint.begin(Trainer(config(), items(), ignore), tmp_path)
    assert sorted(seen) == sorted({path.name for path in stands.iterdir()} - {checkpoint.MANIFEST})


def _no_folder(rank: int, world: int, meet: str, out: str) -> None:
    join(rank, world, meet)
    folder = Path(out) / "rows"
    try:
        Trainer(config(head={"storage": "file", "folder": str(folder if rank == 0 else Path(out) / "nowhere")}), items(), ignore)
    except ValueError as error:
        (Path(out) / str(rank)).write_text(str(error))
    leave()


def test_all_workers_refuse_alike_what_one_of_them_cannot_hold(tmp_path):
    (tmp_path / "rows").mkdir()
    mp.spawn(_no_folder, args=(2, str(tmp_path / "meet"), str(tmp_path)), nprocs=2)
    said = [(tmp_path / str(rank)).read_text() for rank in range(2)]
    assert said[0] == said[1]
    assert "nowhere' is no folder" in said[0]


def _refused(rank: int, world: int, meet: str, stands: str, out: str) -> None:
    join(rank, world, meet)
    trainer, said = Trainer(config(), items(), ignore), []
    for begin in (
        lambda: checkpoint.restore(trainer, Path(stands)),
        lambda: checkpoint.begin(trainer, Path(stands).parent),
        lambda: checkpoint.begin(trainer, Path(out), stands),
    ):
        try:
            begin()
            said.append("nothing")
        except ValueError as error:
            said.append(str(error))
    (Path(out) / str(rank)).write_text("\n".join(said))
    leave()


def test_all_workers_refuse_a_damaged_checkpoint_alike(tmp_path):
    stands = cut_off(config(), 2, tmp_path / "run")
    (stands / checkpoint.OPTIMIZER).unlink()
    out = tmp_path / "out"
    out.mkdir()
    mp.spawn(_refused, args=(2, str(tmp_path / "meet"), str(stands), str(out)), nprocs=2)
    said = [(out / str(rank)).read_text() for rank in range(2)]
    assert said[0] == said[1]
    assert said[0].count("optimizer.safetensors is missing") == 3
