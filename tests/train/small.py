"""A corpus that is learnt in seconds, and settings for it; workers of a process group that a test starts."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

from train.backbones.compact import CompactConfig
from train.corpus import Corpus, Held
from train.loop import Trainer
from train.settings import LoopConfig

MODEL = CompactConfig(side=32, dim=16, widths=(8, 8, 16, 16), text_dim=16, text_layers=1)
WORDS = ("mug", "lamp", "chair", "teapot", "kettle", "sofa", "rug", "vase")


def config(**changes: Any) -> LoopConfig:
    said = {
        "model": MODEL,
        "minutes": 5,
        "steps": 12,
        "batch": 12,
        "margin_batch": 12,
        "margin_per_id": 2,
        "warm_up": 0.4,
        "similar": 0.5,
        "lr": 2e-3,
        "head_lr": 2e-3,
        "prefixes": (8, 16),
        "refresh": 4,
        "checkpoint_seconds": 1e9,
        "bf16": False,
    }
    return LoopConfig(**(said | changes))


def picture(row: int, product: int) -> bytes:
    """Noise in the product's colour."""
    random = np.random.default_rng(int(row))
    colour = np.random.default_rng(1000 + int(product)).integers(0, 255, 3)
    out = io.BytesIO()
    Image.fromarray(np.clip(colour + random.integers(-20, 20, (24, 24, 3)), 0, 255).astype(np.uint8)).save(out, "PNG")
    return out.getvalue()


def corpus(
    products: int = 6, *, titles: bool = True, pictures: bool = True, words: bool = False, held: int = 0, names: Sequence[str] = ()
) -> Corpus:
    """Three rows a product; with `words`, titles of one word, which no noise changes. `held` pictures of two further products."""
    labels = np.repeat(np.arange(products), 3)
    title = (lambda u: f"{WORDS[u % 8]}{u // 8}") if words else (lambda u: f"thing number {u}")
    kept = np.repeat([100, 101], held // 2)
    return Corpus(
        fetch=lambda rows: [picture(r, labels[r]) if pictures else None for r in rows],
        titles=[title(int(u)) if titles else "" for u in labels],
        has_image=np.full(len(labels), pictures),
        labels=labels,
        names=names,
        held=Held(lambda rows: [picture(500 + r, kept[r]) for r in rows], kept) if held else None,
    )


def ignore(figures: dict[str, Any], due: bool) -> None:
    """A report that nobody reads."""


def join(rank: int, world: int, meet: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=world)


def leave() -> None:
    """Who leaves first breaks the others' connections."""
    dist.barrier()
    dist.destroy_process_group()


def largest_difference(a: Trainer, b: Trainer) -> float:
    """Of the vectors of all rows and of the head's rows."""
    rows = np.arange(len(a.corpus.labels))
    pairs = [(a.encode_rows(rows), b.encode_rows(rows)), (a.head.whole(), b.head.whole())]
    return max(float((x - y).abs().max()) for x, y in pairs)
