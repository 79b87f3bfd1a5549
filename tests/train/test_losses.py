"""The two objectives against loops, formulas and finite differences."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from train import losses
from train.head.prototypes import HeadConfig, PrototypeHead


def test_info_nce_agrees_with_a_loop_over_pairs():
    torch.manual_seed(0)
    h = F.normalize(torch.randn(8, 6), dim=1)
    ids = torch.tensor([0, 0, 1, 1, 2, 2, 3, 4])
    fast = losses.info_nce(h, h, ids, ids, torch.arange(8), prefixes=(3, 6), tau=0.2)
    slow = 0.0
    for dim in (3, 6):
        g = F.normalize(h[:, :dim], dim=1)
        terms = []
        for a in range(6):
            positives = [p for p in range(8) if p != a and ids[p] == ids[a]]
            negatives = [n for n in range(8) if ids[n] != ids[a]]
            for p in positives:
                z = torch.stack([g[a] @ g[p], *(g[a] @ g[n] for n in negatives)]) / 0.2
                terms.append(-F.log_softmax(z, 0)[0])
        slow += torch.stack(terms).mean()
    torch.testing.assert_close(fast, slow / 2)


def test_info_nce_without_any_pair_is_zero_and_finite():
    h = F.normalize(torch.randn(3, 4), dim=1).requires_grad_()
    ids = torch.arange(3)
    loss = losses.info_nce(h, h, ids, ids, torch.arange(3), prefixes=(4,), tau=0.1)
    loss.backward()
    assert loss == 0
    assert h.grad is not None
    assert h.grad.isfinite().all()


MARGINS = [0.0, 0.25, 0.5, 1.2]


def formula(c, m):
    """cos(theta + m) as METHOD.md writes it, on float64, with the two rules that keep it finite and rising."""
    sine = np.sqrt(np.maximum(1 - c * c, 1e-6))
    return np.where(c > -np.cos(m), c * np.cos(m) - sine * np.sin(m), c - m * np.sin(m))


@pytest.mark.parametrize("margin", MARGINS)
def test_margin_equals_the_formula_and_its_finite_differences(margin):
    c = np.concatenate([np.linspace(-1, 1, 1001), -np.cos(margin) + np.array([-1e-3, 1e-3]), [0.9999, -0.9999]])
    x = torch.tensor(c, requires_grad=True)
    found = losses.angular_margin(x, margin)
    (slope,) = torch.autograd.grad(found.sum(), x)
    np.testing.assert_allclose(found.detach().numpy(), formula(c, margin), atol=1e-12)
    step = 1e-7
    differences = (formula(c + step, margin) - formula(c - step, margin)) / (2 * step)
    kinks = np.minimum(abs(c + np.cos(margin)), abs(1 - c * c - 1e-6)) < 2 * step
    np.testing.assert_allclose(slope.numpy()[~kinks], differences[~kinks], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("margin", MARGINS)
@pytest.mark.parametrize("cosine", [1.0, -1.0, 0.0, 0.999999, -0.99, -math.cos(0.25), 1.0000001])
def test_margin_has_a_finite_and_right_gradient_everywhere(cosine, margin, dtype):
    c = torch.tensor([cosine], dtype=dtype, requires_grad=True)
    found = losses.angular_margin(c, margin)
    found.sum().backward()
    assert found.dtype == torch.float32
    exact = c.detach().double().requires_grad_()
    losses.angular_margin(exact, margin).sum().backward()
    assert c.grad is not None
    assert c.grad.isfinite().all()
    torch.testing.assert_close(c.grad.double(), exact.grad, rtol=5e-3 if dtype == torch.bfloat16 else 2e-2, atol=1e-6)


@pytest.mark.parametrize("theta", [0.0, 1e-4, 0.3, math.pi / 2, math.pi - 0.25, math.pi - 0.1, math.pi])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_that_reaches_the_embedding_is_finite_and_no_longer_than_the_margin_allows(theta, dtype):
    """An ID with one picture has its own embedding as centroid: theta = 0, where acos would give NaN."""
    w = torch.tensor([[1.0, 0.0]], dtype=dtype)
    raw = torch.tensor([[math.cos(theta), math.sin(theta)]], dtype=dtype, requires_grad=True)
    h = F.normalize(raw, dim=1)
    losses.angular_margin((h * w).sum(1), 0.25).sum().backward()
    assert raw.grad is not None
    assert raw.grad.isfinite().all()
    assert float(raw.grad.norm()) <= 1.02


def test_a_head_of_bfloat16_embeddings_under_autocast_keeps_float32_logits():
    torch.manual_seed(0)
    h = F.normalize(torch.randn(6, 8), dim=1).bfloat16()
    head = PrototypeHead(5, 8, HeadConfig())
    y = torch.tensor([0, 1, 2, 3, 4, 0])
    x = h.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = head.loss(x, y, prefixes=(8,), scale=32.0, margin=0.25)
    loss.backward()
    exact = h.double().requires_grad_()
    wanted = losses.reference_loss(exact, y, head.whole().double(), prefixes=(8,), scale=32.0, margin=0.25)
    wanted.backward()
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-5, atol=0)
    torch.testing.assert_close(x.grad.double(), exact.grad, rtol=8e-3, atol=1e-4)


def test_masked_and_filtered_prototypes_do_not_count_at_all():
    """Minus infinity, not a logit of 0: leaving a prototype out is the same as never having had it."""
    torch.manual_seed(0)
    h, rows = F.normalize(torch.randn(2, 8), dim=1), torch.randn(5, 8)
    y = torch.tensor([0, 1])
    masked = torch.zeros(2, 5, dtype=torch.bool)
    masked[:, 4] = True
    kept = {"prefixes": (4, 8), "scale": 1.0, "margin": 0.1}
    fewer = losses.reference_loss(h, y, rows[:4], **kept)
    torch.testing.assert_close(losses.reference_loss(h, y, rows, masked=masked, **kept), fewer)
    cosine = h @ F.normalize(rows, dim=1).T
    near = float(cosine[:, 4].min()) - 1e-4
    rows[4] = 5 * (h[0] + h[1])  # nearer than any other, and not a unit vector
    others = cosine[:, 2:4].max()
    assert float(others) < float((h @ F.normalize(rows[4], dim=0)).min())
    bar = max(float(others), near) + 1e-3
    torch.testing.assert_close(losses.reference_loss(h, y, rows, filter=bar, **kept), fewer)


def test_weights_of_samples():
    torch.manual_seed(0)
    h, rows, y = F.normalize(torch.randn(4, 8), dim=1), torch.randn(5, 8), torch.tensor([0, 1, 1, 4])
    kept = {"prefixes": (8,), "scale": 8.0, "margin": 0.1}
    twice = losses.reference_loss(h[[0, 0, 1, 3]], y[[0, 0, 1, 3]], rows, **kept)
    weights = torch.tensor([2.0, 1.0, 0.0, 1.0])
    torch.testing.assert_close(losses.reference_loss(h, y, rows, weights=weights, **kept), twice)
    head = PrototypeHead(5, 8, HeadConfig())
    for bad in (torch.tensor([1.0, -1.0, 1.0, 1.0]), torch.tensor([1.0, math.nan, 1.0, 1.0]), torch.tensor([math.inf] * 4)):
        with pytest.raises(ValueError, match="finite and at least 0"):
            head.loss(h, y, weights_b=bad, **kept)
    x = h.clone().requires_grad_()
    nothing = head.loss(x, y, weights_b=torch.zeros(4), **kept)
    nothing.backward()
    assert (float(nothing.detach()), float(x.grad.abs().max())) == (0, 0)


def test_margin_is_the_cosine_of_the_wider_angle_and_monotonous():
    theta = torch.linspace(0.01, math.pi - 0.25 - 0.01, 50, dtype=torch.float64)
    torch.testing.assert_close(losses.angular_margin(theta.cos(), 0.25), (theta + 0.25).cos(), atol=1e-6, rtol=0)
    everywhere = losses.angular_margin(torch.linspace(-1, 1, 400, dtype=torch.float64), 0.25)
    beyond = torch.linspace(-1, 1, 400, dtype=torch.float64) < -math.cos(0.25)
    assert (everywhere[beyond].diff() > 0).all()
    assert (everywhere[~beyond].diff() > -1e-3).all()  # the clamp of the sine bends the last step at theta = 0


def test_a_prefix_is_renormalised():
    h = F.normalize(torch.randn(5, 16), dim=1)
    torch.testing.assert_close(losses.prefix(h, 4).norm(dim=1), torch.ones(5))
    assert losses.prefix(h, 16) is h
