"""Training, saving and reading the rerankers of the qwen3-vl backbone, on a tiny random checkpoint and a shop of eight colours."""

import dataclasses
import io
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from idem import manifest
from idem.storage import Layout
from idem.types import Document, Query
from tests.train.test_rerank_qwen import opened, shaken
from tests.train.test_rerank_run import FakeItems, candidates, offer
from train import rerank_label, rerank_loop, rerank_qwen_reader, rerank_qwen_train, rerank_run, rerank_select
from train.backbones import lora
from train.rerank_data import KINDS, Kind, Lists, draw
from train.rerank_loop import RerankConfig
from train.rerank_merge import Choice, probability
from train.rerank_qwen_inputs import Item, picture_features
from train.rerank_qwen_reader import QwenReranker
from train.rerank_qwen_train import QwenModel, QwenPool, QwenState, RowReranker
from train.rerank_select import Served, quality
from train.reranker import Reranker, canonical

PRODUCTS, PHOTOS = 8, 2
CONFIG = RerankConfig(root="", steps=40, patience=99, batch=4, chunk=4, lr=5e-3, evaluations=2, minutes=1e6, absent=0.1, dropout=0)
LEARNT = {"listwise": 16, "pointwise": 4}  # lists: a random language model cannot compare yet, so its answers are learnt by heart
SERVED: dict[Kind, Served] = {kind: Served(choice=Choice()) for kind in KINDS}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    torch.set_num_threads(1)


def picture(product: int, photo: int) -> bytes:
    """Noise in the product's colour."""
    colour = np.random.default_rng(product).integers(0, 255, 3)
    pixels = colour + np.random.default_rng([product, photo]).normal(0, 10, (64, 64, 3))
    out = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(out, "PNG")
    return out.getvalue()


PICTURES = [picture(p, i) for p in range(PRODUCTS) for i in range(PHOTOS)]
TITLES = ["" if i == 0 else f"mug {p}" for p in range(PRODUCTS) for i in range(PHOTOS)]


def made_lists() -> Lists:
    """Each picture asks for the other one of its product, among three others; the cosine is noise."""
    rows, random = np.arange(PRODUCTS * PHOTOS), np.random.default_rng(0)
    products = rows // PHOTOS
    documents = np.array([random.permutation(rows[products != products[row]])[:4] for row in rows])
    documents[:, 2] = rows ^ 1
    return Lists(
        queries=rows,
        documents=documents,
        cosines=random.uniform(0.4, 0.5, (3, *documents.shape)).astype(np.float32),
        levels=np.where(products[documents] == products[:, None], 0, 3).astype(np.int8),
        products=products[documents],
        families=products // 2,
        told=rows % 4 == 1,
    )


LISTS = made_lists()


def first(count: int) -> Lists:
    parts = {f.name: getattr(LISTS, f.name) for f in dataclasses.fields(LISTS)}
    return Lists(**{name: part[:, :count] if name == "cosines" else part[:count] for name, part in parts.items()})


