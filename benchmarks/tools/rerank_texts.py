"""Text queries that touch unseen products, against the titles and pictures of these products: nDCG@10 over the whole gallery.

Q queries, G products of the gallery, none of them a variant of another by skin tone; a document's text is its title alone.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow.compute as pc

from benchmarks.tools import tfidf
from benchmarks.tools.rerank_trials import ASKS, DEPTH, Answers, Root, Trained, job
from idem import metrics
from idem.qrels import read_qrels
from index.candidate_lists import IRRELEVANT
from index.candidates import CHOSEN_ON, TEST
from train.rerank_merge import Choice, arrange

TONES = " OR ".join(f"product_id LIKE '%_1f3f{tone}%'" for tone in "bcdef")
GALLERY = f"style = 'noto' AND NOT ({TONES})"


def root_of(pictures: str, data: Path) -> str:
    """A root beside `pictures`, with its items and embedder, an index of pictures and titles, and candidates of text queries too."""
    root = f"{pictures}-text"
    for part in ("items", "embedder"):
        shutil.copytree(Path(pictures) / part, Path(root) / part, dirs_exist_ok=True)
    job("index.run", "runs/emoji.toml", root, [f"index.gallery={GALLERY}", "index.fields=both"])
    files = [f"candidates.texts={data / 'emoji/queries.parquet'}", f"candidates.qrels={data / 'emoji/qrels.parquet'}"]
    job("index.candidates", "runs/emoji.toml", root, [f"candidates.k={DEPTH}", f"candidates.test={ASKS['emoji']}", *files])
    return root


def opened(path: str, reader: str) -> Root:
    """Its fold `test` asks by text alone."""
    root = Root.open(path, reader)
    kept = pc.or_(pc.not_equal(root.table["fold"], TEST), pc.is_valid(root.table["text"]))
    return replace(root, table=root.table.filter(kept))


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """What is judged: the products of a gallery, the text queries (Q,) of fold `test`, and the level of every product for each (Q, G).
    families (Q,): that of the product which is best for a query, the first of several."""

    products: Sequence[str]
    titles: Sequence[str]
    texts: Sequence[str]
    levels: np.ndarray
    families: np.ndarray

    @classmethod
    def of(cls, root: Root, data: Path) -> "Gallery":
        rows = root.items.table(["product_id", "family_id", "title", "id_split"], GALLERY).to_pylist()
        told = {row["product_id"]: row for row in rows if row["id_split"] != "train"}
        asked = root.table.filter(pc.equal(root.table["fold"], TEST)).select(["query_id", "text"]).to_pylist()
        judged, products = read_qrels(str(data / "emoji/qrels.parquet")), sorted(told)
        levels = np.array([[judged[row["query_id"]].get(p, IRRELEVANT) for p in products] for row in asked])
        return cls(
            products=products,
            titles=[told[p]["title"] for p in products],
            texts=[row["text"] for row in asked],
            levels=levels,
            families=np.array([told[p]["family_id"] for p in products])[levels.argmin(1)],
        )

    def ndcg(self, query: int, ranked: np.ndarray) -> float:
        """ranked: levels of an answer, best first; what it lacks counts as missed."""
        return metrics.ndcg_at(ranked, 10, np.bincount(self.levels[query], minlength=metrics.LEVELS))

    def tfidf(self) -> np.ndarray:
        """(Q,) nDCG@10 of character n-grams of the titles."""
        order = np.argsort(-tfidf.scores(self.titles, self.texts), axis=1, kind="stable")
        return np.array([self.ndcg(q, self.levels[q, row]) for q, row in enumerate(order)])

    def judged(self, answers: Answers, choice: Choice) -> np.ndarray:
        """(Q,) nDCG@10 of the texts' answers in the order of `choice`."""
        found = np.zeros(len(self.texts))
        for query, scored, levels in zip(answers.numbers, answers.scored, answers.levels, strict=True):
            found[query] = self.ndcg(int(query), levels[arrange(scored, choice)])
        return found


def best(trained: Trained, choices: Mapping[str, Choice]) -> Choice:
    """The order that ranks the texts of fold `calibrate` best."""
    answers = Answers.of(trained, CHOSEN_ON, "text")
    return max(choices.values(), key=lambda choice: float(answers.judged(choice)["nDCG@10"].mean()))
