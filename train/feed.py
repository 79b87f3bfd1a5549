"""Makes what numbered steps will need ahead of them, on threads; a step gets the same with and without."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class Feed(Generic[T]):
    """`make(step)` must depend on the step alone. What it raises is raised by the step that takes it, and never if none does.

    `depth` steps are made ahead by `threads` threads, none at or beyond `end`; depth 0 makes each when it is taken.
    """

    def __init__(self, make: Callable[[int], T], *, depth: int, threads: int, end: int | None = None) -> None:
        self.make, self.depth, self.end = make, depth, end
        self.pool = ThreadPoolExecutor(threads, "feed") if depth else None
        self.ahead: dict[int, Future[T]] = {}

    def take(self, step: int) -> T:
        if not self.pool:
            return self.make(step)
        last = step + self.depth if self.end is None else min(step + self.depth, self.end - 1)
        for number in range(step, last + 1):
            if number not in self.ahead:
                self.ahead[number] = self.pool.submit(self.make, number)
        return self.ahead.pop(step).result()

    def restart(self) -> None:
        """Forget what was made ahead: what `make` looks at has changed."""
        for future in self.ahead.values():
            future.cancel()
        self.ahead.clear()

    def close(self) -> None:
        if self.pool:
            self.pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> "Feed[T]":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
