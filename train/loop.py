"""The three stages as one plain loop: warm-up, centroids, angular margin. Runs alone, or on every worker of a process group.

Everything random comes from (seed, step, rank), so a step can be replayed after a crash and gives the same again.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from train import augment, losses, plan
from train.backbones.base import Backbone
from train.backbones.compact import Compact, CompactConfig
from train.corpus import Corpus
from train.embedder import Embedder
from train.neighbours import nearest, neighbours
from train.prototypes import PrototypeHead, gather

STAGES = ("warm-up", "margin")


class LoopConfig(BaseModel):
    """Training ends at `minutes` of wall time or at `steps`, whichever comes first; schedules follow the one that is ahead."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    model: CompactConfig = CompactConfig()
    minutes: Annotated[float, Field(gt=0)] = 2.0
    steps: Annotated[int, Field(ge=1)] = 100_000
    batch: Annotated[int, Field(ge=8)] = 128  # over all workers
    per_id: Annotated[int, Field(ge=2)] = 2
    warm_up: Annotated[float, Field(ge=0, lt=1)] = 0.4  # share of the run spent on InfoNCE
    prefixes: tuple[int, ...] = (64, 128, 256)
    tau: Annotated[float, Field(gt=0)] = 0.1
    scale: Annotated[float, Field(gt=0)] = 24.0
    margin: Annotated[float, Field(ge=0, lt=1.5)] = 0.25
    similar: Annotated[float, Field(ge=0, le=1)] = 0.5
    refresh: Annotated[int, Field(ge=1)] = 200  # steps between looks for similar prototypes
    text_share: Annotated[float, Field(ge=0, le=1)] = 0.15  # of a batch, that bring their text
    lr: Annotated[float, Field(gt=0)] = 2e-3
    head_lr: Annotated[float, Field(gt=0)] = 2e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    augment: Annotated[float, Field(ge=0, le=1.5)] = 1.0
    bf16: bool = True  # where the hardware computes in it
    seed: int = 0
    checkpoint_seconds: Annotated[float, Field(gt=0)] = 45.0

    def model_post_init(self, _: Any) -> None:
        if bad := [d for d in self.prefixes if not 1 <= d <= self.model.dim]:
            raise ValueError(f"prefixes {bad} are not in 1..{self.model.dim}, the model's dim")


