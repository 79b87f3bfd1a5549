"""Augmentation on whole batches: what it leaves alone, what it repeats, and what it covers."""

import pytest
import torch

from train import augment


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_strength_zero_only_resizes():
    pixels = torch.randint(0, 255, (3, 32, 32, 3), dtype=torch.uint8)
    x = augment.photo(pixels, 32, generator(), strength=0.0)
    assert torch.allclose(x, pixels.permute(0, 3, 1, 2) / 255, atol=1e-5)


def test_one_seed_gives_one_result_and_values_stay_in_range():
    pixels = torch.randint(0, 255, (8, 32, 32, 3), dtype=torch.uint8)
    first, again, other = (augment.photo(pixels, 24, generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == (8, 3, 24, 24)
    assert first.min() >= 0
    assert first.max() <= 1


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_rectangle_of_one_colour_covers_a_share_of_the_pictures(share):
    x = torch.full((400, 3, 20, 20), 2.0)  # a value that no cover has
    covered = augment.occlude(x, generator(), share=share, largest=0.4) != 2
    touched = covered.flatten(1).any(1)
    assert abs(touched.float().mean().item() - share) < 0.1
    for picture in covered[touched][:50, 0]:
        rows, columns = picture.any(1).nonzero()[:, 0], picture.any(0).nonzero()[:, 0]
        assert picture[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
        assert max(len(rows), len(columns)) <= 0.4 * 20 + 1
