"""What fits where: against sums written out by hand, and against the memory that a head really takes."""

import pytest
import torch

from train.head.capacity import Room, capacity, capacity_of, needs, room_here, workers_here
from train.head.prototypes import HeadConfig, PrototypeHead

GIB = 1 << 30
ROOM = Room(device=80 * GIB, host=128 * GIB, file=1000 * GIB)


def of(rows=10**9, dim=64, **changes):
    known = {"dtype": "bfloat16", "storage": "device", "kind": "sparse", "subcentres": 1, "world": 8, "room": ROOM}
    return capacity(rows, dim, **{**known, "columns": 18_000, "batch": 256, "prefixes": 1, "exact_index": True, **changes})


def test_a_prototype_takes_its_row_its_state_and_its_place():
    need = needs(64, "bfloat16", 1, sparse=True, exact_index=True)
    assert (need.stored, need.moment, need.scalars, need.slot, need.index) == (128, 128, 16, 4, 0)
    assert needs(512, "float32", 3, sparse=False, exact_index=False).moment == 3 * 512 * 4
    assert needs(64, "bfloat16", 1, sparse=True, exact_index=False).index == pytest.approx(1.15 * 72, abs=1)


def test_a_billion_prototypes_over_eight_gpus():
    found = of()
    step = 4 * 18_000 * (4 * 64 + 3 * 256)
    assert found.prototypes["device"] == (80 * GIB - step) // 276 * 8
    assert found.prototypes["file"] == min(1000 * GIB // 256, (128 * GIB - step) // 20) * 8
    assert found.fits
    assert found.takes["rows"] == 128 * 125_000_000
    assert not of(world=1).fits
    assert of(world=1, storage="file").fits


def test_more_of_anything_never_fits_more():
    for changes in ({"dim": 128}, {"dtype": "float32"}, {"subcentres": 3}, {"kind": "full"}, {"batch": 4096}, {"exact_index": False}):
        for tier, n in of(**changes).prototypes.items():
            assert n <= of().prototypes[tier], (changes, tier)


def test_nothing_fits_where_there_is_nothing():
    assert set(of(room=Room(device=0, host=0, file=0)).prototypes.values()) == {0}


def test_the_text_names_each_tier_and_says_what_does_not_fit():
    text = str(of(world=1))
    assert "1,000,000,000 prototypes over 1 worker(s)" in text
    assert all(tier in text for tier in ("device", "host", "file", "moments", "does not fit tier 'device'"))
    assert "does not fit" not in str(of())


def test_a_head_takes_what_is_said_of_it(tmp_path):
    head = PrototypeHead(20_000, 64, HeadConfig(storage="file", dtype="bfloat16"), folder=tmp_path)
    for step in range(2):
        h = torch.nn.functional.normalize(torch.randn(4, 64), dim=1)
        head.loss(h, torch.tensor([0, 1, 2, 3]), prefixes=(64,), scale=8.0, margin=0.1, step=step).backward()
        head.update(0.1)
    takes = capacity_of(20_000, 64, head.config, device=head.device, world=1, batch=4, prefixes=1).takes
    disk = sum(file.stat().st_blocks * 512 for file in tmp_path.iterdir())
    assert disk == pytest.approx(takes["rows"] + takes["moments"], rel=0.01)
    head.store.reserve(20_000)
    assert (head.store.scalars.nbytes, head.store.slot.nbytes) == (takes["scalars"], takes["slots"])


def test_what_this_machine_has_is_shared_by_its_workers(tmp_path):
    alone, four = (room_here(torch.device("cpu"), tmp_path / "not yet made", share=n) for n in (1, 4))
    assert 0 < four.host <= alone.host // 3
    assert 0 < four.file <= alone.file // 3


def test_what_cannot_be_held_is_refused_and_what_would_hold_it_is_said():
    of().refuse()
    of(rows=2 * 10**9).refuse()  # its rows fit, its state will once each is touched: that is only said
    with pytest.raises(
        ValueError, match=r"4,000,000,000 prototypes over 8 .* 59.6 GiB .* 'device' has 40.0.*'file'.* 12 workers"
    ) as refused:
        of(rows=4 * 10**9, room=Room(device=40 * GIB, host=64 * GIB, file=4000 * GIB)).refuse()
    assert "'host'" not in str(refused.value)


def test_the_launcher_says_how_many_share_a_machine(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert workers_here(6) == 6
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert workers_here(6) == 2


def test_rebuilds_are_as_rare_as_prototypes_are_many_unless_somebody_says_otherwise():
    assert [HeadConfig().rebuilt_every(rows) for rows in (10, 10**5, 10**7)] == [200, 200, 20_000]
    assert HeadConfig(refresh=5).rebuilt_every(10**7) == 5
