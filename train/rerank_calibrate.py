"""What r means: fitted on first answers of the calibrate fold, where some queries have their product taken away.

A pair is judged by its logit of level 0 and by its prior, what orders it before anything is compared; so r stays that of the pair alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from pydantic import BaseModel, ConfigDict

from idem import metrics
from train.rerank_merge import Choice, Scored, arrange, probability

ABSENT = 0.3  # weight of the case that a query's product is not in the gallery, as in METHOD.md section 4
PULL = 1.0  # strength of the pull of the slope to 1 and of the bias to 0: they stay finite where all answers are right, or wrong
RIDGE = 10.0  # strength of the pull of the prior, in units of its deviation, to having no say
STEPS = 50


class Judged(Protocol):
    """n pairs: their logit (n,), and their prior (n,) where the model has one."""

    @property
    def logit(self) -> np.ndarray: ...
    @property
    def prior(self) -> np.ndarray | None: ...


class Calibration(BaseModel):
    """r = sigmoid(slope * logit + ordered * prior + bias); the slope is above 0."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    slope: float = 1.0
    bias: float = 0.0
    ordered: float = 0.0

    def logit(self, pairs: Judged) -> np.ndarray:
        """(n,) the logit of r."""
        said = self.slope * pairs.logit + self.bias
        return said if pairs.prior is None else said + self.ordered * pairs.prior

    def r(self, pairs: Judged) -> np.ndarray:
        """(n,) P(the very same product)."""
        return probability(self.logit(pairs))


@dataclass(frozen=True, kw_only=True)
class Firsts:
    """n first answers: logit, prior, right and weight (n,) of each."""

    logit: np.ndarray
    prior: np.ndarray | None
    right: np.ndarray
    weight: np.ndarray


def firsts(scored: Sequence[Scored], levels: Sequence[np.ndarray], choice: Choice) -> Firsts:
    """Of each query, as `choice` orders its documents, the first answer with its product there, and the one with it taken away."""
    rows = []  # list, document, weight
    for i, (each, found) in enumerate(zip(scored, levels, strict=True)):
        order = arrange(each, choice)
        rows.append((i, order[0], 1 - ABSENT))
        rows += [(i, document, ABSENT) for document in order if found[document] > 0][:1]
    priors = [each.prior for each in scored]
    return Firsts(
        logit=np.array([scored[i].logit[document] for i, document, _ in rows], np.float64),
        prior=None if any(p is None for p in priors) else np.array([priors[i][document] for i, document, _ in rows], np.float64),
        right=np.array([levels[i][document] == 0 for i, document, _ in rows], np.float64),
        weight=np.array([weight for *_, weight in rows]),
    )


def fit(answers: Firsts) -> Calibration:
    """Platt scaling (1999) with the prior as a covariate, by Newton's method on the penalised log likelihood."""
    prior = np.zeros_like(answers.logit) if answers.prior is None else answers.prior
    mean, scale = float(prior.mean()), float(prior.std()) + 1e-9
    x = np.column_stack([answers.logit, np.ones_like(answers.logit), (prior - mean) / scale])
    start, strength = np.array([1.0, 0.0, 0.0]), np.array([PULL, PULL, RIDGE])
    theta = start
    for _ in range(STEPS):
        p = probability(x @ theta)
        gradient = x.T @ (answers.weight * (p - answers.right)) + strength * (theta - start)
        curvature = (x * (answers.weight * p * (1 - p))[:, None]).T @ x + np.diag(strength)
        theta = theta - np.clip(np.linalg.solve(curvature, gradient), -1, 1)
        theta[0] = max(theta[0], 1e-2)
    slope, bias, ordered = theta.tolist()
    return Calibration(slope=slope, bias=bias - ordered / scale * mean, ordered=ordered / scale)


def figures(fitted: Calibration, answers: Firsts) -> dict[str, float]:
    """ECE and Brier skill of r on these answers, drawn by their weights."""
    pick = np.random.default_rng(0).random(len(answers.weight)) < answers.weight / answers.weight.max()
    r, right = fitted.r(answers)[pick], answers.right[pick]
    return {
        "ECE": round(metrics.expected_calibration_error(r, right), 4),
        "brier_skill": round(metrics.brier_skill(r, right), 4),
        "base_rate": round(float(right.mean()), 4),
    }
