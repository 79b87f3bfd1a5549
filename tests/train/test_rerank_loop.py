"""Drawing batches, the loop alone and resumed, a loss that breaks, and the choice of what is served."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from train import rerank_loop, rerank_select
from train.rerank_blocks import Batch
from train.rerank_data import KINDS, Lists, Pool, draw, served
from train.rerank_loop import RerankConfig
from train.rerank_match import COLOURS
from train.rerank_merge import Scored, arrange
from train.rerank_model import Kind
from train.rerank_score import score

PRODUCTS, PHOTOS, PLACES, CHANNELS = 32, 4, 4, 8
CONFIG = RerankConfig(root="", steps=60, patience=99, minutes=5, batch=8, width=16, layers=1, heads=2, match=8, chunk=5, depth=12, lr=3e-3)


def synthetic(seed: int = 0) -> tuple[Pool, dict[str, Lists]]:
    """Products are patterns over places; a cosine that is nearly noise, so that what can be learnt is in the pictures."""
    random = np.random.default_rng(seed)
    patterns = random.normal(size=(PRODUCTS, PLACES, CHANNELS))
    pictures = np.repeat(patterns, PHOTOS, 0) + 0.3 * random.normal(size=(PRODUCTS * PHOTOS, PLACES, CHANNELS))
    products = np.repeat(np.arange(PRODUCTS), PHOTOS)
    texts = random.integers(4, 260, (len(products), 12)).astype(np.int16)
    pool = Pool(places=pictures.astype(np.float16), pictured=np.ones(len(products), bool), texts=texts)
    half = products < PRODUCTS // 2
    return pool, {"rerank": _fold(np.flatnonzero(half), products, random), "calibrate": _fold(np.flatnonzero(~half), products, random)}


def _fold(rows: np.ndarray, products: np.ndarray, random: np.random.Generator) -> Lists:
    documents = np.array([random.permutation(rows[rows != row])[:20] for row in rows])
    documents[:, 0] = np.where(rows % PHOTOS == 0, rows + 1, rows - 1)  # every list holds the right product
    levels = np.where(products[documents] == products[rows][:, None], 0, 3).astype(np.int8)
    cosines = (0.1 * (levels == 0) + random.uniform(0, 0.6, (3, *levels.shape))).astype(np.float32)
    return Lists(
        queries=rows,
        documents=documents,
        cosines=cosines,
        levels=levels,
        products=products[documents],
        families=products[rows] // 2,
        told=np.ones(len(rows), bool),
    )


def same(one: Batch, other: Batch) -> bool:
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in one.__dataclass_fields__)


class FakeReader:
    """What is asked of a reader to know the shapes of a model."""

    vocabulary = 260

    def __init__(self, views: int) -> None:
        self.token_shape = PLACES // views, CHANNELS - COLOURS

    def image_head(self) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.eye(4), torch.zeros(4)


def fresh(config: RerankConfig = CONFIG) -> tuple[Pool, dict[str, Lists], rerank_loop.State]:
    (pool, made), reader = synthetic(), FakeReader(config.views)
    return pool, made, rerank_loop.start(config, config.shape(reader), pool, made["rerank"], reader.image_head())  # type: ignore[arg-type]


def test_a_batch_depends_on_seed_step_and_slot_alone() -> None:
    pool, made = synthetic()
    told = {"seed": 3, "chunk": 5, "settings": CONFIG}
    whole = draw(pool, made["rerank"], slots=range(4), step=7, **told)
    assert same(whole, draw(pool, made["rerank"], slots=range(4), step=7, **told))
    parts = [draw(pool, made["rerank"], slots=slots, step=7, **told) for slots in ([0, 1], [2, 3])]
    assert torch.equal(whole.d_image, torch.cat([p.d_image for p in parts]))
    assert torch.equal(whole.level, torch.cat([p.level for p in parts]))
    assert not same(whole, draw(pool, made["rerank"], slots=range(4), step=8, **told))


def test_drawn_comparisons_are_what_they_say() -> None:
    pool, made = synthetic()
    batch = draw(pool, made["rerank"], slots=range(200), seed=0, step=0, chunk=5, settings=CONFIG)
    there = batch.level >= 0
    assert (there.sum(1) >= 2).all()
    assert not batch.d_mask[~there].any(), "nothing is seen where there is no document"
    assert 0.1 < (~(batch.level == 0).any(1)).float().mean() < 0.7, "NULL is sometimes right"
    pictured, texted = batch.q_mask.any(1), (batch.q_text > 0).any(1)
    assert (pictured | texted).all()
    assert 0.5 < (pictured & ~texted).float().mean() < 0.9
    assert (~pictured & texted).any()


def test_two_workers_on_half_a_batch_have_the_gradient_of_one() -> None:
    pool, made, state = fresh()

    def gradient(slots: range) -> torch.Tensor:
        batch = draw(pool, made["rerank"], slots=slots, seed=0, step=0, chunk=5, settings=CONFIG)
        state.model.zero_grad()
        rerank_loop.losses(state.model, batch)[0]["loss"].backward()
        return torch.cat([p.grad.flatten() for p in state.model.parameters() if p.grad is not None])

    one, two = gradient(range(8)), (gradient(range(4)) + gradient(range(4, 8))) / 2
    difference = float((one - two).abs().max() / one.abs().max())
    assert difference < 1e-4, difference


@pytest.fixture
def unfitted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The linear part stays what it is made as, so that there is something left to learn."""
    monkeypatch.setattr(rerank_loop.rerank_start, "fit", lambda *_: {})


