"""A shop that does not exist: what its products are, and what sellers call them.

Products come in families of 4 to 6 siblings that differ in exactly one detail. Product i is drawn from (seed, i) alone, so a
shop of any size begins with the same products. Every 15 products make three families, in an order of sizes drawn by the seed.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from idem import folds

GROUP = 15
SIZES = (4, 5, 6)
UNSEEN_EVERY = 5  # one family in five, chosen by a hash, is never trained on
FAMILY, PICTURE, TITLE = range(3)  # streams of random numbers that share a seed

Colour = tuple[int, int, int]
COLOURS: dict[str, Colour] = {
    "white": (246, 243, 236),
    "navy": (38, 58, 112),
    "sky": (126, 184, 222),
    "teal": (32, 128, 130),
    "green": (62, 132, 74),
    "mint": (172, 220, 190),
    "yellow": (240, 196, 62),
    "orange": (232, 126, 44),
    "red": (200, 50, 52),
    "pink": (240, 164, 182),
    "plum": (116, 54, 110),
    "lilac": (190, 166, 220),
    "brown": (120, 78, 52),
    "sand": (222, 200, 162),
    "grey": (140, 146, 152),
    "black": (44, 44, 50),
}
WITH = {  # base -> its accents and parts: base and accent differ in lightness, so that a detail survives bad light
    "white": (("navy", "red"), ("teal", "sand"), ("red", "navy"), ("plum", "pink")),
    "navy": (("white", "yellow"), ("sand", "red")),
    "sky": (("navy", "white"), ("white", "brown")),
    "teal": (("white", "orange"), ("sand", "yellow")),
    "green": (("white", "brown"),),
    "mint": (("green", "brown"), ("plum", "white")),
    "yellow": (("navy", "white"), ("brown", "black")),
    "orange": (("white", "navy"),),
    "red": (("white", "black"), ("sand", "navy")),
    "pink": (("red", "white"), ("plum", "grey")),
    "plum": (("white", "lilac"),),
    "lilac": (("plum", "white"),),
    "brown": (("sand", "orange"),),
    "sand": (("brown", "teal"),),
    "grey": (("white", "orange"),),
    "black": (("white", "red"), ("yellow", "grey")),
}
PALETTES = tuple((base, accent, parts) for base, pairs in WITH.items() for accent, parts in pairs)

KINDS = {  # category -> what sellers call it
    "mug": ("mug", "cup", "coffee mug", "tea cup"),
    "bag": ("bag", "tote", "tote bag", "shopper"),
    "jar": ("jar", "storage jar", "cookie jar", "canister"),
    "vase": ("vase", "flower vase", "ceramic vase"),
    "shirt": ("t-shirt", "shirt", "tee", "top"),
    "bottle": ("bottle", "water bottle", "flask"),
    "lamp": ("lamp", "table lamp", "bedside lamp", "light"),
    "teapot": ("teapot", "tea pot", "kettle"),
    "boot": ("boot", "rain boot", "wellington"),
    "hat": ("hat", "sun hat", "bucket hat"),
    "box": ("box", "gift box", "storage box"),
    "cushion": ("cushion", "pillow", "throw pillow"),
    "umbrella": ("umbrella", "parasol", "brolly"),
}
GRIPPED = ("mug", "bag", "jar", "vase")  # kinds whose handle is a detail that siblings may differ in

DETAILS = {  # slot -> value -> how sellers put it into words
    "pattern": {
        "stripes": ("striped", "with stripes"),
        "uprights": ("pinstripe", "vertical stripes"),
        "diagonal": ("diagonal stripes", "candy stripe"),
        "checks": ("checkered", "chequered", "checks"),
        "dots": ("polka dot", "dotted", "spotted"),
        "zigzag": ("zigzag", "chevron"),
        "rings": ("rings", "target rings"),
        "dipped": ("dipped", "two-tone"),
        "halves": ("half and half", "split colour"),
        "rhombs": ("argyle", "diamond pattern"),
        "rays": ("sunburst", "rays"),
        "spot": ("big dot", "one large spot"),
    },
    "emblem": {
        "star": ("star", "with star"),
        "heart": ("heart", "with heart"),
        "moon": ("moon", "crescent moon"),
        "bolt": ("lightning", "bolt"),
        "cross": ("cross", "plus sign"),
        "triangle": ("triangle", "pyramid print"),
        "ring": ("ring", "circle print"),
        "clover": ("clover", "flower"),
        "fish": ("fish", "fish print"),
        "arrow": ("arrow", "arrow up"),
        "crown": ("crown", "royal crown"),
        "hourglass": ("hourglass", "sand clock"),
    },
    "trim": {
        "top": ("band at top", "trimmed rim"),
        "bottom": ("band at bottom", "trimmed base"),
        "middle": ("belt band", "middle band"),
        "double": ("double band", "two bands"),
        "sash": ("diagonal sash", "sash"),
        "cord": ("centre stripe", "vertical band"),
        "ribbon": ("ribbon cross", "gift ribbon"),
        "wave": ("wavy band", "wave trim"),
        "saltire": ("crossed bands", "x bands"),
    },
    "handle": {
        "round side": ("round handle", "one handle"),
        "square side": ("square handle", "angular handle"),
        "round pair": ("two handles", "two round handles"),
        "pointed pair": ("pointed ears", "two pointed handles"),
        "round top": ("arched handle", "hoop handle"),
        "square top": ("square top handle", "bracket handle"),
        "pointed top": ("pointed top handle", "triangle handle"),
        "none": ("no handle", "without handle"),
    },
    "label": {letter: (f"no. {letter}" if letter.isdigit() else f"letter {letter}", f"initial {letter}") for letter in "AHKOSTXZ47"},
}
BRANDS = ("Norrvik", "Casa Lume", "Tilda", "Okomo", "Fernway", "Brisa", "Halden", "Mirabel", "Pico", "Umbra&Co", "Zelko", "Ravn")
FINISHES = ("classic", "modern", "retro", "large", "small", "premium", "handmade", "everyday")
FILLERS = ("new", "gift idea", "free shipping", "sale", "original", "best price", "in stock", "2 pcs", "top quality", "unused")


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """What a product looks like and belongs to. `differs` is the detail in which the siblings of its family differ.

    colours: names of base, accent and parts; paints: the same as the family mixes them, in RGB.
    proportions: width, height, taper and the scale of the pattern.
    """

    index: int
    product_id: str
    family_id: str
    id_split: str
    kind: str
    colours: tuple[str, str, str]
    paints: tuple[Colour, Colour, Colour]
    proportions: tuple[float, float, float, float]
    brand: str
    finish: str
    differs: str
    pattern: str = ""
    emblem: str = ""
    trim: str = ""
    handle: str = ""
    label: str = ""


def stream(seed: int, *names: int) -> np.random.Generator:
    """Random numbers that depend on the seed and the names alone."""
    return np.random.default_rng((seed, *names))


def place(seed: int, index: int) -> tuple[int, int]:
    """(family, number among its siblings) of a product."""
    group, offset = divmod(index, GROUP)
    for family, size in enumerate(_sizes(seed, group)):
        if offset < size:
            return group * len(SIZES) + family, offset
        offset -= size
    raise AssertionError("the sizes of a group sum to GROUP")


@lru_cache(maxsize=64)
def _sizes(seed: int, group: int) -> tuple[int, ...]:
    return tuple(int(size) for size in stream(seed, FAMILY, group, GROUP).permutation(SIZES))


def unseen(seed: int, family: int) -> bool:
    """Whether a family is kept from training: exactly one in each five, so that small shops have some, too."""
    block, offset = divmod(family, UNSEEN_EVERY)
    return int(folds.uniform(f"{seed}/{block}", "unseen") * UNSEEN_EVERY) == offset


def product(seed: int, index: int) -> Product:
    """Product `index` of the shop `seed`."""
    family, sibling = place(seed, index)
    rng = stream(seed, FAMILY, family)
    kind = _one(rng, tuple(KINDS))
    differs = _one(rng, tuple(slot for slot in DETAILS if slot != "handle" or kind in GRIPPED))
    details = _common_details(rng, kind, differs)
    colours = PALETTES[rng.integers(len(PALETTES))]
    details[differs] = str(rng.permutation(list(DETAILS[differs]))[sibling])
    return Product(
        index=index,
        product_id=f"shop{seed}-p{index:07d}",
        family_id=f"shop{seed}-f{family:07d}",
        id_split="dev_unseen" if unseen(seed, family) else "train",
        kind=kind,
        colours=colours,
        paints=(_mixed(rng, colours[0]), _mixed(rng, colours[1]), _mixed(rng, colours[2])),
        proportions=(rng.uniform(0.84, 1.1), rng.uniform(0.88, 1.08), rng.uniform(-0.22, 0.22), rng.uniform(0.85, 1.25)),
        brand=_one(rng, BRANDS),
        finish=_one(rng, FINISHES),
        differs=differs,
        **details,
    )


def _one(rng: np.random.Generator, values: tuple[str, ...]) -> str:
    return values[rng.integers(len(values))]


def _mixed(rng: np.random.Generator, name: str) -> Colour:
    """A shade of the colour: its channels up to 22 of 255 away."""
    red, green, blue = np.clip(COLOURS[name] + rng.integers(-22, 23, 3), 0, 255).tolist()
    return red, green, blue


def _common_details(rng: np.random.Generator, kind: str, differs: str) -> dict[str, str]:
    """What all siblings share; it leaves the place of the detail that tells them apart empty and easy to see."""
    pattern, emblem, trim, handle = (_one(rng, tuple(DETAILS[slot])) for slot in ("pattern", "emblem", "trim", "handle"))
    usual = {"mug": "round side", "bag": "round top", "teapot": "round side"}.get(kind, "none")
    dress = rng.uniform() if differs == "handle" else 1.0
    return {
        "pattern": pattern if dress < 0.4 else "",
        "emblem": emblem if 0.4 <= dress < 0.8 else "",
        "trim": trim if 0.8 <= dress < 1.0 else "",
        "handle": handle if kind in GRIPPED and rng.uniform() < 0.3 else usual,
        "label": "",
    }


def title(item: Product, rng: np.random.Generator) -> str:
    """A title as a seller writes it: words missing, reordered, replaced by synonyms, misspelt, or shouted."""
    value = getattr(item, item.differs)
    chunks = [
        (0.5, item.brand),
        (0.25, item.finish),
        (0.7, item.colours[0]),
        (0.25, f"and {item.colours[1]}"),
        (0.55, _one(rng, DETAILS[item.differs][value])),
        (0.92, _one(rng, KINDS[item.kind])),
        (0.25, _one(rng, FILLERS)),
    ]
    kept = [words for chance, words in chunks if rng.uniform() < chance] or [item.kind]
    if rng.uniform() < 0.5:
        kept = [kept[i] for i in rng.permutation(len(kept))]
    text = " ".join(_misspelt(word, rng) for words in kept for word in words.split())
    style = rng.uniform()
    return text.upper() if style < 0.08 else text.title() if style < 0.35 else text.lower() if style < 0.6 else text[0].upper() + text[1:]


def _misspelt(word: str, rng: np.random.Generator) -> str:
    """The word, or once in twelve times with two letters swapped, one lost, or one doubled."""
    if len(word) < 4 or rng.uniform() > 1 / 12:
        return word
    at, fault = int(rng.integers(1, len(word) - 1)), rng.integers(3)
    middle = (word[at + 1] + word[at], word[at + 1], word[at] * 2 + word[at + 1])[fault]
    return word[:at] + middle + word[at + 2 :]
