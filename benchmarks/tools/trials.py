"""One training run on labelled pictures and what it finds among products never trained on."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.tools.labelled import Labelled
from idem import folds
from idem.metrics import ndcg_at
from train.corpus import Corpus
from train.encoder import Encoder
from train.loop import Trainer
from train.settings import LoopConfig

CUT = 0.15  # of the training families, that settings are chosen on
EMOJI_QUERIES = ("twemoji", "openmoji", "fluent_3d", "openmoji_line", "fluent_hc")
GALLERY_PHOTOS = 5  # of each grocery product


@dataclass(frozen=True, kw_only=True)
class Trial:
    """`loop` changes LoopConfig. unseen: asked of `dev_unseen`, else of families cut from train, which are then not trained on.

    noise: share of the labels replaced at random; divided: share of the IDs split in two; labels_of: the trial whose members, as
    its measures left them, are trained on instead; texts: rows bring their product's texts.
    """

    name: str
    set: str = "emoji"
    seed: int = 0
    unseen: bool = True
    noise: float = 0.0
    divided: float = 0.0
    labels_of: str = ""
    texts: bool = False
    loop: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Decoded(Corpus):
    """A corpus whose pictures are at hand: `at` (n,) are the rows of `pictures`."""

    pictures: Labelled | None = None
    at: np.ndarray | None = None

    def load(self, rows: np.ndarray, side: int) -> np.ndarray:
        assert self.pictures is not None
        assert self.at is not None
        source = next(x for x in (self.pictures.stored, self.pictures.served) if x.shape[1] == side)
        return source[self.at[rows]]

    def pixels(self, rows: np.ndarray, side: int) -> np.ndarray:
        return self.load(rows, side)


# Labels, as they are and as they are spoilt


def asked_rows(data: Labelled, trial: Trial) -> tuple[np.ndarray, np.ndarray]:
    """Rows that are trained on, and rows that are asked about."""
    train = data.fields["id_split"] == "train"
    if trial.unseen:
        return np.flatnonzero(train), np.flatnonzero(~train)
    cut = {family: folds.uniform(family, "cut") < CUT for family in np.unique(data.fields["family"])}
    held = np.array([cut[family] for family in data.fields["family"]])
    return np.flatnonzero(train & ~held), np.flatnonzero(train & held)


def spoilt(products: np.ndarray, *, noise: float, divided: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Names of IDs (U,) and labels (n,) of products (n,): a share of the labels drawn anew, a share of the IDs split in two."""
    random = np.random.default_rng((seed, 77))
    names = products.astype(object)
    wrong = random.random(len(names)) < noise
    names[wrong] = random.choice(np.unique(products), wrong.sum())
    halved = set(random.permutation(np.unique(products))[: round(divided * len(np.unique(products)))].tolist())
    second = random.random(len(names)) < 0.5
    names = np.array([f"{name}#2" if name in halved and other else name for name, other in zip(names, second, strict=True)])
    return np.unique(names, return_inverse=True)


# What is found


def vectors(encoder: Encoder, pixels: np.ndarray, texts: Sequence[str] | None = None, block: int = 512) -> np.ndarray:
    """(n, D) of pictures as served, with texts where given."""
    encoder.model.eval()
    parts = []
    for start in range(0, len(pixels), block):
        part = pixels[start : start + block]
        said = list(texts[start : start + block]) if texts else []
        with torch.no_grad():
            x = torch.from_numpy(np.ascontiguousarray(part)).to(encoder.device)
            parts.append(encoder.forward(encoder.model, x, np.arange(len(part)), said, np.arange(len(said)), len(part)).cpu())
    return torch.cat(parts).numpy()


def shortened(h: np.ndarray, dim: int) -> np.ndarray:
    return F.normalize(torch.from_numpy(h[:, :dim]), dim=1).numpy()


