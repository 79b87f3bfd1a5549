"""The command line that every job shares: `python -m <stage>.<job> run.toml [--set table.key=value]`.

Progress and logs go to standard error; the last line of standard output is one JSON object.
"""

import argparse
import json
import logging
import resource
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from idem import config


def finish(job: str, ok: bool, **figures: Any) -> None:
    """Print the job's one JSON line."""
    sys.stderr.flush()
    print(json.dumps({"job": job, "ok": ok, **figures}, default=str), flush=True)  # noqa: T201


def guarded(job: str, run: Callable[[], dict[str, Any]]) -> int:
    """Run, print the JSON line, return the exit code: 0 done, 2 bad input (one sentence), 1 a fault of ours (traceback), 130 Ctrl-C."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S")
    start = time.perf_counter()
    try:
        figures = run()
    except KeyboardInterrupt:
        finish(job, False, error="stopped by the user")
        return 130
    except (ValueError, OSError) as error:
        print(f"{job}: {error}", file=sys.stderr)  # noqa: T201
        finish(job, False, error=str(error))
        return 2
    except Exception as error:
        traceback.print_exc()
        finish(job, False, error=f"{type(error).__name__}: {error}")
        return 1
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    told = {"seconds": round(time.perf_counter() - start, 2), "driver_peak_mb": round(peak_mb)}
    finish(job, True, **{**told, **figures})
    return 0


def main(
    job: str,
    table: str,
    model: type[config.T],
    run: Callable[[config.T], dict[str, Any]],
    argv: Sequence[str] | None = None,
    *,
    switches: Mapping[str, tuple[str, str]] | None = None,
) -> int:
    """Parse the shared command line, load `table` of the run file into `model`, and run the job.

    `switches` are short forms of `--set` that one job has: flag to (assignment, help).
    """
    parser = argparse.ArgumentParser(prog=f"python -m {job}", description=sys.modules[run.__module__].__doc__)
    parser.add_argument("run", help="run file (TOML)")
    parser.add_argument("--set", action="append", default=[], metavar="table.key=value", help="change one setting of the run file")
    for flag, (assignment, said) in (switches or {}).items():
        parser.add_argument(flag, dest="set", action="append_const", const=assignment, help=f"{said} (--set {assignment})")
    arguments = parser.parse_args(argv)
    return guarded(job, lambda: run(config.load(arguments.run, table, model, arguments.set)))
