import math

import pytest
import torch
import torch.nn.functional as F

from train import losses


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cosine", [1.0, -1.0, 0.0, 0.999999, -0.99, -math.cos(0.25)])
def test_margin_has_a_finite_gradient_everywhere(cosine, dtype):
    c = torch.tensor([cosine], dtype=dtype, requires_grad=True)
    losses.angular_margin(c, 0.25).sum().backward()
    assert c.grad is not None
    assert c.grad.isfinite().all()


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
