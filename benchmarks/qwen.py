"""Qwen3-VL-2B's real architecture and sizes, with random weights, through our backbone: pictures a second and MFU, encoding and training.

MFU is the share of a peak that the model's own FLOPs take (recomputed activations are not counted): of a bf16 matrix product
measured in the same run, and of the card's data sheet where it is known. `--tiny` runs the same code on any machine.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.tools import qwen_flops, qwen_model, qwen_twin
from idem import job
from train import losses
from train.backbones.qwen3vl import Qwen3VL, Qwen3VLConfig

JOB = "benchmarks.qwen"
NOMINAL = {"NVIDIA H200": 989.0, "NVIDIA H100 80GB HBM3": 989.0}  # dense bf16 TFLOP/s by the data sheets
TITLE = "red mug, 300 ml"
TWIN = "transformers' own forward"
PROTOTYPES = 10_000


@dataclass(frozen=True)
class Case:
    """One way to run the model; `train` is none, lora or full; `compiled` compiles its layers, which are alike."""

    train: str
    batch: int
    checkpointing: bool = False
    compiled: bool = False

    @property
    def name(self) -> str:
        way = "encode" if self.train == "none" else f"train {self.train}"
        return f"{way}, batch {self.batch}{', checkpointing' * self.checkpointing}{', compiled' * self.compiled}"


def model(size: str, device: torch.device, case: Case, image_tokens: int) -> Qwen3VL:
    """Weights in bf16 where they stand still, in float32 where they are trained (autocast computes in bf16)."""
    from transformers import Qwen3VLModel
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    words = qwen_model.tokenizer()
    pictures = {name: value for name, value in qwen_model.picture_settings().items() if name != "image_processor_type"}
    made = qwen_model.architecture(size, words)
    torch.set_default_dtype(torch.float32 if case.train == "full" else torch.bfloat16)
    try:
        with torch.device(device):
            inner = Qwen3VLModel(made)
    finally:
        torch.set_default_dtype(torch.float32)
    config = Qwen3VLConfig(
        dim=qwen_model.SIZES[size]["text"]["hidden_size"],
        image_tokens=image_tokens,
        lora_rank=16 if case.train == "lora" else 0,
        gradient_checkpointing=case.checkpointing,
    )
    net = Qwen3VL(config, inner, words, Qwen2VLImageProcessorPil(**pictures)).to(device)
    for layer in net.layers() if case.compiled else ():
        layer.compile()
    return net


def step_of(net: Qwen3VL, case: Case, device: torch.device) -> Callable[[], Tensor]:
    """One call is one batch: collate on the CPU, copy, forward; in training also the margin loss, backward and AdamW."""
    random = np.random.default_rng(0)
    pixels = torch.from_numpy(random.integers(0, 256, (case.batch, net.side, net.side, 3), np.uint8))
    rows = np.arange(case.batch)

    def forward() -> Tensor:
        made = net.collate(pixels, rows, [TITLE] * case.batch, rows, case.batch)
        inputs = {name: value.to(device, non_blocking=True) for name, value in made.items()}
        with torch.autocast(device.type, torch.bfloat16):
            return net(inputs, case.batch)

    if case.train == "none":
        return torch.inference_mode()(forward)
    head = torch.nn.Parameter(torch.randn(PROTOTYPES, net.dim, device=device))
    labels = torch.from_numpy(random.integers(0, PROTOTYPES, case.batch)).to(device)
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([*trained, head], lr=1e-5, fused=device.type == "cuda")

    def train() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        cosine = forward() @ F.normalize(head, dim=1).T
        target = losses.angular_margin(cosine.gather(1, labels[:, None]), 0.25)
        loss = F.cross_entropy(24 * cosine.scatter(1, labels[:, None], target), labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return train


def seconds_each(step: Callable[[], Any], device: torch.device, *, steps: int) -> float:
    """Of a call, after two that warm up; the device is waited for at both ends."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    for _ in range(2):
        step()
    wait()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    wait()
    return (time.perf_counter() - start) / steps


def matmul_peak(device: torch.device, side: int) -> float:
    """TFLOP/s of a bf16 product of two random square matrices."""
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * side**3 / seconds_each(lambda: a @ b, device, steps=20) / 1e12


