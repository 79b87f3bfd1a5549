"""Rerankers trained on the candidates of a root, and what they make of the queries of fold `test`.

A root has its items, embedder, index and candidates, as their jobs leave them. Both models train on the same lists for as many steps.
Q queries, N documents of each, in canonical order.
"""

import dataclasses
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from idem import manifest, metrics, schema, storage
from idem.qrels import read_qrels, read_texts
from index.candidates import CHOSEN_ON, LEARNT, NAME, TEST
from pipelines.items import Items, open_items
from train import rerank_calibrate, rerank_loop, rerank_select
from train.embedder import Embedder
from train.rerank_calibrate import Calibration
from train.rerank_data import KINDS, Kind, Lists, Pool, assemble, padded, served
from train.rerank_loop import RerankConfig
from train.rerank_merge import Choice, Scored, arrange
from train.rerank_model import Model
from train.rerank_run import gather
from train.rerank_score import score

ASKS = {
    "emoji": "id_split = 'dev_unseen' AND style != 'noto'",
    "grocery": "id_split = 'dev_unseen' AND role = 'photo' AND split = 'test'",
}
PRODUCTS = {"emoji": 404, "grocery": 21}  # in the gallery of fold `test`
DEPTH = 50
METRICS = ("I-HR@1", "C-HR@10", "nDCG@10")


def _asked(folder: Path) -> set[str]:
    """All text queries that touch an unseen product."""
    products = pq.read_table(folder / "products.parquet", columns=["product_id", "id_split"])
    unseen = set(products.filter(pc.not_equal(products["id_split"], "train"))["product_id"].to_pylist())
    judged, texts = read_qrels(str(folder / "qrels.parquet")), read_texts(str(folder / "queries.parquet"))
    return {text.casefold() for query, text in texts.items() if not unseen.isdisjoint(judged.get(query, ()))}


def _untold(keep: Path, folder: Path) -> str:
    """A setting of train.texts: those of the run file, without the keywords that are a query of the test."""
    asked, products = _asked(folder), pq.read_table(folder / "products.parquet", columns=["product_id", "keywords"])
    kept = [[word for word in words or [] if word.casefold() not in asked] for words in products["keywords"].to_pylist()]
    keep.mkdir(parents=True, exist_ok=True)
    file = keep / "keywords.parquet"
    pq.write_table(products.set_column(1, "keywords", pa.array(kept)), file)
    tables = ((file, "keywords"), (folder / "texts.parquet", "title"))
    return "train.texts=[" + ", ".join(f'{{file = "{path}", columns = ["{column}"]}}' for path, column in tables) + "]"


def prepared(name: str, seed: int, keep: Path, data: Path) -> str:
    """The root of a set and a seed, made by the jobs that are not done yet; an embedder takes minutes."""
    root, runs = str(keep / f"{name}-{seed}"), f"runs/{name}.toml"
    given = {
        "pipelines.ingest": [f"ingest.source={data / name}"],
        "train.run": [f"train.loop.seed={seed}", *([_untold(keep, data / name)] if name == "emoji" else [])],
        "index.run": [],
        "index.candidates": [f"candidates.k={DEPTH}", f"candidates.test={ASKS[name]}", f"candidates.calibrate_products={PRODUCTS[name]}"],
    }
    for module, settings in given.items():
        job(module, runs, root, settings)
    return root


def job(module: str, runs: str, root: str, settings: Sequence[str]) -> None:
    words = [word for setting in [f"root={root}", *settings] for word in ("--set", setting)]
    subprocess.run([sys.executable, "-m", module, runs, *words], check=True, stdout=subprocess.DEVNULL)


def embedder_of(root: str) -> str:
    return manifest.current(storage.Layout(root).embedder, kind="embedder")


@dataclass(frozen=True, kw_only=True)
class Root:
    """What is there to train on. reader: what rerankers see pictures with; fields: what of an item was indexed."""

    items: Items
    embedder: Embedder
    reader: Embedder
    table: pa.Table
    fields: str

    @classmethod
    def open(cls, path: str, reader: str = "") -> "Root":
        """reader: folder of an embedder; the retrieval's own where it is empty."""
        layout = storage.Layout(path)
        folder = manifest.current(layout.candidates, kind="candidates")
        embedder = Embedder.load(embedder_of(path))
        return cls(
            items=open_items(layout.items),
            embedder=embedder,
            reader=Embedder.load(reader) if reader else embedder,
            table=pq.read_table(f"{folder}/{NAME}", schema=schema.CANDIDATES),
            fields=manifest.read(folder, kind="candidates").config["fields"],
        )


@dataclass(frozen=True, kw_only=True)
class Trained:
    config: RerankConfig
    model: Model
    pool: Pool
    lists: dict[str, Lists]
    figures: dict[str, Any]


