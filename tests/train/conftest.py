"""A tiny checkpoint in the real Qwen3-VL format, with random weights: what a hub name would give."""

from pathlib import Path

import pytest

from benchmarks.tools import qwen_model


@pytest.fixture(scope="session")
def qwen_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its vocabulary has room for one more token, as the family's own has."""
    return qwen_model.write(tmp_path_factory.mktemp("qwen"))
