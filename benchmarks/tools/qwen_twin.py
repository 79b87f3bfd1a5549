"""The slow twin of our Qwen3-VL forward: transformers' own, which attends picture by picture, on the same inputs."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from train.backbones.qwen3vl import Qwen3VL

FEW = 8  # pictures that are looked at


def squares(count: int, side: int) -> np.ndarray:
    """(count, side, side, 3) uint8 noise: FEW pictures over and over."""
    few = np.random.default_rng(0).integers(0, 256, (min(count, FEW), side, side, 3), np.uint8)
    return np.resize(few, (count, side, side, 3))


def plain(net: Qwen3VL, title: str, count: int, device: torch.device) -> Callable[[], Tensor]:
    """A call encodes `count` pictures with one title, (count, D) normalised; inputs are on the device before."""
    x, rows = squares(min(count, FEW), net.side), np.arange(count)
    seen = net.image_processor(list(x), return_tensors="pt")  # slow: a few, repeated
    times = (-(-count // len(x)), 1)
    grid = seen["image_grid_thw"].repeat(times)[:count]
    patches = seen["pixel_values"].repeat(times)[: int(grid.prod(1).sum())]
    ids = net.collate(torch.from_numpy(squares(count, net.side)), rows, [title] * count, rows, count)["ids"]
    told = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": (ids == net.turns.image).int()}
    inputs = {name: value.to(device) for name, value in {**told, "pixel_values": patches, "image_grid_thw": grid}.items()}
    vision = net.model.visual.config

    @torch.inference_mode()
    def encode() -> Tensor:
        ours, vision._attn_implementation = vision._attn_implementation, "sdpa"
        try:
            with torch.autocast(device.type, torch.bfloat16):
                hidden = net.model(**inputs, use_cache=False).last_hidden_state
        finally:
            vision._attn_implementation = ours
        return F.normalize(hidden[:, -1].float(), dim=1)

    return encode


def differences(net: Qwen3VL, title: str, device: torch.device) -> dict[str, Any]:
    """The largest difference of a vector's entry between ours and the twin, and between ours alone and in a batch."""

    @torch.inference_mode()
    def ours(x: np.ndarray) -> Tensor:
        rows = np.arange(len(x))
        made = net.collate(torch.from_numpy(x), rows, [title] * len(x), rows, len(x))
        with torch.autocast(device.type, torch.bfloat16):
            return net({name: value.to(device) for name, value in made.items()}, len(x))

    x = squares(FEW, net.side)
    together = ours(x)
    alone = torch.cat([ours(x[i : i + 1]) for i in range(FEW)])
    with_twin = (plain(net, title, FEW, device)() - together).abs().max().item()
    return {"largest_difference": round(with_twin, 5), "largest_difference_alone": round((alone - together).abs().max().item(), 5)}
