"""The listwise reranker against the order of retrieval and the pointwise one: what is found, what r is worth, and how fast.

quality  emoji and grocery, queries of products that neither the embedder nor a reranker has seen, their 50 nearest; three seeds, each an
         embedder and two rerankers trained on as many comparisons of the same lists, which read with the embedder of the next seed
text     emoji, text queries that touch such products, against their titles and pictures; three seeds; beside TF-IDF of the titles
ablation emoji, listwise: what each loss adds, trained as for quality on the losses up to it
speed    requests of 8, 50 and 100 candidates, tokens of their pictures at hand; the query's part computed once, or with each chunk
"""

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.tools import paired, rerank_texts, rerank_trials
from benchmarks.tools.measuring import Figure, aligned, at_least, at_most, rounded, save, surroundings, table, verdict
from benchmarks.tools.rerank_texts import Gallery
from benchmarks.tools.rerank_trials import METRICS, Answers, Root, Trained, embedder_of, prepared
from idem import job, metrics
from index.candidates import CHOSEN_ON
from train import rerank_calibrate, rerank_score, rerank_select
from train.backbones.compact import VOCABULARY, Compact, CompactConfig
from train.embedder import Embedder
from train.rerank_blocks import Batch
from train.rerank_calibrate import Calibration
from train.rerank_loop import RerankConfig
from train.rerank_losses import LOSSES, Loss
from train.rerank_merge import MERGES, Choice
from train.rerank_model import MODELS, Kind

JOB = "benchmarks.rerank"
PARTS = ("quality", "text", "ablation", "speed")
SETS = ("emoji", "grocery")
RETRIEVAL = rerank_select.RETRIEVAL
ORDERS = {f"{merge}{', last' * last}": Choice(merge=merge, last=last) for merge in MERGES for last in (False, True)}
BY_R = Choice(merge="relevance", last=False)
ECE_BAR, SKILL_BAR, PRECISION_BAR, FLIP_BAR, SPEED_BAR, GROWTH_BAR = 0.05, 0.3, 0.03, 0.08, 2.0, 1.1
SURE = (0.3, 0.5, 0.7)  # settings of min_score
ADDED: dict[str, tuple[Loss, ...]] = {
    "chunk only": ("pairwise", "next_token"),
    "+ NULL": ("pairwise", "next_token", "null"),
    "+ absolute": LOSSES,
}
COUNTS, REPEATS = (8, 50, 100), 31
LONGEST = 20.0  # minutes of a training: its end is that of its steps, whatever else the machine has to do
TEXT = 24  # tokens of a document's text
WHOLE = "listwise, no crop"
SPEEDS = {
    "listwise": RerankConfig(root=""),
    WHOLE: RerankConfig(root="", crop=False),
    "pointwise": RerankConfig(root="", model="pointwise"),
}
SLICES = (16, 32, 64, 128)  # documents at a time, of which the pointwise model gets its best


def quality(arguments: argparse.Namespace) -> tuple[list[Figure], dict[str, Any]]:
    figures: list[Figure] = []
    told: dict[str, Any] = {}
    for name in arguments.sets:
        seeds = range(arguments.seeds)
        roots = [prepared(name, seed, Path(arguments.keep), Path(arguments.data)) for seed in seeds]
        answered = [
            Seed.of(_both(arguments, Root.open(root, embedder_of(roots[(seed + 1) % len(roots)])), root, seed))
            for seed, root in zip(seeds, roots, strict=True)
        ]
        made, more = compared(name, answered)
        figures, told[name] = figures + made, more
    return figures, told


def _both(arguments: argparse.Namespace, root: Root, path: str, seed: int) -> dict[Kind, Trained]:
    made = {}
    for kind in MODELS:
        config = RerankConfig(root=path, model=kind, steps=arguments.steps, minutes=LONGEST, seed=seed, depth=rerank_trials.DEPTH)
        made[kind] = rerank_trials.train(root, config)
        say(f"{path} {kind}: {made[kind].figures}")
    return made


