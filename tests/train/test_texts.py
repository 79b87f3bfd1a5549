"""Further texts of products: what is taken, and what is said where it cannot be."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from train.ray_run import anywhere
from train.run import TrainConfig
from train.texts import TextSource, read_texts


def written(folder: Path, **columns: list) -> str:
    path = folder / f"{'-'.join(columns)}.parquet"
    pq.write_table(pa.table(columns), path)
    return str(path)


def test_texts_and_lists_of_several_rows_and_files_come_together(tmp_path):
    names = written(tmp_path, product_id=["a", "b", "a"], title=["mug", "lamp", "Becher"])
    words = written(tmp_path, product_id=["a", "b", "c"], keywords=[["drink", " "], None, ["far"]])
    found = read_texts([TextSource(file=names, columns=("title",)), TextSource(file=words, columns=("keywords",))])
    assert found == {"a": ["mug", "Becher", "drink"], "b": ["lamp"], "c": ["far"]}
    assert read_texts([]) == {}


def test_what_cannot_be_read_is_named(tmp_path):
    path = written(tmp_path, product_id=["a"], price=[3])
    with pytest.raises(ValueError, match=r"no file of texts at .*none\.parquet"):
        read_texts([TextSource(file=str(tmp_path / "none.parquet"), columns=("title",))])
    with pytest.raises(ValueError, match="no column title; they have product_id, price"):
        read_texts([TextSource(file=path, columns=("title",))])
    with pytest.raises(ValueError, match=r"price of the texts .* is of type int64"):
        read_texts([TextSource(file=path, columns=("price",))])
    (tmp_path / "torn.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="cannot read the texts"):
        read_texts([TextSource(file=str(tmp_path / "torn.parquet"), columns=("title",))])


def test_paths_reach_the_workers_whatever_directory_they_are_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = TrainConfig(root="out", texts=(TextSource(file="a.parquet", columns=("title",)),), assignments="b.parquet")
    sent = anywhere(config)
    assert sent.texts[0].file == str(tmp_path / "a.parquet")
    assert sent.assignments == str(tmp_path / "b.parquet")
    assert sent.start_from == ""
    assert config.texts[0].file == "a.parquet", "what the artifact is named by does not change"