def test_what_is_fitted_on_whole_lists_finds_more_than_the_cosine() -> None:
    pool, made, state = fresh()
    said = rerank_select.summary(rerank_select.judge(state.model.eval(), CONFIG, pool, made["calibrate"])["image"])
    assert said["chosen"]["R@1"] > said["retrieval"]["R@1"] + 0.2


def test_training_learns_what_the_cosine_does_not_say(unfitted: None) -> None:
    config = CONFIG.model_copy(update={"lr": 1e-2})
    pool, made, state = fresh(config)
    rerank_loop.train(state, config, pool, made["rerank"], made["calibrate"])
    assert state.step == 60
    assert state.best_step > 0
    looks = [c["calibrate_pairwise"] for c in state.curves if "calibrate_pairwise" in c]
    assert min(looks) < 0.7 * looks[0]
    state.model.load_state_dict(state.best)
    settings = rerank_select.judge(state.model.eval(), CONFIG, pool, made["calibrate"])
    said = rerank_select.summary(settings["image"])
    assert said["served"] != "retrieval"
    assert said["chosen"]["R@1"] > said["retrieval"]["R@1"] + 0.2
    assert set(settings) == set(KINDS)


def test_a_resumed_run_gives_the_same_weights(tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"steps": 12, "evaluations": 3, "minutes": 1e6})
    pool, made, state = fresh(config)
    saved: list[int] = []

    def report(figures: dict[str, object], due: bool) -> None:
        if due and not saved and state.step > 4:
            saved.append(state.step)
            state.save(tmp_path)

    rerank_loop.train(state, config, pool, made["rerank"], made["calibrate"], report=report)
    _, _, again = fresh(config)
    again.restore(tmp_path)
    assert again.step == saved[0]
    rerank_loop.train(again, config, pool, made["rerank"], made["calibrate"])
    difference = max(float((a - b).detach().abs().max()) for a, b in zip(state.model.parameters(), again.model.parameters(), strict=True))
    assert difference < 1e-6, difference
    assert [c["step"] for c in again.curves] == [c["step"] for c in state.curves]


def test_a_loss_that_is_not_finite_ends_training_with_the_last_good_weights() -> None:
    pool, made, state = fresh()

    def spoil(figures: dict[str, object], due: bool) -> None:
        if state.step == 30:
            with torch.no_grad():
                state.model.norm.weight.fill_(torch.nan)

    rerank_loop.train(state, CONFIG, pool, made["rerank"], made["calibrate"], report=spoil)
    assert "not finite at step 30" in state.failed
    assert all(value.isfinite().all() for value in state.best.values())


def test_untrained_what_is_served_is_retrieval(unfitted: None) -> None:
    pool, made, state = fresh()
    with torch.no_grad():
        state.model.linear.weight[:, 1] = 0  # of the reader's own cosine
    settings = rerank_select.judge(state.model.eval(), CONFIG, pool, made["calibrate"])
    for kind in KINDS:
        assert rerank_select.summary(settings[kind])["served"] == "retrieval"
        assert len(settings[kind].table) == len(rerank_select.CHOICES)


def test_where_no_title_may_be_told_pictures_alone_are_trained_and_judged() -> None:
    pool, made, state = fresh()
    silent = {name: dataclasses.replace(each, told=np.zeros(len(each), bool)) for name, each in made.items()}
    batch = draw(pool, silent["rerank"], slots=range(100), seed=0, step=0, chunk=5, settings=CONFIG)
    assert not batch.q_text.any()
    assert batch.q_mask.any(1).all()
    settings = rerank_select.judge(state.model.eval(), CONFIG, pool, silent["calibrate"])
    assert settings["image"].queries
    for kind in ("both", "text"):
        assert (settings[kind].queries, settings[kind].choice) == (0, rerank_select.RETRIEVAL)


def test_a_service_sees_the_best_row_of_each_product() -> None:
    _, made = synthetic()
    shown = served(made["rerank"], 3, "image", 6)
    products = made["rerank"].products[3][shown]
    cosine = made["rerank"].cosines[0, 3]
    assert len(set(products.tolist())) == len(products) == 6
    assert (np.diff(cosine[shown]) <= 0).all()
    assert all(cosine[made["rerank"].products[3] == p].max() == cosine[i] for p, i in zip(products, shown, strict=True))


