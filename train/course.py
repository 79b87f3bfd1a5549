"""Where a run stands, what was seen on the way, and what is left: counters, clock, curves, and the looks at the held-back slice."""

import logging
import time
from dataclasses import asdict, dataclass, field
from typing import Any

from train.backbones.base import Backbone
from train.head.prototypes import PrototypeHead

STAGES = ("warm-up", "centroids", "margin")
KEPT = ("stage", "warm_up", "step", "refreshed", "images", "skipped", "finished", "curves")
EVERY = 10  # steps between two rows of the curves
log = logging.getLogger(__name__)


@dataclass
class Trained:
    """What the loop leaves on every worker; `curves` has a row of figures every tenth step and at each checkpoint."""

    model: Backbone
    head: PrototypeHead
    step: int
    seconds: float
    curves: list[dict[str, Any]]


@dataclass
class Looks:
    """R@1 of the best look so far, the step that had it, and the number of looks since."""

    best: float = -1.0
    step: int = -1
    since: int = 0

    def note(self, recall: float | None, step: int) -> None:
        """None, where there is nothing to look at, does not count."""
        if recall is None:
            return
        if recall > self.best:
            self.best, self.step, self.since = recall, step, 0
        else:
            self.since += 1

    def exhausted(self, patience: int) -> bool:
        """Whether as many looks in a row were no better; patience 0 never ends."""
        return 0 < patience <= self.since


@dataclass
class Course:
    """`warm_up` is the share of the run before its margin stage; `step` is the next one, `refreshed` the one of the last refresh;
    `images` counts rows drawn, `skipped` steps left out. A `finished` run has prototypes that mean something, whatever its stage."""

    stage: str
    warm_up: float
    step: int = 0
    refreshed: int = 0
    images: int = 0
    skipped: int = 0
    finished: bool = False
    before: float = 0.0
    looks: Looks = field(default_factory=Looks)
    curves: list[dict[str, Any]] = field(default_factory=list)
    saved: int = -1  # the step of the last checkpoint
    start: float = field(default_factory=time.perf_counter)
    _pace: tuple[int, float] = (0, 0.0)

    def begin(self) -> None:
        """The clock of this run starts."""
        self.start, self.finished = time.perf_counter(), False
        self._pace = (self.images, self.elapsed())

    def elapsed(self) -> float:
        """Seconds of training, with those before the last interruption."""
        return self.before + time.perf_counter() - self.start

    def told(self) -> dict[str, Any]:
        return {"step": self.step, "seconds": round(self.elapsed(), 2), "stage": self.stage}

    def note(self, figures: dict[str, Any], batch: int) -> None:
        """Step on; every tenth step's figures are kept, with the pace since the one before."""
        self.step += 1
        self.images += batch
        if self.step % EVERY != 1:
            return
        images, seconds = self.images - self._pace[0], self.elapsed() - self._pace[1]
        figures["images_per_second"] = round(images / max(seconds, 1e-6), 1)
        self._pace = (self.images, self.elapsed())
        self.curves.append(figures)

    def skip(self, why: str, allowed: int) -> None:
        """A step that is left out, or a FloatingPointError once too many were."""
        self.skipped += 1
        if self.skipped > allowed:
            stands = f"the checkpoint of step {self.saved} stands" if self.saved >= 0 else "there is no checkpoint yet"
            raise FloatingPointError(
                f"{why} at step {self.step} ({self.stage}); such steps: {self.skipped}, allowed are {allowed} (loop.max_skipped); "
                f"{stands}; a smaller loop.lr may help"
            )
        log.warning("%s at step %d (%s): left out", why, self.step, self.stage)

    def keep(self, figures: dict[str, Any]) -> None:
        """Figures of a look belong to the curves, once."""
        if not self.curves or self.curves[-1] is not figures:
            self.curves.append(figures)

    def state(self) -> dict[str, Any]:
        """What a later run goes on from; JSON can hold it."""
        kept = {name: getattr(self, name) for name in KEPT}
        return {**kept, "seconds": self.elapsed(), "looks": asdict(self.looks)}

    @classmethod
    def first(cls, warm_up: float) -> "Course":
        """A run from its beginning; `warm_up` is its share of InfoNCE."""
        return cls(STAGES[0] if warm_up else STAGES[1], warm_up)

    @classmethod
    def after(cls, earlier: "Course", warm_up: float) -> "Course":
        """A run that takes up what an earlier one learnt: from its beginning, but for a warm-up that is over, and not the whole run."""
        over = earlier.finished or earlier.stage == STAGES[2]
        return cls(STAGES[2], 0.0) if over and warm_up < 1 else cls.first(warm_up)

    @classmethod
    def resumed(cls, state: dict[str, Any]) -> "Course":
        kept = {name: state[name] for name in KEPT}
        return cls(**kept, before=state["seconds"], looks=Looks(**state["looks"]), saved=state["step"])