def text(arguments: argparse.Namespace) -> tuple[list[Figure], dict[str, Any]]:
    """nDCG@10 of text queries, means over seeds, and by how much the listwise model is above each peer."""
    data, seeds = Path(arguments.data), range(arguments.seeds)
    pictures = [prepared("emoji", seed, Path(arguments.keep), data) for seed in seeds]
    found: dict[str, list[np.ndarray]] = {name: [] for name in ("retrieval", "TF-IDF", "pointwise", "listwise")}
    chosen, families = [], np.zeros(0)
    for seed, path in zip(seeds, pictures, strict=True):
        root = rerank_texts.opened(rerank_texts.root_of(path, data), embedder_of(pictures[(seed + 1) % len(pictures)]))
        trained, gallery = _both(arguments, root, path, seed), Gallery.of(root, data)
        answers = {kind: Answers.of(each, kind="text") for kind, each in trained.items()}
        chosen.append(rerank_texts.best(trained["listwise"], ORDERS))
        found["retrieval"].append(gallery.judged(answers["listwise"], RETRIEVAL))
        found["TF-IDF"].append(gallery.tfidf())
        found["pointwise"].append(gallery.judged(answers["pointwise"], BY_R))
        found["listwise"].append(gallery.judged(answers["listwise"], chosen[-1]))
        families = gallery.families
        say(aligned([(path, "nDCG@10"), *((name, f"{100 * each[-1].mean():.2f}") for name, each in found.items())], left=1))
    means = {name: float(np.mean(each)) for name, each in found.items()}
    figures = []
    for peer in ("retrieval", "TF-IDF"):
        figure = Figure(name=f"{len(families):,} text queries, nDCG@10", value=means["listwise"], peer=peer, peer_value=means[peer])
        figures.append(at_least(figure, 1.0))
    intervals = {
        peer: paired.interval({"": np.mean(np.subtract(found["listwise"], found[peer]), axis=0)}, {"": families})
        for peer in found
        if peer != "listwise"
    }
    told = {"nDCG@10": means, "listwise above": intervals, "chosen": [c.model_dump() for c in chosen], "products": len(gallery.products)}
    return figures, told


