"""The head's benchmark steps what it says it steps, and its figures are made right of what was measured."""

import json
import math
from pathlib import Path

import pytest
import torch

from benchmarks import head as bench
from benchmarks.tools import head_contenders as contenders
from benchmarks.tools.head_contenders import GENERATOR, INDEX, LINEAR, OURS, SAMPLED, Spec


def measured(kind, rows, seconds, source="", **said):
    known = {"anonymous_mb": 300.0, "columns": 6400, **({"build_s": 2.0, "refresh": 200} if kind == OURS else {})}
    return bench.Measured(spec=Spec(kind=kind, rows=rows, source=source), seconds=seconds, cpu=seconds, said={**known, **said})


def indexed(**changes):
    made = {
        "small": measured(OURS, 10**5, [0.03, 0.05, 0.04], INDEX),
        "linear": measured(LINEAR, 10**5, [1.0]),
        "large": measured(OURS, 10**7, [0.05], INDEX, build_s=100.0, refresh=20_000, anonymous_mb=1200.0),
    }
    return list({**made, **changes}.values())


def fed(seconds):
    return [measured(OURS, 10**5, [0.02, 0.02], GENERATOR, build_s=0.0), measured(OURS, 10**8, [seconds], GENERATOR, build_s=0.0)]


def named(figures, name, peer):
    (found,) = [f for f in figures if f.name == name and f.peer == peer]
    return found


def test_a_step_is_the_median_and_its_share_of_a_rebuild():
    assert indexed()[0].step_ms == pytest.approx(40 + 10)


def test_figures_compare_sizes_that_are_fed_alike():
    figures = bench.compare(indexed(), "cpu")
    large = named(figures, "step_ms ours 1e7 index", "ours 1e5 index")
    assert (large.value, large.peer_value, large.bar, large.holds) == (pytest.approx(55), pytest.approx(50), "<= 1.5", True)
    assert named(figures, "step_ms ours 1e5 index", "nn.Linear 1e5").ratio == pytest.approx(0.05)
    (huge,) = bench.compare(fed(0.05), "cpu")
    assert (huge.peer, huge.ratio, huge.bar, huge.holds) == ("ours 1e5 generator", pytest.approx(2.5), "<= 3.0", True)
    assert bench.memory(indexed()).value == 1200


def test_a_bar_that_is_missed_is_said():
    slow = indexed(large=measured(OURS, 10**7, [0.076], INDEX, build_s=0.0))
    greedy = indexed(small=measured(OURS, 10**5, [0.1], INDEX, anonymous_mb=7700.0))
    assert [f.holds for f in bench.compare(slow, "cpu") if f.bar] == [False]
    assert [f.holds for f in bench.compare(fed(0.061), "cpu")] == [False]
    assert not bench.memory(greedy).holds
    assert "FAILS" in bench.table(slow, bench.compare(slow, "cpu"))
    assert not [f for f in bench.compare(slow, "cuda") if f.bar]


def test_what_takes_part_at_each_size():
    names = [[spec.name for spec in phase] for phase in bench.phases([10**5, 10**6, 10**7, 10**8], "cpu", "x", 16, 2048)]
    together = ["ours 1e5 index", "nn.Linear 1e5", "sampled 10 % 1e5", "ours 1e6 index", "sampled 10 % 1e6", "ours 1e7 index"]
    assert names == [together, ["ours 1e5 generator", "ours 1e8 generator"]]
    on_gpu = [spec for phase in bench.phases([10**5, 10**9], "cuda", "x", 16, 2048) for spec in phase]
    assert {spec.storage for spec in on_gpu if spec.kind == OURS} == {"device"}
    assert [spec.touched for spec in on_gpu if spec.rows == 10**9] == [False]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("--sizes 1e6", "needs 1e5"),
        ("--sizes 1e5,10", "at least 1e3"),
        ("--sizes 1e5,1e14", "GB are free"),
        ("--warm 0", "at least 1; found 40 and 0"),
    ],
)
def test_what_cannot_be_is_refused(asked, said, tmp_path, capsys):
    assert bench.main([*asked.split(), "--folder", str(tmp_path)]) == 2
    assert said in json.loads(capsys.readouterr().out)["error"]
    assert not list(tmp_path.iterdir())


def test_the_whole_of_it_on_small_sizes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "BASE", 2000)
    monkeypatch.setattr(bench, "INDEXED", {"cpu": 2000})
    monkeypatch.setattr(bench, "FIT", {"cpu": {LINEAR: 2000, SAMPLED: 2000}})
    arguments = ["--sizes", "2e3,4e3", "--rounds", "2", "--warm", "1", "--folder", str(tmp_path), "--out", str(tmp_path / "told.json")]
    assert bench.main(arguments) == 0
    told = json.loads((tmp_path / "told.json").read_text())
    assert told["holds"]
    assert json.loads(capsys.readouterr().out)["figures"] == told["figures"]
    runs = {(run["kind"], run["rows"], run["source"]): run for run in told["runs"]}
    assert len(runs) == 5
    ours = runs[OURS, 4000, GENERATOR]
    assert len(ours["steps_ms"]) == 2
    assert ours["disk_gb"] * 1e9 == pytest.approx(4000 * (128 + 128), rel=0.05)
    assert math.isfinite(ours["step_ms"])
    assert {path.name for path in tmp_path.iterdir()} == {"told.json"}


def test_a_contender_that_fails_is_named(tmp_path):
    failing = bench.Contender(Spec(kind=OURS, rows=1, source=INDEX, folder=str(tmp_path)))
    with pytest.raises(ValueError, match=r"ours 1e0 index failed: ValueError: ID recognition needs at least 2 products"):
        failing.ready()
    failing.process.kill()


@pytest.mark.parametrize("kind", [OURS, LINEAR, SAMPLED])
def test_a_step_moves_the_targets_rows(kind, tmp_path):
    torch.manual_seed(0)
    spec = Spec(kind=kind, rows=3000, source=GENERATOR if kind == OURS else "", folder=str(tmp_path))
    made = contenders.KINDS[kind](spec)
    rows = made.head.store.weight if kind == OURS else made.rows.weight if kind == LINEAR else made.rows
    before = rows.detach().clone()
    state = torch.random.get_rng_state()
    _, labels = contenders.batch(spec)
    torch.random.set_rng_state(state)
    made.step()
    moved = (rows.detach() != before).any(1)
    assert moved[labels].all()
    assert made.figures()["columns"] > 0
    assert kind == LINEAR or int(moved.sum()) < 3000
    assert Path(spec.folder).exists()
