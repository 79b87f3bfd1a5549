import io
import math
import statistics

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageEnhance

from pipelines.phash import COSINES, KEPT, MIN_VARIED, SCALE, SIDE, hamming, hash_luma, luma, phash


def obvious(grey: np.ndarray) -> int | None:
    """The slow twin: sums written out, whole numbers of Python, bits one by one."""
    cosines = [[round(SCALE * math.cos(math.pi * k * (2 * n + 1) / (2 * SIDE))) for n in range(SIDE)] for k in range(KEPT)]
    pixels = grey.tolist()
    coefficients = []
    for v in range(KEPT):
        for u in range(KEPT):
            coefficients.append(sum(cosines[v][y] * cosines[u][x] * pixels[y][x] for y in range(SIDE) for x in range(SIDE)))
    if sum(c != 0 for c in coefficients[1:]) < MIN_VARIED:
        return None
    middle = statistics.median(coefficients)
    bits = int("".join("1" if c > middle else "0" for c in coefficients), 2)
    return bits - 2**64 if bits >= 2**63 else bits


def scene(seed: int, side: int = 200) -> Image.Image:
    """A thing of several shapes and colours on a soft ground, as a shop would draw it."""
    rng = np.random.default_rng(seed)
    ground = rng.integers(120, 256, (3, 3, 3), dtype=np.uint8)
    image = Image.fromarray(ground).resize((side, side), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(image)
    for _ in range(6):
        left, top = rng.integers(0, side * 3 // 4, 2).tolist()
        width, height = rng.integers(side // 8, side // 2, 2).tolist()
        draw = (pen.rectangle, pen.ellipse)[int(rng.integers(2))]
        draw((left, top, left + width, top + height), fill=tuple(rng.integers(0, 256, 3).tolist()))
    return image


def compressed(image: Image.Image) -> Image.Image:
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=60)
    return Image.open(stream)


CHANGES = {
    "quality 60": compressed,
    "half the size": lambda image: image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS),
    "twice the size": lambda image: image.resize((image.width * 2, image.height * 2), Image.Resampling.BICUBIC),
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.08),
    "darker": lambda image: ImageEnhance.Brightness(image).enhance(0.92),
}
SCENES = [scene(seed) for seed in range(60)]
HASHES = np.array([phash(image) for image in SCENES])


@pytest.mark.parametrize("seed", range(20))
def test_the_fast_and_the_obvious_agree_to_the_bit(seed: int) -> None:
    rng = np.random.default_rng(seed)
    grey = luma(SCENES[seed]) if seed % 2 else rng.integers(0, 1 + 2 ** (seed % 8 + 1), (SIDE, SIDE)).clip(0, 255).astype(np.uint8)
    assert hash_luma(grey) == obvious(grey)


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_the_same_picture_stays_near(name: str) -> None:
    distances = hamming(HASHES, np.array([phash(CHANGES[name](image)) for image in SCENES]))
    print(f"{name}: mean {distances.mean():.2f}, greatest {distances.max()}, at most 6 in {np.mean(distances <= 6):.0%}")  # noqa: T201
    assert np.mean(distances <= 6) >= 0.95


def test_different_pictures_are_far_apart() -> None:
    distances = hamming(HASHES[:, None], HASHES[None, :])[np.triu_indices(len(HASHES), 1)]
    print(f"different: mean {distances.mean():.2f}, least {distances.min()}, more than 15 in {np.mean(distances > 15):.1%}")  # noqa: T201
    assert np.mean(distances > 15) >= 0.97
    assert distances.min() > 6


@pytest.mark.parametrize("colour", ["white", "black", "#123456"])
def test_blank_pictures_have_no_hash(colour: str) -> None:
    assert phash(Image.new("RGB", (50, 70), colour)) is None


def test_plain_stripes_and_ramps_have_no_hash() -> None:
    ramp = np.tile(np.arange(0, 256, 4, dtype=np.uint8), (64, 1))
    assert phash(Image.fromarray(ramp)) is None
    assert phash(Image.fromarray(ramp.T.copy())) is None


def test_a_hash_fits_int64_and_does_not_depend_on_the_mode() -> None:
    assert all(-(2**63) <= value < 2**63 for value in HASHES.tolist())
    assert (HASHES < 0).any()
    assert [phash(image.convert("L")) for image in SCENES[:5]] == HASHES[:5].tolist()


def test_the_cosines_are_whole_and_sum_to_nothing() -> None:
    assert np.array_equal(COSINES, np.rint(COSINES))
    assert not COSINES[1:].sum(axis=1).any()  # else a blank picture would seem to vary


@pytest.mark.parametrize(("a", "b", "distance"), [(0, 0, 0), (0, -1, 64), (1, 2, 2), (-(2**63), 0, 1), (-(2**63), 2**63 - 1, 64)])
def test_hamming(a: int, b: int, distance: int) -> None:
    assert hamming(a, b) == distance


def test_hamming_broadcasts_and_agrees_with_counting_bits() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.integers(-(2**63), 2**63 - 1, (2, 50))
    expected = [[((x ^ y) & (2**64 - 1)).bit_count() for y in b.tolist()] for x in a.tolist()]
    assert hamming(a[:, None], b[None, :]).tolist() == expected
