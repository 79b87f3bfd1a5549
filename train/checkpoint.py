"""A training state on disk: safetensors and JSON, one file a worker for its rows of the head, so that workers may come and go."""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from train.loop import Trainer
from train.prototypes import shard_range

HEAD = re.compile(r"head-(\d+)-of-(\d+)\.safetensors")


def _optimizer_tensors(trainer: Trainer) -> dict[str, Tensor]:
    """State of AdamW by the parameter's name, for every parameter but the head's rows."""
    named = {id(p): name for name, p in trainer.model.named_parameters()}
    return {
        f"{named[id(p)]}/{key}": value.contiguous()
        for p, state in trainer.optimizer.state.items()
        if id(p) in named
        for key, value in state.items()
    }


def save(trainer: Trainer, folder: Path) -> None:
    """Write this worker's files; worker 0 also writes the backbone, its optimizer state and the counters."""
    head = {"weight": trainer.head.weight.detach(), **trainer.optimizer.state.get(trainer.head.weight, {})}
    save_file({k: v.contiguous() for k, v in head.items()}, folder / f"head-{trainer.rank}-of-{trainer.world}.safetensors")
    if trainer.rank == 0:
        save_file({k: v.contiguous() for k, v in trainer.model.state_dict().items()}, folder / "model.safetensors")
        save_file(_optimizer_tensors(trainer), folder / "optimizer.safetensors")
        if trainer.similar is not None:
            save_file({"similar": torch.from_numpy(trainer.similar).contiguous()}, folder / "similar.safetensors")
        (folder / "state.json").write_text(json.dumps(trainer.state()))


def whole_head(folder: Path) -> dict[str, Tensor]:
    """All rows of the head and of its optimizer state, however many workers wrote them. ValueError if one is missing."""
    files = {int(m[1]): (path, int(m[2])) for path in folder.iterdir() if (m := HEAD.fullmatch(path.name))}
    world = next(iter(files.values()))[1] if files else 0
    if sorted(files) != list(range(world)) or not files:
        raise ValueError(f"the checkpoint at {folder} holds the head's rows of workers {sorted(files)} of {world}")
    parts = [load_file(files[rank][0]) for rank in range(world)]
    return {key: torch.cat([p[key] for p in parts]) if parts[0][key].ndim else parts[0][key] for key in parts[0]}


def restore(trainer: Trainer, folder: Path) -> None:
    """Put the trainer where the checkpoint stands, on any number of workers."""
    state: dict[str, Any] = json.loads((folder / "state.json").read_text())
    trainer.model.load_state_dict(load_file(folder / "model.safetensors"))
    named = dict(trainer.model.named_parameters())
    for key, value in load_file(folder / "optimizer.safetensors").items():
        name, slot = key.rsplit("/", 1)
        trainer.optimizer.state[named[name]][slot] = value if slot == "step" else value.to(trainer.device)
    head = whole_head(folder)
    if len(head["weight"]) != trainer.head.rows:
        raise ValueError(f"the checkpoint at {folder} has {len(head['weight'])} prototypes, this run {trainer.head.rows}")
    start, stop = shard_range(trainer.head.rows, trainer.rank, trainer.world)
    with torch.no_grad():
        trainer.head.weight.copy_(head.pop("weight")[start:stop])
    for slot, value in head.items():
        trainer.optimizer.state[trainer.head.weight][slot] = value[start:stop].clone().to(trainer.device) if value.ndim else value
    trainer.step, trainer.before, trainer.stage = state["step"], state["seconds"], state["stage"]
    trainer.curves = state["curves"]
    if (folder / "similar.safetensors").exists():
        trainer.similar = load_file(folder / "similar.safetensors")["similar"].numpy()
