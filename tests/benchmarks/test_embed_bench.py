"""The comparison's arithmetic: the paired bootstrap, the peer of text search, spoilt labels, the plan of trials."""

import time
from dataclasses import replace

import numpy as np
import pytest

from benchmarks import embed
from benchmarks.tools import paired, pool, verdicts
from benchmarks.tools.tfidf import scores
from benchmarks.tools.trials import Trial, spoilt

FAMILIES = {"a": np.array(["f", "f", "g", "h"]), "b": np.array(["g", "h"])}


def test_the_difference_is_that_of_the_means_and_lies_in_its_interval():
    ours, theirs = [{"a": "1110", "b": "10"}, {"a": "1100", "b": "11"}], [{"a": "1000", "b": "10"}, {"a": "1000", "b": "00"}]
    gain, low, high = paired.difference(ours, theirs, FAMILIES)
    assert gain == pytest.approx(np.mean([paired.mean(a) - paired.mean(b) for a, b in zip(ours, theirs, strict=True)]))
    assert low <= gain <= high


def test_the_interval_is_that_of_a_plain_bootstrap_over_families():
    random = np.random.default_rng(1)
    families = {"a": np.array([f"f{i // 3}" for i in range(300)])}
    ours, theirs = ("".join("01"[int(x)] for x in random.random(300) < p) for p in (0.6, 0.5))
    delta = np.array([int(a) - int(b) for a, b in zip(ours, theirs, strict=True)])
    members = [delta[i : i + 3] for i in range(0, 300, 3)]
    plain = [np.concatenate([members[j] for j in random.integers(100, size=100)]).mean() for _ in range(4000)]
    _, low, high = paired.difference([{"a": ours}], [{"a": theirs}], families)
    assert np.allclose([low, high], np.percentile(plain, [2.5, 97.5]), atol=0.01)


def test_no_difference_is_none():
    assert paired.difference([{"a": "1010", "b": "01"}], [{"a": "1010", "b": "01"}], FAMILIES) == (0, 0, 0)


def test_tfidf_prefers_rare_ngrams_and_knows_parts_of_words():
    said = scores(["red mug", "red teapot", "blue teapot"], ["mugs", "red", "nothing"])
    assert said[0].argmax() == 0
    assert said[1, 0] > 0
    assert said[1, 2] == 0
    assert not said[2].any()


def test_spoilt_labels_have_the_share_that_was_asked_for():
    products = np.repeat([f"p{i}" for i in range(200)], 8)
    names, labels = spoilt(products, noise=0.3, divided=0.0, seed=0)
    assert abs((names[labels] != products).mean() - 0.3) < 0.04
    names, labels = spoilt(products, noise=0.0, divided=0.2, seed=0)
    halves = [name for name in names if "#" in name]
    assert len(halves) == 40
    assert len(names) == 240
    assert all(abs((labels == i).sum() - 8) <= 8 for i in range(len(names)))
    assert (np.char.partition(names[labels].astype(str), "#")[:, 0] == products).all()


def test_both_sides_try_as_many_settings_and_see_as_many_images():
    assert len(embed.CONTRAST) == len(embed.STAGES)
    images = {"emoji": 1000, "grocery": 500}
    trials = [*embed.search(range(2), 1000), *embed.finals(embed.PARTS, range(3), {"contrast": "plain", "stages": "slow"}, images)]
    assert len({t.name for t in trials}) == len(trials)
    assert all(t.loop["images"] == images[t.set] for t in trials)
    assert {t.seed for t in trials if t.unseen} == {0, 1, 2}


def test_a_side_is_chosen_by_its_mean_over_the_seeds():
    hits = {"search stages slow 0": "10", "search stages slow 1": "10", "search stages plain 0": "11", "search stages plain 1": "11"}
    done = {name: {"hits": {"a": said}} for name, said in hits.items()}
    assert embed.chosen(done, "stages", ["slow", "plain"]) == "plain"


def test_bars_are_judged_by_difference_and_interval(monkeypatch):
    families = np.array([f"f{i}" for i in range(200)])

    done = {}
    for seed in range(3):
        done[f"claim/contrast {seed}"] = {"hits": {"a": "10" * 100}, "hits_half": {"a": "10" * 100}}
        done[f"claim/stages {seed}"] = {"hits": {"a": "1110" * 50}, "hits_half": {"a": "1110" * 49 + "0000"}}
    monkeypatch.setattr(verdicts, "families_of", lambda data, which: {"a": families})
    lines = {x["name"]: x for x in verdicts.compared(done, {"emoji": None}, ["claim"], asked=3)}  # pyright: ignore[reportArgumentType]
    assert lines["three stages against InfoNCE"]["points"] == pytest.approx(25)
    assert lines["three stages against InfoNCE"]["holds"]
    assert lines["half the dimensions against all"]["holds"]
    fewer = verdicts.compared(done, {"emoji": None}, ["claim"], asked=4)  # pyright: ignore[reportArgumentType]
    assert {x["holds"] for x in fewer} == {False}


def test_a_line_that_was_not_measured_does_not_hold():
    lines = verdicts.compared({}, {}, ["claim", "noise"], asked=1)
    assert {x["holds"] for x in lines if x["bar"]} == {False}
    assert "not done" in verdicts.table(lines)


def test_a_trial_that_was_done_is_not_run_again_and_another_is(tmp_path, monkeypatch):
    trial = Trial(name="claim/stages 0", loop={"prefixes": (64, 128)})
    taker = Trial(name="kept 0", labels_of=trial.name)
    how = {"processes": 1, "device": "cpu", "until": time.monotonic() + 60, "tell": lambda name, figures: None}
    for one in (trial, taker):
        pool._keep(pool._said(one, {trial.name: trial}, "cpu"), {"seconds": 1}, tmp_path)
    assert pool.run_all([trial, taker], {}, tmp_path, **how) == {trial.name: {"seconds": 1}, taker.name: {"seconds": 1}}
    for others in ([replace(trial, seed=1)], [replace(trial, noise=0.2), taker]):  # also one that takes another's labels
        with pytest.raises(ValueError, match="1 of 1 processes of trials died"):  # the set of pictures is not there
            pool.run_all(others, {"emoji": tmp_path / "nowhere"}, tmp_path, **how)
    with pytest.raises(ValueError, match="labels are taken of trials that are not run: noise/measured"):
        pool.run_all([replace(trial, labels_of="noise/measured/0.2 0")], {}, tmp_path, **how)
    monkeypatch.setattr(pool, "_code", lambda: "another")
    assert pool._found(pool._said(trial, {}, "cpu"), tmp_path) is None
