"""Trains the reranker: one plain loop that runs alone, or on every worker of a process group, and resumes from a folder."""

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from idem.config import Table
from train import rerank_losses, rerank_start
from train.rerank_blocks import Batch, Shape
from train.rerank_data import Lists, Pool, Reader, draw, places_shape
from train.rerank_losses import LOSSES, Loss
from train.rerank_model import MODELS, Kind, Model

VALIDATION_SEED = 7_919


class RerankConfig(Table):
    """model: listwise, or the pointwise baseline. crop: the listwise model of the compact backbone sees pictures in two views, as a whole
    and their middle, as the pointwise ones always do; it costs time for quality. reader_minutes: given to a tower of its own, trained on
    the embedder's products as that was, with the next seed: two towers err apart. 0 reads with the embedder's. judgements: a parquet
    file of JUDGEMENTS, of people or of train.rerank_label: levels that all its judges agree on replace those of the candidates.

    Training ends at `minutes` of wall time or at `steps`, whichever is first, and earlier where `patience` looks at the calibrate fold
    in a row found nothing better. `batch` is comparisons a step of each worker. kinds: shares of queries asked by picture, by both, by
    text. absent: share of lists without a right document. dropout: share of places hidden. losses: those of the listwise model that are
    summed.
    """

    model: Kind = "listwise"
    crop: bool = True
    judgements: str = ""
    reader_minutes: Annotated[float, Field(ge=0)] = 0.0
    minutes: Annotated[float, Field(gt=0)] = 1.0
    steps: Annotated[int, Field(ge=1)] = 100_000
    workers: Annotated[int, Field(ge=1, le=1024)] = 2
    batch: Annotated[int, Field(ge=1)] = 8
    width: Annotated[int, Field(ge=8)] = 96
    layers: Annotated[int, Field(ge=1)] = 2
    heads: Annotated[int, Field(ge=1)] = 4
    match: Annotated[int, Field(ge=4)] = 64
    text_length: Annotated[int, Field(ge=4)] = 48
    chunk: Annotated[int, Field(ge=2)] = 10
    depth: Annotated[int, Field(ge=1)] = 20  # products that the choice on the calibrate fold is made for
    lr: Annotated[float, Field(gt=0)] = 3e-4
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    kinds: tuple[float, float, float] = (0.7, 0.15, 0.15)
    absent: Annotated[float, Field(ge=0, le=1)] = 0.2
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.15
    losses: Annotated[tuple[Loss, ...], Field(min_length=1)] = LOSSES
    evaluations: Annotated[int, Field(ge=1)] = 12
    patience: Annotated[int, Field(ge=1)] = 4
    least_queries: Annotated[int, Field(ge=1)] = 20  # of each fold; with fewer, the order of retrieval stands
    select_queries: Annotated[int, Field(ge=1)] = 300
    errors: Annotated[float, Field(ge=0)] = 1.0  # standard errors by which a reranked order must win to be served
    tokens_mb: Annotated[int, Field(ge=1)] = 2048  # most memory that cached picture tokens may take
    max_failures: Annotated[int, Field(ge=0)] = 2
    seed: int = 0

    @property
    def views(self) -> int:
        """Of the compact backbone."""
        return 2 if self.crop or self.model == "pointwise" else 1

    def shape(self, reader: Reader) -> Shape:
        (tokens, channels), (own, pooled) = places_shape(reader, self.views), reader.image_head()[0].shape
        names = ("width", "layers", "heads", "match", "text_length", "views")
        told = {name: getattr(self, name) for name in names}
        return Shape(tokens=tokens, channels=channels, vocabulary=reader.vocabulary, pooled=pooled // 2, own=own, **told)


@dataclass(kw_only=True)
class State:
    """Where training stands; `best` is the copy of the weights that did best on the calibrate fold."""

    model: Model
    optimizer: torch.optim.AdamW
    best: dict[str, Tensor] = field(default_factory=dict)
    best_loss: float = math.inf
    best_step: int = -1
    stale: int = 0
    looks: int = 0
    step: int = 0
    seconds: float = 0.0
    failed: str = ""
    curves: list[dict[str, Any]] = field(default_factory=list)

    COUNTERS = ("best_loss", "best_step", "stale", "looks", "step", "seconds", "failed", "curves")

    def save(self, folder: Path) -> None:
        names = {id(p): name for name, p in self.model.named_parameters()}
        slots = {f"{names[id(p)]}/{slot}": value for p, values in self.optimizer.state.items() for slot, value in values.items()}
        save_file({name: value.contiguous() for name, value in self.model.state_dict().items()}, folder / "model.safetensors")
        save_file(self.best, folder / "best.safetensors")
        save_file(slots, folder / "optimizer.safetensors")
        (folder / "state.json").write_text(json.dumps({name: getattr(self, name) for name in self.COUNTERS}))

    def restore(self, folder: Path) -> None:
        self.model.load_state_dict(load_file(folder / "model.safetensors"))
        self.best = load_file(folder / "best.safetensors")
        named = dict(self.model.named_parameters())
        for key, value in load_file(folder / "optimizer.safetensors").items():
            name, slot = key.rsplit("/", 1)
            self.optimizer.state[named[name]][slot] = value
        for name, value in json.loads((folder / "state.json").read_text()).items():
            setattr(self, name, value)


def start(config: RerankConfig, shape: Shape, pool: Pool, train: Lists, head: tuple[Tensor, Tensor] | None = None) -> State:
    """A fresh state; the projection of the patches starts from the principal axes of the training pictures, the own vector of a
    picture from the reader's `head`."""
    torch.manual_seed(config.seed)
    model = MODELS[config.model](shape)
    rows = torch.from_numpy(pool.pictured).nonzero().flatten()
    if len(rows):
        used = rows[torch.randperm(len(rows))[:500]].numpy()
        model.match.start_from(torch.from_numpy(pool.places[used]).float().flatten(0, 1))
    if model.own is not None and head is not None:
        with torch.no_grad():
            model.own.weight.copy_(head[0])
            model.own.bias.copy_(head[1])
    rerank_start.fit(model, pool, train, config.kinds)
    model.linear.requires_grad_(False)  # as good as it gets
    rest = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in rest if p.ndim > 1], "peak": config.lr, "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p.ndim <= 1], "peak": config.lr, "weight_decay": 0.0},
    ]
    return State(model=model, optimizer=torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.98)))


