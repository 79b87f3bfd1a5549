"""The contenders of the head's benchmark: ours, a plain linear softmax, and a row-sampled head; each a process that steps when told.

A step is the whole of it: rows fetched, logits, backward to the embeddings and the rows, optimizer, rows written back.
"""

import os
import threading
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from train.head.prototypes import HeadConfig, PrototypeHead
from train.head.rows import STATELESS
from train.losses import angular_margin

DIM, BATCH, SCALE, MARGIN = 64, 256, 32.0, 0.25
OURS, LINEAR, SAMPLED = "ours", "nn.Linear", "sampled 10 %"
INDEX, GENERATOR = "index", "generator"


@dataclass(frozen=True, kw_only=True)
class Spec:
    """source: where ours has its neighbours from; touched: whether all rows have optimizer state from the outset (else none has)."""

    kind: str
    rows: int
    source: str = ""
    device: str = "cpu"
    storage: str = "file"
    folder: str = ""
    neighbours: int = 16
    random: int = 2048
    touched: bool = True

    @property
    def name(self) -> str:
        return f"{self.kind} {self.rows:.0e}".replace("e+0", "e") + (f" {self.source}" if self.source else "")


class Generated:
    """Neighbours out of nothing, spread over all rows: the worst case for whatever keeps rows at hand."""

    def build(self, blocks: Any, n: int) -> None:
        self.n = n

    def search(self, vectors: Tensor, k: int) -> tuple[Tensor, Tensor]:
        found = torch.randint(self.n, (len(vectors), k), device=vectors.device)
        return torch.linspace(1, 0, k, device=vectors.device).expand(len(vectors), k).contiguous(), found


def batch(spec: Spec) -> tuple[Tensor, Tensor]:
    """Embeddings and labels; these uniform over all rows, so that nothing is ever at hand from the step before."""
    h = F.normalize(torch.randn(BATCH, DIM, device=spec.device), dim=1).requires_grad_()
    return h, torch.randint(spec.rows, (BATCH,), device=spec.device)


