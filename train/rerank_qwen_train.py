"""Trains the rerankers of the qwen3-vl backbone by the drawing and the loop of the compact ones: a batch is drawn as numbers of rows, from
which a request is made. Shapes as in train.rerank_blocks and train.rerank_qwen_inputs; V views of a picture, S pixels a side.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from idem import images
from train.backbones.base import computes_bf16
from train.backbones.qwen3vl import OURS, Qwen3VL, Qwen3VLConfig
from train.rerank_blocks import Batch
from train.rerank_data import Pool, seen
from train.rerank_loop import RerankConfig, State
from train.rerank_merge import Scored
from train.rerank_qwen import QwenListwise, QwenPointwise, score
from train.rerank_qwen_inputs import Item, QwenBatch, moved, picture_features

QwenModel = QwenListwise | QwenPointwise
VIEWS = {"listwise": 1, "pointwise": 2}  # of a picture; METHOD.md section 3
QWEN_MODELS: dict[str, type[QwenListwise] | type[QwenPointwise]] = {"listwise": QwenListwise, "pointwise": QwenPointwise}


@dataclass(frozen=True, kw_only=True)
class QwenPool(Pool):
    """places (n, V T, 1) are the numbers of the rows, texts (n, 1) the same from 1 on, 0 for an empty title: what `draw` gives of them is
    looked up in pixels (n, V, S, S, 3) uint8 and titles. Features would take five times the memory at the 2B's widths."""

    pixels: np.ndarray
    titles: Sequence[str]


def read_picture(data: bytes | None, side: int, views: int) -> np.ndarray | None:
    """(views, side, side, 3) uint8; None where there is no picture or it does not decode."""
    try:
        return seen(data, side, views) if data else None
    except images.ImageError:
        return None


def picture_bytes(backbone: Qwen3VL, views: int) -> int:
    """What a picture takes in a QwenPool."""
    return views * backbone.side**2 * 3


def qwen_pool(backbone: Qwen3VL, pictures: Sequence[bytes | None], titles: Sequence[str], *, views: int, progress: str = "") -> QwenPool:
    """Of n items; a picture that does not decode counts as none."""
    count, side = len(titles), backbone.side
    pixels, pictured = np.zeros((count, views, side, side, 3), np.uint8), np.zeros(count, bool)
    for row, data in enumerate(tqdm(pictures, desc=progress, disable=not progress, unit="picture")):
        if (found := read_picture(data, side, views)) is not None:
            pixels[row], pictured[row] = found, True
    numbers, tokens = np.arange(count), views * backbone.turns.cells**2
    return QwenPool(
        places=np.broadcast_to(numbers.astype(np.float32)[:, None, None], (count, tokens, 1)),
        pictured=pictured,
        texts=np.where([bool(title.strip()) for title in titles], numbers + 1, 0)[:, None],
        pixels=pixels,
        titles=titles,
    )


def numbered(texts: Sequence[str], shown: Sequence[bool], views: int) -> list[Item]:
    """Items whose pictures, `views` of each that is shown, are one after another in the features of a request."""
    starts = np.cumsum([0, *shown])[:-1] * views
    ranges = [tuple(range(start, start + views)) if there else () for start, there in zip(starts.tolist(), shown, strict=True)]
    return [Item(text=text, pictures=pictures) for text, pictures in zip(texts, ranges, strict=True)]


def first_view(item: Item) -> Item:
    """As a query is read, whatever a document is."""
    return dataclasses.replace(item, pictures=item.pictures[:1])


