"""What every backbone offers the loop and the reader: pictures and texts to one vector an item."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Inputs = dict[str, Tensor]


def computes_bf16(device: torch.device) -> bool:
    """Whether `device` has instructions for bfloat16: without AVX-512 a convolution in it was seen to take 22 s in place of 1.5 s."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported()


class Backbone(nn.Module, ABC):
    """n items, S pixels a side, D embedding dimensions. `dim` is D, `side` the S of the pictures it takes; `config` made it."""

    config: Any
    dim: int
    side: int

    @abstractmethod
    def collate(self, pixels: Tensor | None, image_rows: np.ndarray, texts: Sequence[str], text_rows: np.ndarray, count: int) -> Inputs:
        """What `forward` takes, made on the CPU: tensors by name, to be moved to the device as they are.

        pixels (len(image_rows), S, S, 3) uint8, or (len(image_rows), 3, S, S) float in 0..1, belong to the items
        `image_rows`, texts to the items `text_rows`; each of the `count` items is in at least one of them.
        """

    @abstractmethod
    def forward(self, inputs: Inputs, count: int) -> Tensor:
        """(count, D) float32, L2-normalised, in the order of the items."""

    @abstractmethod
    def train_only(self, *, images: bool, texts: bool) -> None:
        """Let what is never used stand still: parameters that get no gradient make a data-parallel step wait for ever."""

    @abstractmethod
    def save(self, folder: Path) -> list[str]:
        """Write everything that `load` of the same backbone needs; the names of the files, relative to `folder`."""

    def hear(self, texts: Sequence[str]) -> None:
        """Texts of the training rows, before the first step: how often words are said may matter. The same on every worker."""

    def layers(self) -> list[nn.Module]:
        """The blocks that a sharded data-parallel wrapper takes one by one; none where the whole is small."""
        return []

    def state_for_checkpoint(self) -> dict[str, Tensor]:
        """What training changes, parameters and buffers by name: all of it, unless most of the weights stand still."""
        return dict(self.state_dict())

    def load_checkpoint(self, state: Mapping[str, Tensor]) -> None:
        """Put `state_for_checkpoint` of the same kind of backbone back. ValueError where names or shapes are others."""
        own = self.state_for_checkpoint()
        if wrong := sorted(set(own) ^ set(state)) or sorted(name for name in own if own[name].shape != state[name].shape):
            raise ValueError(f"the checkpoint does not fit the {type(self).__name__} backbone in {len(wrong)} tensors, as {wrong[0]}")
        self.load_state_dict(dict(state), strict=False)