@pytest.fixture(scope="module")
def embedder(qwen_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("embedder")
    opened(qwen_folder).save(folder)
    return folder


def gathered(embedder: Path, views: int = 1) -> QwenPool:
    backbone = rerank_qwen_train.adapted(embedder, torch.device("cpu"))
    return rerank_qwen_train.qwen_pool(backbone, [*PICTURES, b"broken", None], [*TITLES, "broken", " "], views=views)


@dataclass(frozen=True, kw_only=True)
class Made:
    config: RerankConfig
    pool: QwenPool
    state: QwenState
    model: QwenModel
    lists: Lists


@pytest.fixture(scope="module", params=["listwise", "pointwise"])
def made(request: pytest.FixtureRequest, embedder: Path) -> Made:
    config, own = CONFIG.model_copy(update={"model": request.param, "steps": 60}), first(LEARNT[request.param])
    pool = gathered(embedder, rerank_qwen_train.VIEWS[config.model])
    state = rerank_qwen_train.start(config, embedder, pool)
    rerank_loop.train(state, config, pool, own, own)
    return Made(lists=own, config=config, pool=pool, state=state, model=rerank_qwen_train.trained(config, embedder, pool, state.best))


def test_a_pool_holds_what_decodes(embedder: Path) -> None:
    pool = gathered(embedder, views=2)
    assert pool.pictured.tolist() == [True] * len(PICTURES) + [False, False]
    assert pool.pixels.shape == (18, 2, 64, 64, 3)
    assert pool.pixels.nbytes == 18 * rerank_qwen_train.picture_bytes(opened(embedder), 2)
    assert pool.texts[:, 0].tolist() == [i + 1 if title else 0 for i, title in enumerate([*TITLES, "broken", ""])]


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["listwise", "pointwise"])
def test_drawn_rows_read_as_the_items_they_number(embedder: Path, kind: str) -> None:
    config = CONFIG.model_copy(update={"model": kind, "kinds": (0.3, 0.4, 0.3), "chunk": 6})
    pool = gathered(embedder, rerank_qwen_train.VIEWS[config.model])
    rows = rerank_qwen_train.start(config, embedder, pool).model
    assert isinstance(rows, RowReranker)
    shaken(rows)
    model, views = rows.model, rerank_qwen_train.VIEWS[config.model]
    batch = draw(pool, LISTS, slots=range(6), seed=0, step=0, chunk=6, settings=config)
    answers = rows(batch)
    for b in range(6):
        there = batch.level[b] >= 0
        numbers = [int(batch.q_image[b, 0, 0]), *batch.d_image[b, there, 0, 0].int().tolist()]
        shown = [bool(batch.q_mask[b].any()), *[True] * int(there.sum())]
        texts = [TITLES[n] for n in numbers]
        texts[0] = texts[0] if batch.q_text[b].any() else ""
        pixels = torch.from_numpy(pool.pixels[numbers]).flatten(0, 1)
        items = [
            Item(text=text, pictures=tuple(range(views * i, views * (i + 1))) if pictured else ())
            for i, (text, pictured) in enumerate(zip(texts, shown, strict=True))
        ]
        query = dataclasses.replace(items[0], pictures=items[0].pictures[:1])
        assert query.text or query.pictures
        features = picture_features(model.backbone, pixels)
        alone = model(model.layout.batch([query], [items[1:]], features, [batch.cosine[b, there].tolist()]))
        s, expected = (each if isinstance(each, torch.Tensor) else each[0] for each in (answers, alone))
        assert s.shape == batch.level.shape, "also where no list of the batch fills a chunk"
        assert float((s[b, there] - expected[0]).abs().max()) < 1e-4


def test_hidden_places_are_zero(embedder: Path) -> None:
    pool = gathered(embedder)
    rows = rerank_qwen_train.start(CONFIG, embedder, pool).model
    assert isinstance(rows, RowReranker)
    batch = draw(pool, LISTS, slots=range(4), seed=0, step=0, chunk=4, settings=CONFIG.model_copy(update={"dropout": 0.5}))
    hidden = ~torch.cat([batch.q_mask[:, None], batch.d_mask], 1)
    seen = rows.request(batch).features
    assert (seen.abs().sum((1, 3)) == 0).equal(hidden[~hidden.all(2)])


def test_a_catalogue_without_pictures_is_trained_on_its_titles(embedder: Path) -> None:
    backbone = rerank_qwen_train.adapted(embedder, torch.device("cpu"))
    pool = rerank_qwen_train.qwen_pool(backbone, [None] * len(TITLES), TITLES, views=1)
    state = rerank_qwen_train.start(CONFIG, embedder, pool)
    rerank_loop.train(state, CONFIG.model_copy(update={"steps": 2}), pool, LISTS, LISTS)
    assert (state.step, state.failed) == (2, "")


def measured_of(made: Made, source: Lists, queries: int) -> rerank_select.Measured:
    rows, how = RowReranker(made.model, made.pool), rerank_qwen_train.scored
    return rerank_select.measure(rows, made.pool, source, kind="image", depth=4, chunk=4, queries=queries, scoring=how)


def test_it_learns_its_own_lists(made: Made) -> None:
    looks = [c for c in made.state.curves if "calibrate_loss" in c]
    assert min(c["calibrate_loss"] for c in looks) < 0.75 * looks[0]["calibrate_loss"]
    measured = measured_of(made, made.lists, queries=99)
    assert len(measured.scored) == len(made.lists)
    orders = [np.argsort(-s.logit) for s in measured.scored]
    recall = np.mean([quality(levels[order])[0] for order, levels in zip(orders, measured.levels, strict=True)])
    assert recall >= 0.7, f"chance is .25, found {recall}"


