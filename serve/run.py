"""Start the service of a release and keep it up until Ctrl-C or SIGTERM.

The JSON line comes when the service is ready; after it, only the address tells that the job still runs. Exit code 0 when
it was stopped after that.
"""

import logging
import os
import signal
import sys
import threading
from collections.abc import Sequence
from typing import Any

import ray
import ray.serve
from pydantic import Field

from idem import cluster, job, storage
from idem.config import Table
from serve.app import NAME, ServiceConfig, build
from serve.port import require_port

log = logging.getLogger("serve.run")  # as a job this module is __main__

HEAD = "node:__internal_head__"  # the resource by which Ray marks the head node, where a proxy always runs
BACKSTOP_S = 10  # beyond the deadline that the gateway keeps itself


class ServeConfig(Table, ServiceConfig):
    """host and port to listen on; everything else is serve.app.ServiceConfig, where an empty release is the current one of the run."""

    release: str = ""
    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=1, le=65535)

    def service(self) -> ServiceConfig:
        settings = self.model_dump(include=set(ServiceConfig.model_fields))
        return ServiceConfig(**{**settings, "release": self.release or storage.Layout(self.root).releases})


def proxy_is_ours() -> bool:
    """Will the proxy that Serve is about to start listen on this machine? Not where the cluster's Serve is up already."""
    here = ray.get_runtime_context().get_node_id()
    heads = [node["NodeID"] for node in ray.nodes() if HEAD in node["Resources"]]
    return here in heads and not ray.serve.status().proxies


def start(config: ServeConfig) -> dict[str, Any]:
    """Deploy and wait until every part is up; figures for the JSON line."""
    if not os.environ.get("RAY_ADDRESS"):
        require_port(config.host, config.port)  # before a cluster is started in vain
    service = config.service()
    application = build(service)
    log.info("starting the service of %s", service.release)
    cluster.connect()
    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # our own lines say the same
    if proxy_is_ours():
        require_port(config.host, config.port)
    options = {"host": config.host, "port": config.port, "request_timeout_s": service.timeout_ms / 1e3 + BACKSTOP_S}
    quiet = {"log_level": "WARNING", "enable_access_log": False}
    ray.serve.start(http_options=options, logging_config=quiet)
    ray.serve.run(application, name=NAME, logging_config=quiet)
    url = f"http://{config.host}:{config.port}"
    deployments = ray.serve.status().applications[NAME].deployments
    log.info("open %s", url)
    return {"url": url, "deployments": {name: status.status.value for name, status in deployments.items()}}


def stop() -> None:
    """Take the service down; a private cluster goes with it, a joined one keeps Serve for its other applications."""
    if not ray.is_initialized():
        return
    log.info("stopping the service")
    if os.environ.get("RAY_ADDRESS"):
        ray.serve.delete(NAME)
    else:
        ray.serve.shutdown()
    ray.shutdown()


def stay_until(asked: threading.Event) -> None:
    """From now on Ctrl-C and SIGTERM ask for a clean end. Ray sets its own SIGTERM when it connects, so this comes after."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: asked.set())


def main(argv: Sequence[str] | None = None) -> int:
    """0 when stopped after it was ready; else the exit code of a job (idem.job.guarded)."""
    asked = threading.Event()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell that starts us in the background has it ignored

    def begin(config: ServeConfig) -> dict[str, Any]:
        figures = start(config)
        stay_until(asked)
        return figures

    try:
        code = job.main("serve.run", "serve", ServeConfig, begin, argv)
        if code == 0:
            asked.wait()
    finally:
        stop()
    return code


if __name__ == "__main__":
    sys.exit(main())
