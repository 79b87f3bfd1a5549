"""Rows of the corpus to vectors without augmentation, as in service: for centroids, for the held-back slice, for curation."""

from collections.abc import Iterable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train import parallel
from train.backbones.base import Backbone, computes_bf16
from train.corpus import Block, Corpus, read
from train.neighbours import nearest


class Encoder:
    """The picture of an item where there is one, else its text; `bf16` where the hardware computes in it.

    What is encoded together is encoded alike: all workers do it at the same time, as many blocks each, with worker 0's buffers.
    """

    def __init__(self, model: Backbone, corpus: Corpus, *, device: torch.device, bf16: bool) -> None:
        self.model, self.corpus, self.device = model, corpus, device
        self.bf16 = bf16 and computes_bf16(device)
        self.rank, self.world = parallel.rank_world()

    def forward(
        self, net: nn.Module, pixels: Tensor | None, image_rows: np.ndarray, texts: list[str], text_rows: np.ndarray, count: int
    ) -> Tensor:
        """(count, D) float32, normalised, by the module that is called in training or by the model itself."""
        inputs = {k: v.to(self.device) for k, v in self.model.collate(pixels, image_rows, texts, text_rows, count).items()}
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            return net(inputs, count).float()

    def blocks(self, blocks: Iterable[Block], *, held: bool = False) -> Iterator[tuple[Block, Tensor]]:
        """Each block of this worker's share with its vectors (n, D); those of `held` are pictures outside the corpus. Collective."""
        parallel.share_buffers(self.model)
        yield from self._encoded(blocks, held=held)

    def _encoded(self, blocks: Iterable[Block], *, held: bool = False) -> Iterator[tuple[Block, Tensor]]:
        training = self.model.training
        self.model.eval()
        try:
            for block in blocks:
                with torch.no_grad():  # inference mode would leave FSDP2 buffers that training cannot write to
                    yield block, self._block(block, np.ones(len(block.rows), bool) if held else self.corpus.has_image[block.rows])
        finally:
            self.model.train(training)

    def _block(self, block: Block, has_image: np.ndarray) -> Tensor:
        image_rows, text_rows = np.flatnonzero(has_image), np.flatnonzero(~has_image)
        texts = [self.corpus.titles[int(r)] for r in block.rows[text_rows]]
        pixels = torch.from_numpy(block.pixels).to(self.device) if len(image_rows) else None
        return self.forward(self.model, pixels, image_rows, texts, text_rows, len(block.rows))

    def members(self) -> Iterator[Block]:
        """This worker's share of all rows of the corpus."""
        return self.corpus.members(self.rank, self.world, self.model.side)

    def rows(self, rows: np.ndarray) -> Tensor:
        """(n, D) of any rows, in their order, by this worker alone; with FSDP2 all must ask, since gathering the weights takes everyone."""
        load = lambda part: self.corpus.load(part, self.model.side)  # noqa: E731
        read_blocks = read(load, rows, np.ones(len(rows), bool), self.corpus.has_image)
        return torch.cat([torch.zeros(0, self.model.dim, device=self.device), *(h for _, h in self._encoded(read_blocks))])

    def held_recall(self) -> float | None:
        """R@1 on the held-back slice, the same on every worker; None where it has not two products or nothing to ask with."""
        held = self.corpus.held
        if held is None or len(set(held.products.tolist())) < 2:
            return None
        first = np.unique(held.products, return_index=True)[1]
        queries = np.setdiff1d(np.arange(len(held.products)), first)
        if not len(queries):
            return None
        vectors = torch.zeros(len(held.products), self.model.dim, device=self.device)
        for block, h in self.blocks(self.corpus.held_blocks(self.rank, self.world, self.model.side), held=True):
            counted = torch.from_numpy(block.counted).to(self.device)
            vectors[torch.from_numpy(block.rows).to(self.device)[counted]] = h[counted]
        found = F.normalize(parallel.add_up(vectors), dim=1).cpu().numpy()
        _, rows = nearest(found[queries], found[first], 1)
        right = float((held.products[first][rows[:, 0]] == held.products[queries]).mean())
        return round(parallel.same_everywhere(right, self.device), 4)
