"""The forms the shop is drawn from: silhouettes, patterns, trims, emblems and handles, as numbers.

Coordinates of silhouettes are shares of the picture's side, y downwards; an outline is an (n, 2) array of them, closed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

Points = list[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Shape:
    """behind, front: outlines with the number of their colour (0 base, 1 accent, 2 parts). panel: x, y, radius of emblem or label."""

    body: np.ndarray
    panel: tuple[float, float, float]
    behind: tuple[tuple[np.ndarray, int], ...] = ()
    front: tuple[tuple[np.ndarray, int], ...] = ()


def smooth(points: Points, rounds: int = 3) -> np.ndarray:
    """Chaikin's corner cutting of a closed outline; a point given twice in a row stays a corner."""
    outline = np.array(points, float)
    for _ in range(rounds):
        after = np.roll(outline, -1, axis=0)
        outline = np.stack([0.75 * outline + 0.25 * after, 0.25 * outline + 0.75 * after], axis=1).reshape(-1, 2)
    return outline


def mirrored(*half: tuple[float, float], sharp: tuple[int, ...] = ()) -> np.ndarray:
    """A symmetric outline from its right half, top to bottom; points whose numbers are in `sharp` stay corners."""
    right = [point for i, point in enumerate(half) for _ in range(2 if i in sharp else 1)]
    return smooth([*right, *((1 - x, y) for x, y in reversed(right))])


def turned(*profile: tuple[float, float]) -> np.ndarray:
    """The outline of a turned body from (y, half its width), top to bottom; sharp at rim and foot."""
    return mirrored(*((0.5 + half, y) for y, half in profile), sharp=(0, len(profile) - 1))


def corners(*points: tuple[float, float]) -> np.ndarray:
    return np.array(points, float)


def ellipse(x: float, y: float, rx: float, ry: float) -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    return np.stack([x + rx * np.cos(t), y + ry * np.sin(t)], axis=1)


SPOUT = smooth([(0.26, 0.56), (0.14, 0.48), (0.11, 0.34), (0.03, 0.3), (0.03, 0.3), (0.01, 0.36), (0.06, 0.62), (0.3, 0.78)])
CANE = smooth([(0.48, 0.3), (0.52, 0.3), (0.52, 0.84), (0.58, 0.88), (0.62, 0.8), (0.67, 0.8), (0.62, 0.97), (0.48, 0.95)])
BOOT = smooth(
    [(0.3, 0.1), (0.3, 0.1), (0.66, 0.1), (0.66, 0.1), (0.65, 0.5), (0.7, 0.62), (0.87, 0.7), (0.86, 0.86), (0.28, 0.86), (0.28, 0.86)]
)
SLEEVE = ((0.58, 0.13), (0.7, 0.14), (0.93, 0.36), (0.82, 0.5), (0.73, 0.42), (0.73, 0.9))
DOME = ((0.5, 0.02), (0.9, 0.2), (0.97, 0.58), (0.73, 0.52), (0.65, 0.6), (0.5, 0.52))

SHAPES = {  # kind -> silhouette, before the proportions of a family
    "mug": Shape(turned((0.25, 0.27), (0.5, 0.27), (0.86, 0.24)), (0.5, 0.57, 0.22), front=((ellipse(0.5, 0.25, 0.265, 0.045), 2),)),
    "bag": Shape(turned((0.32, 0.25), (0.6, 0.3), (0.92, 0.32)), (0.5, 0.63, 0.23)),
    "jar": Shape(
        turned((0.3, 0.24), (0.36, 0.31), (0.6, 0.31), (0.86, 0.29), (0.92, 0.22)),
        (0.5, 0.62, 0.23),
        front=((turned((0.2, 0.22), (0.26, 0.26), (0.33, 0.25)), 2),),
    ),
    "vase": Shape(turned((0.2, 0.17), (0.3, 0.09), (0.42, 0.19), (0.58, 0.32), (0.8, 0.29), (0.93, 0.15)), (0.5, 0.63, 0.21)),
    "shirt": Shape(mirrored(*SLEEVE, sharp=(0, 2, 3, 4, 5)), (0.5, 0.55, 0.21)),
    "bottle": Shape(
        turned((0.2, 0.1), (0.3, 0.1), (0.37, 0.23), (0.5, 0.23), (0.95, 0.22)),
        (0.5, 0.66, 0.2),
        behind=((turned((0.07, 0.11), (0.22, 0.12)), 2),),
    ),
    "lamp": Shape(
        turned((0.08, 0.2), (0.62, 0.4)), (0.5, 0.39, 0.21), behind=((turned((0.6, 0.035), (0.8, 0.04), (0.85, 0.2), (0.94, 0.22)), 2),)
    ),
    "teapot": Shape(
        turned((0.34, 0.16), (0.38, 0.28), (0.6, 0.35), (0.84, 0.26), (0.89, 0.17)),
        (0.5, 0.61, 0.21),
        behind=((SPOUT, 0), (ellipse(0.5, 0.24, 0.055, 0.05), 2), (ellipse(0.5, 0.35, 0.21, 0.09), 2)),
    ),
    "boot": Shape(BOOT, (0.47, 0.42, 0.165), front=((smooth([(0.27, 0.84), (0.87, 0.84), (0.88, 0.92), (0.27, 0.92)], 1), 2),)),
    "hat": Shape(
        turned((0.15, 0.24), (0.2, 0.33), (0.5, 0.36), (0.72, 0.39)), (0.5, 0.45, 0.21), behind=((ellipse(0.5, 0.73, 0.49, 0.13), 2),)
    ),
    "box": Shape(
        corners((0.17, 0.3), (0.83, 0.3), (0.8, 0.92), (0.2, 0.92)),
        (0.5, 0.63, 0.23),
        front=((corners((0.12, 0.2), (0.88, 0.2), (0.88, 0.34), (0.12, 0.34)), 2),),
    ),
    "cushion": Shape(mirrored((0.5, 0.17), (0.93, 0.1), (0.86, 0.5), (0.93, 0.9), (0.5, 0.83), sharp=(1, 3)), (0.5, 0.5, 0.24)),
    "umbrella": Shape(mirrored(*DOME, sharp=(2, 4)), (0.5, 0.34, 0.19), behind=((CANE, 2),)),
}

