"""One step down the gradient, in as many micro-batches as memory asks for.

With several, the vectors of the whole batch are made first without a graph; the loss is taken of all of them, and its gradient
with respect to each vector is carried through the backbone one micro-batch at a time ("gradient cache", Gao et al. 2021, arXiv
2101.06983). So in-batch negatives and the head see the whole batch in both stages, and the gradient is that of the big batch, at
the price of one more forward pass; only batch norm takes its statistics by micro-batch.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from train import augment, parallel
from train.encoder import Encoder
from train.views import Part, Views

CLIP = 5.0  # the largest norm of a gradient


def groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameters for AdamW: decay on matrices, none on vectors."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]


@dataclass
class Descent:
    """`net` is what training calls, `encoder` holds the model behind it; `augmentation` is the strength of train.augment.photo."""

    net: nn.Module
    encoder: Encoder
    optimizer: torch.optim.Optimizer
    augmentation: float

    def backward(self, views: Views, loss_of: Callable[[Tensor], Tensor]) -> float:
        """The loss, averaged over the workers, with its gradients in place; without any where it is not finite."""
        self.optimizer.zero_grad(set_to_none=True)
        pixels = self._pixels(views)
        if len(views.parts) == 1:
            return self._single(views.parts[0], pixels, loss_of)
        h = self._without_graph(views.parts, pixels).requires_grad_()
        loss = loss_of(h)
        if not math.isfinite(value := parallel.mean(loss.item(), self.encoder.device)):
            return value
        loss.backward()
        assert h.grad is not None
        start = 0
        for part in views.parts:
            with parallel.without_sync(self.net, part is views.parts[-1]):
                (self._forward(part, pixels) * h.grad[start : start + part.asked]).sum().backward()
            start += part.asked
        return value

    def _single(self, part: Part, pixels: Tensor | None, loss_of: Callable[[Tensor], Tensor]) -> float:
        loss = loss_of(self._forward(part, pixels))
        if math.isfinite(value := parallel.mean(loss.item(), self.encoder.device)):
            loss.backward()
        return value

    def step(self, lr: float) -> bool:
        """Move by the gradients, clipped; False, and nothing moves, where they are not finite."""
        norm = nn.utils.clip_grad_norm_(self.net.parameters(), CLIP)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if not torch.isfinite(norm):
            return False
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        return True

    def _pixels(self, views: Views) -> Tensor | None:
        if views.stored is None:
            return None
        device = self.encoder.device if self.encoder.device.type == "cuda" else torch.device("cpu")
        generator = torch.Generator(device).manual_seed(views.seed)
        return augment.photo(views.stored.to(device), self.encoder.model.side, generator, strength=self.augmentation)

    def _forward(self, part: Part, pixels: Tensor | None) -> Tensor:
        seen = pixels[part.pictures] if pixels is not None else None
        return self.encoder.forward(self.net, seen, part.image_rows, part.texts, part.text_rows, part.count)[: part.asked]

    def _without_graph(self, parts: list[Part], pixels: Tensor | None) -> Tensor:
        """(b, D) in training mode; running statistics are put back, since the second pass moves them."""
        model = self.encoder.model
        before = [buffer.clone() for buffer in model.buffers()]
        with torch.no_grad():
            h = torch.cat([self._forward(part, pixels) for part in parts])
            for buffer, value in zip(model.buffers(), before, strict=True):
                buffer.copy_(value)
        return h