def agree(values: list[float], world: int) -> list[float]:
    """The largest of each value over the workers, so that all stop at the same step."""
    if world == 1:
        return values
    shared = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(shared, dist.ReduceOp.MAX)
    return shared.tolist()


def held_batches(config: RerankConfig, pool: Pool, calibrate: Lists, *, count: int = 8, size: int = 16) -> list[Batch]:
    """Fixed comparisons of the calibrate fold, drawn as those of training are, with nothing hidden."""
    settings = config.model_copy(update={"dropout": 0.0})
    slots = [range(b * size, (b + 1) * size) for b in range(count)]
    return [draw(pool, calibrate, slots=s, seed=VALIDATION_SEED, step=0, chunk=config.chunk, settings=settings) for s in slots]


def losses(net: nn.Module, batch: Batch, summed: Sequence[Loss] = LOSSES) -> tuple[dict[str, Tensor], Tensor]:
    """By name, of those `summed` the sum as "loss"; and the scores (B, M) that documents are ordered by."""
    made = net(batch)
    if isinstance(made, Tensor):
        return rerank_losses.yes_no(made, batch.level), made
    s, null, levels = made
    return rerank_losses.all_of(s, null, levels, batch.level, summed), s


@torch.inference_mode()
def validate(model: Model, batches: list[Batch], summed: Sequence[Loss] = LOSSES) -> dict[str, float]:
    """Losses on fixed comparisons of the calibrate fold, and how often the first document of a comparison is the right one."""
    model.eval()
    results, right = [], []
    for batch in batches:
        parts, s = losses(model, batch, summed)
        results.append({name: float(value) for name, value in parts.items()})
        with_one = (batch.level == 0).any(1)
        right += (batch.level.gather(1, s.argmax(1, keepdim=True))[with_one, 0] == 0).tolist()
    model.train()
    found = {f"calibrate_{name}": sum(r[name] for r in results) / len(results) for name in results[0]}
    return {**found, "calibrate_right": sum(right) / max(len(right), 1)}


