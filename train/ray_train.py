"""What both training jobs share of Ray Train: the run itself, and one bar of its progress where the job was typed."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
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
) -> Path:
    """Run `worker(told)` on every worker; the folder of the last checkpoint. A run of the same name goes on where it was cut off."""
    trainer = ray.train.torch.TorchTrainer(
        worker,
        train_loop_config=told,
        scaling_config=ray.train.ScalingConfig(num_workers=workers, use_gpu=use_gpu),
        torch_config=ray.train.torch.TorchConfig(backend="nccl" if use_gpu else "gloo"),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=storage_path,
            failure_config=ray.train.FailureConfig(max_failures=max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
        ),
    )
    result = trainer.fit()
    if result.checkpoint is None:
        raise RuntimeError("training ended without a checkpoint")
    return Path(result.checkpoint.path)


@ray.remote(num_cpus=0)
class Board:
    """Holds the last figures; a worker puts them there, the driver reads them."""

    def __init__(self) -> None:
        self.figures: dict[str, Any] = {}

    def put(self, figures: dict[str, Any]) -> None:
        self.figures = figures

    def get(self) -> dict[str, Any]:
        return self.figures


def _show(board: Any, bar: tqdm, over: threading.Event) -> None:
    while not over.wait(0.5):
        figures = dict(ray.get(board.get.remote()))
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
