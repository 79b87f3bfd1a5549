"""The three stages as named steps of one plain loop: warm-up, centroids, angular margin (METHOD.md section 2).

It runs alone, or on every worker of a process group. Everything random comes from (seed, step, rank), so a step can be replayed
after a crash and gives the same again. Shapes: b rows of this worker, D dimensions, U prototypes.
"""

import logging
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from train import losses, parallel, plan
from train.backbones import build
from train.backbones.base import Backbone
from train.centroids import centroids
from train.corpus import Corpus
from train.course import Course, Trained
from train.descent import Descent, groups
from train.encoder import Encoder
from train.feed import Feed
from train.head.capacity import Capacity, capacity_of
from train.head.prototypes import PrototypeHead, gather
from train.labelling import Labelling, fingerprint
from train.noise import purged
from train.settings import LoopConfig
from train.views import Viewer, Views

NEIGHBOURS = 11  # prototypes near each that may come into a batch with it
MOST_SIMILAR = 1_000_000  # prototypes that are all looked up at each refresh; beyond, a list of all is neither quick nor small
SAMPLED = 4  # members of an ID that make its centroid in the course of the warm-up
log = logging.getLogger(__name__)


class Trainer:
    """One worker's part of the run. `report(figures, due)` is called every step; `due`, on all workers alike, asks for a checkpoint."""

    def __init__(
        self, config: LoopConfig, corpus: Corpus, report: Callable[[dict[str, Any], bool], None], *, device: str | torch.device = "cpu"
    ) -> None:
        self.rank, self.world = parallel.rank_world()
        self.device = torch.device(device)
        config.divides(self.world)
        self.config, self.corpus, self.report = config, corpus, report
        self.labelling = Labelling(corpus.labels, len(corpus.names), corpus.weights)
        self.rows_id = fingerprint(corpus.labels, self.labelling.given, corpus.names, corpus.item_ids)
        torch.manual_seed(config.seed)
        self.model: Backbone = build(config.model).to(self.device)
        room = self.model.side * 4 // 3  # for the crops of augmentation
        self.viewer = Viewer(corpus, side=room, text_share=config.text_share, parts=config.accumulate)
        self.model.hear(corpus.said())
        self.model.train_only(images=self.viewer.images_used, texts=self.viewer.texts_used)
        self.capacity = self._capacity()
        self._scratch = tempfile.TemporaryDirectory(prefix="idem-train-", dir=config.head.folder or None)
        self.folder = Path(self._scratch.name)  # rows of the head where they live in a file; the best so far
        self.head = self._new_head()
        self.encoder = Encoder(self.model, corpus, device=self.device, bf16=config.bf16)
        self.net = parallel.share_training(self.model, config.parallel)
        self.optimizer = torch.optim.AdamW(groups(self.model, config.weight_decay), lr=config.lr, betas=(0.9, 0.98))
        self.descent = Descent(self.net, self.encoder, self.optimizer, config.augment)
        self.feed = Feed(self._views, depth=config.prefetch, threads=config.decode_threads, end=config.steps)
        self.course = Course.first(config.warm_up)
        self.similar: np.ndarray | None = None

    def _capacity(self) -> Capacity:
        """How many prototypes fit where, and what those of this run take: said before any is made. ValueError where they cannot fit."""
        head, said = self.config.head, self.config

        def found() -> Capacity:
            if head.folder and not Path(head.folder).is_dir():
                raise ValueError(
                    f"head.folder = {head.folder!r} is no folder on this machine; make it, or leave it empty for the system's own"
                )
            ids, dim, prefixes = self.labelling.ids, self.model.dim, len(said.prefixes)
            made = capacity_of(ids, dim, head, device=self.device, world=self.world, batch=said.margin_batch, prefixes=prefixes)
            if self.rank == 0:
                log.info("%s", made)
            made.refuse()
            return made

        return parallel.by_all(found, self.device)

    def _new_head(self) -> PrototypeHead:
        return PrototypeHead(
            self.labelling.ids,
            self.model.dim,
            self.config.head,
            rank=self.rank,
            world=self.world,
            device=self.device,
            seed=self.config.seed,
            folder=self.folder if self.config.head.storage == "file" else None,
        )

    def progress(self) -> float:
        """0..1, the same on every worker: worker 0's clock decides."""
        seconds = parallel.same_everywhere(self.course.elapsed(), self.device)
        images = self.course.images / self.config.images if self.config.images else 0.0
        return min(1.0, max(seconds / (60 * self.config.minutes), self.course.step / self.config.steps, images))

    # The run and its stages

    def run(self) -> Trained:
        """All stages, from wherever the course stands."""
        self.course.begin()
        last_saved = time.perf_counter()
        try:
            while (progress := self.progress()) < 1 and not self.course.looks.exhausted(self.config.patience):
                self._advance(progress)
                figures = self._one(progress)
                due = parallel.same_everywhere(time.perf_counter() - last_saved, self.device) > self.config.checkpoint_seconds
                if due:
                    self._look(figures)
                    last_saved = time.perf_counter()
                self._tell({**figures, "progress": progress}, due)
            self._finish()
        finally:
            self.feed.close()
        return Trained(self.model, self.head, self.course.step, self.course.elapsed(), self.course.curves)

    def _advance(self, progress: float) -> None:
        """From stage to stage. That of the centroids has a checkpoint at each end: a kill inside does it again, and it alone."""
        if self.course.stage == "warm-up" and progress >= self.course.warm_up:
            self.course.stage = "centroids"
            self._tell(self.course.told(), True)
        if self.course.stage == "centroids":
            self.purge()
            self.head.start_from(self.centroids())
            self.course.stage = "margin"
            self.mine()
            self._tell(self.course.told(), True)

    def _finish(self) -> None:
        """A last look; and prototypes that mean something where the run never came to the margin."""
        if self.course.stage != "margin":
            self.head.start_from(self.centroids())
        if self.course.curves:
            self._look({**self.course.curves[-1], **self.course.told()})
        self.course.finished = True

    def _tell(self, figures: dict[str, Any], due: bool) -> None:
        self.report(figures, due)
        if due:
            self.course.saved = self.course.step

    # What is done on a schedule

    def purge(self) -> None:
        """Set aside or move the members that their own ID would not be found for, and take back those that it would."""
        if self.config.purge:
            labelling = self.labelling
            labelling.set(*purged(self.encoder, labelling, self.config.purge, self.config.relabel))
            counts, moved = (labelling.weights > 0).mean(), (labelling.labels != labelling.given_labels).mean()
            log.info("step %d: %.1f %% of the rows count, %.1f %% under another ID", self.course.step, 100 * counts, 100 * moved)
            self.feed.restart()

    def mine(self) -> None:
        """Look anew which prototypes are similar."""
        self.course.refreshed = self.course.step
        if self.similar_share() > 0:
            if self.course.stage == "warm-up":
                self.head.start_from(self.centroids(SAMPLED))
            self.similar = self.head.near(np.arange(self.labelling.ids), NEIGHBOURS)
        self.feed.restart()

    def _on_schedule(self, step: int) -> None:
        """Once at a step, also when a run goes on from a checkpoint of that very step."""
        if not step or step % self.config.refresh or self.course.refreshed == step:
            return
        if self.course.stage == "margin" and step // self.config.refresh % self.config.purge_every == 0:
            self.purge()
        self.mine()

    def similar_share(self) -> float:
        """Of a batch, that comes with its nearest IDs; none beyond MOST_SIMILAR, where the head alone looks for neighbours."""
        if self.labelling.ids > MOST_SIMILAR:
            return 0.0
        return self.config.similar if self.course.stage == "margin" else self.config.warm_up_similar

    def _look(self, figures: dict[str, Any]) -> None:
        """Measure on the held-back slice; what counts as the best is of the last stage alone, which the prototypes belong to."""
        figures["held_R@1"] = self.encoder.held_recall()
        if self.course.stage == "margin":
            stale = self.head.stale_share(self.course.step, self.config.stale)
            figures["stale_share"] = round(parallel.mean(stale, self.device), 4)
        if self.course.stage == "margin" or self.config.warm_up == 1:
            self.course.looks.note(figures["held_R@1"], self.course.step)
        self.course.keep(figures)

    # One step

    def _rows(self, step: int) -> np.ndarray:
        """This worker's rows of a step."""
        size, per_id = self.config.drawn(self.course.stage)
        similar = self.similar_share()
        rows = plan.batch(
            self.labelling.members, seed=self.config.seed, step=step, size=size, per_id=per_id, neighbours=self.similar, similar=similar
        )
        return plan.share(rows, self.rank, self.world, per_id)

    def _views(self, step: int) -> Views:
        return self.viewer.draw(self._rows(step), np.random.default_rng((self.config.seed, step, self.rank, 1)))

    def _loss(self, h_bD: Tensor, rows: np.ndarray, margin: float) -> Tensor:
        labels, said = torch.from_numpy(self.labelling.labels[rows]).to(self.device), self.config
        if self.course.stage == "warm-up":
            own = torch.arange(len(h_bD), device=self.device) + self.rank * len(h_bD)
            return losses.info_nce(h_bD, gather(h_bD), labels, gather(labels), own, prefixes=said.prefixes, tau=said.tau)
        weights = torch.from_numpy(self.labelling.weights[rows]) if self.labelling.weighted else None
        return self.head.loss(
            h_bD, labels, prefixes=said.prefixes, scale=said.scale, margin=margin, step=self.course.step, weights_b=weights
        )

    def _one(self, progress: float) -> dict[str, Any]:
        """The figures of one step, which moves the backbone and, in the last stage, the prototypes."""
        step = self.course.step
        self._on_schedule(step)
        rate, margin = self.config.rate(progress), self.config.margin_at(progress, self.course.warm_up)
        views = self.feed.take(step)
        loss = self.descent.backward(views, lambda h: self._loss(h, views.rows, margin))
        if not np.isfinite(loss):
            self._skip(f"the loss is {loss}")
        elif not self.descent.step(self.config.lr * rate):
            self._skip("the gradient is not finite")
        elif self.course.stage == "margin":
            self.head.update(self.config.head_lr * rate)
        figures = {**self.course.told(), "loss": loss, "margin": round(margin, 4), "lr": self.config.lr * rate}
        self.course.note(figures, self.config.drawn(self.course.stage)[0])
        return figures

    def _skip(self, why: str) -> None:
        self.head.discard()
        self.course.skip(why, self.config.max_skipped)

    # Vectors of rows

    def encode_rows(self, rows: np.ndarray) -> Tensor:
        """(n, D): embeddings of rows as in service: the picture where there is one, else the text. This worker alone."""
        return self.encoder.rows(rows)

    def centroids(self, most: int | None = None) -> Tensor:
        """(U, D): see train.centroids; told as the progress of the stage where it is one."""
        tell = self._encoded if self.course.stage == "centroids" else None
        return centroids(self.encoder, self.labelling, most=most, tell=tell)

    def _encoded(self, rows: int) -> None:
        self.report({**self.course.told(), "encoded": rows, "of": len(self.labelling.labels)}, False)
