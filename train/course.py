"""Where a run stands and what was seen on the way: counters, clock, curves, and the looks at the held-back slice."""

import time
from dataclasses import asdict, dataclass, field
from typing import Any

KEPT = ("stage", "step", "refreshed", "images", "skipped", "curves")
EVERY = 10  # steps between two rows of the curves


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
    """`step` is the next one; `refreshed` the one of the last refresh; `images` counts rows drawn, `skipped` steps left out."""

    stage: str
    step: int = 0
    refreshed: int = 0
    images: int = 0
    skipped: int = 0
    before: float = 0.0
    looks: Looks = field(default_factory=Looks)
    curves: list[dict[str, Any]] = field(default_factory=list)
    saved: int = -1  # the step of the last checkpoint
    start: float = field(default_factory=time.perf_counter)
    _pace: tuple[int, float] = (0, 0.0)

    def begin(self) -> None:
        """The clock of this run starts."""
        self.start = time.perf_counter()
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

    def keep(self, figures: dict[str, Any]) -> None:
        """Figures of a look belong to the curves, once."""
        if not self.curves or self.curves[-1] is not figures:
            self.curves.append(figures)

    def state(self) -> dict[str, Any]:
        """What a later run goes on from; JSON can hold it."""
        kept = {name: getattr(self, name) for name in KEPT}
        return {**kept, "seconds": self.elapsed(), "looks": asdict(self.looks)}

    @classmethod
    def resumed(cls, state: dict[str, Any]) -> "Course":
        kept = {name: state[name] for name in KEPT}
        return cls(**kept, before=state["seconds"], looks=Looks(**state["looks"]), saved=state["step"])
