"""How much memory a job and all that it started hold together."""

import contextlib
import threading

import psutil


class MemoryWatch:
    """The most memory that this process and all below it held together, looked at every `seconds`.

    It is the sum of PSS: what processes share (the object store, libraries) is counted once, however many map it.
    """

    COUNTED = "sum of PSS over all processes, every 3 s"

    def __init__(self, seconds: float = 3.0) -> None:  # each look walks every mapping: once a second took 6 % of two cores
        self.peak_mb = 0.0
        self._over = threading.Event()
        self._seconds = seconds
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "MemoryWatch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        over = False
        while not over:  # looked at first: what is over sooner than the first wait has a peak too
            self.peak_mb = max(self.peak_mb, tree_mb())
            over = self._over.wait(self._seconds)


def tree_mb() -> float:
    """PSS of this process and all below it, in MiB; a process that ends while it is looked at counts as gone."""
    own = psutil.Process()
    total = 0
    for process in [own, *own.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            total += process.memory_full_info().pss
    return total / 2**20