def test_what_is_served_is_chosen_for_every_kind(made: Made) -> None:
    settings = rerank_select.judge(RowReranker(made.model, made.pool), made.config, made.pool, LISTS, rerank_qwen_train.scored)
    assert set(settings) == set(KINDS)
    assert settings["image"].queries == PRODUCTS * PHOTOS
    assert settings["both"].queries == PRODUCTS * PHOTOS // 4


def test_a_checkpoint_holds_what_is_trained_and_training_goes_on_from_it(embedder: Path, tmp_path: Path) -> None:
    config, pool = CONFIG.model_copy(update={"steps": 6}), gathered(embedder)
    saved: list[int] = []

    def report(figures: dict[str, object], due: bool) -> None:
        if due and not saved:
            saved.append(whole.step)
            whole.save(tmp_path)

    whole = rerank_qwen_train.start(config, embedder, pool)
    rerank_loop.train(whole, config, pool, LISTS, LISTS, report=report)
    assert 0 < saved[0] < 6
    names = set(load_file(tmp_path / "model.safetensors"))
    assert all(lora.MARK in name or not name.startswith("model.backbone.") for name in names)
    assert not any("visual." in name for name in names)
    resumed = rerank_qwen_train.start(config, embedder, pool)
    resumed.restore(tmp_path)
    assert resumed.step == saved[0]
    rerank_loop.train(resumed, config, pool, LISTS, LISTS)
    for name, value in whole.model.state_dict().items():
        assert torch.allclose(value, resumed.model.state_dict()[name], atol=1e-5), name
    with pytest.raises(ValueError, match="does not fit the reranker in 1 tensors"):
        resumed.model.load_state_dict({**whole.best, "other": torch.zeros(1)})


def test_in_bf16_as_on_a_gpu_it_learns_and_is_served(qwen_folder: Path, tmp_path: Path) -> None:
    opened(qwen_folder, dtype="bf16").save(tmp_path / "embedder")
    pool, config = gathered(tmp_path / "embedder"), CONFIG.model_copy(update={"steps": 30})
    state = rerank_qwen_train.start(config, tmp_path / "embedder", pool)
    rows = state.model
    assert isinstance(rows, RowReranker)
    rows.bf16 = True
    rerank_loop.train(state, config, pool, first(4), first(4))
    assert not state.failed
    looks = [c["calibrate_loss"] for c in state.curves if "calibrate_loss" in c]
    assert min(looks) < 0.5 * looks[0]
    assert {value.dtype for value in rows.state_dict().values()} == {torch.float32}
    assert {p.dtype for p in rows.model.backbone.model.visual.parameters()} == {torch.bfloat16}
    rerank_qwen_reader.save(rows.model.eval(), tmp_path)
    before, after = (
        QwenReranker(m, served=SERVED, chunk=4).rerank(QUERIES[0], documents())
        for m in (rows.model, rerank_qwen_reader.load(tmp_path, "listwise"))
    )
    np.testing.assert_allclose(after.relevance, before.relevance, atol=0.1, err_msg="merging rounds")


def reader_of(made: Made, cache_bytes: int = 1 << 24) -> QwenReranker:
    return QwenReranker(made.model, served=SERVED, chunk=4, cache_bytes=cache_bytes)


def documents() -> list[Document]:
    return [Document(item_id=f"i{i}", text=TITLES[i], image=PICTURES[i], score=0.5 - 0.01 * i) for i in range(9)]


QUERIES = (Query(image=picture(3, 9)), Query(text="mug 2"), Query(image=picture(3, 9), text="mug 3"), Query(image=b"no picture"))


def test_saved_and_loaded_it_scores_the_same(made: Made, tmp_path: Path) -> None:
    names = rerank_qwen_reader.save(made.model, tmp_path)
    assert {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()} == set(names)
    beside = load_file(tmp_path / "model.safetensors")
    assert not any(name.startswith("backbone.") for name in beside)
    again = rerank_qwen_reader.load(tmp_path, made.config.model)
    assert not any(lora.MARK in name for name, _ in again.named_parameters()), "adapters are merged"
    for query in QUERIES[:3]:
        before, after = (QwenReranker(m, served=SERVED, chunk=4).rerank(query, documents()) for m in (made.model, again))
        assert before.order == after.order
        np.testing.assert_allclose(after.relevance, before.relevance, atol=1e-5)
        np.testing.assert_allclose(after.null, before.null, atol=1e-4)
    other = {"listwise": "pointwise", "pointwise": "listwise"}[made.config.model]
    with pytest.raises(ValueError, match="another version of this program: train it again"):
        rerank_qwen_reader.load(tmp_path, other)


