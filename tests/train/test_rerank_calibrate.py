"""What r is fitted to."""

import numpy as np
import pytest

from train.rerank_calibrate import Firsts, fit
from train.rerank_merge import probability


def test_temperature_recovers_the_slope_and_bias_of_its_data() -> None:
    random = np.random.default_rng(0)
    logit = random.normal(0, 3, 20_000)
    right = (random.random(len(logit)) < probability(0.5 * logit - 1.0)).astype(float)
    found = fit(Firsts(logit=logit, prior=None, right=right, weight=np.ones(len(logit))))
    assert found.slope == pytest.approx(0.5, abs=0.03)
    assert found.bias == pytest.approx(-1.0, abs=0.06)
    found = fit(Firsts(logit=np.array([5.0, 6.0]), prior=None, right=np.ones(2), weight=np.ones(2)))
    assert np.isfinite([found.slope, found.bias]).all()
    assert found.slope > 0


@pytest.mark.parametrize("say", [0.0, 3.0])
def test_the_prior_has_the_say_that_its_data_gives_it(say: float) -> None:
    random = np.random.default_rng(1)
    logit, prior = random.normal(0, 2, 20_000), random.normal(5, 0.5, 20_000)
    true = logit + say * (prior - 5) - 1.0
    answers = Firsts(logit=logit, prior=prior, right=(random.random(20_000) < probability(true)).astype(float), weight=np.ones(20_000))
    found = fit(answers)
    assert found.ordered == pytest.approx(say, abs=0.15)
    assert np.abs(found.r(answers) - probability(true)).mean() < 0.01


def test_a_constant_prior_says_nothing() -> None:
    logit = np.random.default_rng(0).normal(0, 2, 100)
    of = {"logit": logit, "right": (logit > 0).astype(float), "weight": np.ones(100)}
    told, untold = (fit(Firsts(prior=prior, **of)) for prior in (np.full(100, 7.0), None))
    np.testing.assert_allclose(told.r(Firsts(prior=np.full(100, 7.0), **of)), untold.r(Firsts(prior=None, **of)), atol=1e-6)
