"""The demo shop: families differ in one detail, everything is drawn from (seed, product), and the file is the same byte for byte."""

import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from idem import images, job
from pipelines import catalog, shop, shop_shapes
from pipelines.shop_drawing import catalogue_picture, cut_out, user_photo

LOOKS = ("kind", "colours", "paints", "proportions", "pattern", "emblem", "trim", "handle", "label")


def families(seed: int, products: int) -> dict[str, list[shop.Product]]:
    found = defaultdict(list)
    for index in range(products):
        item = shop.product(seed, index)
        found[item.family_id].append(item)
    return found


def settings(root: Path, **changes: int) -> catalog.CatalogConfig:
    return catalog.CatalogConfig(root=str(root), **{"products": 12, "photos": 2, "side": 48, "seed": 3, **changes})


@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_siblings_differ_in_exactly_one_detail(seed: int) -> None:
    for siblings in families(seed, 20 * shop.GROUP).values():
        assert len(siblings) in shop.SIZES
        differing = {look for look in LOOKS if len({getattr(item, look) for item in siblings}) > 1}
        assert differing == {siblings[0].differs}
        assert len({getattr(item, siblings[0].differs) for item in siblings}) == len(siblings)
        assert len({(item.id_split, item.brand) for item in siblings}) == 1


def test_details_are_all_drawn_and_named() -> None:
    assert set(shop.KINDS) == set(shop_shapes.SHAPES)
    assert len(shop.KINDS) >= 8
    assert set(shop.DETAILS["pattern"]) == set(shop_shapes.PATTERNS)
    assert set(shop.DETAILS["trim"]) == set(shop_shapes.TRIMS)
    assert set(shop.DETAILS["emblem"]) == set(shop_shapes.emblems())
    assert {value.split()[0] for value in shop.DETAILS["handle"]} == {*shop_shapes.GRIPS, "none"}
    assert all(len(values) >= max(shop.SIZES) for values in shop.DETAILS.values())


@pytest.mark.parametrize("seed", range(4))
def test_one_family_in_five_is_unseen(seed: int) -> None:
    drawn = [shop.unseen(seed, family) for family in range(100)]
    assert [sum(drawn[start : start + 5]) for start in range(0, 100, 5)] == [1] * 20
    assert len({drawn.index(True, start) % 5 for start in range(0, 100, 5)}) > 1


def test_siblings_look_different_in_the_catalogue() -> None:
    for siblings in families(0, 4 * shop.GROUP).values():
        pictures = [np.asarray(cut_out(item, 128).convert("RGB"), np.int16) for item in siblings]
        for i, one in enumerate(pictures):
            for other in pictures[:i]:
                assert (np.abs(one - other).max(axis=2) > 24).mean() > 0.005, siblings[i]


@pytest.mark.parametrize("kind", shop.KINDS)
def test_every_kind_is_drawn_whole(kind: str) -> None:
    item = next(item for index in range(10_000) if (item := shop.product(5, index)).kind == kind)
    cut = cut_out(item, 128)
    opaque = np.asarray(cut.getchannel("A")) > 128
    assert 0.15 < opaque.mean() < 0.85
    for number, draw in enumerate((catalogue_picture, user_photo)):
        first, again, other = (draw(cut, shop.stream(5, seed)) for seed in (number, number, number + 9))
        assert first == again != other
        assert images.pixels(first, 64).shape == (64, 64, 3)


def test_titles_are_noisy_but_never_empty() -> None:
    item = shop.product(0, 7)
    titles = [shop.title(item, shop.stream(0, shop.TITLE, 7, number)) for number in range(200)]
    assert all(title.strip() for title in titles)
    assert len(set(titles)) > 150
    named = [title for title in titles if any(word in title.lower() for word in shop.KINDS[item.kind])]
    assert 100 < len(named) < 200


def test_a_product_does_not_depend_on_how_many_are_drawn(tmp_path: Path) -> None:
    few, many = settings(tmp_path, products=17), settings(tmp_path, products=31, photos=3)
    for path, shape in (("few", few), ("many", many)):
        catalog.write(shape, tmp_path / path, workers=1)
    rows = {row["image_id"]: row for row in pq.read_table(tmp_path / "many").to_pylist()}
    for row in pq.read_table(tmp_path / "few").to_pylist():
        assert rows[row["image_id"]] == row


