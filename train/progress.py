"""What workers say while they train, shown as one bar where the job was typed."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from tqdm import tqdm


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