def test_long_lists_are_scored_in_slices_with_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    pool, made, state = fresh()
    batch = draw(pool, made["rerank"], slots=[0], seed=0, step=0, chunk=18, settings=CONFIG)
    (one,) = score(state.model.eval(), batch, chunk=5)
    monkeypatch.setattr("train.rerank_score.SLICE", 4)
    (two,) = score(state.model, batch, chunk=5)
    for name in ("local", "null", "logit", "final"):
        np.testing.assert_allclose(getattr(one, name), getattr(two, name), atol=1e-5)


@pytest.mark.parametrize("model", ["listwise", "pointwise"])
def test_several_lists_are_scored_at_once_as_each_alone(model: Kind) -> None:
    config = CONFIG.model_copy(update={"model": model})
    pool, made, state = fresh(config)
    with torch.no_grad():
        for p in state.model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    batch = draw(pool, made["rerank"], slots=range(6), seed=0, step=0, chunk=18, settings=config)
    assert len(set((batch.level >= 0).sum(1).tolist())) > 1, "lists of one length would not tell"
    for row, together in enumerate(score(state.model.eval(), batch, chunk=5)):
        count = int((batch.level[row] >= 0).sum())
        names = ("q_image", "q_mask", "q_text")
        alone = {name: getattr(batch, name)[[row]] if name in names else getattr(batch, name)[[row], :count] for name in vars(batch)}
        (one,) = score(state.model, Batch(**alone), chunk=5)
        assert one.finalists.tolist() == together.finalists.tolist()
        for name in ("local", "null", "logit", "final"):
            np.testing.assert_allclose(getattr(one, name), getattr(together, name), atol=1e-5)


def test_the_pointwise_model_learns_too_and_sees_two_views(unfitted: None) -> None:
    config = CONFIG.model_copy(update={"model": "pointwise"})
    pool, made, state = fresh(config)
    assert config.views == 2
    rerank_loop.train(state, config, pool, made["rerank"], made["calibrate"])
    looks = [c["calibrate_yes_no"] for c in state.curves if "calibrate_yes_no" in c]
    assert min(looks) < 0.9 * looks[0]
    state.model.load_state_dict(state.best)
    said = rerank_select.summary(rerank_select.judge(state.model.eval(), config, pool, made["calibrate"])["image"])
    assert said["chosen"]["R@1"] > said["retrieval"]["R@1"] + 0.1


def _measured(logit_of_right: float, *, queries: int = 60, families: int = 15) -> rerank_select.Measured:
    """Lists of 8 whose right document is second in retrieval; its r and scores are `logit_of_right`, those of others 0."""
    levels = np.array([3, 0, 3, 3, 3, 3, 3, 3])
    says = np.where(levels == 0, logit_of_right, 0.0)
    one = Scored(chunk=5, local=says, null=np.zeros(8), logit=says, finalists=np.arange(5), final=says[:5])
    return rerank_select.Measured(
        numbers=np.arange(queries), scored=[one] * queries, levels=[levels] * queries, families=np.arange(queries) % families
    )


def test_a_reranker_that_harms_is_never_chosen() -> None:
    choice, table = rerank_select.select(_measured(-1.0))
    assert choice == rerank_select.RETRIEVAL
    assert min(row["gain"] for row in table) < 0
    choice, _ = rerank_select.select(_measured(+1.0))
    assert arrange(_measured(1.0).scored[0], choice)[0] == 1


@pytest.mark.parametrize("errors", [0.0, 1.0])
def test_too_few_families_keep_retrieval(errors: float) -> None:
    for families in (1, 2, rerank_select.FEWEST_FAMILIES - 1):
        choice, table = rerank_select.select(_measured(+1.0, families=families), errors=errors)
        assert choice == rerank_select.RETRIEVAL
        assert not any(row["clear"] for row in table)
        json.dumps(table, allow_nan=False)
    assert rerank_select.select(_measured(+1.0, families=rerank_select.FEWEST_FAMILIES))[0] != rerank_select.RETRIEVAL
    assert rerank_select.clustered_error(np.array([1.0, 0.0]), np.zeros(2)) == np.inf


def test_families_not_queries_are_the_unit_of_the_error() -> None:
    gain = np.repeat(np.random.default_rng(0).normal(size=25), 4)
    plain = gain.std(ddof=1) / np.sqrt(len(gain))
    assert rerank_select.clustered_error(gain, np.arange(100)) == pytest.approx(plain, rel=1e-6)
    means = gain.reshape(25, 4).mean(1)
    assert rerank_select.clustered_error(gain, np.arange(100) // 4) == pytest.approx(means.std(ddof=1) / 5, rel=1e-6)
