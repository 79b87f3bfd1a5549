"""Jobs as child processes: started apart from the terminal's Ctrl-C, heard out, and ended with all that they started."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any

PATIENCE_S = 10.0  # after SIGINT; then SIGKILL, which jobs must survive anyway: what has no manifest is made again


class JobFailed(ValueError):
    """A job ended with another code than 0; `code` is its exit code, 128 + n where signal n ended it."""

    def __init__(self, job: str, code: int, said: str) -> None:
        super().__init__(f"{job} failed: {said}")
        self.code = code


class Child:
    """`python -m <job> ...` with standard error on the terminal; the last JSON line of its standard output is its result."""

    def __init__(self, job: str, arguments: Sequence[str], env: Mapping[str, str]) -> None:
        self.job = job
        self.figures: dict[str, Any] = {}
        # A session of its own: Ctrl-C reaches the demo alone, which then ends its children in order.
        self._process = subprocess.Popen(
            [sys.executable, "-m", job, *arguments], stdout=subprocess.PIPE, text=True, env=dict(env), start_new_session=True
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def _read(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            with contextlib.suppress(ValueError):
                if isinstance(said := json.loads(line), dict):
                    self.figures = said

    def ended(self) -> bool:
        return self._process.poll() is not None

    def result(self) -> dict[str, Any]:
        """Wait for the end; the JSON line, or JobFailed with what it says is wrong."""
        code = self._process.wait()
        self._reader.join(5)
        if code == 0 and self.figures.get("ok"):
            return self.figures
        code = 128 - code if code < 0 else code or 1
        raise JobFailed(self.job, code, str(self.figures.get("error") or f"it ended with exit code {code} and no word"))

    def stop(self) -> None:
        """Ask it to end, then make it; also whatever it started. Safe to call twice."""
        if not self.ended():
            self._process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(PATIENCE_S)
        # The session's process group outlives its leader while anything that it started is alive.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
