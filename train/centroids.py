"""Stage 2: one prototype an ID, the centroid of its members' embeddings (METHOD.md section 2)."""

from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from train import parallel, plan
from train.corpus import Block, read, share_out
from train.encoder import Encoder
from train.labelling import Labelling


def centroids(encoder: Encoder, labelling: Labelling, *, most: int | None = None, tell: Callable[[int], None] | None = None) -> Tensor:
    """(U, D) normalised means of the members of each ID by their weights, or of at most `most` of them.

    The workers encode a share each and add up, so every worker holds all U rows. `tell` hears how many rows are encoded, by all.
    """
    sums = torch.zeros(labelling.ids, encoder.model.dim, device=encoder.device)
    encoded = 0
    for block, h in encoder.blocks(_blocks(encoder, labelling.members, most)):
        weights = torch.from_numpy(labelling.weights[block.rows] * block.counted).to(encoder.device)
        sums.index_add_(0, torch.from_numpy(labelling.labels[block.rows]).to(encoder.device), h * weights[:, None])
        encoded += int(block.counted.sum())
        if tell:
            tell(encoded * encoder.world)
    return F.normalize(parallel.add_up(sums), dim=1)


def _blocks(encoder: Encoder, members: plan.Members, most: int | None) -> Iterator[Block]:
    """This worker's share of all rows, or of the first members of each ID."""
    corpus, side = encoder.corpus, encoder.model.side
    if most is None:
        return encoder.members()
    ends = zip(members.offsets, members.offsets[1:], strict=False)
    chosen = np.concatenate([members.rows[start:stop][:most] for start, stop in ends])
    rows, counted = share_out(len(chosen), encoder.rank, encoder.world)
    return read(lambda part: corpus.load(part, side), chosen[rows], counted, corpus.has_image)