def test_the_reader_says_what_was_measured(made: Made) -> None:
    measured = measured_of(made, LISTS, queries=1)
    (query,) = np.random.default_rng(0).permutation(len(LISTS))[:1]
    row, numbers, cosines = LISTS.queries[query], LISTS.documents[query], LISTS.cosines[0, query]
    shown = [Document(item_id=f"i{n}", text=TITLES[n], image=PICTURES[n], score=float(c)) for n, c in zip(numbers, cosines, strict=True)]
    r = np.array(reader_of(made).rerank(Query(image=PICTURES[row]), shown).relevance)
    kept = [i for i in canonical(shown) if i in {int(np.flatnonzero(numbers == n)[0]) for n in numbers}]
    expected = probability(measured.scored[0].logit)
    assert len(expected) == len({int(p) for p in LISTS.products[query]})
    best = [i for at, i in enumerate(kept) if LISTS.products[query][i] not in LISTS.products[query][kept[:at]]]
    np.testing.assert_allclose(r[best], expected, atol=1e-4)


@pytest.mark.parametrize("query", QUERIES[:3])
def test_r_is_the_documents_own(made: Made, query: Query) -> None:
    reader, shown, order = reader_of(made), documents(), [4, 2, 0, 8, 1, 3, 7, 5, 6]
    together = np.array(reader.rerank(query, shown).relevance)
    alone = [reader.rerank(query, [d]).relevance[0] for d in shown]
    np.testing.assert_allclose(alone, together, atol=1e-4)
    np.testing.assert_allclose(np.log(alone), np.log(together), atol=1e-3, err_msg="a small r differs little")
    shuffled = reader.rerank(query, [shown[i] for i in order])
    assert [order[i] for i in shuffled.order] == list(reader.rerank(query, shown).order)
    np.testing.assert_array_equal(shuffled.relevance, together[order])
    assert np.std(np.log(together)) > 0.01, "a constant r would pass"


def test_requests_of_several_users_are_answered_as_each_alone(made: Made) -> None:
    reader, lists = reader_of(made), [documents(), [], documents()[:1], documents()[3:]]
    for query, shown, ranking in zip(QUERIES, lists, reader.rerank_many(QUERIES, lists), strict=True):
        alone = reader.rerank(query, shown)
        assert ranking.order == alone.order
        np.testing.assert_allclose(ranking.relevance, alone.relevance, atol=1e-4)


@pytest.mark.parametrize("query", QUERIES)
@pytest.mark.parametrize("mode", ["listwise", "pointwise"])
def test_bad_inputs_never_raise(made: Made, query: Query, mode: str) -> None:
    reader = reader_of(made)
    good = documents()
    bad = [
        Document(item_id="nothing", text="", image=None, score=0.5),
        Document(item_id="broken", text="mug", image=b"\x89PNG broken", score=0.4),
        Document(item_id="nan", text="mug", image=PICTURES[0], score=math.nan),
        Document(item_id="surrogate", text="\ud800 <|image_pad|>", image=None, score=math.inf),
        Document(item_id="long", text="x" * 10_000, image=b"", score=-7.0),
        Document(item_id="", text="nameless", image=PICTURES[1], score=0.3),
    ]
    for shown in ([], good[:1], bad, [*good, *bad], [*good, *good, *good[:1]], [bad[0]] * 5):
        ranking = reader.rerank(query, shown, mode=mode)  # type: ignore[arg-type]
        assert sorted(ranking.order) == list(range(len(shown)))
        assert len(ranking.relevance) == len(ranking.null) == len(shown)
        assert all(0 <= r <= 1 for r in ranking.relevance)
        assert not ranking.degraded or not shown
    twice = reader.rerank(query, [*good, *good], mode=mode)  # type: ignore[arg-type]
    assert twice.relevance[: len(good)] == twice.relevance[len(good) :]