def train(root: Root, config: RerankConfig) -> Trained:
    """As the job trains it, on one worker."""
    pool, lists = gather(root.table, root.items, root.embedder, root.reader, config, fields=root.fields)
    began = time.perf_counter()
    state = rerank_loop.start(config, config.shape(root.reader), pool, lists[LEARNT], root.reader.image_head())
    fitted = time.perf_counter() - began
    state = rerank_loop.train(state, config, pool, lists[LEARNT], lists[CHOSEN_ON])
    if state.failed:
        raise ValueError(f"training failed: {state.failed}")
    state.model.load_state_dict(state.best)
    figures = {"fit_seconds": round(fitted, 1), "seconds": round(state.seconds, 1), "steps": state.step, "best_step": state.best_step}
    return Trained(config=config, model=state.model.eval(), pool=pool, lists=lists, figures=figures)


@dataclass(frozen=True, kw_only=True)
class Answers:
    """Lists that were scored: their `numbers` (Q,) in the fold, `levels` of their documents, `families` (Q,) of the queries."""

    numbers: np.ndarray
    scored: list[Scored]
    levels: list[np.ndarray]
    families: np.ndarray

    @classmethod
    def of(cls, trained: Trained, fold: str = TEST, kind: Kind = "image") -> "Answers":
        source, chunk = trained.lists[fold], trained.config.chunk
        found = rerank_select.measure(trained.model, trained.pool, source, kind=kind, depth=DEPTH, chunk=chunk, queries=len(source))
        return cls(numbers=found.numbers, scored=found.scored, levels=found.levels, families=found.families)

    def judged(self, choice: Choice) -> dict[str, np.ndarray]:
        """METRICS (Q,) of an order, over the candidates (METHOD.md section 4)."""
        rows = [_judged(levels[arrange(scored, choice)]) for scored, levels in zip(self.scored, self.levels, strict=True)]
        return dict(zip(METRICS, np.array(rows).T, strict=True))

    def calibrated(self, calibration: Calibration) -> "Answers":
        """With the logit of r as it is served; to judge by, as orders are made by what the model says."""
        scored = [dataclasses.replace(each, logit=calibration.logit(each)) for each in self.scored]
        return dataclasses.replace(self, scored=scored)

    def firsts(self, choice: Choice, calibration: Calibration, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """r (Q,) of the first answers, and whether they are right (Q,); some lists lose their product (rerank_calibrate.ABSENT)."""
        absent = np.random.default_rng(seed).random(len(self.levels)) < rerank_calibrate.ABSENT
        r, right = [], []
        for scored, levels, gone in zip(self.scored, self.levels, absent, strict=True):
            order = [i for i in arrange(scored, choice) if not gone or levels[i] > 0]
            if order:
                r.append(calibration.r(scored)[order[0]])
                right.append(levels[order[0]] == 0)
        return np.array(r), np.array(right, np.float64)

    def instances(self, threshold: float) -> tuple[float, float, float]:
        """Precision, recall and F1 of "the logit of r is above the threshold" for "it is the product", over all pairs."""
        logit, level = np.concatenate([s.logit for s in self.scored]), np.concatenate(self.levels)
        said, true = logit > threshold, level == 0
        hits = float((said & true).sum())
        precision, recall = hits / max(said.sum(), 1), hits / max(true.sum(), 1)
        return precision, recall, 2 * precision * recall / max(precision + recall, 1e-9)

    def threshold(self) -> float:
        """The logit at which F1 is best."""
        tried = np.quantile(np.concatenate([s.logit for s in self.scored]), np.linspace(0.9, 0.999, 100))
        return float(max(tried, key=lambda at: self.instances(at)[2]))


def _judged(levels: np.ndarray) -> tuple[float, float, float]:
    counts = np.bincount(levels, minlength=metrics.LEVELS)
    coarse = metrics.hit_rate_at(levels, 10, int(counts[:2].sum()), 1) if counts[:2].any() else 0.0
    return float(levels[0] == 0), coarse, metrics.ndcg_at(levels, 10, counts)


def flips(trained: Trained, choice: Choice, queries: int = 300, seed: int = 0) -> float:
    """Share of queries whose first answer changes when the documents come shuffled and are not put in canonical order."""
    source, random, changed = trained.lists[TEST], np.random.default_rng(seed), 0
    chosen = random.permutation(len(source))[:queries]
    for query in chosen.tolist():
        numbers = served(source, query, "image", DEPTH)
        firsts = [_first(trained, source, query, each, choice) for each in (numbers, random.permutation(numbers))]
        changed += firsts[0] != firsts[1]
    return changed / len(chosen)


def _first(trained: Trained, source: Lists, query: int, numbers: np.ndarray, choice: Choice) -> int:
    documents, cosine, level = (t[query][numbers][None] for t in (source.documents, source.cosines[KINDS.index("image")], source.levels))
    batch = assemble(trained.pool, source.queries[[query]], ["image"], padded(documents), padded(cosine, 0), padded(level))
    (scored,) = score(trained.model, batch, chunk=trained.config.chunk)
    return int(numbers[arrange(scored, choice)[0]])


def sure(r: np.ndarray, right: np.ndarray, settings: tuple[float, ...]) -> list[Mapping[str, float]]:
    """For each `min_score`: the share of queries that get an answer, the precision that r predicts for them, and the one observed."""
    kept = [r >= at for at in settings]
    return [
        {"min_score": at, "answered": float(k.mean()), "predicted": float(r[k].mean()), "observed": float(right[k].mean())}
        for at, k in zip(settings, kept, strict=True)
        if k.any()
    ]
