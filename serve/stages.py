"""What the demo noted of its stages, for its last table and for the report: root/stages.json."""

from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict

from idem import storage

NAME = "stages.json"


class StageTime(BaseModel):
    """seconds: wall time of this run; made_in: wall time of the run that made what this one found unchanged, if it was noted."""

    model_config = ConfigDict(frozen=True)
    job: str
    title: str
    seconds: float
    skipped: bool = False
    made_in: float | None = None


class Noted(BaseModel):
    """peak_mb: the most memory of all processes of the run together, told by `memory` how it was counted."""

    model_config = ConfigDict(frozen=True)
    stages: list[StageTime]
    peak_mb: float
    memory: str


def save(root: str, noted: Noted) -> None:
    storage.write_bytes(storage.join(root, NAME), noted.model_dump_json(indent=1).encode())


def load(root: str) -> Noted | None:
    """What was noted last, or None where the jobs were run one by one."""
    uri = storage.join(root, NAME)
    return Noted.model_validate_json(storage.read_bytes(uri)) if storage.exists(uri) else None


def since(noted: Noted | None, job: str) -> float | None:
    """The wall time of the run that really did `job`, by what was noted before."""
    known = [stage for stage in noted.stages if stage.job == job] if noted else []
    return (known[0].made_in if known[0].skipped else known[0].seconds) if known else None


def said(stage: StageTime) -> str:
    """The time of a stage for people."""
    if not stage.skipped:
        return f"{stage.seconds:.1f} s"
    return f"{stage.seconds:.1f} s  unchanged, skipped" + (f" (made in {stage.made_in:.1f} s)" if stage.made_in else "")


def table(noted: Noted) -> str:
    """Seconds per stage and peak memory as aligned text."""
    rows: Sequence[tuple[str, str]] = [(stage.title, said(stage)) for stage in noted.stages]
    total = sum(stage.seconds for stage in noted.stages)
    rows = [*rows, ("all stages", f"{total:.1f} s"), ("peak memory", f"{noted.peak_mb / 1024:.2f} GiB ({noted.memory})")]
    width = max(len(title) for title, _ in rows)
    return "\n".join(f"{title.ljust(width)}  {told}" for title, told in rows)
