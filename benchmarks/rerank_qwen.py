"""Reranking on Qwen3-VL-2B's real architecture and sizes, with random weights in bf16: milliseconds a request, beside what it must compute.

A request is one query with a picture and N documents, from its words and cached features to scores on the CPU: laying out, the query's
picture through the tower, the language model. The listwise reranker, with its prefix shared and repeated, with the documents' pictures
cached and encoded, stands beside the pointwise one with the same cache. The bound is the request's FLOPs (no padding) at the rate of a
bf16 matrix product measured in the same run. `--tiny` runs the same code on any machine.
"""

import argparse
import json
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from benchmarks import qwen
from benchmarks.tools import qwen_flops
from benchmarks.tools.measuring import Figure, aligned, at_most, rounded, save, surroundings, verdict
from idem import job
from train.backbones.qwen3vl import Qwen3VL
from train.rerank_qwen import QwenListwise, QwenPointwise, score
from train.rerank_qwen_blocks import SLICE, decode
from train.rerank_qwen_inputs import COMPARE, DOCUMENT, JUDGE, OPENING, Item, QwenBatch, Rows, moved, picture_features

JOB = "benchmarks.rerank_qwen"
PACKAGES = ("torch", "transformers", "numpy")
AIM_MS, AIM_AT = 75.0, 100  # milliseconds for so many documents with cached image tokens
CHUNK = 10
QUESTION = "red enamel camping mug with a steel rim"
TITLES = (
    "Camping mug, enamel, red, 300 ml",
    "Enamel mug with steel rim for camping and outdoor, red and white, dishwasher safe, gift box included",
    "Red mug",
    "Coffee cup 8 oz, stoneware, glazed by hand, set of two",
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """views: pictures of a document that are read. cached: the documents' image tokens are on the device. size: documents at a time."""

    model: str = "listwise"
    documents: int = AIM_AT
    views: int = 1
    cached: bool = True
    shared: bool = True
    size: int = SLICE
    compiled: bool = False

    @property
    def name(self) -> str:
        told = (f"{self.views} views" * (self.views > 1), "" if self.cached else "encoded", "" if self.shared else "prefix repeated")
        sizes = (f"{self.size} at a time" * (self.size < self.documents), "compiled" * self.compiled)
        return ", ".join(part for part in (f"{self.model} {self.documents}", *told, *sizes) if part)


def cases(counts: Sequence[int], *, compiled: bool) -> list[Case]:
    """The aim first: time may end before the last ones."""
    made = [Case(documents=n, compiled=c) for c in ((False, True) if compiled else (False,)) for n in sorted(counts, reverse=True)]
    for n in sorted(counts, reverse=True):
        made += [Case(documents=n, shared=False), Case(documents=n, cached=False)]
        batched = [(shared, size) for shared in (True, False) for size in (SLICE, 32) if size == SLICE or size < n]
        made += [Case(model="pointwise", documents=n, views=v, shared=shared, size=size) for v in (2, 1) for shared, size in batched]
    return made


def read_whole(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> None:
    """Let every word be one token, as most are by the family's own merges, so that there are about as many tokens."""
    tokenizer.add_tokens(sorted({word for text in texts for word in re.findall(r" ?[^\W\d]+", text)}))


def rerankers(size: str, device: torch.device, image_tokens: int) -> dict[str, QwenListwise | QwenPointwise]:
    """Both on one model with random weights."""
    net = qwen.model(size, device, qwen.Case("none", 1), image_tokens)
    read_whole(net.tokenizer, (OPENING, COMPARE, JUDGE, DOCUMENT, QUESTION, *TITLES))
    return {"listwise": QwenListwise(net).to(device).eval(), "pointwise": QwenPointwise(net).to(device).eval()}


def request(model: QwenListwise | QwenPointwise, case: Case, features: Tensor) -> QwenBatch:
    """Features: the query's picture, then `views` of each document."""
    documents = [
        Item(text=TITLES[i % len(TITLES)], pictures=tuple(range(1 + i * case.views, 1 + (i + 1) * case.views)))
        for i in range(case.documents)
    ]
    cosines = [1 - i / case.documents for i in range(case.documents)]
    return model.layout.batch([Item(text=QUESTION, pictures=(0,))], [documents], features, [cosines])


def step_of(model: QwenListwise | QwenPointwise, case: Case, device: torch.device) -> tuple[Callable[[], Any], Callable[[], QwenBatch]]:
    """A call that answers one request, and one that only lays it out."""
    net = model.backbone
    pixels = torch.randint(0, 256, (1 + case.documents * case.views, net.side, net.side, 3), dtype=torch.uint8)
    known = pictures(net, pixels, device)[1:]
    asked = pixels[:1] if case.cached else pixels

    def laid_out() -> QwenBatch:
        return request(model, case, known)

    @torch.inference_mode()
    def answered() -> Any:
        new = picture_features(net, asked.to(device, non_blocking=True))
        features = torch.cat([new, known]) if case.cached else new
        batch = moved(request(model, case, features), device)
        return score(model, batch, chunk=CHUNK, share_prefix=case.shared)

    return answered, laid_out


def pictures(net: Qwen3VL, pixels: Tensor, device: torch.device) -> Tensor:
    """Features of pixels on the CPU, some at a time."""
    return torch.cat([picture_features(net, part.to(device)) for part in pixels.split(64)])


def flops(config: Any, query: Rows, blocks: Rows, case: Case, *, image_tokens: int) -> dict[str, float]:
    """Of a request, by part: the tower, the prefix, the blocks, the comparisons. Padding is not counted."""
    text, tower = config.text_config, qwen_flops.tower(config.vision_config, image_tokens)
    looked = 4 * text.num_hidden_layers * text.num_attention_heads * text.head_dim  # a token, and one that it sees
    prefix, lengths = int(query.last[0]) + 1, (blocks.last + 1).tolist()
    behind = [qwen_flops.language(text, length) + length * prefix * looked for length in lengths]
    again = [qwen_flops.language(text, prefix + length) for length in lengths]
    compared = -(-case.documents // CHUNK) + 1 if case.model == "listwise" else 0
    seen = prefix + min(CHUNK, case.documents) * sum(lengths) / len(lengths)
    return {
        "tower": tower * (1 if case.cached else 1 + case.documents * case.views),
        "prefix": qwen_flops.language(text, prefix) if case.shared or compared else 0.0,
        "blocks": sum(behind if case.shared else again),
        "comparisons": compared * (qwen_flops.language(text, 1) + seen * looked),
    }


def times(call: Callable[[], Any], device: torch.device, repeats: int) -> list[float]:
    """Milliseconds of each call, after two that warm up; the device is waited for at both ends of each."""
    made = []
    for _ in range(2 + repeats):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        made.append(1e3 * (time.perf_counter() - start))
    return made[2:]


def measure(model: QwenListwise | QwenPointwise, case: Case, device: torch.device, *, repeats: int, peak: float) -> dict[str, Any]:
    model.slice, model.decode = case.size, torch.compile(decode, dynamic=True) if case.compiled else decode
    answered, laid_out = step_of(model, case, device)
    found, layout = times(answered, device, repeats), times(laid_out, device, repeats)
    batch, net = laid_out(), model.backbone
    parts = flops(net.model.config, batch.query, batch.blocks, case, image_tokens=net.turns.cells**2)
    median = statistics.median(found)
    bound = sum(parts.values()) / peak / 1e9  # TFLOP/s to milliseconds
    return {
        "ms": median,
        "least_ms": min(found),
        "most_ms": max(found),
        "layout_ms": statistics.median(layout),
        "gflop": sum(parts.values()) / 1e9,
        **{f"gflop_{name}": value / 1e9 for name, value in parts.items()},
        "bound_ms": bound,
        "of_bound": bound / median,
        "tokens": int((batch.blocks.last + 1).sum()),
        "prefix_tokens": int(batch.query.last[0]) + 1,
    }


def compare(found: dict[Case, dict[str, Any]], *, real: bool) -> list[Figure]:
    """The aim, and listwise beside the quickest way to run each other contender on as many documents."""
    figures = []
    for case, told in found.items():
        if case != Case(documents=case.documents, compiled=case.compiled):
            continue
        aim = Figure(name=f"ms, {case.name}", value=told["ms"], peer=f"{AIM_MS:.0f} ms", peer_value=AIM_MS)
        figures += [at_most(aim, 1.0)] if real and case.documents == AIM_AT else []
        others = {c: t for c, t in found.items() if c.documents == case.documents and c.compiled <= case.compiled and c != case}
        for model, views, cached in sorted({(c.model, c.views, c.cached) for c in others}):
            best = min((c for c in others if (c.model, c.views, c.cached) == (model, views, cached)), key=lambda c: others[c]["ms"])
            figures.append(Figure(name=f"ms, {case.name}", value=told["ms"], peer=best.name, peer_value=others[best]["ms"]))
    return figures


def table(found: dict[Case, dict[str, Any]], figures: Sequence[Figure]) -> str:
    head = ("request", "median ms", "least", "most", "layout ms", "GFLOP", "bound ms", "of bound")
    raw = [
        (c.name, *(f"{t[name]:.2f}" for name in ("ms", "least_ms", "most_ms", "layout_ms", "gflop", "bound_ms", "of_bound")))
        for c, t in found.items()
    ]
    said_of = {True: "holds", False: "FAILS", None: ""}
    made = [(f.name, f.peer, f"{f.value:,.2f}", f"{f.peer_value:,.2f}", f"{f.ratio:.3f}", f.bar, said_of[f.holds]) for f in figures]
    return aligned([head, *raw], left=1) + "\n\n" + aligned([("figure", "peer", "ours", "peer's", "ratio", "bar", ""), *made], left=2)


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    began = time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() and not arguments.tiny else "cpu")
    if device.type == "cpu" and not arguments.tiny:
        raise ValueError("no CUDA device; --tiny runs the same code on a tiny model")
    size, image_tokens, counts, repeats, side = (
        ("tiny", 4, (3, 12), 2, 256) if arguments.tiny else ("2b", 64, (8, 50, AIM_AT), arguments.repeats, 8192)
    )
    torch.manual_seed(0)
    peak = qwen.matmul_peak(device, side)
    models = rerankers(size, device, image_tokens)
    found: dict[Case, dict[str, Any]] = {}
    skipped: dict[str, str] = {}
    for case in cases(counts, compiled=arguments.compile):
        if time.perf_counter() - began > arguments.budget:
            skipped[case.name] = f"{arguments.budget} s are over"
            continue
        try:
            found[case] = measure(models[case.model], case, device, repeats=repeats, peak=peak)
        except torch.OutOfMemoryError:
            skipped[case.name] = "out of memory"
            continue
        sys.stderr.write(f"{time.perf_counter() - began:6.1f} s  {case.name}: {found[case]['ms']:.2f} ms\n")
    figures = compare(found, real=not arguments.tiny)
    sys.stderr.write(table(found, figures) + "\n")
    return {
        "size": size,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "peak_tflops": round(peak, 2),
        "picture_bytes": picture_bytes(models["listwise"].backbone),
        "holds": verdict(figures),
        "figures": [rounded({**asdict(figure), "ratio": figure.ratio}) for figure in figures],
        "runs": [{"case": case.name, **asdict(case), **rounded(told)} for case, told in found.items()],
        "skipped": skipped,
        **surroundings(JOB, PACKAGES),
    }


def picture_bytes(net: Qwen3VL) -> int:
    """What the cached features of one picture take."""
    device = next(net.parameters()).device
    features = picture_features(net, torch.zeros(1, net.side, net.side, 3, dtype=torch.uint8, device=device))
    return features.numel() * features.element_size()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=f"python -m {JOB}", description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="a tiny model on the CPU, to see that all of it runs")
    parser.add_argument("--compile", action="store_true", help="the listwise reranker with compiled layers as well, which takes its time")
    parser.add_argument("--repeats", type=int, default=15, help="timed requests a case")
    parser.add_argument("--budget", type=float, default=150.0, help="seconds after which no further case begins")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/rerank_qwen_<hardware>_<date>.json as well")
    parser.add_argument("--hardware", default="", help="what the saved file calls this machine, <cores>cpu by default")
    parser.add_argument("--out", help="write the figures to this file as well (JSON)")
    arguments = parser.parse_args(argv)

    def measured() -> dict[str, Any]:
        told = run(arguments)
        if arguments.out:
            Path(arguments.out).write_text(json.dumps(told, indent=1) + "\n")
        if not arguments.save:
            return told
        return {**told, "saved": save("rerank_qwen", told, **({"hardware": arguments.hardware} if arguments.hardware else {}))}

    return job.guarded(JOB, measured)


if __name__ == "__main__":
    sys.exit(main())