def measure(net: Qwen3VL, case: Case, device: torch.device, *, steps: int, peaks: dict[str, float]) -> dict[str, Any]:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    step = step_of(net, case, device)
    tokens = len(net.turns.before) + len(net.turns.words([TITLE])[0]) + len(net.turns.after_with_image)
    seconds = seconds_each(step, device, steps=steps)
    flops = case.batch * qwen_flops.of_item(net.model.config, tokens=tokens, image_tokens=net.turns.cells**2, train=case.train)
    return {
        "seconds": round(seconds, 4),
        "images_per_s": round(case.batch / seconds, 1),
        "tokens_per_item": tokens,
        "tflops_per_s": round(flops / seconds / 1e12, 2),
        **{f"mfu_{name}": round(flops / seconds / 1e12 / peak, 4) for name, peak in peaks.items()},
        "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 1) if device.type == "cuda" else None,
    }


def against_twin(net: Qwen3VL, batch: int, device: torch.device, *, steps: int) -> dict[str, Any]:
    """Images a second of transformers' own forward, and how far its vectors are from ours."""
    seconds = seconds_each(qwen_twin.plain(net, TITLE, batch, device), device, steps=steps)
    return {"images_per_s": round(batch / seconds, 1), **qwen_twin.differences(net, TITLE, device)}


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    began = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() and not arguments.tiny else "cpu")
    if device.type == "cpu" and not arguments.tiny:
        raise ValueError("no CUDA device; --tiny runs the same code on a tiny model")
    size, image_tokens, batches, steps = ("tiny", 4, (2, 4), 1) if arguments.tiny else ("2b", 64, (32, 128), arguments.steps)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    peaks = {"of_matmul": matmul_peak(device, 256 if arguments.tiny else 8192)}
    peaks |= {"of_nominal": NOMINAL[name]} if name in NOMINAL else {}
    figures: dict[str, Any] = {}
    cases = [Case("none", batch) for batch in batches]
    cases += [Case(train, batch, ckpt) for train in ("lora", "full") for ckpt in (True, False) for batch in batches]
    cases += [Case(train, max(batches), compiled=True) for train in ("none", "full") if arguments.compile]
    net, made = None, None
    for case in cases:
        if time.perf_counter() - began > arguments.budget:
            figures[case.name] = {"skipped": f"{arguments.budget} s are over"}
            continue
        kind = replace(case, batch=0)
        try:
            if net is None or made != kind:
                net = None  # its memory first
                net, made = model(size, device, case, image_tokens), kind
            if case == Case("none", max(batches)):
                figures[TWIN] = against_twin(net, case.batch, device, steps=steps)
            figures[case.name] = measure(net, case, device, steps=steps, peaks=peaks)
        except torch.OutOfMemoryError:
            figures[case.name] = {"skipped": "out of memory"}
        if device.type == "cuda":
            torch.cuda.empty_cache()
        sys.stderr.write(f"{time.perf_counter() - began:6.1f} s  {case.name}: {figures[case.name]}\n")
    return {
        "size": size,
        "device": name,
        "torch": torch.__version__,
        "peak_tflops": {key: round(value, 1) for key, value in peaks.items()},
        "cases": [asdict(case) for case in cases],
        "figures": figures,
        "seconds": round(time.perf_counter() - began, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog=f"python -m {JOB}", description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="a tiny model on the CPU, to see that all of it runs")
    parser.add_argument("--compile", action="store_true", help="two more cases with torch.compile, which takes its time")
    parser.add_argument("--steps", type=int, default=4, help="timed steps a case")
    parser.add_argument("--budget", type=float, default=90.0, help="seconds after which no further case begins")
    parser.add_argument("--out", help="file for the figures (JSON)")
    arguments = parser.parse_args()

    def measured() -> dict[str, Any]:
        figures = run(arguments)
        if arguments.out:
            Path(arguments.out).write_text(json.dumps(figures, indent=1))
        return figures

    return job.guarded(JOB, measured)


if __name__ == "__main__":
    sys.exit(main())
