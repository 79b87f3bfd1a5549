"""What every backbone offers the loop and the reader: pictures and texts to one vector an item."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor, nn

Inputs = dict[str, Tensor]


class Backbone(nn.Module, ABC):
    """n items, S pixels a side, D embedding dimensions. `dim` is D, `side` the S of the pictures it takes."""

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