def ablation(arguments: argparse.Namespace) -> tuple[list[Figure], dict[str, Any]]:
    """The mean over seeds of METRICS by losses and by order; nothing is held to a bar."""
    seeds = range(arguments.seeds)
    paths = [prepared("emoji", seed, Path(arguments.keep), Path(arguments.data)) for seed in seeds]
    roots = [Root.open(path, embedder_of(paths[(seed + 1) % len(paths)])) for seed, path in zip(seeds, paths, strict=True)]
    means: dict[str, dict[str, dict[str, float]]] = {}
    for name, summed in ADDED.items():
        judged: dict[str, list[dict[str, np.ndarray]]] = {order: [] for order in ORDERS}
        for seed, path, root in zip(seeds, paths, roots, strict=True):
            config = RerankConfig(root=path, steps=arguments.steps, minutes=LONGEST, seed=seed, depth=rerank_trials.DEPTH, losses=summed)
            answers = Answers.of(rerank_trials.train(root, config))
            for order, choice in ORDERS.items():
                judged[order].append(answers.judged(choice))
        means[name] = {order: {m: float(np.mean([each[m].mean() for each in of])) for m in METRICS} for order, of in judged.items()}
        say(aligned([(name, *METRICS), *((order, *(f"{100 * of[m]:.2f}" for m in METRICS)) for order, of in means[name].items())], left=1))
    return [], means


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seed:
    """What one seed says: answers of both models on the test and the calibrate fold; choice: the best order of the latter; flipped: share
    of first answers that change with the order of the input; figures: of both trainings. The models and what they read are let go."""

    test: dict[Kind, Answers]
    calibrate: dict[Kind, Answers]
    choice: Choice
    flipped: float
    figures: dict[Kind, dict[str, Any]]

    @classmethod
    def of(cls, trained: dict[Kind, Trained]) -> "Seed":
        test: dict[Kind, Answers] = {kind: Answers.of(each) for kind, each in trained.items()}
        calibrate: dict[Kind, Answers] = {kind: Answers.of(each, CHOSEN_ON) for kind, each in trained.items()}
        choice = choose(calibrate["listwise"])
        flipped = rerank_trials.flips(trained["listwise"], choice)
        return cls(test=test, calibrate=calibrate, choice=choice, flipped=flipped, figures={k: t.figures for k, t in trained.items()})

    def chosen(self, kind: Kind) -> Choice:
        return self.choice if kind == "listwise" else BY_R

    def firsts(self, kind: Kind, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """r and right (Q,) of the first answers of the test fold; r as fitted on the calibrate fold."""
        return self.test[kind].firsts(self.chosen(kind), self.calibration(kind), seed)

    def calibration(self, kind: Kind) -> Calibration:
        """Fitted on the calibrate fold alone."""
        answers = self.calibrate[kind]
        return rerank_calibrate.fit(rerank_calibrate.firsts(answers.scored, answers.levels, self.chosen(kind)))

    def instances(self, kind: Kind) -> tuple[float, float, float]:
        """Of r as it is served, at the threshold that is best on the calibrate fold."""
        calibration = self.calibration(kind)
        at = self.calibrate[kind].calibrated(calibration).threshold()
        return self.test[kind].calibrated(calibration).instances(at)


def choose(answers: Answers) -> Choice:
    """The best of ORDERS, or where it cannot be told from the best one with a last comparison: as train.rerank_select chooses."""
    worth = {}
    for choice in ORDERS.values():
        judged = answers.judged(choice)
        worth[choice] = (judged["I-HR@1"] + judged["nDCG@10"]) / 2
    best = max(worth.values(), key=lambda each: float(each.mean()))
    as_good = {c: w for c, w in worth.items() if (best - w).mean() <= rerank_select.clustered_error(best - w, answers.families)}
    return max(as_good, key=lambda choice: (choice.last, float(as_good[choice].mean())))


def compared(name: str, seeds: Sequence[Seed]) -> tuple[list[Figure], dict[str, Any]]:
    """Figures of one set over its seeds, and the table of all orders."""
    families = {"": seeds[0].test["listwise"].families}
    judged = {
        "retrieval": [s.test["listwise"].judged(RETRIEVAL) for s in seeds],
        "pointwise": [s.test["pointwise"].judged(BY_R) for s in seeds],
        "listwise": [s.test["listwise"].judged(s.choice) for s in seeds],
        **{f"listwise, {order}": [s.test["listwise"].judged(choice) for s in seeds] for order, choice in ORDERS.items()},
    }
    means = {order: {m: float(np.mean([each[m].mean() for each in of])) for m in METRICS} for order, of in judged.items()}
    say(aligned([(name, *METRICS), *((order, *(f"{100 * of[m]:.2f}" for m in METRICS)) for order, of in means.items())], left=1))
    figures, intervals = [], {}
    for metric in ("I-HR@1", "nDCG@10"):
        for peer in ("retrieval", "pointwise"):
            gained = np.mean([a[metric] - b[metric] for a, b in zip(judged["listwise"], judged[peer], strict=True)], axis=0)
            intervals[f"{metric} above {peer}"] = paired.interval({"": gained}, families)
            pair = Figure(name=f"{name}, {metric}", value=means["listwise"][metric], peer=peer, peer_value=means[peer][metric])
            figures.append(at_least(pair, 1.0))
    of_pairs = {kind: np.mean([s.instances(kind) for s in seeds], axis=0).tolist() for kind in MODELS}
    for at, what in ((2, "instance F1"), (1, "instance recall")):
        mine, theirs = of_pairs["listwise"][at], of_pairs["pointwise"][at]
        figures.append(at_least(Figure(name=f"{name}, {what}", value=mine, peer="pointwise", peer_value=theirs), 1.0))
    r, right = (np.concatenate(column) for column in zip(*(s.firsts("listwise", i) for i, s in enumerate(seeds)), strict=True))
    ece, skill = metrics.expected_calibration_error(r, right), metrics.brier_skill(r, right)
    shares = rerank_trials.sure(r, right, SURE)
    off = max((abs(each["predicted"] - each["observed"]) for each in shares), default=1.0)
    flipped = float(np.mean([s.flipped for s in seeds]))
    figures += [
        at_most(Figure(name=f"{name}, ECE of {len(r):,} first answers", value=ece, peer="bar", peer_value=ECE_BAR), 1.0),
        at_least(Figure(name=f"{name}, Brier skill", value=skill, peer="bar", peer_value=SKILL_BAR), 1.0),
        at_most(Figure(name=f"{name}, precision of min_score off by", value=off, peer="bar", peer_value=PRECISION_BAR), 1.0),
        at_most(Figure(name=f"{name}, flips without canonical order", value=flipped, peer="bar", peer_value=FLIP_BAR), 1.0),
    ]
    return figures, {
        "orders": means,
        "intervals": intervals,
        "chosen": [s.choice.model_dump() for s in seeds],
        "instances": of_pairs,
        "min_score": shares,
        "base_rate": float(right.mean()),
        "queries": len(families[""]),
        "families": len(np.unique(families[""])),
        "trained": [s.figures for s in seeds],
    }


def drawn(queries: int, documents: int, places: int, channels: int) -> Batch:
    """Requests of random tokens, texts and cosines, all documents with picture and text."""
    random = torch.Generator().manual_seed(0)
    return Batch(
        q_image=torch.randn(queries, places, channels, generator=random),
        q_mask=torch.ones(queries, places, dtype=torch.bool),
        q_text=torch.zeros(queries, 4, dtype=torch.int64),
        d_image=torch.randn(queries, documents, places, channels, generator=random),
        d_mask=torch.ones(queries, documents, places, dtype=torch.bool),
        d_text=torch.randint(4, VOCABULARY, (queries, documents, TEXT), generator=random),
        cosine=torch.rand(queries, documents, generator=random),
        level=torch.full((queries, documents), 3),
    )


def apart(batch: Batch, size: int) -> Batch:
    """The one request as many of `size` documents each, so that the query's part is computed with every one; the last is filled up."""
    count = -(-batch.level.shape[1] // size)
    rows = torch.arange(count * size).remainder(batch.level.shape[1])
    of_query = {name: getattr(batch, name).expand(count, *getattr(batch, name).shape[1:]) for name in ("q_image", "q_mask", "q_text")}
    names = ("d_image", "d_mask", "d_text", "cosine", "level")
    return Batch(**of_query, **{name: getattr(batch, name)[0, rows].unflatten(0, (count, size)) for name in names})


def milliseconds(contenders: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
    """Median of each, taking turns."""
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(REPEATS):
        for name, work in contenders.items():
            start = time.perf_counter()
            work()
            taken[name] += [1e3 * (time.perf_counter() - start)] if turn else []
    return {name: statistics.median(each) for name, each in taken.items()}


def speed(arguments: argparse.Namespace) -> tuple[list[Figure], dict[str, Any]]:
    """Of both models as they are served, and of the listwise one that sees pictures as a whole alone."""
    reader = Embedder(Compact(CompactConfig()))
    found: dict[int, dict[str, float]] = {}
    for count in COUNTS:
        contenders: dict[str, Callable[[], Any]] = {}
        for name, config in SPEEDS.items():
            model = MODELS[config.model](config.shape(reader)).eval()
            one = drawn(1, count, model.shape.tokens, model.shape.channels)
            for size in SLICES if name == "pointwise" else (rerank_score.SLICE,):
                contenders[f"{name} {size}"] = _scoring(model, ready(model, one), config.chunk, size)
            contenders[f"{name} apart"] = _scoring(model, ready(model, apart(one, config.chunk)), config.chunk, rerank_score.SLICE)
        found[count] = milliseconds(contenders)
    best = {
        n: {name: min(v for k, v in of.items() if k.rpartition(" ")[0] == name and "apart" not in k) for name in SPEEDS}
        for n, of in found.items()
    }
    rows = [
        (f"{n} candidates", *(f"{v:.1f}" for v in (*best[n].values(), *(found[n][f"{name} apart"] for name in SPEEDS)))) for n in COUNTS
    ]
    say(aligned([("ms a request", *SPEEDS, *(f"{name}, prefix not shared" for name in SPEEDS)), *rows], left=1))
    middle, most = (best[count] for count in COUNTS[1:])
    figures = []
    for name in ("listwise", WHOLE):
        faster = Figure(name=f"{name}, times as fast at 50", value=middle["pointwise"] / middle[name], peer="bar", peer_value=SPEED_BAR)
        growth = Figure(
            name=f"{name}, ms a candidate of 100", value=most[name] / COUNTS[2], peer="of 50", peer_value=middle[name] / COUNTS[1]
        )
        figures += [at_least(faster, 1.0), at_most(growth, GROWTH_BAR)]
    return figures, {"milliseconds": found}


def ready(model: Any, batch: Batch) -> Batch:
    """With the documents' pictures as the reader's cache holds them."""
    with torch.inference_mode():
        return dataclasses.replace(batch, d_image=model.documents(batch.d_image, batch.d_mask))


def _scoring(model: Any, batch: Batch, chunk: int, size: int) -> Callable[[], Any]:
    def work() -> None:
        rerank_score.SLICE = size
        rerank_score.score(model, batch, chunk=chunk)

    return work


def say(text: str) -> None:
    sys.stderr.write(f"{text}\n")


def bench(arguments: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(arguments.threads)
    figures: list[Figure] = []
    told: dict[str, Any] = {}
    for part in arguments.parts:
        made, told[part] = {"quality": quality, "text": text, "ablation": ablation, "speed": speed}[part](arguments)
        figures += made
    say(table([], figures))
    result = {
        "figures": [rounded({**asdict(figure), "ratio": figure.ratio}) for figure in figures],
        "holds": verdict(figures),
        **surroundings(JOB, ("torch", "numpy")),
    }
    return {**result, "saved": save("rerank", {**result, **told})} if arguments.save else result


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=f"python -m {JOB}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=500, help="of each reranker's training")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--data", default="../shared/data", help="folder of the public sets")
    parser.add_argument("--keep", default="out/bench-rerank", help="folder for roots, whose embedders take minutes each")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/rerank_<cores>cpu_<date>.json as well")
    arguments = parser.parse_args(argv)
    return job.guarded(JOB, lambda: bench(arguments))


if __name__ == "__main__":
    sys.exit(main())