class RowReranker(nn.Module):
    """A reranker that takes batches as `draw` and `assemble` make them of a QwenPool, and gives its answers on the CPU. Its state is what
    training changes alone: the rest is in the folder that the backbone came from."""

    def __init__(self, model: QwenModel, pool: QwenPool) -> None:
        super().__init__()
        self.model, self.pool = model, pool
        self.device = next(model.parameters()).device
        self.bf16 = self.device.type == "cuda" and computes_bf16(self.device)

    def request(self, batch: Batch) -> QwenBatch:
        """On the device of the model; hidden places are zero."""
        backbone, views, there = self.model.backbone, self.model.layout.document.views, batch.level >= 0
        assert isinstance(batch.d_image, Tensor), "numbers of the pool's pictures, which no reader of the compact backbone prepares"
        mask = torch.cat([batch.q_mask[:, None], batch.d_mask], 1)
        shown = mask.any(2)
        rows = torch.cat([batch.q_image[:, None], batch.d_image], 1)[shown][:, 0, 0].long().numpy()
        features = torch.zeros(0)
        if len(rows):
            pixels = torch.from_numpy(self.pool.pixels[rows].reshape(-1, backbone.side, backbone.side, 3))
            features = picture_features(backbone, pixels.to(self.device))
            features = features * mask[shown].reshape(len(features), 1, -1, 1).to(self.device)
        titles, said = ["", *self.pool.titles], torch.cat([batch.q_text[:, None, 0], batch.d_text[..., 0]], 1)
        items = numbered([titles[text] for text in said.flatten().tolist()], shown.flatten().tolist(), views)
        width, counts = shown.shape[1], there.sum(1).tolist()
        made = self.model.layout.batch(
            [first_view(item) for item in items[::width]],
            [items[at : at + count] for at, count in zip(range(1, len(items), width), counts, strict=True)],
            features,
            [values[found].tolist() for values, found in zip(batch.cosine, there, strict=True)],
            [values[found].tolist() for values, found in zip(batch.level, there, strict=True)],
        )
        missing = (0, there.shape[1] - made.level.shape[1])  # the losses see places that no list of the batch fills
        made = dataclasses.replace(made, rows=F.pad(made.rows, missing), level=F.pad(made.level, missing, value=-1))
        return moved(made, self.device)

    def forward(self, batch: Batch) -> Tensor | tuple[Tensor, ...]:
        """As the compact model of the same kind: (B, M), or s (B, M), null (B,) and levels (B, M, LEVELS)."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            made = self.model(self.request(batch))
        return made.cpu() if isinstance(made, Tensor) else tuple(part.cpu() for part in made)

    def state_dict(self, *args: Any, **told: Any) -> dict[str, Any]:
        trained = {name for name, p in self.named_parameters() if p.requires_grad}
        return {name: value for name, value in super().state_dict(*args, **told).items() if name in trained}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """ValueError where names are others than those of `state_dict`."""
        if wrong := set(state_dict) ^ set(self.state_dict()):
            raise ValueError(f"the state does not fit the reranker in {len(wrong)} tensors, as {min(wrong)}")
        return super().load_state_dict(state_dict, strict=False, assign=assign)


class QwenState(State):
    def restore(self, folder: Path) -> None:
        super().restore(folder)
        for parameter, slots in self.optimizer.state.items():
            slots.update({name: value.to(parameter.device) for name, value in slots.items() if value.ndim})


def adapted(folder: Path, device: torch.device) -> Qwen3VL:
    """The backbone of the embedder in `folder`, with fresh adapters in its language model, in bf16 on a GPU that computes in it."""
    told, fields = json.loads((folder / "config.json").read_text())[OURS], Qwen3VLConfig.model_fields
    changed = {"path": str(folder), "lora_rank": fields["lora_rank"].default, "freeze_vision": True}
    if device.type == "cuda" and computes_bf16(device):
        changed["dtype"] = "bf16"
    made = Qwen3VL.build(Qwen3VLConfig(**{**told, **changed}))
    return made.to(device)


def start(config: RerankConfig, folder: Path, pool: QwenPool) -> QwenState:
    """A fresh state of the reranker on the backbone of the embedder in `folder`, on the GPU where there is one."""
    torch.manual_seed(config.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model: Any = RowReranker(QWEN_MODELS[config.model](adapted(folder, device)).to(device), pool)
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "peak": config.lr, "weight_decay": config.weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "peak": config.lr, "weight_decay": 0.0},
    ]
    return QwenState(model=model, optimizer=torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.98)))


def trained(config: RerankConfig, folder: Path, pool: QwenPool, weights: Mapping[str, Tensor]) -> QwenModel:
    """The reranker of `start` with the weights of State.best."""
    model: Any = start(config, folder, pool).model
    model.load_state_dict(weights)
    return model.model.eval()


def scored(rows: RowReranker, batch: Batch, *, chunk: int) -> list[Scored]:
    """As train.rerank_score.score; what train.rerank_select measures and judges with."""
    return score(rows.model, rows.request(batch), chunk=chunk)