class Ours:
    """The prototype head, sparse, rows in bf16 where `storage` says; every row is really written."""

    def __init__(self, spec: Spec) -> None:
        self.spec, self.steps = spec, 0
        config = HeadConfig.model_validate(
            {
                "kind": "sparse",
                "neighbours": spec.neighbours,
                "random": spec.random,
                "storage": spec.storage,
                "dtype": "bfloat16",
            }
        )
        folder, index = (Path(spec.folder) if spec.storage == "file" else None), (Generated() if spec.source == GENERATOR else None)
        self.head = PrototypeHead(spec.rows, DIM, config, device=spec.device, folder=folder, index=index)
        self._write()
        began = time.perf_counter()
        self.head.neighbourhood.build_if_due()
        self.build_s = time.perf_counter() - began

    def _write(self) -> None:
        store, size = self.head.store, 1 << (20 if self.spec.device == "cuda" else 16)
        block = F.normalize(torch.randn(size, DIM, device=self.spec.device), dim=1).to(store.dtype)
        for a in range(0, store.n, size):
            rows = block[: store.n - a]
            store.weight[a : a + len(rows)] = rows.roll(a // size, 1)
            store.slot[a : a + len(rows)] = STATELESS
        if self.spec.touched:
            store.reserve(store.n)
            for ids in torch.randperm(store.n, device=store.home).split(size):  # state in another order than rows
                store.places(ids)
        os.sync()  # so that no step pays for what was written before; to write to a page is then dear again, until it was

    def step(self) -> None:
        h, labels = batch(self.spec)
        self.head.loss(h, labels, prefixes=(DIM,), scale=SCALE, margin=MARGIN, step=self.steps).backward()
        self.head.update(1e-3)
        self.steps += 1

    def figures(self) -> dict[str, Any]:
        files = Path(self.spec.folder).glob("*.rows") if self.spec.storage == "file" else ()
        return {
            "build_s": self.build_s,
            "refresh": self.head.config.rebuilt_every(self.spec.rows),
            "disk_gb": sum(file.stat().st_blocks * 512 for file in files) / 1e9,
            "columns": BATCH * (1 + self.spec.neighbours) + self.spec.random,
        }


class Linear:
    """All rows in float32, all logits, AdamW on all rows: what a trainer without a head of its own does."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.rows = torch.nn.Linear(DIM, spec.rows, bias=False, device=spec.device)
        self.optimizer = torch.optim.AdamW(self.rows.parameters(), lr=1e-3)

    def step(self) -> None:
        h, labels = batch(self.spec)
        F.cross_entropy(SCALE * self.rows(h), labels).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def figures(self) -> dict[str, Any]:
        return {"columns": self.spec.rows}


class Sampled:
    """A tenth of the rows a step, every target among them, drawn at random (as Partial FC does), with AdamW's state of those rows."""

    def __init__(self, spec: Spec) -> None:
        self.spec, self.count = spec, 0
        self.rows = F.normalize(torch.randn(spec.rows, DIM, device=spec.device), dim=1)
        self.first, self.second = torch.zeros_like(self.rows), torch.zeros_like(self.rows)

    def step(self) -> None:
        h, labels = batch(self.spec)
        drawn = torch.randint(self.spec.rows, (self.spec.rows // 10,), device=self.spec.device)
        ids, column = torch.cat([labels, drawn]).unique(return_inverse=True)
        column = column[: len(labels)]
        leaf = self.rows[ids].requires_grad_()
        cosine = h @ F.normalize(leaf, dim=1).T
        at = torch.arange(len(h), device=h.device)
        logits = SCALE * cosine.index_put((at, column), angular_margin(cosine[at, column], MARGIN))
        F.cross_entropy(logits, column).backward()
        assert leaf.grad is not None
        self.count += 1
        first = self.first[ids].lerp_(leaf.grad, 0.1)
        second = self.second[ids].lerp_(leaf.grad.square(), 0.02)
        spread = (second / (1 - 0.98**self.count)).sqrt_().add_(1e-8)
        self.rows[ids] = leaf.detach() - first / spread * (1e-3 / (1 - 0.9**self.count))
        self.first[ids], self.second[ids] = first, second

    def figures(self) -> dict[str, Any]:
        return {"columns": self.spec.rows // 10}


KINDS = {OURS: Ours, LINEAR: Linear, SAMPLED: Sampled}


class Memory(threading.Thread):
    """The most anonymous memory (RssAnon) that this process was seen to hold, MiB."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most = 0.0

    def look(self) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        self.most = max([self.most, *(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))])
        return self.most

    def run(self) -> None:
        while True:
            self.look()
            time.sleep(0.5)


def serve(spec: Spec, told: Connection) -> None:
    """A contender's process: sets up, says "ready" or what went wrong, then answers "step" with seconds and "tell" with its figures."""
    torch.set_num_threads(1 if spec.device == "cpu" else 4)
    torch.manual_seed(0)
    memory = Memory()
    memory.start()
    try:
        contender = KINDS[spec.kind](spec)
        told.send("ready")
        while (asked := told.recv()) != "end":
            told.send(timed(contender, spec) if asked == "step" else {**contender.figures(), **used(spec, memory)})
    except Exception as error:  # handed to the process that measures, which raises it
        told.send(f"{type(error).__name__}: {error}")


def timed(contender: Ours | Linear | Sampled, spec: Spec) -> tuple[float, float]:
    """Seconds of a step by the clock, and of this process's CPU: they part where others want the cores."""
    began, used = time.perf_counter(), time.process_time()
    contender.step()
    if spec.device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began, time.process_time() - used


def used(spec: Spec, memory: Memory) -> dict[str, Any]:
    """Memory, and on which device."""
    found: dict[str, Any] = {"anonymous_mb": memory.look()}
    if spec.device == "cuda":
        found |= {"device_gb": torch.cuda.max_memory_allocated() / 1e9, "device_name": torch.cuda.get_device_name()}
    return found
