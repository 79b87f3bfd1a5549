"""Pictures of one size through Qwen3-VL's vision tower, all at once.

Pictures enter as squares, so that every one has the same grid: cutting into patches is a reshape, positions are the same for
all, and attention within pictures is one batched call instead of one a picture. Shapes: n pictures, S pixels a side,
P = (S / 16)^2 patches, T = P / 4 image tokens, C channels of the tower, D of the language model.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ATTENTION = "equal_squares"


def normalise(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(n, S, S, 3) uint8 or (n, 3, S, S) float in 0..1 -> (n, 3, S, S) float32 around zero."""
    if pixels.dtype == torch.uint8:
        pixels = pixels.permute(0, 3, 1, 2).float() / 255
    mean_3, std_3 = (torch.tensor(list(values), device=pixels.device).reshape(3, 1, 1) for values in (mean, std))
    return (pixels.float() - mean_3) / std_3


def patchify(x: Tensor, *, patch: int, merge: int, frames: int) -> Tensor:
    """(n, 3, S, S) -> (n, P, 3 * frames * patch * patch): what transformers' Qwen2VLImageProcessorPil makes of each picture.

    The merge x merge patches that become one image token lie together; a still picture stands for each of `frames` frames.
    """
    n, channels, side, _ = x.shape
    cells = side // (patch * merge)
    x = x.reshape(n, channels, cells, merge, patch, cells, merge, patch).permute(0, 2, 5, 3, 6, 1, 4, 7)
    x = x.unsqueeze(6).expand(*x.shape[:6], frames, *x.shape[6:])
    return x.reshape(n, (side // patch) ** 2, channels * frames * patch * patch)


def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **told: Any) -> tuple[Tensor, None]:
    """Attention within each picture: (1, heads, n * P, d) -> (1, n * P, heads, d). Called by transformers, which passes `patches`."""
    heads, total, d = query.shape[1:]
    q, k, v = (part.reshape(heads, -1, told["patches"], d).transpose(0, 1) for part in (query, key, value))
    seen = F.scaled_dot_product_attention(q, k, v, scale=told["scaling"])
    return seen.transpose(1, 2).reshape(1, total, heads, d), None


class Squares(nn.Module):
    """The forward pass of a Qwen3VLVisionModel (its own modules, held elsewhere) for pictures of `side` pixels."""

    where: Tensor
    weights: Tensor
    places: Tensor

    def __init__(self, visual: nn.Module, side: int) -> None:
        super().__init__()
        from transformers import AttentionInterface
        from transformers.vision_utils import get_vision_interpolation_indices_and_weights, get_vision_position_ids

        config: Any = visual.config
        self.patch, self.merge, self.frames = config.patch_size, config.spatial_merge_size, config.temporal_patch_size
        self.taps = tuple(config.deepstack_visual_indexes)
        grid = torch.tensor([[1, side // self.patch, side // self.patch]])
        where, weights = get_vision_interpolation_indices_and_weights(
            grid,
            num_grid_per_side=visual.num_grid_per_side,  # pyright: ignore[reportArgumentType]
            mode=visual.interpolation_mode,  # pyright: ignore[reportArgumentType]
            align_corners=visual.interpolation_align_corners,  # pyright: ignore[reportArgumentType]
            spatial_merge_size=self.merge,
        )
        self.register_buffer("where", where, persistent=False)
        self.register_buffer("weights", weights, persistent=False)
        self.register_buffer("places", get_vision_position_ids(grid, self.merge), persistent=False)
        AttentionInterface.register(ATTENTION, attend)
        config._attn_implementation = ATTENTION

    def forward(self, visual: Any, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """x (n, 3, S, S) normalised -> image tokens (n * T, D), and those for the first language layers (DeepStack), (n * T, D) each."""
        patches = patchify(x, patch=self.patch, merge=self.merge, frames=self.frames)
        n, count = patches.shape[:2]
        embed = visual.patch_embed.proj
        # A convolution whose kernel is its stride is a product of matrices, which cuDNN's 3-D one is far slower at.
        hidden = F.linear(patches.to(embed.weight.dtype), embed.weight.flatten(1), embed.bias)
        position = (visual.pos_embed(self.where) * self.weights[:, :, None]).sum(1)
        hidden = (hidden + position.to(hidden.dtype)).flatten(0, 1)
        rotary = tuple(part.repeat(n, 1) for part in visual.rotary_pos_emb(hidden, self.places))
        whole = torch.tensor([0, n * count])  # one piece on the CPU: `attend` splits it, and no device has to be waited for
        deep = []
        for number, block in enumerate(visual.blocks):
            hidden = block(hidden, cu_seqlens=whole, position_embeddings=rotary, patches=count)
            if number in self.taps:
                deep.append(visual.deepstack_merger_list[self.taps.index(number)](hidden))
        return visual.merger(hidden), deep
