"""Asks the running service over HTTP, as a user would, and takes the time."""

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
from tqdm import tqdm

from serve.measured import EvaluateConfig

WARM_UP = 5
AGAIN = 3  # times that a degraded answer is asked for again
TIMEOUT_S = 60.0  # of one request, and of trying again while the service is overloaded


def require_release(client: httpx.Client, release: str, url: str) -> str:
    """The hash of the service's settings; ValueError unless a service answers there and serves this release."""
    try:
        said = client.get("/version").json()
        serving, settings = said["release"], said["settings"]
    except (httpx.HTTPError, ValueError, KeyError) as error:
        raise ValueError(f"no Idem service answers at {url} ({type(error).__name__}); start it with python -m serve.run") from error
    if serving != release:
        raise ValueError(f"the service at {url} serves release {serving}, the current one of this run is {release}")
    return settings


def _said(response: httpx.Response) -> str:
    try:
        return response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return response.text[:200]


def ask(client: httpx.Client, picture: bytes, config: EvaluateConfig, *, rerank: bool) -> tuple[dict[str, Any], float]:
    """The service's answer to one photo and the milliseconds it took; 503 is tried again for TIMEOUT_S. ValueError for a refusal."""
    fields = {"top_k": str(config.top_k), "rerank": "true" if rerank else "false"}
    if config.depth:
        fields["depth"] = str(config.depth)
    until = time.monotonic() + TIMEOUT_S
    while True:
        start = time.perf_counter()
        try:
            response = client.post("/v1/search", files={"image": ("query", picture)}, data=fields)
        except httpx.HTTPError as error:
            raise ValueError(f"{config.url} did not answer: {type(error).__name__} {error}") from error
        took = (time.perf_counter() - start) * 1e3
        if response.status_code == 200:
            return response.json(), took
        if response.status_code != 503 or time.monotonic() > until:
            raise ValueError(f"{config.url} answered {response.status_code}: {_said(response)}")
        time.sleep(min(float(response.headers.get("retry-after", 1)), 5))


def ask_until_whole(client: httpx.Client, picture: bytes, config: EvaluateConfig, *, rerank: bool) -> tuple[dict[str, Any], float]:
    """`ask`, and AGAIN times more while the answer is degraded. The time is that of the first answer, which a user would have had."""
    answer, took = ask(client, picture, config, rerank=rerank)
    for _ in range(AGAIN):
        if not answer["degraded"]:
            break
        answer = ask(client, picture, config, rerank=rerank)[0]
    return answer, took


def interview(
    client: httpx.Client, pictures: Sequence[bytes], config: EvaluateConfig, *, rerank: bool, what: str
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """An answer for each picture, the first `timed` one at a time, the rest `concurrency` at once; and p50, p99 of the former."""
    for picture in pictures[:WARM_UP]:
        ask(client, picture, config, rerank=rerank)
    with tqdm(total=len(pictures), desc=what, unit="photo", mininterval=0.5) as bar, ThreadPoolExecutor(config.concurrency) as pool:

        def one(picture: bytes) -> tuple[dict[str, Any], float]:
            answer = ask_until_whole(client, picture, config, rerank=rerank)
            bar.update()
            return answer

        timed = [one(picture) for picture in pictures[: config.timed]]
        rest = list(pool.map(one, pictures[config.timed :]))
    p50, p99 = np.percentile([took for _, took in timed], [50, 99])
    return [answer for answer, _ in timed + rest], {"p50_ms": round(float(p50), 1), "p99_ms": round(float(p99), 1)}