def test_same_seed_same_bytes_for_any_number_of_workers(tmp_path: Path) -> None:
    shape = settings(tmp_path, products=40, photos=1)
    alone = catalog.write(shape, tmp_path / "alone", workers=1)
    together = catalog.write(shape, tmp_path / "together", workers=2)
    assert alone == together
    assert (tmp_path / "alone").read_bytes() == (tmp_path / "together").read_bytes()
    catalog.write(settings(tmp_path, products=40, photos=1, seed=4), tmp_path / "other", workers=1)
    assert (tmp_path / "alone").read_bytes() != (tmp_path / "other").read_bytes()


def test_rows_look_as_the_public_sets_do(tmp_path: Path) -> None:
    figures = catalog.run(settings(tmp_path, products=30))
    table = pq.read_table(figures["records"])
    assert table.schema.equals(catalog.RECORDS)
    assert (figures["products"], figures["families"], figures["pictures"]) == (30, 6, 90) == (30, 6, table.num_rows)
    assert len(set(table["image_id"].to_pylist())) == 90
    for row in table.to_pylist():
        assert all(row[name] not in (None, "") for name in table.column_names)
        assert images.decode(row["image"]).size == (row["width"], row["height"]) == (48, 48)
        assert (row["role"], row["split"]) in {("catalog", "catalog"), ("photo", "test")}
    unseen = {row["product_id"] for row in table.to_pylist() if row["id_split"] == "dev_unseen"}
    assert len(unseen) == figures["unseen_products"] > 0


def test_colour_alone_neither_finds_products_nor_is_blind(tmp_path: Path) -> None:
    """R@1 of a joint colour histogram, photos of unseen products against the catalogue: 5-50 % (a shop of 600 has about 14 %)."""
    catalog.write(settings(tmp_path, products=300, photos=1, side=64, seed=0), tmp_path / "shop", workers=2)
    rows = pq.read_table(tmp_path / "shop").to_pylist()
    bins = images.batch([row["image"] for row in rows], 64).reshape(len(rows), -1, 3) // 32 @ np.array([64, 8, 1], np.uint8).astype(int)
    histograms = np.sqrt(np.stack([np.bincount(row, minlength=512) for row in bins]))
    gallery = [i for i, row in enumerate(rows) if row["role"] == "catalog"]
    queries = [i for i, row in enumerate(rows) if row["role"] == "photo" and row["id_split"] == "dev_unseen"]
    found = (histograms[queries] @ histograms[gallery].T).argmax(axis=1)
    hits = np.mean([rows[gallery[g]]["product_id"] == rows[q]["product_id"] for q, g in zip(queries, found, strict=True)])
    assert 0.05 < hits < 0.5


def test_the_job_resumes_and_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_file = tmp_path / "run.toml"
    run_file.write_text(f'root = "{tmp_path}/run"\n[catalog]\nproducts = 5\nphotos = 1\nside = 32\n')

    def call(*changes: str) -> tuple[int, dict]:
        argv = [str(run_file), *(part for change in changes for part in ("--set", change))]
        code = job.main("pipelines.catalog", "catalog", catalog.CatalogConfig, catalog.run, argv)
        return code, json.loads(capsys.readouterr().out.splitlines()[-1])

    first, again = call(), call()
    assert (first[0], first[1]["skipped"], again[0], again[1]["skipped"]) == (0, False, 0, True)
    assert first[1]["bytes"] == again[1]["bytes"] == Path(first[1]["records"]).stat().st_size
    for change, said in {
        "products=0": "products",
        "photos=-1": "photos",
        "side=8": "side",
        "seed=-1": "seed",
        "colour=1": "colour",
    }.items():
        code, line = call(f"catalog.{change}")
        assert (code, line["ok"]) == (2, False)
        assert said in line["error"]
        assert "Allowed keys: products, photos, side, seed" in line["error"]
    code, line = call("catalog.products=1000000000000")
    assert code == 2
    assert "too little disk" in line["error"]
