"""What a second photo of the same thing may look like: geometry, light, colour and occlusion, on whole batches, on any device.

The generator is on the device of the pictures.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def _uniform(n: int, low: float, high: float, random: torch.Generator) -> Tensor:
    return torch.rand(n, generator=random, device=random.device) * (high - low) + low


def geometry(x: Tensor, side: int, random: torch.Generator, *, turn: float, zoom: float, aspect: float, shift: float) -> Tensor:
    """(n, 3, A, A) -> (n, 3, side, side): rotation up to `turn` radians, scale up to `zoom`, `aspect`
    a logarithm, shift as a share of the side."""
    n = len(x)
    angle = _uniform(n, -turn, turn, random)
    scale = torch.exp(_uniform(n, -math.log1p(zoom), math.log1p(zoom), random))
    ratio = torch.exp(_uniform(n, -aspect, aspect, random))
    theta = torch.zeros(n, 2, 3, device=x.device)
    theta[:, 0, 0], theta[:, 0, 1] = angle.cos() * scale * ratio, -angle.sin() * scale
    theta[:, 1, 0], theta[:, 1, 1] = angle.sin() * scale, angle.cos() * scale / ratio
    theta[:, :, 2] = _uniform(2 * n, -2 * shift, 2 * shift, random).reshape(n, 2)
    grid = F.affine_grid(theta, [n, 3, side, side], align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def colour(x: Tensor, random: torch.Generator, *, strength: float, grey: float) -> Tensor:
    """Brightness, contrast, colour cast and saturation by `strength`; a share `grey` of the pictures loses its colour."""
    n = len(x)

    def factor(low: float, high: float) -> Tensor:
        return torch.exp(_uniform(n, low, high, random))[:, None, None, None]

    mean = x.mean((1, 2, 3), keepdim=True)
    x = (x - mean) * factor(-strength, strength) + mean * factor(-strength, strength)
    x = x * torch.exp(_uniform(3 * n, -strength / 2, strength / 2, random)).reshape(n, 3, 1, 1)
    luminance = x.mean(1, keepdim=True)
    saturation = _uniform(n, 1 - strength, 1 + strength, random) * (_uniform(n, 0, 1, random) >= grey)
    return luminance + (x - luminance) * saturation[:, None, None, None]


def occlude(x: Tensor, random: torch.Generator, *, share: float, largest: float) -> Tensor:
    """Cover a rectangle of up to `largest` of each side, in a share of the pictures, with one flat colour."""
    n, side = len(x), x.shape[2]
    size = (_uniform(2 * n, 0, largest, random).reshape(n, 2) * side).clamp(min=2)
    start = _uniform(2 * n, 0, 1, random).reshape(n, 2) * (side - size)
    at = torch.arange(side, device=x.device)
    inside = (at >= start[..., None]) & (at < (start + size)[..., None])  # (n, 2, side): across, down
    covered = inside[:, 0, None, :] & inside[:, 1, :, None] & (_uniform(n, 0, 1, random) < share)[:, None, None]
    return torch.where(covered[:, None], _uniform(3 * n, 0, 1, random).reshape(n, 3, 1, 1), x)


def photo(pixels: Tensor, side: int, random: torch.Generator, *, strength: float = 1.0) -> Tensor:
    """(n, A, A, 3) uint8 -> (n, 3, side, side) float in 0..1; `strength` 0 only resizes."""
    x = pixels.permute(0, 3, 1, 2).float() / 255
    x = geometry(x, side, random, turn=0.25 * strength, zoom=0.25 * strength, aspect=0.1 * strength, shift=0.06 * strength)
    x = colour(x, random, strength=0.4 * strength, grey=0.15 * strength)
    return occlude(x, random, share=0.5 * strength, largest=0.4).clamp(0, 1)
