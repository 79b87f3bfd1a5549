"""Perceptual hash of a picture: 64 bits that stay nearly alike when it is scaled, compressed again or made a little brighter.

pHash, after C. Zauner, "Implementation and Benchmarking of Perceptual Image Hash Functions" (2010), with the choices of
Python's ImageHash: luma at 32 x 32, the 8 x 8 lowest coefficients of its DCT, each compared with their median, row by row (but
scaled with a Hamming window: Lanczos takes 2.5 times as long and tells pictures apart no better).
It sees shapes, not colours: a red and a blue mug are alike.
"""

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image

SIDE = 32
KEPT = 8
SCALE = 4096  # cosines as whole numbers: float64 then adds them without rounding, so every machine finds the same bits
MIN_VARIED = 16  # coefficients beside the mean that must not be zero: blank pictures and plain stripes would all be alike

_FREQUENCIES, _PLACES = np.ogrid[:KEPT, :SIDE]
COSINES = np.rint(SCALE * np.cos(np.pi * _FREQUENCIES * (2 * _PLACES + 1) / (2 * SIDE)))  # (KEPT, SIDE), whole numbers


def luma(image: Image.Image) -> np.ndarray:
    """(SIDE, SIDE) uint8: the picture's brightness at the size that is hashed."""
    grey = image if image.mode == "L" else image.convert("L")
    return np.asarray(grey.resize((SIDE, SIDE), Image.Resampling.HAMMING))


def hash_luma(grey: np.ndarray) -> int | None:
    """The hash of (SIDE, SIDE) uint8 as int64; None for a picture without enough variation to tell it from others."""
    coefficients = (COSINES @ grey.astype(np.float64) @ COSINES.T).ravel()
    if np.count_nonzero(coefficients[1:]) < MIN_VARIED:
        return None
    low, high = np.partition(coefficients, (31, 32))[31:33]
    bits = np.packbits(2 * coefficients > low + high)
    return int.from_bytes(bits.tobytes(), signed=True)


def phash(image: Image.Image) -> int | None:
    """The hash of a decoded picture (RGB or L) as int64, None as `hash_luma`."""
    return hash_luma(luma(image))


def hamming(a: ArrayLike, b: ArrayLike) -> np.ndarray:
    """In how many of their 64 bits hashes differ; broadcasts."""
    return np.bitwise_count((np.asarray(a, np.int64) ^ np.asarray(b, np.int64)).view(np.uint64))