def tasks(data: Labelled, rows: np.ndarray, which: str) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Name, queries and gallery of each task; queries without an answer in the gallery do not count."""
    style, product = data.fields["style"][rows], data.fields["product"][rows]
    if which == "emoji":
        for name in EMOJI_QUERIES:
            gallery = np.flatnonzero(style == "noto")
            yield name, np.flatnonzero((style == name) & np.isin(product, product[gallery])), gallery
        return
    # Photos of one product share the scene: those of the gallery and those that ask are of different source splits.
    of_test = np.flatnonzero((style == "photo") & (data.fields["split"][rows] == "test"))
    of_train = np.flatnonzero((style == "photo") & (data.fields["split"][rows] == "train"))
    if not len(of_test):
        of_test, of_train = of_train[::2], of_train[1::2]
    several = np.concatenate([of_train[product[of_train] == p][:GALLERY_PHOTOS] for p in np.unique(product[of_train])])
    for name, gallery in (("photo", several), ("catalog", np.flatnonzero(style == "catalog"))):
        yield name, of_test[np.isin(product[of_test], product[gallery])], gallery


def found(data: Labelled, rows: np.ndarray, h: np.ndarray, which: str) -> dict[str, str]:
    """For each task a "1" for each query whose product comes first, else "0"."""
    product, out = data.fields["product"][rows], {}
    for name, queries, gallery in tasks(data, rows, which):
        first = (h[queries] @ h[gallery].T).argmax(1)
        out[name] = "".join("01"[hit] for hit in (product[gallery][first] == product[queries]).astype(int))
    return out


def text_gallery(data: Labelled, rows: np.ndarray) -> np.ndarray:
    """Of `rows`, the Noto drawings: one for each product."""
    return rows[data.fields["style"][rows] == "noto"]


def text_ndcg(data: Labelled, products: Sequence[str], scores: Callable[[Sequence[str]], np.ndarray]) -> float:
    """Mean nDCG@10 of the text queries that have an answer among `products`; scores(texts) gives (queries, products)."""
    asked = [(text, grades) for text, grades in data.queries if any(p in grades for p in products)]
    levels = [np.array([3 - grades.get(p, 0) for p in products]) for _, grades in asked]
    said = scores([text for text, _ in asked])
    each = [
        ndcg_at(level[np.argsort(-s, kind="stable")], 10, np.bincount(level, minlength=4)) for level, s in zip(levels, said, strict=True)
    ]
    return float(np.mean(each))


# One trial


def left(folder: Path, name: str, ending: str) -> Path:
    """Where a trial leaves its labels (npz) and its figures (json)."""
    return folder / f"{name.replace('/', '.').replace(' ', '_')}.{ending}"


def corpus_of(data: Labelled, rows: np.ndarray, trial: Trial, earlier: Path) -> Decoded:
    """What the trial learns from."""
    names, labels = spoilt(data.fields["product"][rows], noise=trial.noise, divided=trial.divided, seed=trial.seed)
    weights = np.ones(len(rows), np.float32)
    if trial.labels_of:
        with np.load(left(earlier, trial.labels_of, "npz")) as z:
            labels, weights = z["labels"], z["weights"]
    product = data.fields["product"][rows]
    return Decoded(
        fetch=lambda _: [],
        titles=[data.titles[p] if trial.texts else "" for p in product],
        texts=[data.texts.get(p, []) if trial.texts else [] for p in product],
        has_image=np.ones(len(rows), bool),
        labels=labels,
        weights=weights,
        names=names.tolist(),
        pictures=data,
        at=rows,
    )


def are_right(corpus: Decoded, labels: np.ndarray) -> np.ndarray:
    """(n,) bool: the label is the product's, or a part of it."""
    assert corpus.pictures is not None
    return np.char.partition(np.array(corpus.names).astype(str)[labels], "#")[:, 0] == corpus.pictures.fields["product"][corpus.at]


def run(trial: Trial, data: Labelled, earlier: Path, device: str) -> dict[str, Any]:
    """Train and ask; the figures of one trial."""
    rows, asked = asked_rows(data, trial)
    corpus = corpus_of(data, rows, trial, earlier)
    config = LoopConfig(**{"minutes": 600, "seed": trial.seed, "checkpoint_seconds": 1e9, **trial.loop})
    start = time.perf_counter()
    trainer = Trainer(config, corpus, lambda figures, due: None, device=device)
    trained = trainer.run()
    seconds = time.perf_counter() - start
    labelling = trainer.labelling
    kept, given, right = labelling.weights > 0, are_right(corpus, labelling.given_labels), are_right(corpus, labelling.labels)
    np.savez(left(earlier, trial.name, "npz"), labels=labelling.labels, weights=labelling.weights)
    h = vectors(trainer.encoder, data.served[asked])
    dim = h.shape[1]
    told = {
        "steps": trained.step,
        "seconds": round(seconds, 1),
        "train_seconds": round(trained.seconds, 1),
        "hits": found(data, asked, h, trial.set),
        "hits_half": found(data, asked, shortened(h, dim // 2), trial.set),
        "kept": round(float(kept.mean()), 4),
        "kept_right": round(float(right[kept].mean()), 4),
        "right_lost": round(float((given & ~(kept & right)).sum() / max(given.sum(), 1)), 4),
        "moved": round(float((labelling.labels != labelling.given_labels).mean()), 4),
    }
    if trial.texts and data.queries:
        gallery = text_gallery(data, asked)
        products = data.fields["product"][gallery].tolist()
        documents = vectors(trainer.encoder, data.served[gallery], [data.titles[p] for p in products])
        told["text_ndcg"] = text_ndcg(data, products, lambda texts: words(trainer.encoder, texts) @ documents.T)
    return told


def words(encoder: Encoder, texts: Sequence[str]) -> np.ndarray:
    """(n, D) of texts alone."""
    nothing = np.zeros(0, np.int64)
    encoder.model.eval()
    with torch.no_grad():
        return encoder.forward(encoder.model, None, nothing, list(texts), np.arange(len(texts)), len(texts)).cpu().numpy()
