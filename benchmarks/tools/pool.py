"""Many trials, a few at a time, each kept on disk as soon as it is done."""

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


def _found(trial: Trial, kept: Path) -> Figures | None:
    """What this very trial left in an earlier call."""
    path = left(kept, trial.name, "json")
    said = json.loads(path.read_text()) if path.exists() else {}
    return said["figures"] if said.get("trial") == json.loads(json.dumps(asdict(trial))) else None


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
    done = {trial.name: figures for trial in trials if (figures := _found(trial, kept)) is not None}
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
            left(kept, name, "json").write_text(json.dumps({"trial": asdict(by_name[name]), "figures": figures}))
            tell(name, figures)
    finally:
        for worker in workers:  # daemons; what they are at has come too late
            worker.kill()
            worker.join()
    return done
