"""Search settings for a recall: the cheapest that reach it on half of the queries, told by the other half."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import faiss
import numpy as np

from index import kinds
from index.checking import K, Yardstick
from index.searcher import Searcher

log = logging.getLogger("index.tuning")
FACTORS = (1, 2, 4, 8, 16, 32)
Setting = Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Tried:
    """A setting, the recall it reaches and what it costs (seconds for the queries)."""

    setting: Setting
    recall: float
    seconds: float


def knobs(index: faiss.Index) -> dict[str, list[int]]:
    """The settings of an index that trade recall for time, by FAISS's names, each from cheap to dear; none where search is exact."""
    found: dict[str, list[int]] = {}
    for layer in kinds.layers(index):
        if isinstance(layer, faiss.IndexRefine):
            found["k_factor_rf"] = list(FACTORS)
        elif isinstance(layer, faiss.IndexIVF):
            found["nprobe"] = [1 << i for i in range(layer.nlist.bit_length()) if 1 << i <= layer.nlist]
        elif isinstance(layer, faiss.IndexHNSW):
            found["efSearch"] = [16 << i for i in range(7)]
    return found


def written(setting: Setting) -> str:
    """As FAISS's ParameterSpace reads it."""
    return ",".join(f"{name}={value}" for name, value in sorted(setting.items(), reverse=True))


def cheapest(tried: Sequence[Tried], target: float) -> Tried | None:
    """The fastest of those that reach `target`; None where none does. Pure."""
    return min((each for each in tried if each.recall >= target), key=lambda each: each.seconds, default=None)


def searched(space: Mapping[str, Sequence[int]], trial: Callable[[Setting], Tried], target: float) -> list[Tried]:
    """Try settings until the cheapest that reach `target` are known: for each refine factor the first value of the other knob that does.

    Recall grows along every knob, so what is dearer than one that reaches the target is not tried.
    """
    factors = space.get("k_factor_rf", [0])
    others = [(name, values) for name, values in space.items() if name != "k_factor_rf"]
    name, values = others[0] if others else ("", [0])
    tried: list[Tried] = []
    for factor in factors:
        for value in values:
            setting = {**({"k_factor_rf": factor} if factor else {}), **({name: value} if name else {})}
            tried.append(trial(setting))
            if tried[-1].recall >= target:
                break
    return tried


def tune(searcher: Searcher, yardstick: Yardstick, target: float) -> str:
    """Set `searcher` to the cheapest setting whose recall reaches `target` for every kind of query; the setting as FAISS writes it.

    ValueError names the best that was reached where none does.
    """
    space = knobs(searcher.shards[0].index)
    queries = np.concatenate([each.queries for each in yardstick.asked.values()])

    def apply(setting: Setting) -> None:
        for shard in searcher.shards:
            faiss.ParameterSpace().set_index_parameters(shard.index, written(setting))

    def trial(setting: Setting) -> Tried:
        apply(setting)
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            searcher.find(queries, K)
            seconds.append(time.perf_counter() - start)
        made = Tried(setting, min(yardstick.recalls(searcher).values()), float(np.median(seconds)))
        log.info("%-28s recall@10 %.3f, %.2f ms a query", written(setting), made.recall, made.seconds / len(queries) * 1e3)
        return made

    if not space:
        return ""
    tried = searched(space, trial, target)
    best = cheapest(tried, target)
    if best is None:
        most = max(tried, key=lambda each: each.recall)
        raise ValueError(f"target_recall = {target} is out of reach: the most is {most.recall:.3f}, with {written(most.setting)}")
    apply(best.setting)
    return written(best.setting)