Field = np.ndarray  # one number per pixel
PATTERNS: dict[str, Callable[[Field, Field], Field]] = {  # where the accent goes; x and y are 0 at the panel, in periods
    "stripes": lambda x, y: (y + 0.2) % 1 < 0.4,
    "uprights": lambda x, y: (x + 0.18) % 1 < 0.35,
    "diagonal": lambda x, y: (0.7 * (x + y)) % 1 < 0.6,
    "checks": lambda x, y: (x % 1 < 0.5) ^ (y % 1 < 0.5),
    "dots": lambda x, y: (x % 1 - 0.5) ** 2 + (y % 1 - 0.5) ** 2 < 0.1,
    "zigzag": lambda x, y: (y + 1.2 * np.abs(0.7 * x % 1 - 0.5)) % 1 < 0.45,
    "rings": lambda x, y: np.hypot(x, y) % 1 < 0.5,
    "dipped": lambda x, y: y > -0.2,
    "halves": lambda x, y: x > 0,
    "rhombs": lambda x, y: ((0.7 * x + 0.5 * y) % 1 < 0.6) & ((0.7 * x - 0.5 * y) % 1 < 0.6),
    "rays": lambda x, y: (np.arctan2(y, x) / np.pi * 4) % 1 < 0.5,
    "spot": lambda x, y: x * x + y * y < 1.2,
}
TRIMS: dict[str, Callable[[Field, Field], Field]] = {  # x and y run from -1 to 1 over the body
    "top": lambda x, y: y < -0.5,
    "bottom": lambda x, y: y > 0.5,
    "middle": lambda x, y: np.abs(y) < 0.24,
    "double": lambda x, y: np.abs(np.abs(y) - 0.45) < 0.16,
    "sash": lambda x, y: np.abs(x + y) < 0.3,
    "cord": lambda x, y: np.abs(x) < 0.22,
    "ribbon": lambda x, y: (np.abs(x) < 0.14) | (np.abs(y) < 0.14),
    "wave": lambda x, y: np.abs(y - 0.35 * np.sin(5.5 * x)) < 0.2,
    "saltire": lambda x, y: np.minimum(np.abs(x + y), np.abs(x - y)) < 0.2,
}
GRIPS = {  # how a handle runs from one root to the other: (how far out, where between the roots)
    "round": np.stack([np.sin(np.linspace(0, np.pi, 16)), -np.cos(np.linspace(0, np.pi, 16))], axis=1),
    "square": corners((0, -1), (1, -1), (1, 1), (0, 1)),
    "pointed": corners((0, -1), (1.15, 0), (0, 1)),
}


@lru_cache(maxsize=1)
def emblems() -> dict[str, np.ndarray]:
    """Outlines within the unit circle."""
    t, spikes = np.linspace(0, 2 * np.pi, 60, endpoint=False), np.arange(10) * np.pi / 5
    reach, petals = np.where(np.arange(10) % 2, 0.42, 1.0), 0.62 + 0.38 * np.cos(4 * t)
    wide, narrow = np.linspace(0.7, 5.58, 40), np.linspace(5.1, 1.18, 40)
    arm = np.array([(0.34, -1), (0.34, -0.34), (1, -0.34)])
    return {
        "star": np.stack([reach * np.sin(spikes), -reach * np.cos(spikes)], 1),
        "heart": np.stack([np.sin(t) ** 3, -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)) / 16], 1),
        "moon": np.concatenate(
            [np.stack([np.cos(wide), np.sin(wide)], 1), np.stack([0.45 + 0.78 * np.cos(narrow), 0.78 * np.sin(narrow)], 1)]
        ),
        "bolt": corners((0.25, -1), (-0.65, 0.2), (-0.1, 0.2), (-0.35, 1), (0.65, -0.3), (0.1, -0.3), (0.55, -1)),
        "cross": np.concatenate([arm @ np.array([(np.cos(a), np.sin(a)), (-np.sin(a), np.cos(a))]) for a in np.arange(4) * np.pi / 2]),
        "triangle": corners((0, -0.95), (1, 0.8), (-1, 0.8)),
        "ring": np.concatenate([ellipse(0, 0, 1, 1), [(1, 0), (0.5, 0)], ellipse(0, 0, 0.5, 0.5)[::-1]]),
        "clover": np.stack([petals * np.sin(t), -petals * np.cos(t)], 1),
        "fish": smooth(
            [(1, 0), (0.6, -0.5), (0, -0.5), (-0.45, 0), (-1, -0.6), (-1, -0.6), (-1, 0.6), (-1, 0.6), (-0.45, 0), (0, 0.5), (0.6, 0.5)]
        ),
        "arrow": corners((0, -1), (0.85, -0.05), (0.32, -0.05), (0.32, 1), (-0.32, 1), (-0.32, -0.05), (-0.85, -0.05)),
        "crown": corners((-1, 0.75), (-1, -0.7), (-0.5, 0), (0, -0.9), (0.5, 0), (1, -0.7), (1, 0.75)),
        "hourglass": corners((-0.85, -1), (0.85, -1), (0.12, 0), (0.85, 1), (-0.85, 1), (-0.12, 0)),
    }
