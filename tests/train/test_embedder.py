import io

import numpy as np
import pytest
import torch
from PIL import Image

from idem.images import ImageError
from train.backbones.compact import EMB, Compact, CompactConfig, tokenize
from train.embedder import Embedder, HistogramEmbedder


def picture(seed: int, size: tuple[int, int] = (70, 50)) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size, 3), np.uint8)).save(out, "PNG")
    return out.getvalue()


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    torch.manual_seed(0)
    return Embedder(Compact(CompactConfig(dim=32, widths=(8, 16, 16, 32), text_dim=16)))


def test_vectors_are_the_same_alone_and_in_a_batch(embedder):
    images = [picture(0), None, picture(2), picture(3)]
    texts = ["", "a red mug", "mug", ""]
    together = embedder.encode(images, texts, batch_size=3)
    alone = np.concatenate([embedder.encode([i], [t]) for i, t in zip(images, texts, strict=True)])
    assert np.abs(together - alone).max() < 1e-5
    assert np.allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)


def test_a_prefix_is_the_renormalised_start_of_the_vector(embedder):
    whole, half = embedder.encode([picture(0)], None), embedder.encode([picture(0)], None, dim=16)
    assert half.shape == (1, 16)
    assert np.allclose(half, whole[:, :16] / np.linalg.norm(whole[:, :16]), atol=1e-6)


def test_what_is_wrong_is_said(embedder):
    with pytest.raises(ValueError, match="item 1 has neither a picture nor a text"):
        embedder.encode([picture(0), None], ["", "  "])
    with pytest.raises(ImageError, match="not a picture"):
        embedder.encode([b"nonsense"], None)
    with pytest.raises(ValueError, match=r"not in 1\.\.32"):
        embedder.encode([picture(0)], None, dim=33)
    assert embedder.encode([], []).shape == (0, 32)


def test_image_tokens_have_the_promised_shape(embedder):
    tokens = embedder.image_tokens(torch.zeros(2, 48, 48, 3, dtype=torch.uint8))
    assert tuple(tokens.shape) == (2, *embedder.token_shape)


def test_tokens_end_with_the_embedding_token_within_their_length():
    tokens = tokenize(["abc", "ü" * 100, ""], 8)
    assert tuple(tokens.shape) == (3, 8)
    assert [(row == EMB).sum().item() for row in tokens] == [1, 1, 1]
    assert tokens[2, 0] == EMB


def test_text_padding_does_not_change_a_vector(embedder):
    short, long = "mug", "a very long title of a teapot with a handle"
    assert np.allclose(embedder.encode(None, [short]), embedder.encode(None, [short, long])[:1], atol=1e-5)


def test_histogram_twin_sees_colour_alone():
    twin = HistogramEmbedder()
    vectors = twin.encode([picture(0), None])
    assert np.linalg.norm(vectors[0]) == pytest.approx(1, abs=1e-5)
    assert not vectors[1].any()
