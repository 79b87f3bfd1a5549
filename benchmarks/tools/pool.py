"""Many trials, a few at a time, each kept on disk as soon as it is done."""

import hashlib
import json
import multiprocessing
import queue
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.tools.labelled import load
from benchmarks.tools.trials import Trial, left, run

Figures = dict[str, Any]
ROOT = Path(__file__).resolve().parents[2]
LOOK_S = 5.0  # between looks whether the processes live


def _serve(jobs: Any, answers: Any, folders: Mapping[str, str], kept: str, device: str) -> None:
    torch.set_num_threads(1)
    data = {name: load(Path(folder)) for name, folder in folders.items()}
    while (said := jobs.get()) is not None:
        trial = Trial(**said)
        try:
            answers.put((trial.name, run(trial, data[trial.set], Path(kept), device)))
        except Exception:
            answers.put((trial.name, {"error": traceback.format_exc()}))


def _code() -> str:
    """Which code trains and asks."""
    digest = hashlib.sha256()
    for path in sorted([*(ROOT / "train").rglob("*.py"), *(ROOT / "benchmarks/tools").glob("*.py")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _said(trial: Trial, by_name: Mapping[str, Trial], device: str) -> dict[str, Any]:
    """All that decides what a trial comes to, its labels' source among it; as JSON gives it back."""
    of = _said(by_name[trial.labels_of], by_name, device) if trial.labels_of else {}
    return json.loads(json.dumps({**asdict(trial), "labels": of, "code": _code(), "device": device}))


def _found(said: Mapping[str, Any], kept: Path) -> Figures | None:
    """What this very trial left in an earlier call."""
    path = left(kept, said["name"], "json")
    before = json.loads(path.read_text()) if path.exists() else {}
    return before["figures"] if before.get("trial") == said else None


def _keep(said: Mapping[str, Any], figures: Figures, kept: Path) -> None:
    path = left(kept, said["name"], "json")
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps({"trial": said, "figures": figures}))
    partial.replace(path)


def run_all(
    trials: Sequence[Trial],
    folders: Mapping[str, Path],
    kept: Path,
    *,
    processes: int,
    device: str,
    until: float,
    tell: Callable[[str, Figures], None],
) -> dict[str, Figures]:
    """Figures by name, of those that were done by `until` (time.monotonic); those that `kept` holds from an earlier call are not run
    again. One that takes another's labels waits for it.

    ValueError once one fails, once a process dies, or where labels are asked of a trial that is not among these.
    """
    by_name = {trial.name: trial for trial in trials}
    if strays := sorted({t.labels_of for t in trials if t.labels_of} - set(by_name)):
        raise ValueError(f"labels are taken of trials that are not run: {', '.join(strays)}")
    said = {trial.name: _said(trial, by_name, device) for trial in trials}
    done = {name: figures for name, one in said.items() if (figures := _found(one, kept)) is not None}
    waiting = [trial for trial in trials if trial.name not in done]
    if not waiting:
        return done
    context = multiprocessing.get_context("spawn")
    jobs, answers = context.Queue(), context.Queue()
    told = ({name: str(folder) for name, folder in folders.items()}, str(kept), device)
    workers = [context.Process(target=_serve, args=(jobs, answers, *told), daemon=True) for _ in range(min(processes, len(waiting)))]
    for worker in workers:
        worker.start()
    try:
        while len(done) < len(trials) and time.monotonic() < until:
            for trial in [t for t in waiting if not t.labels_of or t.labels_of in done]:
                jobs.put(asdict(trial))
                waiting.remove(trial)
            try:
                name, figures = answers.get(timeout=LOOK_S)
            except queue.Empty:
                if dead := [worker.exitcode for worker in workers if not worker.is_alive()]:
                    raise ValueError(f"{len(dead)} of {len(workers)} processes of trials died (exit codes {dead}): memory?") from None
                continue
            if "error" in figures:
                raise ValueError(f"the trial {name} failed: {figures['error']}")
            done[name] = figures
            _keep(said[name], figures, kept)
            tell(name, figures)
    finally:
        for worker in workers:  # daemons; what they are at has come too late
            worker.kill()
            worker.join()
    return done
