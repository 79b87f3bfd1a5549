"""The linear start of a reranker, against what it should find and against small steps."""

import numpy as np
import pytest
import torch

from train import rerank_start

QUERIES, DOCUMENTS = 200, 12


def made(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Features (Q, N, 3) of which the first two tell the right document, and levels; every list has one right document."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(QUERIES, DOCUMENTS, 3, generator=random)
    utility = x @ torch.tensor([2.0, -1.0, 0.0]) - torch.log(-torch.log(torch.rand(QUERIES, DOCUMENTS, generator=random)))
    level = torch.full((QUERIES, DOCUMENTS), 3)
    level[torch.arange(QUERIES), utility.argmax(1)] = 0
    return x, level


def test_the_weights_that_made_the_lists_are_found() -> None:
    weights = rerank_start.order(*made(), torch.ones(QUERIES))
    np.testing.assert_allclose(weights.numpy(), [2.0, -1.0, 0.0], atol=0.5)


def test_places_without_a_document_and_lists_without_a_right_one_change_nothing() -> None:
    x, level = made()
    longer = torch.cat([x, 100 * torch.ones(QUERIES, 2, 3)], 1), torch.cat([level, torch.full((QUERIES, 2), -1)], 1)
    more = torch.cat([longer[0], torch.randn(5, DOCUMENTS + 2, 3)]), torch.cat([longer[1], torch.full((5, DOCUMENTS + 2), 3)])
    expected = rerank_start.order(x, level, torch.ones(QUERIES))
    torch.testing.assert_close(rerank_start.order(*more, torch.ones(QUERIES + 5)), expected, atol=1e-3, rtol=0)


def test_outcomes_say_how_likely_each_is() -> None:
    x, level = made()
    weights, bias = rerank_start.outcomes(x, torch.where(level > 0, 1, level), torch.ones(QUERIES), 2)
    said = (x @ weights.T + bias).softmax(2)[..., 0]
    assert float(said.mean()) == pytest.approx(1 / DOCUMENTS, abs=0.01)
    sure = said > 0.5
    assert float((level[sure] == 0).float().mean()) == pytest.approx(float(said[sure].mean()), abs=0.1)


def test_null_lies_between_right_and_wrong() -> None:
    s, level = torch.tensor([[5.0, 1.0, 0.0], [6.0, 2.0, 1.0]]), torch.tensor([[0, 3, 3], [0, 2, 1]])
    assert 2 < float(rerank_start._threshold(s, level)) < 5
