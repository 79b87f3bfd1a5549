"""Texts by their n-grams: the sketch against a counted bag, and what the weights do."""

import zlib
from collections import Counter

import numpy as np
import pytest
import torch

from train.backbones.compact import Compact, CompactConfig, Lexicon, ngrams

BUCKETS = 4096


def counted(text: str) -> Counter[int]:
    found: Counter[int] = Counter()
    for word in text.lower().split():
        marked = f" {word} "
        for length in (3, 4, 5):
            for i in range(len(marked) - length + 1):
                found[zlib.crc32(marked[i : i + length].encode()) % BUCKETS] += 1
    return found


def test_ngrams_are_those_of_each_word_whatever_stands_beside_it():
    texts = ["Red mug", "", "赤い マグ", "x"]
    found, starts = ngrams(texts, BUCKETS)
    ends = [*starts.tolist()[1:], len(found)]
    for text, start, end in zip(texts, starts.tolist(), ends, strict=True):
        assert Counter(found[start:end].tolist()) == counted(text)
    assert Counter(ngrams(["mug red"], BUCKETS)[0].tolist()) == counted("Red mug")


def test_the_sketch_is_the_bag_of_weighted_ngrams():
    torch.manual_seed(0)
    lexicon = Lexicon(BUCKETS, 2048)
    texts = ["red mug with a handle", "mug, red", "blue teapot", "a handle of a door"]
    lexicon.weigh(texts)
    h = lexicon(*ngrams(texts, BUCKETS)).detach()
    bags = np.zeros((len(texts), BUCKETS))
    for bag, text in zip(bags, texts, strict=True):
        for bucket, times in counted(text).items():
            bag[bucket] = times
    idf = np.log((1 + len(texts)) / (1 + (bags > 0).sum(0))) + 1
    weighted = bags * idf
    weighted /= np.linalg.norm(weighted, axis=1, keepdims=True)
    difference = np.abs((h @ h.T).numpy() - weighted @ weighted.T).max()
    assert difference < 0.1, f"largest difference of a cosine: {difference:.3f}"  # 1 / sqrt(2048) is .022


def test_words_never_seen_are_found_by_their_letters_before_any_training():
    torch.manual_seed(0)
    model = Compact(CompactConfig(dim=512, widths=(8, 8, 16, 16), text_dim=16, text_layers=1)).eval()
    titles = ["stroopwafel tin", "garden gnome", "gnocchi board", "waffle iron"]
    nothing = np.zeros(0, np.int64)

    def said(texts: list[str]) -> torch.Tensor:
        return model(model.collate(None, nothing, texts, np.arange(len(texts)), len(texts)), len(texts))

    with torch.no_grad():
        assert (said(["stroopwafels", "gnomes"]) @ said(titles).T).argmax(1).tolist() == [0, 1]


def test_letters_and_pictures_share_no_dimension_and_every_prefix_has_both():
    config = CompactConfig(dim=32, letters=0.25, widths=(8, 8, 16, 16), text_dim=16, text_layers=1)
    assert [int(config.lettered[:d].sum()) for d in (4, 8, 16, 32)] == [1, 2, 4, 8]
    model = Compact(config).eval()
    one, nothing = np.zeros(1, np.int64), np.zeros(0, np.int64)
    pixels = torch.randint(0, 255, (1, 48, 48, 3), dtype=torch.uint8)
    with torch.no_grad():
        shown = model(model.collate(pixels, one, [], nothing, 1), 1)[0]
        said = model(model.collate(None, nothing, ["red mug"], one, 1), 1)[0]
        both = model(model.collate(pixels, one, ["red mug"], one, 1), 1)[0]
    assert not shown[config.lettered].any()
    assert not said[~config.lettered].any()  # the causal model's part begins at zero
    assert float(both @ shown) == pytest.approx(1 / 1.09**0.5, abs=1e-6)  # so a picture finds its own whatever the title
    assert float(both @ said) == pytest.approx(0.3 / 1.09**0.5, abs=1e-6)


@pytest.mark.parametrize(("dim", "letters", "spelt"), [(8, 0.01, 1), (8, 0.99, 7), (10, 0.25, 2), (256, 0.5, 128)])
def test_neither_is_left_without_a_dimension(dim, letters, spelt):
    config = CompactConfig(dim=dim, letters=letters)
    assert int(config.lettered.sum()) == config.spelt == spelt