def computes_bf16(device: torch.device) -> bool:
    """Whether `device` has instructions for bfloat16: without AVX-512 a convolution in it was seen to take 22 s in place of 1.5 s."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported()


@dataclass
class Trained:
    """What the loop leaves on every worker; `curves` has a row of figures every tenth step and at each checkpoint."""

    model: Backbone
    head: PrototypeHead
    step: int
    seconds: float
    curves: list[dict[str, Any]]


def _rank_world() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


class Trainer:
    """One worker's part of the run. `report(figures, due)` is called every step; `due`, on all workers alike, asks for a checkpoint."""

    def __init__(
        self, config: LoopConfig, corpus: Corpus, report: Callable[[dict[str, Any], bool], None], *, device: str | torch.device = "cpu"
    ) -> None:
        self.rank, self.world = _rank_world()
        self.device = torch.device(device)
        if config.batch % (config.per_id * self.world):
            raise ValueError(f"batch {config.batch} does not divide into pairs of {config.per_id} over {self.world} workers")
        self.config, self.corpus, self.report = config, corpus, report
        torch.manual_seed(config.seed)
        self.model: Backbone = Compact(config.model).to(self.device)
        self.members = plan.Members(corpus.labels)
        self.head = PrototypeHead(len(self.members), config.model.dim, rank=self.rank, world=self.world).to(self.device)
        self._freeze_what_is_never_used()
        self.net = DistributedDataParallel(self.model) if self.world > 1 else self.model
        self.optimizer = torch.optim.AdamW(self._groups(), lr=config.lr, betas=(0.9, 0.98))
        self.step, self.before, self.curves = 0, 0.0, []
        self.stage = STAGES[0]
        self.similar: np.ndarray | None = None

    def _freeze_what_is_never_used(self) -> None:
        """DDP waits for every parameter: without texts (or pictures) in the corpus, or in the batches, their model stands still."""
        self.titled = np.flatnonzero([bool(title) for title in self.corpus.titles])
        self.texts_used = self.config.text_share > 0 and len(self.titled) > 0
        self.images_used = bool(self.corpus.has_image.any())
        if not self.texts_used and not self.images_used:
            raise ValueError("the training items have neither pictures nor texts")
        self.model.train_only(images=self.images_used, texts=self.texts_used)

    def _groups(self) -> list[dict[str, Any]]:
        trained = [p for p in self.model.parameters() if p.requires_grad]
        decay, plain = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim <= 1]
        return [
            {"params": decay, "weight_decay": self.config.weight_decay, "peak": self.config.lr},
            {"params": plain, "weight_decay": 0.0, "peak": self.config.lr},
            {"params": [self.head.weight], "weight_decay": 0.0, "peak": self.config.head_lr},
        ]

    def state(self) -> dict[str, Any]:
        """The counters that a run goes on from; `step` is the next one."""
        return {"step": self.step, "seconds": self.elapsed(), "stage": self.stage, "curves": self.curves}

    def _same_everywhere(self, value: float) -> float:
        """Worker 0's value, on every worker: clocks differ, decisions must not."""
        if self.world == 1:
            return value
        shared = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.broadcast(shared, 0)
        return shared.item()

    def elapsed(self) -> float:
        return self.before + time.perf_counter() - self.start

    def progress(self) -> float:
        """0..1, the same on every worker: worker 0's clock decides."""
        seconds = self._same_everywhere(self.elapsed())
        return min(1.0, max(seconds / (60 * self.config.minutes), self.step / self.config.steps))

    def run(self) -> Trained:
        """All three stages, from wherever the state stands."""
        self.start = last_saved = time.perf_counter()
        while (progress := self.progress()) < 1:
            if self.stage == "warm-up" and progress >= self.config.warm_up:
                self._to_margin()
            figures = self._step(progress)
            if self.step % 10 == 0:
                self.curves.append(figures)
            self.step += 1
            due = self._same_everywhere(time.perf_counter() - last_saved) > self.config.checkpoint_seconds
            if due:
                figures["held_R@1"] = self.held_recall() if self.rank == 0 else None
                self.curves.append(figures)
                last_saved = time.perf_counter()
            self.report({**figures, "progress": progress}, due)
        if self.curves:
            self.curves.append(
                {
                    **self.curves[-1],
                    "step": self.step,
                    "seconds": self.elapsed(),
                    "held_R@1": self.held_recall() if self.rank == 0 else None,
                }
            )
        return Trained(self.model, self.head, self.step, self.elapsed(), self.curves)

    def _to_margin(self) -> None:
        """Stage 2 to stage 3: the head starts from the centroids of what the warm-up learnt."""
        self.stage = STAGES[1]
        self.head.start_from(self.centroids())
        self.optimizer.state.pop(self.head.weight, None)
        self.look_for_similar()

    def look_for_similar(self) -> None:
        rows = F.normalize(self.head.whole(), dim=1).cpu().numpy()
        self.similar = neighbours(rows, min(12, len(self.members) - 1))

    def _schedule(self, progress: float) -> float:
        """Linear rise over the first 3 % of the run, then half a cosine to zero; the margin rises over its own stage."""
        rate = min(1.0, progress / 0.03 + 0.01) * 0.5 * (1 + np.cos(np.pi * progress))
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * rate
        stage = (progress - self.config.warm_up) / (1 - self.config.warm_up)
        return self.config.margin * min(1.0, max(0.0, stage / 0.7))

    def _step(self, progress: float) -> dict[str, Any]:
        margin = self._schedule(progress)
        if self.stage == "margin" and self.step % self.config.refresh == 0:
            self.look_for_similar()
        rows = plan.batch(
            self.members,
            seed=self.config.seed,
            step=self.step,
            size=self.config.batch,
            per_id=self.config.per_id,
            neighbours=self.similar,
            similar=self.config.similar,
        )
        mine = plan.share(rows, self.rank, self.world, self.config.per_id)
        labels = torch.from_numpy(self.corpus.labels[mine]).to(self.device)
        h = self._embed(mine)
        if self.stage == "warm-up":
            everyone, ids = gather(h), gather(labels)
            own = torch.arange(len(h), device=self.device) + self.rank * len(h)
            loss = losses.info_nce(h, everyone, labels, ids, own, prefixes=self.config.prefixes, tau=self.config.tau)
            # DDP and the optimizer want every parameter in the graph; the head rests in this stage.
            loss = loss + 0.0 * self.head.weight.sum()
        else:
            loss = self.head.loss(h, labels, prefixes=self.config.prefixes, scale=self.config.scale, margin=margin)
        self._descend(loss)
        return {
            "step": self.step,
            "seconds": round(self.elapsed(), 2),
            "stage": self.stage,
            "loss": loss.item(),
            "margin": round(margin, 4),
        }

    def _descend(self, loss: Tensor) -> None:
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss.item()} at step {self.step} ({self.stage}); the last checkpoint stands")
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 5.0)
        self.optimizer.step()

    def _embed(self, rows: np.ndarray) -> Tensor:
        """Embeddings (b, D) of augmented rows; modality dropout decides which bring their picture, their text, or both."""
        random = np.random.default_rng((self.config.seed, self.step, self.rank, 1))
        with_text = self._texts_of(rows, random)
        only_text = with_text & ((random.random(len(rows)) < 0.5) | ~self.corpus.has_image[rows])
        image_rows, text_rows = np.flatnonzero(self.corpus.has_image[rows] & ~only_text), np.flatnonzero(with_text)
        asked = len(rows)
        if self.images_used and len(image_rows) < 2:  # batch norm needs two, and DDP every parameter: their vectors are dropped
            image_rows = np.concatenate([image_rows, [len(rows), len(rows) + 1]])
            rows = np.concatenate([rows, np.resize(np.flatnonzero(self.corpus.has_image), 2)])
        if self.texts_used and not len(text_rows):
            text_rows, rows = np.array([len(rows)]), np.append(rows, self.titled[0])
        x = None
        if self.images_used:
            stored = torch.from_numpy(self.corpus.pixels(rows[image_rows], self.model.side * 4 // 3))
            generator = torch.Generator().manual_seed(int(random.integers(2**62)))
            x = augment.photo(stored, self.model.side, generator, strength=self.config.augment)
        texts = [self._noisy(self.corpus.titles[int(r)], random) for r in rows[text_rows]] if self.texts_used else []
        return self._forward(self.net, x, image_rows, texts, text_rows[: len(texts)], len(rows))[:asked]

    def _forward(
        self, net: nn.Module, x: Tensor | None, image_rows: np.ndarray, texts: list[str], text_rows: np.ndarray, count: int
    ) -> Tensor:
        """(count, D) float32 on the trainer's device, from inputs on the CPU."""
        inputs = {k: v.to(self.device) for k, v in self.model.collate(x, image_rows, texts, text_rows, count).items()}
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.bf16 and computes_bf16(self.device)):
            return net(inputs, count).float()

    def _texts_of(self, rows: np.ndarray, random: np.random.Generator) -> np.ndarray:
        titled = np.array([bool(self.corpus.titles[r]) for r in rows])
        if not self.texts_used:
            return np.zeros(len(rows), bool)
        return titled & ((random.random(len(rows)) < self.config.text_share) | ~self.corpus.has_image[rows])

    @staticmethod
    def _noisy(title: str, random: np.random.Generator) -> str:
        """Sellers leave out words and change their order; a title of one word stays."""
        words = title.split()
        kept = [w for w in words if random.random() > 0.2] or words
        return " ".join(random.permutation(kept)) if random.random() < 0.3 else " ".join(kept)

    @torch.inference_mode()
    def encode_rows(self, rows: np.ndarray) -> Tensor:
        """Embeddings of rows as they are, without augmentation: the picture where there is one, else the text."""
        self.model.eval()
        parts = [torch.zeros(0, self.config.model.dim, device=self.device)]
        for start in range(0, len(rows), 128):
            block = rows[start : start + 128]
            image_rows, text_rows = np.flatnonzero(self.corpus.has_image[block]), np.flatnonzero(~self.corpus.has_image[block])
            x = None
            if len(image_rows):
                stored = torch.from_numpy(self.corpus.pixels(block[image_rows], self.model.side * 4 // 3))
                x = augment.photo(stored, self.model.side, torch.Generator(), strength=0.0)
            texts = [self.corpus.titles[int(r)] for r in block[text_rows]]
            parts.append(self._forward(self.model, x, image_rows, texts, text_rows, len(block)))
        self.model.train()
        return torch.cat(parts)

    def centroids(self, most: int = 8) -> Tensor:
        """(U, D) normalised means of at most `most` members of each ID; the workers encode a share each."""
        rows = np.concatenate([self.members.rows[a:b][:most] for a, b in zip(self.members.offsets, self.members.offsets[1:], strict=False)])
        mine = rows[self.rank :: self.world]
        sums = torch.zeros(len(self.members), self.config.model.dim, device=self.device)
        sums.index_add_(0, torch.from_numpy(self.corpus.labels[mine]).to(self.device), self.encode_rows(mine))
        if self.world > 1:
            dist.all_reduce(sums)
        return F.normalize(sums, dim=1)

    def held_recall(self) -> float | None:
        """R@1 on the held-back slice by the reader that will be served; the first picture of each product is its gallery."""
        if self.corpus.held_fetch is None:
            return None
        data, products = self.corpus.held_fetch()
        if len(set(products.tolist())) < 2:
            return None
        vectors = Embedder(self.model).encode(data, None)
        self.model.train()
        first = np.unique(products, return_index=True)[1]
        queries = np.setdiff1d(np.arange(len(products)), first)
        if not len(queries):
            return None
        _, found = nearest(vectors[queries], vectors[first], 1)
        return round(float((products[first][found[:, 0]] == products[queries]).mean()), 4)
