"""What both training jobs share of Ray Train: the run itself, and one bar of its progress where the job was typed."""

import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import ray.data
import ray.train
import ray.train.torch
from tqdm import tqdm


def fit(
    worker: Callable[[dict[str, Any]], None],
    told: dict[str, Any],
    *,
    name: str,
    storage_path: str,
    workers: int,
    use_gpu: bool,
    max_failures: int,
    datasets: Mapping[str, ray.data.Dataset] | None = None,
) -> Path:
    """Run `worker(told)` on every worker; the folder of the last checkpoint. A run of the same name goes on where it was cut off.

    Each worker streams its share of the datasets. An error of our own that ended all attempts is raised as it was, not Ray's.
    """
    trainer = ray.train.torch.TorchTrainer(
        worker,
        train_loop_config=told,
        scaling_config=ray.train.ScalingConfig(num_workers=workers, use_gpu=use_gpu),
        datasets=dict(datasets or {}),
        torch_config=ray.train.torch.TorchConfig(backend="nccl" if use_gpu else "gloo"),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=storage_path,
            failure_config=ray.train.FailureConfig(max_failures=max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
        ),
    )
    try:
        result = trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise _ours(error) from error
    if result.checkpoint is None:
        raise RuntimeError("training ended without a checkpoint")
    return Path(result.checkpoint.path)


def _ours(error: BaseException) -> BaseException:
    """The ValueError or FloatingPointError behind an error of Ray's, wherever it was wrapped; the error itself where there is none."""
    seen, waiting = set(), [error]
    while waiting:
        found = waiting.pop(0)
        if type(found) in (ValueError, FloatingPointError):
            return found
        seen.add(id(found))
        inner = [found.__cause__, getattr(found, "cause", None), *getattr(found, "worker_failures", {}).values()]
        waiting += [e for e in inner if isinstance(e, BaseException) and id(e) not in seen]
    return error


@ray.remote(num_cpus=0)
class Board:
    """Holds the last figures, and lines to be shown once; a worker puts them there, the driver reads them."""

    def __init__(self) -> None:
        self.figures: dict[str, Any] = {}
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)

    def said(self) -> list[str]:
        lines, self.lines = self.lines, []
        return lines

    def put(self, figures: dict[str, Any]) -> None:
        self.figures = figures

    def get(self) -> dict[str, Any]:
        return self.figures


def _show(board: Any, bar: tqdm, over: threading.Event) -> None:
    while not over.wait(0.5):
        figures, lines = dict(ray.get(board.get.remote())), ray.get(board.said.remote())
        for line in lines:
            bar.write(line, file=sys.stderr)
        bar.n = int(100 * figures.pop("progress", bar.n / 100))
        bar.set_postfix({k: f"{v:.3g}" if isinstance(v, float) else v for k, v in figures.items()})


@contextmanager
def bar(title: str) -> Iterator[Any]:
    """A handle for workers to `put.remote({"progress": 0..1, ...})` on, while a bar runs on standard error."""
    board, over = Board.remote(), threading.Event()
    with tqdm(total=100, desc=title, unit="%", bar_format="{desc} {percentage:3.0f}%|{bar:30}| {elapsed}{postfix}") as shown:
        thread = threading.Thread(target=_show, args=(board, shown, over), daemon=True)
        thread.start()
        try:
            yield board
        finally:
            over.set()
            thread.join(5)
            ray.kill(board)  # pyright: ignore[reportArgumentType]
