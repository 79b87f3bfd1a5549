"""The qwen3-vl backbone through the loop that trains every backbone, and shared over two workers."""

from pathlib import Path

import numpy as np
import torch
import torch.multiprocessing as mp

from tests.train.small import config, corpus, ignore, join, leave, picture
from train import backbones, parallel
from train.backbones.qwen3vl import Qwen3VL, Qwen3VLConfig
from train.embedder import Embedder
from train.loop import Trainer

TEXTS = ("the red mug", "a teapot with a handle", "spoon")


def told(folder: Path, **changed: object) -> Qwen3VLConfig:
    small = {"path": str(folder), "dim": 32, "image_tokens": 4, "text_length": 24, "lora_rank": 4}
    return Qwen3VLConfig.model_validate({**small, **changed})


def test_the_three_stages_then_what_is_served(qwen_folder: Path, tmp_path: Path) -> None:
    trainer = Trainer(config(model=told(qwen_folder), steps=6, text_share=0.5, lr=1e-3), corpus(), ignore)
    trained = trainer.run()
    assert trained.step == 6
    asked = [picture(0, 0), picture(5, 1), None], ["", "thing number 1", "thing number 2"]
    start, ours = (Embedder(m).encode(*asked) for m in (backbones.build(told(qwen_folder)), trained.model))
    assert np.abs(ours - start).max() > 1e-3
    assert isinstance(trained.model, Qwen3VL)
    trained.model.save(tmp_path)
    served = Embedder(backbones.load(tmp_path)).encode(*asked)
    assert np.abs(served - ours).max() < 1e-5  # adapters are merged


def _loss(net: torch.nn.Module, model: Qwen3VL, half: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(half)
    pixels = torch.randint(0, 256, (2, model.side, model.side, 3), dtype=torch.uint8, generator=random)
    h = net(model.collate(pixels, np.array([2, 0]), TEXTS, np.array([0, 1, 3]), 4), 4)
    return torch.nn.functional.cross_entropy(8 * h @ h.detach().roll(1, 0).T, torch.arange(4))


SHARED: tuple[tuple[str, dict[str, object]], ...] = (("ddp", {"lora_rank": 0}), ("fsdp2", {"dtype": "bf16"}))


def _apart(rank: int, folder: Path, kind: str, changed: dict[str, object]) -> float:
    """The largest difference between the gradients of two workers and those of one that has both halves."""
    torch.manual_seed(0)
    model = Qwen3VL.build(told(folder, **changed))
    ((_loss(model, model, 0) + _loss(model, model, 1)) / 2).backward()
    alone = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    net = parallel.share_training(model, kind)
    _loss(net, model, rank).backward()
    shared = {name: parallel.whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    assert shared.keys() == alone.keys()
    return max(float((shared[name] - alone[name]).abs().max()) for name in alone)


def _worker(rank: int, meet: str, folder: str) -> None:
    join(rank, 2, meet)
    found = {f"{kind} {changed}": _apart(rank, Path(folder), kind, changed) for kind, changed in SHARED}
    assert max(found.values()) < 1e-6, found
    leave()


def test_two_workers_have_the_gradient_of_one(qwen_folder: Path, tmp_path: Path) -> None:
    mp.spawn(_worker, args=(str(tmp_path / "meet"), str(qwen_folder)), nprocs=2)
