"""Losses against plain loops, and that they pull the right way."""

import math

import torch

from train import rerank_losses

S = torch.tensor([[2.0, -1.0, 0.5, 0.0], [0.3, 0.1, -0.2, 9.0]])
NULL = torch.tensor([0.2, -0.1])
LEVEL = torch.tensor([[3, 0, 1, 0], [2, 2, 3, -1]])


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def test_pairwise_is_the_double_loop() -> None:
    expected = []
    for s, level in zip(S.tolist(), LEVEL.tolist(), strict=True):
        pairs = [(i, j) for i in range(4) for j in range(4) if 0 <= level[i] < level[j]]
        weights = [max(level[j] - level[i], 1) for i, j in pairs]
        total = sum(w * softplus(s[j] - s[i]) for w, (i, j) in zip(weights, pairs, strict=True))
        expected.append(total / sum(weights))
    torch.testing.assert_close(rerank_losses.pairwise(S, LEVEL), torch.tensor(sum(expected) / 2))


def test_null_and_next_token_are_the_plain_loops() -> None:
    below, tokens = [], []
    for s, null, level in zip(S.tolist(), NULL.tolist(), LEVEL.tolist(), strict=True):
        there = [i for i in range(4) if level[i] >= 0]
        below.append(sum(softplus(null - s[i] if level[i] == 0 else s[i] - null) for i in there) / len(there))
        right = [math.exp(s[i]) for i in there if level[i] == 0] or [math.exp(null)]
        tokens.append(-math.log(sum(right) / (sum(math.exp(s[i]) for i in there) + math.exp(null))))
    torch.testing.assert_close(rerank_losses.null(S, NULL, LEVEL), torch.tensor(sum(below) / 2))
    torch.testing.assert_close(rerank_losses.next_token(S, NULL, LEVEL), torch.tensor(sum(tokens) / 2))


def test_absolute_is_the_mean_of_log_likelihoods() -> None:
    logits = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(0))
    p = logits.softmax(-1)
    first = -sum(p[0, i, LEVEL[0, i]].log() for i in range(4)) / 4
    second = -sum(p[1, i, LEVEL[1, i]].log() for i in range(3)) / 3
    torch.testing.assert_close(rerank_losses.absolute(logits, LEVEL), (first + second) / 2)


def test_places_without_a_document_get_no_gradient() -> None:
    s, null, logits = S.clone().requires_grad_(), NULL.clone().requires_grad_(), torch.randn(2, 4, 4).requires_grad_()
    rerank_losses.all_of(s, null, logits, LEVEL)["loss"].backward()
    assert s.grad is not None
    assert logits.grad is not None
    assert s.grad[1, 3] == 0
    assert (logits.grad[1, 3] == 0).all()


def test_descent_puts_right_above_null_above_wrong() -> None:
    s, null, logits = torch.zeros(2, 4, requires_grad=True), torch.zeros(2, requires_grad=True), torch.zeros(2, 4, 4, requires_grad=True)
    optimizer = torch.optim.SGD([s, null, logits], lr=1.0)
    for _ in range(200):
        optimizer.zero_grad()
        rerank_losses.all_of(s, null, logits, LEVEL)["loss"].backward()
        optimizer.step()
    margin = (s - null[:, None]).detach()
    assert (margin[LEVEL == 0] > 0).all()
    assert (margin[LEVEL > 0] < 0).all()
    assert s[0, 2] > s[0, 0], "level 1 above level 3"
    assert (logits.argmax(-1)[LEVEL >= 0] == LEVEL[LEVEL >= 0]).all()


def test_lists_without_a_pair_or_without_a_document_are_finite() -> None:
    for level in (torch.full((1, 4), 2), torch.full((1, 4), -1)):
        s = S[:1].clone().requires_grad_()
        loss = rerank_losses.all_of(s, NULL[:1], torch.zeros(1, 4, 4), level)["loss"]
        loss.backward()
        assert loss.isfinite()
        assert s.grad is not None
        assert s.grad.isfinite().all()


def test_a_loss_that_is_not_summed_moves_nothing_yet_gives_every_weight_a_gradient():
    s, null, logits = (torch.randn(shape, requires_grad=True) for shape in ((1, 4), (1,), (1, 4, 4)))
    level = torch.tensor([[0, 1, 3, 2]])
    parts = rerank_losses.all_of(s, null, logits, level, ("pairwise",))
    assert parts["loss"] == parts["pairwise"]
    parts["loss"].backward()
    assert [bool(each.grad.any()) for each in (s, null, logits) if each.grad is not None] == [True, False, False]
