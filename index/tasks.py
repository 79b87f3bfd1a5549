"""Work in parallel (Ray). The workers import this module and what they are given, so that those who need no torch start without it."""

from collections.abc import Callable, Sequence
from typing import Any

import ray
import ray.exceptions
from tqdm import tqdm


def in_parallel(task: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], *, desc: str, on_gpu: bool = False) -> list[Any]:
    """task(*each) as Ray tasks, results in order. A worker that dies is replaced and its task alone repeated.

    on_gpu: each has a GPU to itself, where the cluster has any. What failed is raised once, all of it together, when every task has
    ended: ValueError.
    """
    gpus = min(1.0, ray.cluster_resources().get("GPU", 0)) if on_gpu else 0
    # One call a worker: an idle one would keep the memory of its last task.
    remote = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=3, max_calls=1)(_captured)
    waiting = [remote.remote(task, each) for each in arguments]
    number = {ref: i for i, ref in enumerate(waiting)}
    results: list[tuple[Any, str]] = [(None, "not run")] * len(waiting)
    with tqdm(total=len(waiting), desc=desc, unit=desc) as bar:
        while waiting:
            (ref,), waiting = ray.wait(waiting, num_returns=1)
            try:
                results[number[ref]] = ray.get(ref)
            except ray.exceptions.RayError as error:
                results[number[ref]] = (None, f"the worker failed: {error}")
            bar.update()
    if failed := [f"{desc} {i}: {error}" for i, (_, error) in enumerate(results) if error]:
        raise ValueError(f"{len(failed)} of {len(arguments)} failed: " + "; ".join(failed))
    return [value for value, _ in results]


def _captured(task: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[Any, str]:
    try:
        return task(*arguments), ""
    except (ValueError, OSError, RuntimeError, AssertionError) as error:
        return None, f"{type(error).__name__}: {error}"
