"""What can be set of a training run, and the schedules that follow its progress."""

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from train.backbones import BackboneConfig
from train.backbones.compact import CompactConfig
from train.head.prototypes import HeadConfig


class LoopConfig(BaseModel):
    """Training ends at `minutes` of wall time or at `steps`, whichever comes first; schedules follow the one that is ahead.

    `warm_up` is the share of the run spent on InfoNCE: 0 goes to the centroids at once, 1 is InfoNCE all the way (the baseline).
    `similar` and `warm_up_similar` are the shares of a batch whose IDs come with their nearest neighbours, in the margin stage and
    in the warm-up (mined hard negatives; 0 is off). `accumulate` cuts a worker's batch into as many micro-batches for memory; the
    loss still sees the whole batch, in both stages (train.descent). Against wrong labels: `purge` is the share of all IDs among which
    a member's own must be near it, else it is set aside; `relabel` the cosine by which another ID must be nearer than the next to
    take it over; 0 is off (train.noise; docs/decisions/0007).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    model: BackboneConfig = CompactConfig()
    head: HeadConfig = HeadConfig()
    minutes: Annotated[float, Field(gt=0)] = 2.0
    steps: Annotated[int, Field(ge=1)] = 100_000
    images: Annotated[int, Field(ge=0)] = 0  # rows drawn in all that end the run as well; 0 is no bound
    batch: Annotated[int, Field(ge=8)] = 128  # of the warm-up, over all workers
    per_id: Annotated[int, Field(ge=2)] = 2
    margin_batch: Annotated[int, Field(ge=1)] = 64  # of the margin stage
    margin_per_id: Annotated[int, Field(ge=1)] = 1
    accumulate: Annotated[int, Field(ge=1)] = 1
    parallel: Literal["ddp", "fsdp2"] = "ddp"
    warm_up: Annotated[float, Field(ge=0, le=1)] = 0.1
    warm_up_similar: Annotated[float, Field(ge=0, le=1)] = 0.0
    prefixes: tuple[int, ...] = (64, 128, 256)
    tau: Annotated[float, Field(gt=0)] = 0.1
    scale: Annotated[float, Field(gt=0)] = 24.0
    margin: Annotated[float, Field(ge=0, lt=1.5)] = 0.25
    similar: Annotated[float, Field(ge=0, le=1)] = 0.25
    refresh: Annotated[int, Field(ge=1)] = 200  # steps between looks for similar prototypes
    purge: Annotated[float, Field(ge=0, le=1)] = 0.0
    relabel: Annotated[float, Field(ge=0, le=2)] = 0.0
    purge_every: Annotated[int, Field(ge=1)] = 2  # of these looks, in the margin stage
    text_share: Annotated[float, Field(ge=0, le=1)] = 0.15  # of a batch, that bring their text
    lr: Annotated[float, Field(gt=0)] = 1e-3
    head_lr: Annotated[float, Field(gt=0)] = 1e-2
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    augment: Annotated[float, Field(ge=0, le=1.5)] = 1.0
    bf16: bool = True  # where the hardware computes in it
    seed: int = 0
    prefetch: Annotated[int, Field(ge=0)] = 2  # batches decoded ahead of the step that takes them; 0 decodes within the step
    decode_threads: Annotated[int, Field(ge=1)] = 1  # of each worker
    stale: Annotated[int, Field(ge=1)] = 1000  # steps without a touch after which a prototype counts as stale
    patience: Annotated[int, Field(ge=0)] = 0  # looks at the held-back slice without a better R@1 that end the run; 0 is off
    max_skipped: Annotated[int, Field(ge=0)] = 0  # steps whose loss is not finite that are left out before the run gives up
    checkpoint_seconds: Annotated[float, Field(gt=0)] = 45.0

    def model_post_init(self, _: Any) -> None:
        if bad := [d for d in self.prefixes if not 1 <= d <= self.model.dim]:
            raise ValueError(f"prefixes {bad} are not in 1..{self.model.dim}, the model's dim")
        if self.relabel and not self.purge:
            raise ValueError(f"relabel = {self.relabel} moves members that a purge would set aside, and purge is 0; set both, or neither")

    def drawn(self, stage: str) -> tuple[int, int]:
        """Rows of a global step in this stage, and how many of one ID."""
        return (self.margin_batch, self.margin_per_id) if stage == "margin" else (self.batch, self.per_id)

    def divides(self, workers: int) -> None:
        """ValueError unless every micro-batch of every worker gets whole groups of one ID."""
        for size, per_id, prefix in ((self.batch, self.per_id, ""), (self.margin_batch, self.margin_per_id, "margin_")):
            if size % (groups := per_id * workers * self.accumulate):
                raise ValueError(
                    f"loop.{prefix}batch = {size} must divide by workers x loop.{prefix}per_id x loop.accumulate = {workers} x "
                    f"{per_id} x {self.accumulate} = {groups}, so that every worker gets whole groups of one product"
                )

    def rate(self, progress: float) -> float:
        """The share of the peak learning rate: a linear rise over the first 3 % of the run, then half a cosine to zero."""
        return min(1.0, progress / 0.03 + 0.01) * 0.5 * (1 + math.cos(math.pi * progress))

    def margin_at(self, progress: float, warm_up: float) -> float:
        """Radians; the margin rises over the first 70 % of its own stage, which begins at `warm_up`."""
        if warm_up == 1:
            return 0.0
        stage = (progress - warm_up) / (1 - warm_up)
        return self.margin * min(1.0, max(0.0, stage / 0.7))
