"""A run on one process, one GPU or the CPU, without Ray: the plain loop with its checkpoints in a folder."""

from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from train import checkpoint
from train.corpus import Corpus
from train.loop import Trainer
from train.settings import LoopConfig

SHOWN = ("step", "loss", "stage", "images_per_second", "held_R@1", "stale_share", "encoded")


def pick_device(use_gpu: bool) -> torch.device:
    """ValueError where a GPU is asked for and there is none."""
    if use_gpu and not torch.cuda.is_available():
        raise ValueError("train.use_gpu is set, but torch finds no GPU here; train.use_gpu = false runs on the CPU")
    return torch.device("cuda" if use_gpu else "cpu")


def train_here(config: LoopConfig, corpus: Corpus, folder: Path, *, device: torch.device, start_from: str = "") -> Path:
    """Train to the end, beginning as train.checkpoint.begin; the folder of the last checkpoint, below `folder`."""

    def report(figures: dict[str, Any], due: bool) -> None:
        bar.n = int(100 * figures.get("progress", bar.n / 100))
        bar.set_postfix({k: f"{v:.3g}" if isinstance(v, float) else v for k, v in figures.items() if k in SHOWN})
        if due:
            checkpoint.keep(trainer, folder)

    trainer = Trainer(config, corpus, report, device=device)
    checkpoint.begin(trainer, folder, start_from)
    with tqdm(total=100, desc="training", unit="%", bar_format="{desc} {percentage:3.0f}%|{bar:30}| {elapsed}{postfix}") as bar:
        trainer.run()
    return checkpoint.keep(trainer, folder)