def _schedule(state: State, progress: float) -> None:
    """A short linear warm-up, then half a cosine down to nothing."""
    factor = min((state.step + 1) / 20, 1.0) * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    for group in state.optimizer.param_groups:
        group["lr"] = group["peak"] * factor


def _look(state: State, config: RerankConfig, batches: list[Batch]) -> dict[str, float]:
    """Judge the weights of this moment on the calibrate fold and keep them if none were better."""
    found = validate(state.model, batches, config.losses)
    judged = found["calibrate_loss"] - (found.get("calibrate_null", 0.0) if "null" in config.losses else 0.0)  # NULL orders nothing
    state.looks += 1
    state.stale += 1
    if judged < state.best_loss:
        state.best_loss, state.best_step, state.stale = judged, state.step, 0
        state.best = {name: value.clone() for name, value in state.model.state_dict().items()}
    return found


def train(
    state: State,
    config: RerankConfig,
    pool: Pool,
    train: Lists,
    calibrate: Lists,
    *,
    rank: int = 0,
    world: int = 1,
    report: Callable[[dict[str, Any], bool], None] = lambda figures, due: None,
) -> State:
    """Run to the end of the budget. `report(figures, due)` is called every step on every worker; due asks for a checkpoint.

    A loss that is not finite ends training with `state.failed` set and the weights of the last good step.
    """
    net = DistributedDataParallel(state.model) if world > 1 else state.model
    held = held_batches(config, pool, calibrate)
    if not state.looks:
        state.curves.append({"step": state.step, "seconds": state.seconds, **_look(state, config, held)})
    before, began = state.seconds, time.perf_counter()
    while True:
        slots = range(rank * config.batch, (rank + 1) * config.batch)
        batch = draw(pool, train, slots=slots, seed=config.seed, step=state.step, chunk=config.chunk, settings=config)
        parts, _ = losses(net, batch, config.losses)
        elapsed = before + time.perf_counter() - began
        spent = max(elapsed / (60 * config.minutes), state.step / config.steps)
        over = float(spent >= 1 or state.stale >= config.patience)
        progress, bad, over, state.seconds = agree([spent, float(not parts["loss"].isfinite()), over, elapsed], world)
        if bad:
            state.failed = f"the loss is not finite at step {state.step}; the weights of step {state.best_step} are kept"
        if bad or over:
            break
        _schedule(state, progress)
        state.optimizer.zero_grad(set_to_none=True)
        parts["loss"].backward()
        nn.utils.clip_grad_norm_(state.model.parameters(), 1.0)
        state.optimizer.step()
        state.step += 1
        _after(state, config, parts, progress, held, report)
    if not state.failed:
        state.curves.append({"step": state.step, "seconds": round(state.seconds, 2), **_look(state, config, held)})
    report({"progress": 1.0, "step": state.step}, True)
    return state


def _after(
    state: State,
    config: RerankConfig,
    parts: dict[str, Tensor],
    progress: float,
    held: list[Batch],
    report: Callable[[dict[str, Any], bool], None],
) -> None:
    """Record a step; look at the calibrate fold and ask for a checkpoint when a share of the budget is spent."""
    due = progress * config.evaluations >= state.looks
    figures: dict[str, Any] = {"step": state.step, "seconds": round(state.seconds, 2)}
    if due or state.step % 10 == 0:
        figures |= {name: round(float(value.detach()), 4) for name, value in parts.items()}
        figures |= {name: round(value, 4) for name, value in (_look(state, config, held) if due else {}).items()}
        state.curves.append(figures)
    report({"progress": min(progress, 1.0), **figures}, due)