def test_faults_are_counted(made: Made) -> None:
    reader = reader_of(made)
    reader.rerank(QUERIES[0], documents())
    assert reader.faults == 0
    shown = [*documents(), Document(item_id="broken", text="", image=b"broken", score=math.nan)]
    reader.rerank(QUERIES[3], shown)
    assert reader.faults == 3, "two pictures that do not decode and a score that is no number"
    assert list(reader.rerank(QUERIES[3], documents()).order) == canonical(documents()), "nothing is left of the query"


def test_the_cache_changes_nothing_and_knows_changed_pictures(made: Made) -> None:
    shown = documents()
    reader, small = reader_of(made), reader_of(made, cache_bytes=3000)
    first, second, third = reader.rerank(QUERIES[0], shown), reader.rerank(QUERIES[0], shown), small.rerank(QUERIES[0], shown)
    assert first == second == third
    assert len(reader.cache) == len(shown)
    assert small.cache.bytes <= 3000
    reader.rerank(QUERIES[0], [dataclasses.replace(d, item_id="") for d in shown])
    assert len(reader.cache) == len(shown), "what has no name is not kept"
    changed = dataclasses.replace(shown[0], image=PICTURES[9])
    assert reader.rerank(QUERIES[0], [changed]).relevance != reader.rerank(QUERIES[0], shown[:1]).relevance


def test_when_time_is_over_the_order_of_retrieval_is_returned_and_says_so(made: Made) -> None:
    late = reader_of(made).rerank(QUERIES[0], documents(), max_ms=0)
    assert late.degraded
    assert list(late.order) == canonical(documents())
    assert all(math.isnan(r) for r in (*late.relevance, *late.null))
    assert not reader_of(made).rerank(QUERIES[0], documents(), max_ms=60_000).degraded


def test_weights_that_are_no_numbers_keep_the_order_of_retrieval(made: Made, tmp_path: Path) -> None:
    rerank_qwen_reader.save(made.model, tmp_path)
    model = rerank_qwen_reader.load(tmp_path, made.config.model)
    with torch.no_grad():
        model.backbone.model.language_model.norm.weight.fill_(torch.nan)
    reader = QwenReranker(model, served=SERVED, chunk=4)
    ranking = reader.rerank(QUERIES[0], documents())
    assert (list(ranking.order), ranking.degraded, reader.faults) == (canonical(documents()), True, 1)


@pytest.mark.ray
def test_a_catalogue_embedded_by_qwen_gets_a_qwen_reranker(
    qwen_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray_session: None
) -> None:
    for module in (rerank_run, rerank_label):
        monkeypatch.setattr(module, "open_items", lambda uri: FakeItems())
    layout = Layout(str(tmp_path))
    plan = manifest.Plan(parent=layout.embedder, kind="embedder", config={"fractions": [0.7, 0.2, 0.1]}, inputs={})
    plan.write(figures={}, files=opened(qwen_folder, text_length=16).save(Path(plan.folder)))
    offer(layout, candidates(100))
    config = CONFIG.model_copy(update={"root": layout.root, "steps": 4, "least_queries": 5})
    figures = rerank_run.run(config)
    assert (figures["identity"], figures["steps"]) == (False, 4)
    folder = manifest.current(layout.reranker, kind="reranker")
    reranker = Reranker.load(folder, embedder_path=plan.folder)
    assert isinstance(reranker, QwenReranker)
    assert sorted(reranker.rerank(QUERIES[0], documents()).order) == list(range(len(documents())))
    assert rerank_run.run(config)["skipped"]
    told = rerank_label.run(rerank_label.LabelConfig(root=layout.root, judge=folder, sure=0.6))
    assert told["pairs"] == sum(map(len, candidates(100)["item_ids"].to_pylist()))
    embedder, few = rerank_run.Embedder.load(plan.folder), config.model_copy(update={"tokens_mb": 1})
    monkeypatch.setattr(rerank_qwen_train, "picture_bytes", lambda *_: 1 << 20)
    with pytest.raises(ValueError, match=r"rerank\.tokens_mb allows 1"):
        rerank_run.gather(candidates(100), FakeItems(), embedder, embedder, few, fields="image")  # type: ignore[arg-type]
