"""What can go wrong in training: each ends in recovery or in an error that says what, where, and what stands."""

import numpy as np
import pytest
import torch

from tests.train.small import config, corpus, ignore, picture
from train import checkpoint
from train.labelling import Labelling
from train.loop import Trainer


def test_a_loss_that_is_not_finite_names_the_step_and_what_stands(tmp_path):
    def report(figures: dict, due: bool) -> None:
        if figures["step"] == 7:
            with torch.no_grad():
                trainer.model.image_out.weight.fill_(float("nan"))
        if due:
            checkpoint.keep(trainer, tmp_path)

    trainer = Trainer(config(), corpus(), report)
    with pytest.raises(FloatingPointError, match=r"the loss is nan at step 8 \(margin\).*the checkpoint of step 5 stands"):
        trainer.run()
    again = Trainer(config(), corpus(), ignore)
    checkpoint.begin(again, tmp_path)
    assert again.run().step == 12, "the last good state goes on"


def test_without_a_checkpoint_that_is_said():
    trainer = Trainer(config(), corpus(), ignore)
    with torch.no_grad():
        trainer.model.image_out.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=r"at step 0 \(warm-up\).*there is no checkpoint yet"):
        trainer.run()


@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("stage", ["warm-up", "margin"])
def test_some_steps_may_be_left_out_and_move_nothing(where, stage):
    at = {"warm-up": 2, "margin": 8}[stage]

    class Unlucky(Trainer):
        def _loss(self, h, rows, margin):
            loss = super()._loss(h, rows, margin)
            if self.course.step != at:
                return loss
            return loss * float("nan") if where == "loss" else loss + (h * 0).sqrt().sum()  # finite, its gradient is not

    def report(figures: dict, due: bool) -> None:
        if "loss" in figures:
            states[figures["step"]] = [p.detach().clone() for p in (*trainer.model.parameters(), trainer.head.whole())]

    states: dict[int, list[torch.Tensor]] = {}
    trainer = Unlucky(config(max_skipped=1), corpus(), report)
    assert trainer.run().step == 12
    assert trainer.course.skipped == 1
    assert all(torch.equal(a, b) for a, b in zip(states[at - 1], states[at], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(states[at], states[at + 1], strict=True))


def test_a_picture_that_no_longer_decodes_is_named_and_ends_the_run(tmp_path):
    made = corpus()
    made.item_ids = [f"sku-{row}" for row in range(18)]
    made.cache_bytes = 0
    broken: set[int] = set()
    made.fetch = lambda rows: [b"rotten" if int(r) in broken else picture(r, made.labels[r]) for r in rows]

    def report(figures: dict, due: bool) -> None:
        if due:
            checkpoint.keep(trainer, tmp_path)
            broken.add(4)

    trainer = Trainer(config(steps=60), made, report)
    with pytest.raises(ValueError, match=r"the picture of row 4 \(item sku-4\) does not decode any more: .*ingest"):
        trainer.run()
    assert not checkpoint.damage(checkpoint.found(tmp_path)[0])


def test_a_label_out_of_range_is_named():
    for bad in (-1, 6):
        labels = np.repeat(np.arange(6), 3)
        labels[5] = bad
        with pytest.raises(ValueError, match=rf"row 5 has the label {bad}; allowed are 0\.\.5"):
            Labelling(labels, 6)
    made = corpus(names=list("abcde"))
    with pytest.raises(ValueError, match=r"row 15 has the label 5; allowed are 0\.\.4 \(3 such rows\)"):
        Trainer(config(), made, ignore)


def test_an_id_without_a_row_is_named():
    with pytest.raises(ValueError, match=r"no row is left of ID 2 \(1 such IDs of 6\)"):
        Labelling(np.repeat(np.arange(6), 3), 6, np.where(np.repeat(np.arange(6), 3) == 2, 0.0, 1.0))


def test_one_class_only_is_refused():
    with pytest.raises(ValueError, match="at least 2 products to tell apart, found 1"):
        Trainer(config(), corpus(1), ignore)


def test_nothing_to_train_on_is_refused():
    with pytest.raises(ValueError, match="not one item to train on"):
        corpus(0)
    with pytest.raises(ValueError, match="neither pictures nor texts"):
        Trainer(config(), corpus(titles=False, pictures=False), ignore)


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match=r"loop\.batch = 12 must divide by .* = 1 x 2 x 5 = 10"):
        Trainer(config(accumulate=5), corpus(), ignore)


def test_prefixes_beyond_the_model_are_refused():
    with pytest.raises(ValueError, match=r"prefixes \[17\] are not in 1\.\.16"):
        config(prefixes=(8, 17))
