"""Which order is served, and what r means, decided on the calibrate fold alone and written down with all that was tried."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict
from tqdm import tqdm

from idem import metrics
from train import rerank_calibrate
from train.rerank_calibrate import Calibration
from train.rerank_data import KINDS, Kind, Lists, Pool, askable, assemble, padded, served
from train.rerank_loop import RerankConfig
from train.rerank_merge import MERGES, Choice, Scored, arrange
from train.rerank_score import score

RETRIEVAL = Choice(blend=0.0, last=False)
CHOICES = (RETRIEVAL, *(Choice(merge=m, last=last, blend=b) for m in MERGES for last in (False, True) for b in (0.25, 0.5, 0.75, 1.0)))
COST = 0.01  # of R@1: reranking never costs more than one point
FEWEST_FAMILIES = 8  # the standard error from 8 is itself known to a quarter (1 / sqrt(2 * 7)); from fewer it decides nothing
GROUP = 8  # queries scored at a time


class Served(BaseModel):
    """What is served for one kind of query, and why.

    calibration gives r. table: every choice that was tried; gain is over retrieval in the mean of R@1 and nDCG@10, error its standard
    error with families as the unit (None for too few of them), clear whether it was gain enough at no cost (see `select`). worth: of r
    on the first answers of the very fold that it was fitted on.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    choice: Choice = RETRIEVAL
    calibration: Calibration = Calibration()
    queries: int = 0
    table: list[dict[str, Any]] = []
    worth: dict[str, float] = {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """Lists of one kind of query, scored: their numbers, levels of the documents in canonical order, and the families of the queries."""

    numbers: np.ndarray
    scored: list[Scored]
    levels: list[np.ndarray]
    families: np.ndarray


def measure(
    model: Any, pool: Pool, source: Lists, *, kind: Kind, depth: int, chunk: int, queries: int, scoring: Callable[..., list[Scored]] = score
) -> Measured:
    """Score at most `queries` lists, spread over the families, as the service would. scoring: that of the model's backbone."""
    chosen = np.random.default_rng(0).permutation(askable(pool, source, kind))[:queries]
    scored, levels = [], []
    with tqdm(total=len(chosen), desc=f"judge {kind} queries", unit="query", disable=len(chosen) < 20, mininterval=0.5) as bar:
        for group in np.split(chosen, range(GROUP, len(chosen), GROUP)) if len(chosen) else []:
            numbers = [served(source, int(query), kind, depth) for query in group]
            documents, cosines, found = (
                [table[query][row] for query, row in zip(group, numbers, strict=True)]
                for table in (source.documents, source.cosines[KINDS.index(kind)], source.levels)
            )
            kinds: list[Kind] = [kind] * len(group)
            batch = assemble(pool, source.queries[group], kinds, padded(documents), padded(cosines, 0), padded(found))
            scored += scoring(model, batch, chunk=chunk)
            levels += found
            bar.update(len(group))
    return Measured(numbers=chosen, scored=scored, levels=levels, families=source.families[chosen])


def clustered_error(gain: np.ndarray, families: np.ndarray) -> float:
    """Standard error of the mean of `gain`, with families as the unit: queries of one family are not independent.

    Infinite below FEWEST_FAMILIES, where deviations may be small, or of one family zero, by chance alone.
    """
    _, codes = np.unique(families, return_inverse=True)
    sums = np.bincount(codes, weights=gain - gain.mean())
    groups = len(sums)
    if groups < FEWEST_FAMILIES:
        return math.inf
    return float(np.sqrt((sums**2).sum() * groups / (groups - 1)) / len(gain))


def quality(levels: np.ndarray) -> tuple[float, float, float]:
    """R@1, nDCG@10 over the candidates, and their mean, which is what is chosen by."""
    recall, ndcg = metrics.recall_at(levels, 1), metrics.ndcg_at(levels, 10, np.bincount(levels, minlength=metrics.LEVELS))
    return recall, ndcg, (recall + ndcg) / 2


def _rounded(error: float) -> float | None:
    return round(error, 4) if math.isfinite(error) else None  # JSON has no infinity


def select(measured: Measured, *, errors: float = 1.0) -> tuple[Choice, list[dict[str, Any]]]:
    """The gentlest choice that is as good as the best within `errors` standard errors, else retrieval's own order; and the table.

    A choice is clear where it gains on retrieval by more than `errors` standard errors, and where R@1, at its lower end of as
    many, loses no more than COST. Among the clear ones that cannot be told from the best, the one with the smallest blend is
    served: the fold's gallery is smaller than the one in service, and what leans least on it carries over best; of those the one with a
    last comparison, whose first answer depends least on which documents met in a chunk.
    """
    results = np.array([[quality(f[arrange(s, c)]) for s, f in zip(measured.scored, measured.levels, strict=True)] for c in CHOICES])
    recall, quality_of = results[:, :, 0], results[:, :, 2]
    table, clear = [], []
    for i, choice in enumerate(CHOICES):
        gain, cost = quality_of[i] - quality_of[0], recall[i] - recall[0]
        error, cost_error = clustered_error(gain, measured.families), clustered_error(cost, measured.families)
        won = gain.mean() > errors * error and cost.mean() >= 0 and cost.mean() - errors * cost_error >= -COST
        good = bool(math.isfinite(error) and won)
        means = {"R@1": round(float(recall[i].mean()), 4), "nDCG@10": round(float(results[i, :, 1].mean()), 4)}
        table.append({**choice.model_dump(), **means, "gain": round(float(gain.mean()), 4), "error": _rounded(error), "clear": good})
        clear += [i] if good else []
    if not clear:
        return RETRIEVAL, table
    best = max(clear, key=lambda i: quality_of[i].mean())
    behind = {i: quality_of[best] - quality_of[i] for i in clear}
    as_good = [i for i in clear if behind[i].mean() <= errors * clustered_error(behind[i], measured.families)]
    return CHOICES[min(as_good, key=lambda i: (CHOICES[i].blend, not CHOICES[i].last, behind[i].mean()))], table


def judge(
    model: Any, config: RerankConfig, pool: Pool, calibrate: Lists, scoring: Callable[..., list[Scored]] = score
) -> dict[Kind, Served]:
    """What to serve for each kind of query. A kind that the fold has no query of keeps retrieval's order, and r as for pictures.
    scoring: as for `measure`."""
    settings: dict[Kind, Served] = {}
    for kind in KINDS:
        most = config.select_queries if kind == KINDS[0] else -(-config.select_queries // 3)
        measured = measure(model, pool, calibrate, kind=kind, depth=config.depth, chunk=config.chunk, queries=most, scoring=scoring)
        if not measured.scored:
            first = settings.get(KINDS[0], Served())
            settings[kind] = Served(calibration=first.calibration)
            continue
        choice, table = select(measured, errors=config.errors)
        answers = rerank_calibrate.firsts(measured.scored, measured.levels, choice)
        calibration = rerank_calibrate.fit(answers)
        worth = rerank_calibrate.figures(calibration, answers)
        settings[kind] = Served(choice=choice, calibration=calibration, queries=len(measured.scored), table=table, worth=worth)
    return settings


def summary(served: Served) -> dict[str, Any]:
    """For the figures of a manifest: what is served, and what it and retrieval alone reach on the calibrate fold."""
    chosen = [row for row in served.table if all(row[name] == value for name, value in served.choice.model_dump().items())]
    names = ("R@1", "nDCG@10")
    return {
        "served": "retrieval" if served.choice.blend == 0 else served.choice.model_dump(),
        "queries": served.queries,
        "retrieval": {name: served.table[0][name] for name in names} if served.table else None,
        "chosen": {name: chosen[0][name] for name in names} if chosen else None,
        **served.worth,
    }
