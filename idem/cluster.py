"""The one place that joins or starts a Ray cluster; used by wiring modules only."""

import logging
import os
import warnings

import ray

# Two OpenMP threads beside one other busy process spin-wait: a 12 ms forward pass was seen to take 1.15 s.
WORKER_ENV = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}


def connect(*, num_cpus: int | None = None) -> None:
    """Join the cluster named by RAY_ADDRESS (as set for a submitted job), else start a private one on this machine."""
    if ray.is_initialized():
        return
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # it says that we show our own progress
    # Whoever may read a bucket here may read it on the workers.
    runtime_env = {"env_vars": {**WORKER_ENV, **{name: value for name, value in os.environ.items() if name.startswith(("AWS_", "IDEM_"))}}}
    with warnings.catch_warnings():
        # Lance warns of every fork. Those of ray.init are followed by exec at once, so nothing of Lance runs in the child.
        warnings.filterwarnings("ignore", "lance is not fork-safe")
        if os.environ.get("RAY_ADDRESS"):
            ray.init(runtime_env=runtime_env, logging_level=logging.WARNING, log_to_driver=False)
            return
        ray.init(
            address="local",
            num_cpus=num_cpus,
            include_dashboard=False,
            object_store_memory=512 << 20,
            runtime_env=runtime_env,
            logging_level=logging.WARNING,
            log_to_driver=False,
        )
